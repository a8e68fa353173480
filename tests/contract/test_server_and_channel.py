"""The house's server and client, against each other over a real socket."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pydantic import SecretStr

from preceptor import __version__
from preceptor.channel import (
    RETRIED,
    Health,
    call,
    connect,
    from_rpc_error,
    health_of,
    is_serving,
    open_channel,
    stream,
)
from preceptor.errors import PreceptorError
from preceptor.security import Security
from preceptor.server import MAX_MESSAGE_BYTES, WAITING_PER_THREAD, Server
from preceptor.settings import ServiceSettings
from preceptor.v1 import student_pb2, student_pb2_grpc
from preceptor.versions import CONTRACT_VERSION

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
    # Below the ports that the system gives away: nobody else may have it when the server comes back.
    port = random.randrange(20_000, 30_000)
    first = Server([SERVICE], _add(Servicer()), ServiceSettings(port=port, grace_seconds=0))
    address = f"127.0.0.1:{port}"
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
    def WatchDeployment(self, request, context):
        yield student_pb2.WatchDeploymentResponse(deployment=student_pb2.Deployment(name=request.name))
        time.sleep(100)
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


def test_a_stopped_service_is_noticed_and_found_again_when_it_goes_on() -> None:
    process, address = _serve_in_a_process()
    try:
        stub = connect(address, student_pb2_grpc.StudentServiceStub)
        watch = stream(stub.WatchDeployment, student_pb2.WatchDeploymentRequest(name="x"), deadline=120)
        assert next(watch).deployment.name == "x"
        begin = time.monotonic()
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(PreceptorError) as raised:
            next(watch)
        assert raised.value.reason == "SERVICE_UNREACHABLE"
        assert time.monotonic() - begin < 30  # 10 s until the ping, 10 s for its answer
        begin = time.monotonic()
        with pytest.raises(PreceptorError) as raised:
            call(stub.GetStudent, student_pb2.GetStudentRequest(name="x"), deadline=2)
        assert raised.value.reason in ("SERVICE_UNREACHABLE", "DEADLINE_EXCEEDED")
        assert time.monotonic() - begin < 5
        process.send_signal(signal.SIGCONT)
        assert call(stub.GetStudent, student_pb2.GetStudentRequest(name="x"), deadline=30).student.name == "x"
    finally:
        process.kill()
        process.wait()


class Busy(student_pb2_grpc.StudentServiceServicer):
    """Holds every call until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def GetStudent(self, request: student_pb2.GetStudentRequest, context: Any) -> student_pb2.GetStudentResponse:
        assert self.go.wait(30)
        return student_pb2.GetStudentResponse(student=student_pb2.Student(name=request.name))

    def WatchDeployment(
        self, request: student_pb2.WatchDeploymentRequest, context: Any
    ) -> Iterator[student_pb2.WatchDeploymentResponse]:
        yield student_pb2.WatchDeploymentResponse(deployment=student_pb2.Deployment(name=request.name))
        assert self.go.wait(30)


@pytest.fixture
def busy() -> Iterator[tuple[Server, Busy]]:
    servicer = Busy()
    made = Server([SERVICE], _add(servicer), ServiceSettings(max_threads=2, max_streams=2, grace_seconds=5))
    yield made, servicer
    servicer.go.set()
    made.stop()


def test_health_answers_while_every_thread_is_taken(busy: tuple[Server, Busy]) -> None:
    server, _ = busy
    stub = _stub(server)
    calls = [stub.GetStudent.future(student_pb2.GetStudentRequest(name="x"), timeout=20) for _ in range(8)]
    watches = [stub.WatchDeployment(student_pb2.WatchDeploymentRequest(), timeout=20) for _ in range(2)]
    for watch in watches:
        next(watch)
    for _ in range(20):
        assert is_serving(f"127.0.0.1:{server.port}")
    for open_call in [*calls, *watches]:
        open_call.cancel()


