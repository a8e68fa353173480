"""Puts the teacher together and serves it. Imported after the settings are read: torch comes with it."""

from __future__ import annotations

import logging
import threading

import grpc
from transformers.utils import logging as transformers_logging

from preceptor.artifacts import ArtifactStore, artifact_store
from preceptor.database import HAND_OVER_SECONDS, own_database
from preceptor.errors import PreceptorError
from preceptor.server import serve
from preceptor.stack import shipped_models
from preceptor.telemetry import OFF, Telemetry
from preceptor.v1 import teacher_pb2_grpc
from teacher.model import PolicyModels, TeacherBase, load_teacher
from teacher.policies import Policies
from teacher.policy_store import PolicyStore
from teacher.servicer import TeacherServicer
from teacher.settings import TeacherSettings
from teacher.sight import TeacherSight
from teacher.writing import Writer

log = logging.getLogger(__name__)

SERVICE = "preceptor.v1.TeacherService"


class Teacher:
    """The parts of a teacher service, put together; ``add_to`` makes a gRPC server answer for it."""

    def __init__(self, base: TeacherBase, settings: TeacherSettings, telemetry: Telemetry = OFF) -> None:
        device, sight = threading.Lock(), TeacherSight(telemetry)
        self.store = PolicyStore(settings.database("teacher"))
        artifacts = artifact_store(f"{settings.artifacts}/policies", settings.artifact_cache)
        _tidy(artifacts)
        self.policies = Policies(base, self.store, artifacts, device, sight)
        self.writer = Writer(
            base,
            self.policies,
            PolicyModels(base, settings.teacher_cached_policies),
            self.store,
            device,
            rows=settings.teacher_rows,
            answer_room=settings.teacher_answer_room,
            sight=sight,
        )
        self.policies.start()

    def add_to(self, server: grpc.Server) -> None:
        """Adds the servicer."""
        teacher_pb2_grpc.add_TeacherServiceServicer_to_server(TeacherServicer(self.policies, self.writer), server)

    def stop(self) -> None:
        """Ends watches, writing and training; what was being trained begins again at the next start."""
        self.policies.stop()


def _tidy(artifacts: ArtifactStore) -> None:
    """Removes leftovers, and so finds out whether there is a store. One that is away is waited for later, by whoever
    needs it; one that lets nobody in is said at once. Raises ARTIFACT_STORE_REFUSED, EXTRA_MISSING."""
    try:
        artifacts.remove_leftovers()
    except PreceptorError as error:
        if error.reason != "ARTIFACT_STORE_UNREACHABLE":
            raise
        log.warning("%s", error)


def run(settings: TeacherSettings, telemetry: Telemetry) -> None:
    """Serves until SIGTERM. Raises PreceptorError: what ``load_teacher`` raises, PORT_IN_USE."""
    source = settings.teacher_source or str(shipped_models() / "teacher")
    transformers_logging.disable_progress_bar()  # a log is no terminal
    base = load_teacher(source, revision=settings.teacher_revision, device=settings.teacher_device)
    with own_database(settings.database("teacher"), settings.grace_seconds + HAND_OVER_SECONDS):
        teacher = Teacher(base, settings, telemetry)
        try:
            serve([SERVICE], teacher.add_to, settings, on_drain=teacher.stop, telemetry=telemetry)
        finally:
            teacher.stop()
            teacher.store.close()
