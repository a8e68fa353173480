"""``python -m teacher``: serves TeacherService until SIGTERM."""

from __future__ import annotations

import sys

from preceptor.launch import launch
from teacher.settings import TeacherSettings


def run(settings: TeacherSettings) -> None:
    """Puts the service together and serves it."""
    from teacher import service  # torch comes with it

    service.run(settings)


if __name__ == "__main__":
    sys.exit(launch("teacher", TeacherSettings, run))
