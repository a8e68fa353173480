"""``python -m student``: the registry of students (gRPC). Holds no model; ``python -m student.worker`` does."""

from __future__ import annotations

import sys

from preceptor.launch import launch
from preceptor.telemetry import Telemetry
from student.settings import StudentSettings


def run(settings: StudentSettings, telemetry: Telemetry) -> None:
    """Puts the service together and serves it."""
    from preceptor.database import HAND_OVER_SECONDS, own_database
    from preceptor.server import serve
    from preceptor.v1.student_pb2_grpc import add_StudentServiceServicer_to_server
    from student.default_student import register_default
    from student.deployment import DeploymentBoard
    from student.registry import Registry
    from student.servicer import SERVICE, StudentServicer

    url = settings.database("student")
    with own_database(url, settings.grace_seconds + HAND_OVER_SECONDS):
        registry = Registry(url)
        register_default(registry, settings.default_student)
        servicer = StudentServicer(registry, DeploymentBoard(settings.broker_url), settings.watch_seconds, telemetry)
        serve(
            [SERVICE],
            lambda server: add_StudentServiceServicer_to_server(servicer, server),
            settings,
            on_drain=servicer.drain,
            telemetry=telemetry,
        )


if __name__ == "__main__":
    sys.exit(launch("student", StudentSettings, run))
