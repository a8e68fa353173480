"""The house's server and client, against each other over a real socket."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from preceptor.channel import call, connect, is_serving, open_channel, stream
from preceptor.errors import PreceptorError
from preceptor.server import Server
from preceptor.settings import ServiceSettings
from preceptor.v1 import student_pb2, student_pb2_grpc

SERVICE = "preceptor.v1.StudentService"


class Servicer(student_pb2_grpc.StudentServiceServicer):
    """Raises or answers by the name it is asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def GetStudent(self, request: student_pb2.GetStudentRequest, context: Any) -> student_pb2.GetStudentResponse:
        self.calls += 1
        if request.name == "missing":
            raise PreceptorError("STUDENT_NOT_FOUND", "no student named 'missing'", field="name")
        if request.name == "bug":
            raise KeyError("secret detail")
        if request.name == "slow":
            time.sleep(3)
        return student_pb2.GetStudentResponse(student=student_pb2.Student(name=request.name))

    def WatchDeployment(
        self, request: student_pb2.WatchDeploymentRequest, context: Any
    ) -> Iterator[student_pb2.WatchDeploymentResponse]:
        yield student_pb2.WatchDeploymentResponse(deployment=student_pb2.Deployment(name=request.name))
        if request.name == "missing":
            raise PreceptorError("STUDENT_NOT_FOUND", "gone")


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server([SERVICE], _add(Servicer()), ServiceSettings(grace_seconds=5))
    yield made
    made.stop()


def _add(servicer: Servicer) -> Callable[[grpc.Server], None]:
    return lambda server: student_pb2_grpc.add_StudentServiceServicer_to_server(servicer, server)


def _stub(server: Server) -> student_pb2_grpc.StudentServiceStub:
    return connect(f"127.0.0.1:{server.port}", student_pb2_grpc.StudentServiceStub)


def test_the_client_raises_the_exception_that_the_server_raised(server: Server) -> None:
    with pytest.raises(PreceptorError) as raised:
        call(_stub(server).GetStudent, student_pb2.GetStudentRequest(name="missing"))
    assert raised.value.reason == "STUDENT_NOT_FOUND"
    assert raised.value.message == "no student named 'missing'"
    assert raised.value.metadata == {"field": "name"}


def test_a_bug_in_a_servicer_is_internal_and_tells_no_detail(server: Server) -> None:
    with pytest.raises(PreceptorError) as raised:
        call(_stub(server).GetStudent, student_pb2.GetStudentRequest(name="bug"))
    assert raised.value.reason == "INTERNAL"
    assert "secret detail" not in str(raised.value)


def test_an_error_in_the_middle_of_a_stream_reaches_the_client_after_what_came_before(server: Server) -> None:
    seen = []
    with pytest.raises(PreceptorError, match="gone"):
        for response in stream(
            _stub(server).WatchDeployment, student_pb2.WatchDeploymentRequest(name="missing"), deadline=5
        ):
            seen.append(response.deployment.name)
    assert seen == ["missing"]


def test_no_call_outlives_its_deadline(server: Server) -> None:
    begin = time.monotonic()
    with pytest.raises(PreceptorError) as raised:
        call(_stub(server).GetStudent, student_pb2.GetStudentRequest(name="slow"), deadline=0.5)
    assert raised.value.reason == "DEADLINE_EXCEEDED"
    assert time.monotonic() - begin < 2


def test_a_service_that_is_not_there_is_named_unreachable_in_time() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        stub = connect(f"127.0.0.1:{unused.getsockname()[1]}", student_pb2_grpc.StudentServiceStub)
        with pytest.raises(PreceptorError) as raised:
            call(stub.GetStudent, student_pb2.GetStudentRequest(), deadline=1)
    assert raised.value.reason in ("SERVICE_UNREACHABLE", "DEADLINE_EXCEEDED")


def test_a_call_waits_for_a_service_that_comes_back_within_the_deadline() -> None:
    first = Server([SERVICE], _add(Servicer()), ServiceSettings(grace_seconds=0))
    stub, port = _stub(first), first.port
    assert call(stub.GetStudent, student_pb2.GetStudentRequest(name="a")).student.name == "a"
    first.stop()
    back: list[Server] = []

    def come_back() -> None:
        time.sleep(1)
        back.append(Server([SERVICE], _add(Servicer()), ServiceSettings(port=port)))

    thread = threading.Thread(target=come_back)
    thread.start()
    assert call(stub.GetStudent, student_pb2.GetStudentRequest(name="b"), deadline=20).student.name == "b"
    thread.join()
    back[0].stop()


def test_a_new_channel_does_not_inherit_the_back_off_of_an_old_one() -> None:
    first = Server([SERVICE], _add(Servicer()), ServiceSettings(grace_seconds=0))
    address, port = f"127.0.0.1:{first.port}", first.port
    with open_channel(address) as old:
        first.stop()
        for _ in range(30):  # until the old channel has failed often enough to wait two seconds
            with pytest.raises(grpc.RpcError):
                old.unary_unary("/none/none")(b"", timeout=0.5)
            time.sleep(0.1)
        again = Server([SERVICE], _add(Servicer()), ServiceSettings(port=port))
        assert is_serving(address)  # at once, although it does not wait
        again.stop()


def test_a_taken_port_is_an_error_that_names_it(server: Server) -> None:
    with pytest.raises(PreceptorError) as raised:
        Server([SERVICE], _add(Servicer()), ServiceSettings(port=server.port))
    assert raised.value.reason == "PORT_IN_USE"
    assert raised.value.metadata["port"] == str(server.port)


def test_health_and_reflection_are_served(server: Server) -> None:
    address = f"127.0.0.1:{server.port}"
    assert is_serving(address)
    with open_channel(address) as channel:
        answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5
        )
        names = {service.name for service in next(answers).list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


SERVE = """
import time
from preceptor.server import serve
from preceptor.settings import ServiceSettings
from preceptor.v1 import student_pb2, student_pb2_grpc
class Servicer(student_pb2_grpc.StudentServiceServicer):
    def GetStudent(self, request, context):
        time.sleep(1.5)
        return student_pb2.GetStudentResponse(student=student_pb2.Student(name=request.name))
serve(["preceptor.v1.StudentService"],
      lambda server: student_pb2_grpc.add_StudentServiceServicer_to_server(Servicer(), server), ServiceSettings())
"""


def _serve_in_a_process(parent: int = 0) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PRECEPTOR_PORT": str(port), "PRECEPTOR_PARENT_PID": str(parent)}
    process = subprocess.Popen([sys.executable, "-c", SERVE], env=environment)
    end = time.monotonic() + 20
    while not is_serving(f"127.0.0.1:{port}") and time.monotonic() < end:
        time.sleep(0.05)
    return process, f"127.0.0.1:{port}"


def test_sigterm_lets_calls_under_way_finish() -> None:
    process, address = _serve_in_a_process()
    try:
        stub = connect(address, student_pb2_grpc.StudentServiceStub)
        answer = stub.GetStudent.future(student_pb2.GetStudentRequest(name="kept"), timeout=10)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert answer.result().student.name == "kept"
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def test_a_service_ends_when_its_parent_is_gone() -> None:
    process, _ = _serve_in_a_process(parent=1 if os.getppid() != 1 else 2)  # not our pid: as if the owner had died
    try:
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()
