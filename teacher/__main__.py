"""``python -m teacher``: serves TeacherService until SIGTERM."""

from __future__ import annotations

import sys

from preceptor.launch import launch
from preceptor.telemetry import Telemetry
from teacher.settings import TeacherSettings


def run(settings: TeacherSettings, telemetry: Telemetry) -> None:
    """Puts the service together and serves it."""
    from teacher import service  # torch comes with it

    service.run(settings, telemetry)


if __name__ == "__main__":
    sys.exit(launch("teacher", TeacherSettings, run))
