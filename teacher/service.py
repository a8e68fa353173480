"""Puts the teacher together and serves it. Imported after the settings are read; a backend brings what it needs."""

from __future__ import annotations

import logging

import grpc

from preceptor.artifacts import ArtifactStore, UsedStore, artifact_store
from preceptor.database import HAND_OVER_SECONDS, own_database
from preceptor.errors import PreceptorError
from preceptor.server import serve
from preceptor.telemetry import OFF, Telemetry
from preceptor.v1 import teacher_pb2_grpc
from teacher.backend import Backend
from teacher.garbage import TeacherGarbage
from teacher.policies import Policies
from teacher.policy_store import PolicyStore
from teacher.prompts import Formats
from teacher.servicer import TeacherServicer
from teacher.settings import TeacherSettings
from teacher.sight import TeacherSight
from teacher.writing import Writer

log = logging.getLogger(__name__)

SERVICE = "preceptor.v1.TeacherService"


class Teacher:
    """The parts of a teacher service, put together; ``add_to`` makes a gRPC server answer for it."""

    def __init__(self, backend: Backend, settings: TeacherSettings, telemetry: Telemetry = OFF) -> None:
        sight = TeacherSight(telemetry)
        self._formats = Formats(settings.teacher_templates)
        self.store = PolicyStore(settings.database("teacher"))
        artifacts = UsedStore(artifact_store(f"{settings.artifacts}/policies", settings.artifact_cache))
        _tidy(artifacts)
        self._garbage = TeacherGarbage(self.store, artifacts)
        self.policies = Policies(backend.source, backend.commit, backend.trainer, self.store, artifacts, sight)
        self.writer = Writer(
            backend.author,
            self.policies,
            self.store,
            rows=settings.teacher_rows,
            answer_room=settings.teacher_answer_room,
            sight=sight,
            formats=self._formats,
        )
        self.policies.start()

    def add_to(self, server: grpc.Server) -> None:
        """Adds the servicer."""
        servicer = TeacherServicer(self.policies, self.writer, self._garbage, self._formats)
        teacher_pb2_grpc.add_TeacherServiceServicer_to_server(servicer, server)

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
    """Serves until SIGTERM.

    Raises PreceptorError: what ``Formats`` and ``make_backend`` raise, PORT_IN_USE.
    """
    Formats(settings.teacher_templates)  # a template that is wrong is said before a model is loaded
    backend = make_backend(settings)
    try:
        with own_database(settings.database("teacher"), settings.grace_seconds + HAND_OVER_SECONDS):
            teacher = Teacher(backend, settings, telemetry)
            try:
                serve([SERVICE], teacher.add_to, settings, on_drain=teacher.stop, telemetry=telemetry)
            finally:
                teacher.stop()
                teacher.store.close()
    finally:
        backend.close()


def make_backend(settings: TeacherSettings) -> Backend:
    """What the settings name, ready. Imports torch only where it is needed.

    Raises PreceptorError: what ``teacher.model.load_teacher`` raises or, of an inference server,
    ``preceptor.inference.InferenceServer.check``.
    """
    if settings.teacher_backend == "openai":
        from teacher.fixed import fixed

        return fixed(settings)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a log is no terminal
    if settings.teacher_backend == "vllm":
        from teacher.served import served

        return served(settings)
    from teacher.in_process import in_process
    from teacher.model import load_teacher

    source, revision = settings.base_source, settings.teacher_revision
    return in_process(
        load_teacher(source, revision=revision, device=settings.teacher_device), settings.teacher_cached_policies
    )
