"""``python -m orchestrator``: serves runs until SIGTERM."""

from __future__ import annotations

import sys

from orchestrator.settings import OrchestratorSettings
from preceptor.launch import launch
from preceptor.telemetry import Telemetry


def run(settings: OrchestratorSettings, telemetry: Telemetry) -> None:
    """Puts the service together and serves it."""
    from orchestrator.execution import Services
    from orchestrator.executor import RunExecutor
    from orchestrator.servicer import SERVICE, OrchestratorServicer
    from preceptor.channel import connect, health_of
    from preceptor.database import HAND_OVER_SECONDS, open_database, own_database
    from preceptor.server import serve
    from preceptor.v1 import evaluator_pb2_grpc, orchestrator_pb2_grpc, student_pb2_grpc, teacher_pb2_grpc

    url = settings.database("orchestrator")
    with own_database(url, settings.grace_seconds + HAND_OVER_SECONDS):
        engine = open_database(url, "orchestrator.migrations")
        services = Services(
            teacher=connect(settings.teacher_address, teacher_pb2_grpc.TeacherServiceStub),
            student=connect(settings.student_address, student_pb2_grpc.StudentServiceStub),
            evaluator=connect(settings.evaluator_address, evaluator_pb2_grpc.EvaluatorServiceStub),
            external_teacher=(
                connect(settings.external_teacher_address, teacher_pb2_grpc.TeacherServiceStub)
                if settings.external_teacher_address
                else None
            ),
            evaluator_ahead=lambda: health_of(settings.evaluator_address, deadline=5).seconds_ahead,
        )
        executor = RunExecutor(engine, services, settings, telemetry)
        servicer = OrchestratorServicer(engine, services, executor)
        executor.start()
        try:
            serve(
                [SERVICE],
                lambda server: orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(servicer, server),
                settings,
                on_drain=executor.drain,
                telemetry=telemetry,
            )
        finally:
            executor.drain()
            executor.join(HAND_OVER_SECONDS)  # while the database is still ours


if __name__ == "__main__":
    sys.exit(launch("orchestrator", OrchestratorSettings, run))