def test_open_watches_take_no_thread_from_calls(server: Server) -> None:
    servicer = Busy()
    with_watches = Server([SERVICE], _add(servicer), ServiceSettings(max_threads=1, max_streams=40, grace_seconds=5))
    stub = _stub(with_watches)
    watches = [stub.WatchDeployment(student_pb2.WatchDeploymentRequest(), timeout=20) for _ in range(40)]
    for watch in watches:
        next(watch)
    answer = stub.GetStudent.future(student_pb2.GetStudentRequest(name="x"), timeout=20)
    servicer.go.set()
    assert answer.result().student.name == "x"
    with_watches.stop()


def test_one_watch_too_many_is_told_so_at_once(busy: tuple[Server, Busy]) -> None:
    server, servicer = busy
    stub = _stub(server)
    request = student_pb2.WatchDeploymentRequest()
    watches = [stub.WatchDeployment(request, timeout=20) for _ in range(2)]
    for watch in watches:
        next(watch)
    begin = time.monotonic()
    with pytest.raises(PreceptorError) as raised:
        list(stream(stub.WatchDeployment, request, deadline=20))
    assert raised.value.reason == "SERVICE_BUSY"
    assert "open streams" in raised.value.message
    assert time.monotonic() - begin < 2
    servicer.go.set()
    for watch in watches:
        list(watch)
    assert len(list(stream(stub.WatchDeployment, request, deadline=20))) == 1  # there is room again


def test_a_call_behind_too_many_others_is_refused_and_gets_through_later(busy: tuple[Server, Busy]) -> None:
    server, servicer = busy
    stub = _stub(server)
    request = student_pb2.GetStudentRequest(name="x")
    room = 2 * (1 + WAITING_PER_THREAD)
    sent = [stub.GetStudent.future(request, timeout=20) for _ in range(room + 4)]
    end = time.monotonic() + 10
    while sum(one.done() for one in sent) < 4 and time.monotonic() < end:
        time.sleep(0.01)
    refused = [one.exception() for one in sent if one.done()]
    assert [from_rpc_error(error).reason for error in refused if isinstance(error, grpc.RpcError)] == [
        "SERVICE_BUSY"
    ] * 4
    threading.Timer(0.5, servicer.go.set).start()
    assert call(stub.GetStudent, request, deadline=20).student.name == "x"
    assert sum(one.exception() is None for one in sent) == room


class Failing(student_pb2_grpc.StudentServiceServicer):
    """Raises each of its errors once, then answers."""

    def __init__(self, *errors: PreceptorError) -> None:
        self.errors = list(errors)

    def GetStudent(self, request: student_pb2.GetStudentRequest, context: Any) -> student_pb2.GetStudentResponse:
        if self.errors:
            raise self.errors.pop(0)
        return student_pb2.GetStudentResponse(student=student_pb2.Student(name="there"))


def _serving(servicer: Any) -> Server:
    return Server([SERVICE], _add(servicer), ServiceSettings(grace_seconds=0))


@pytest.mark.parametrize("reason", sorted(RETRIED))
def test_what_passes_by_itself_is_asked_again(reason: str) -> None:
    server = _serving(Failing(PreceptorError(reason, "later"), PreceptorError(reason, "later")))
    assert call(_stub(server).GetStudent, student_pb2.GetStudentRequest(), deadline=10).student.name == "there"
    server.stop()


@pytest.mark.parametrize("reason", ["DISK_FULL", "INTERNAL", "BROKER_UNREACHABLE", "UNAUTHENTICATED", "VERSION_SKEW"])
def test_what_does_not_pass_by_itself_is_asked_once(reason: str) -> None:
    servicer = Failing(*[PreceptorError(reason, "no")] * 2)
    server = _serving(servicer)
    with pytest.raises(PreceptorError) as raised:
        call(_stub(server).GetStudent, student_pb2.GetStudentRequest(), deadline=10)
    assert raised.value.reason == reason
    assert len(servicer.errors) == 1
    server.stop()


def test_a_refusal_that_lasts_is_raised_at_the_deadline_under_its_own_reason() -> None:
    server = _serving(Failing(*[PreceptorError("QUEUE_FULL", "no room")] * 100))
    begin = time.monotonic()
    with pytest.raises(PreceptorError) as raised:
        call(_stub(server).GetStudent, student_pb2.GetStudentRequest(), deadline=1)
    assert raised.value.reason == "QUEUE_FULL"
    assert time.monotonic() - begin < 1.5
    server.stop()


