"""StudentService: translates. Proto in, one call, proto out; no torch, no SQL, no Celery."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from preceptor.errors import PreceptorError
from preceptor.limits import MAX_NAME_CHARACTERS, MAX_SOURCE_CHARACTERS, check_name, page_size
from preceptor.metrics import STUDENT_SWAPS
from preceptor.telemetry import OFF, Telemetry
from preceptor.v1 import student_pb2 as api
from preceptor.v1 import student_pb2_grpc
from preceptor.v1 import types_pb2 as types
from student.deployment import DeploymentBoard, DeploymentStatus
from student.registry import RegisteredStudent, Registry, Version
from student.source import inspect

log = logging.getLogger(__name__)

SERVICE = api.DESCRIPTOR.services_by_name["StudentService"].full_name
# The registry's table has room for so many characters.
MAX_REQUEST_ID = 128
_NAME = re.compile(r"[a-z0-9_.-]{1,64}")


class StudentServicer(student_pb2_grpc.StudentServiceServicer):
    """The registry and the deployments behind the contract."""

    def __init__(
        self, registry: Registry, board: DeploymentBoard, watch_seconds: float, telemetry: Telemetry = OFF
    ) -> None:
        self._registry = registry
        self._board = board
        self._watch_seconds = watch_seconds
        self._metrics = telemetry.metrics
        self._draining = threading.Event()
        if (active := registry.active_name()) is not None:
            self._publish(registry.get(active))

    def drain(self) -> None:
        """Ends open watches."""
        self._draining.set()

    def RegisterStudent(
        self, request: api.RegisterStudentRequest, context: grpc.ServicerContext
    ) -> api.RegisterStudentResponse:
        if not _NAME.fullmatch(request.name):
            message = (
                f"{request.name[:80]!r} is no name: lower-case letters, digits, '-', '_', '.'; at most 64 characters"
            )
            raise PreceptorError("INVALID_REQUEST", message, field="name")
        for field, most in (("source", MAX_SOURCE_CHARACTERS), ("revision", MAX_NAME_CHARACTERS)):
            value = getattr(request, field)
            if len(value) > most or not value.isprintable():
                message = f"{field} must have at most {most} printable characters"
                raise PreceptorError("INVALID_REQUEST", message, field=field)

        def act(session: Any) -> bytes:
            facts = inspect(request.source, request.revision)
            student = self._registry.register(session, request.name, facts)
            return api.RegisterStudentResponse(student=_student(student)).SerializeToString()

        return api.RegisterStudentResponse.FromString(self._once(request, act))

    def GetStudent(self, request: api.GetStudentRequest, context: grpc.ServicerContext) -> api.GetStudentResponse:
        return api.GetStudentResponse(student=_student(self._registry.get(request.name)))

    def ListStudents(self, request: api.ListStudentsRequest, context: grpc.ServicerContext) -> api.ListStudentsResponse:
        size = page_size(request.page_size)
        found = self._registry.students(request.page_token, size + 1)
        return api.ListStudentsResponse(
            students=[_student(one) for one in found[:size]],
            next_page_token=found[size - 1].name if len(found) > size else "",
        )

    def ActivateStudent(
        self, request: api.ActivateStudentRequest, context: grpc.ServicerContext
    ) -> api.ActivateStudentResponse:
        before, swapped = self._registry.active_name(), list[str]()

        def act(session: Any) -> bytes:
            self._registry.activate(session, request.name)
            if before not in (None, request.name):
                swapped.append(request.name)
            return b""  # the answer is where the deployment stands now

        self._once(request, act)
        if swapped:  # and not only asked again
            self._metrics.count(STUDENT_SWAPS)
        student = self._registry.get(request.name)
        active = self._registry.get()
        self._publish(active, forget_failure=True)
        try:
            status = self._board.status(student.current.commit, student.name)
        except PreceptorError as error:  # it is active; whether workers have it can be asked for later
            log.warning("activated %s, but: %s", student.name, error)
            status = DeploymentStatus("LOADING", 0, 0)
        return api.ActivateStudentResponse(deployment=_deployment(student.name, status))

    def WatchDeployment(
        self, request: api.WatchDeploymentRequest, context: grpc.ServicerContext
    ) -> Iterator[api.WatchDeploymentResponse]:
        name = self._registry.get(request.name).name
        last: api.Deployment | None = None
        while context.is_active():
            if self._draining.is_set():
                raise PreceptorError("SHUTTING_DOWN", "the student service is shutting down")
            student = self._registry.get(name)
            status = self._board.status(student.current.commit, student.name)
            if student.active:
                self._publish(student)  # Redis may have been emptied meanwhile
            elif status.state != "READY":
                active = self._registry.active_name() or "none"
                message = f"{name} is not being deployed: the active student is {active}"
                raise PreceptorError("INVALID_REQUEST", message, field="name")
            deployment = _deployment(name, status)
            if deployment != last:
                yield api.WatchDeploymentResponse(deployment=deployment)
                last = deployment
            if status.state != "LOADING":
                return
            self._draining.wait(self._watch_seconds)

    def DeleteStudent(
        self, request: api.DeleteStudentRequest, context: grpc.ServicerContext
    ) -> api.DeleteStudentResponse:
        def act(session: Any) -> bytes:
            self._registry.delete(session, request.name)
            return b""

        self._once(request, act)
        return api.DeleteStudentResponse()

    def ListVersions(self, request: api.ListVersionsRequest, context: grpc.ServicerContext) -> api.ListVersionsResponse:
        name = request.name or self._registry.get().name
        return api.ListVersionsResponse(versions=[_lineage(name, one) for one in self._registry.versions(name)])

    def PromoteSelfEdit(
        self, request: api.PromoteSelfEditRequest, context: grpc.ServicerContext
    ) -> api.PromoteSelfEditResponse:
        raise PreceptorError("NOT_SERVED", "promotion is not served yet")

    def RollbackStudent(
        self, request: api.RollbackStudentRequest, context: grpc.ServicerContext
    ) -> api.RollbackStudentResponse:
        raise PreceptorError("NOT_SERVED", "rollback is not served yet")

    def _once(self, request: Any, act: Callable[[Any], bytes]) -> bytes:
        check_name("request_id", request.request_id, MAX_REQUEST_ID)
        return self._registry.once(request.request_id, _body(request), act)

    def _publish(self, student: RegisteredStudent, *, forget_failure: bool = False) -> None:
        try:
            if forget_failure:
                self._board.clear_failure(student.current.commit)
            self._board.publish(_pinned(student.name, student.current))
        except PreceptorError as error:  # jobs carry their student; without this a worker only loads it later
            log.warning("%s is active, but workers do not know it yet: %s", student.name, error)


def _body(request: Any) -> bytes:
    """What the request asks for, without its id; the method is part of it."""
    bare = type(request)()
    bare.CopyFrom(request)
    bare.request_id = ""
    return f"{request.DESCRIPTOR.full_name}\n".encode() + bytes(bare.SerializeToString(deterministic=True))


def _pinned(name: str, version: Version) -> types.PinnedStudent:
    return types.PinnedStudent(name=name, source=version.source, commit=version.commit)


def _student(student: RegisteredStudent) -> api.Student:
    message = api.Student(
        name=student.name,
        pinned=_pinned(student.name, student.current),
        active=student.active,
        architecture=student.architecture,
        parameters=student.parameters,
        context_tokens=student.context_tokens,
    )
    message.create_time.FromDatetime(student.create_time)
    return message


def _lineage(name: str, version: Version) -> api.StudentVersion:
    message = api.StudentVersion(
        version=version.version, pinned=_pinned(name, version), evaluation_id=version.evaluation_id
    )
    message.create_time.FromDatetime(version.create_time)
    return message


def _deployment(name: str, status: DeploymentStatus) -> api.Deployment:
    message = api.Deployment(
        name=name,
        state=api.DeploymentState.Value(f"DEPLOYMENT_STATE_{status.state}"),
        workers_ready=status.workers_ready,
        workers_alive=status.workers_alive,
    )
    if status.failure is not None:
        message.failure.reason = status.failure.reason
        message.failure.message = status.failure.message
    return message