@pytest.mark.parametrize(
    ("message", "arrives"),
    [
        ("a lone surrogate \ud800", "a lone surrogate ?"),
        ("€" * 100_000, "€" * 461 + " ..."),
        ("nul \0, line\nbreak, 100 % \x7f", "nul \0, line\nbreak, 100 % \x7f"),
    ],
)
def test_every_message_of_an_error_arrives(message: str, arrives: str) -> None:
    server = _serving(Failing(PreceptorError("BAD_CONFIG", message, field="\udcff" * 100_000)))
    with pytest.raises(PreceptorError) as raised:
        call(_stub(server).GetStudent, student_pb2.GetStudentRequest())
    assert raised.value.reason == "BAD_CONFIG"
    assert raised.value.message == arrives
    assert raised.value.metadata["field"].startswith("???")
    server.stop()


def test_too_large_a_message_says_how_large_it_may_be(server: Server) -> None:
    with pytest.raises(PreceptorError) as raised:
        call(_stub(server).GetStudent, student_pb2.GetStudentRequest(name="x" * (MAX_MESSAGE_BYTES + 1)))
    assert raised.value.reason == "INVALID_REQUEST"
    assert "64 MiB" in raised.value.message


def test_a_client_without_a_limit_of_its_own_is_stopped_by_the_server(server: Server) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.max_send_message_length", -1)]) as channel:
        with pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary(f"/{SERVICE}/GetStudent")(b"x" * (MAX_MESSAGE_BYTES + 1), timeout=30)
        assert from_rpc_error(raised.value).reason == "INVALID_REQUEST"
    assert is_serving(f"127.0.0.1:{server.port}")


@pytest.mark.parametrize("method", ["GetStudent", "WatchDeployment"])
@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\x0a\x02\xc3\x28", b"\x0a\xff\xff\xff\xff\x0f"])
def test_bytes_that_are_no_message_are_an_invalid_request(
    server: Server, method: str, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with open_channel(f"127.0.0.1:{server.port}") as channel, pytest.raises(grpc.RpcError) as raised:
        list(channel.unary_stream(f"/{SERVICE}/{method}")(garbage, timeout=5))
    assert from_rpc_error(raised.value).reason == "INVALID_REQUEST"
    assert "Traceback" not in caplog.text


def test_a_method_that_the_service_does_not_know_is_a_version_skew(server: Server) -> None:
    with open_channel(f"127.0.0.1:{server.port}") as channel, pytest.raises(PreceptorError) as raised:
        call(channel.unary_unary(f"/{SERVICE}/Newer"), b"")
    assert raised.value.reason == "VERSION_SKEW"


def _foreign(code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, bytes], ...]) -> PreceptorError:
    """What our client makes of an answer that is not our server's."""

    def answer(_request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata(trailing)
        context.abort(code, details)
        return b""

    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("x", {"y": grpc.unary_unary_rpc_method_handler(answer)}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with open_channel(f"127.0.0.1:{port}") as channel, pytest.raises(PreceptorError) as raised:
            call(channel.unary_unary("/x/y"), b"", deadline=0.3)
        return raised.value
    finally:
        server.stop(0)


@pytest.mark.parametrize("garbage", [b"", b"\xff", b"\x08\x05", b"\x1a\x04\x0a\x02\xc3\x28"])
def test_status_details_that_nobody_can_read_leave_the_code(garbage: bytes) -> None:
    error = _foreign(grpc.StatusCode.PERMISSION_DENIED, "not you", (("grpc-status-details-bin", garbage),))
    assert error.reason == "INTERNAL"
    assert error.message == "PERMISSION_DENIED: not you"


def test_a_reason_of_a_later_version_is_named() -> None:
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason="NOT_YET_KNOWN", domain="preceptor"))
    status = status_pb2.Status(code=9, message="what it is", details=[detail]).SerializeToString()
    error = _foreign(grpc.StatusCode.FAILED_PRECONDITION, "what it is", (("grpc-status-details-bin", status),))
    assert error.reason == "VERSION_SKEW"
    assert "NOT_YET_KNOWN" in error.message
    assert "what it is" in error.message


def _ask(server: Server, *metadata: tuple[str, str]) -> PreceptorError | None:
    """Calls as a client of another make does, with these metadata alone."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = student_pb2_grpc.StudentServiceStub(channel)
        try:
            stub.GetStudent(student_pb2.GetStudentRequest(name="x"), timeout=5, metadata=metadata)
        except grpc.RpcError as error:
            return from_rpc_error(error)
    return None


@pytest.mark.parametrize(("contract", "older"), [(CONTRACT_VERSION + 1, "this service"), (0, "the client")])
def test_another_contract_is_refused_with_both_versions_and_the_side_to_update(
    server: Server, contract: int, older: str
) -> None:
    error = _ask(server, ("preceptor-contract", str(contract)), ("preceptor-version", "7.8.9"))
    assert error
    assert error.reason == "VERSION_SKEW"
    assert f"7.8.9 (contract {contract})" in error.message
    assert f"{__version__} (contract {CONTRACT_VERSION})" in error.message
    assert error.message.endswith(f"update {older}")


def test_a_client_that_tells_no_version_is_served(server: Server) -> None:
    assert _ask(server) is None
    assert _ask(server, ("preceptor-contract", str(CONTRACT_VERSION))) is None


@pytest.mark.parametrize("contract", ["", "one", "9" * 5000, "1.0"])
def test_a_version_that_is_no_number_is_an_invalid_request(server: Server, contract: str) -> None:
    error = _ask(server, ("preceptor-contract", contract))
    assert error
    assert (error.reason, error.metadata) == ("INVALID_REQUEST", {"field": "preceptor-contract"})


def test_somebody_else_who_serves_on_a_port_is_not_taken_for_the_process_that_was_to(server: Server) -> None:
    """A measurement once went through a stranger's teacher, which had taken the port between its choice and its use."""
    address = f"127.0.0.1:{server.port}"
    assert is_serving(address)
    assert is_serving(address, pid=os.getpid())
    assert not is_serving(address, pid=os.getpid() + 1)


def test_health_tells_the_version_even_to_a_client_of_another(server: Server) -> None:
    told = health_of(f"127.0.0.1:{server.port}")
    assert told == Health(True, __version__, str(CONTRACT_VERSION), told.seconds_ahead, os.getpid())
    assert abs(told.seconds_ahead) < 1  # one machine, one clock
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        method = health_pb2_grpc.HealthStub(channel).Check
        method(health_pb2.HealthCheckRequest(), timeout=5, metadata=(("preceptor-contract", "99"),))


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload


def _header(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


@pytest.mark.parametrize("value", [b"\xff\xfe\xc3\x28", b"\0\0\0", b"\r\n x: y", b"Bearer \xed\xa0\x80"])
@pytest.mark.parametrize("name", [b"authorization", b"preceptor-contract", b"preceptor-version", b"x-bin"])
def test_headers_that_are_no_text_harm_nobody(server: Server, name: bytes, value: bytes) -> None:
    headers = b"".join(
        _header(*pair)
        for pair in (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", f"/{SERVICE}/GetStudent".encode()),
            (b":authority", b"x"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (name, value),
        )
    )
    request = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"") + _frame(1, 4, 1, headers)
    guarded = Server([SERVICE], _add(Servicer()), ServiceSettings(token=SecretStr("secret"), grace_seconds=0))
    for asked, token in ((server, ""), (guarded, "secret")):
        with socket.create_connection(("127.0.0.1", asked.port), timeout=5) as connection:
            connection.sendall(request + _frame(0, 1, 1, b"\0\0\0\0\0"))
            connection.settimeout(0.3)
            answer = b""
            with suppress(TimeoutError, ConnectionError):
                while part := connection.recv(65536):
                    answer += part
        assert answer
        assert b"Traceback" not in answer
        with open_channel(f"127.0.0.1:{asked.port}", Security(token)) as channel:
            stub = student_pb2_grpc.StudentServiceStub(channel)
            assert call(stub.GetStudent, student_pb2.GetStudentRequest(name="x"), deadline=5).student.name == "x"
    guarded.stop()
