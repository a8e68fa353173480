"""Redis and PostgreSQL with passwords from files and with TLS, by every way in which our processes talk to them."""

from __future__ import annotations

import os
import shutil
import socketserver
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import kombu.pools
import pytest
import redis
from sqlalchemy import make_url

from evaluator.broker import RedisBroker
from preceptor.errors import PreceptorError
from preceptor.launch import launch
from preceptor.leases import LeaseBoard, WorkerStatus
from preceptor.names import celery_task_id
from preceptor.postgres import server_version
from preceptor.queue import check_broker, fetch_result, make_app, submit
from preceptor.settings import HouseSettings, ServiceSettings
from student.deployment import DeploymentBoard
from tests.contract.test_security import (
    ROOT,
    Authority,
    authority,
    broker,
    foreign,
    free_port,
    good,
    needs_openssl,
    through_tls,
    trial_batch,
    wait_until,
)
from tests.postgres import Postgres

__all__ = ["authority", "broker", "foreign", "good"]  # fixtures

# What a URL could take for something else.
PASSWORD = "p@ss:w/ord?#%41&é +"


@pytest.fixture(autouse=True)
def without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PRECEPTOR_"):
            monkeypatch.delenv(name)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n")
    return path


# Passwords from files.


def test_a_password_from_a_file_reaches_redis_by_every_way(broker: str, secret: Path) -> None:
    password = unquote(urlsplit(broker).password or "")
    with redis.Redis.from_url(broker) as client:
        client.config_set("requirepass", PASSWORD)
    place = broker.rpartition("@")[2]
    settings = HouseSettings(broker_url=f"redis://{place}", broker_password_file=secret)
    try:
        assert PASSWORD not in repr(settings)
        url = settings.broker_url
        assert check_broker(url) < 5
        LeaseBoard(url).beat(WorkerStatus("host:1"))
        assert DeploymentBoard(url).wanted() is None
        app = make_app(url)
        submit(app, trial_batch("good"), 1)
        assert fetch_result(app, "none.1") is None
        app.close()
        queue = RedisBroker(url)
        assert queue.depths(["trials"]) == {"trials": 1}
        queue.close()
        # An ACL user keeps its name.
        named = HouseSettings(broker_url=f"redis://default@{place}", broker_password_file=secret).broker_url
        assert check_broker(named) < 5
    finally:
        with redis.Redis.from_url(settings.broker_url) as client:
            client.config_set("requirepass", password)


def _start(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch("teacher", ServiceSettings, lambda *_: pytest.fail("it ran")) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "p@ss" not in said
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("what", ["BROKER", "DATABASE"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff\xfe", "it is no text"),
    ],
)
def test_a_file_that_holds_no_password_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    what: str,
    content: bytes | None,
    said: str,
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    variables = {f"PRECEPTOR_{what}_PASSWORD_FILE": str(path), "PRECEPTOR_DATABASE_URL": "postgresql://u@h/db"}
    line = _start(variables, monkeypatch, capsys)
    assert f"PRECEPTOR_{what}_PASSWORD_FILE={path} " in line
    assert said in line


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PRECEPTOR_BROKER_URL": "redis://:p@ss@h/0"}, "PRECEPTOR_BROKER_URL has a password too; give one of the two"),
        (
            {"PRECEPTOR_BROKER_URL": "redis://h/0", "PRECEPTOR_DATABASE_URL": "postgresql://u:p@ss@h/db"},
            "PRECEPTOR_DATABASE_URL has a password too; give one of the two",
        ),
    ],
)
def test_a_password_that_is_given_twice_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    secret: Path,
    variables: dict[str, str],
    said: str,
) -> None:
    files = {"PRECEPTOR_BROKER_PASSWORD_FILE": str(secret), "PRECEPTOR_DATABASE_PASSWORD_FILE": str(secret)}
    which = "PRECEPTOR_DATABASE_PASSWORD_FILE" if "DATABASE" in said else "PRECEPTOR_BROKER_PASSWORD_FILE"
    assert said in _start({**variables, which: files[which]}, monkeypatch, capsys)


def test_a_password_without_a_database_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], secret: Path
) -> None:
    said = _start({"PRECEPTOR_DATABASE_PASSWORD_FILE": str(secret)}, monkeypatch, capsys)
    assert "PRECEPTOR_DATABASE_URL is not" in said


def test_a_database_gets_its_password_and_keeps_its_tls(secret: Path) -> None:
    url = "postgresql://preceptor@db:5432/preceptor?sslmode=verify-full&sslrootcert=/run/tls/ca.pem"
    settings = ServiceSettings(database_url=url, database_password_file=secret)
    assert PASSWORD not in repr(settings)
    parts = urlsplit(settings.database("teacher"))
    assert parts.scheme == "postgresql+psycopg"
    assert unquote(parts.password or "") == PASSWORD
    assert (parts.username, parts.hostname, parts.port) == ("preceptor", "db", 5432)
    assert "sslmode=verify-full&sslrootcert=/run/tls/ca.pem" in parts.query


def test_empty_files_of_compose_are_not_set() -> None:
    settings = ServiceSettings(broker_password_file="", database_password_file="")  # type: ignore[arg-type]
    assert (settings.broker_password_file, settings.database_password_file) == (None, None)


def test_children_of_the_embedded_stack_use_its_own_redis_whatever_the_environment_names(
    secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECEPTOR_BROKER_PASSWORD_FILE", str(secret))
    monkeypatch.setenv("PRECEPTOR_BROKER_URL", "redis://elsewhere/0")
    monkeypatch.setenv("PRECEPTOR_HOME", str(tmp_path / "home"))
    mine = HouseSettings()
    addresses = mine.model_copy(update={"broker_url": "redis://:own@127.0.0.1:7/0"})
    handed_on = {**os.environ, **addresses.environment()}
    for name in list(os.environ):
        if name.startswith("PRECEPTOR_"):
            monkeypatch.delenv(name)
    for name, value in handed_on.items():
        if name.startswith("PRECEPTOR_"):
            monkeypatch.setenv(name, value)
    assert HouseSettings().broker_url == "redis://:own@127.0.0.1:7/0"


# TLS.


@pytest.fixture
def doors() -> Iterator[Callable[..., int]]:
    """Opens TLS doors before a Redis; gives their ports."""
    opened: list[socketserver.ThreadingTCPServer] = []

    def door(certificate: Path, url: str, **options: Any) -> int:
        server, port = through_tls(certificate, urlsplit(url).port or 0, **options)
        opened.append(server)
        return port

    yield door
    kombu.pools.reset()  # kombu keeps connections by host and port
    for server in opened:
        server.shutdown()
        server.server_close()


def by_tls(url: str, port: int, host: str = "127.0.0.1") -> str:
    return f"rediss://:{quote(urlsplit(url).password or '')}@{host}:{port}/0"


@needs_openssl
def test_mutual_tls_with_the_files_of_the_house_for_everything(
    broker: str, good: Path, doors: Callable[..., int], tmp_path: Path
) -> None:
    port = doors(good, broker, clients_too=True)
    url = HouseSettings(broker_url=by_tls(broker, port), tls=good).broker_url
    assert check_broker(url) < 5
    LeaseBoard(url).beat(WorkerStatus("host:1"))
    assert DeploymentBoard(url).wanted() is None
    queue = RedisBroker(url)
    queue.submit(trial_batch("good"), 1, "trials")
    assert queue.depths(["trials"]) == {"trials": 1}
    queue.close()
    # And a real worker: its consumer has a connection of another kind.
    done, log = tmp_path / "done", tmp_path / "worker.log"
    done.touch()
    with log.open("wb") as output:
        command = [sys.executable, "-m", "tests.integration.scripted_worker", url, str(done)]
        worker = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    app = make_app(url)
    try:
        wait_until(lambda: fetch_result(app, celery_task_id("batch-of-good", 1)) or worker.poll() is not None)
        assert worker.poll() is None, log.read_text()
    finally:
        worker.kill()
        worker.wait()
        app.close()
    assert done.read_text() == "trial-of-good\n"


@needs_openssl
def test_a_client_without_a_certificate_or_with_a_foreign_one_is_told_so(
    broker: str, good: Path, foreign: Path, doors: Callable[..., int]
) -> None:
    port = doors(good, broker, clients_too=True)
    only_authority = f"{by_tls(broker, port)}?ssl_ca_certs={good / 'ca.pem'}"
    mixed = f"{only_authority}&ssl_certfile={foreign / 'cert.pem'}&ssl_keyfile={foreign / 'key.pem'}"
    for url in (only_authority, mixed):
        with pytest.raises(PreceptorError) as raised:
            check_broker(url)
        assert raised.value.reason == "TLS_FAILED", raised.value
        assert "it refuses this side's certificate" in raised.value.message


@needs_openssl
def test_whatever_tls_does_not_fit_is_said_in_words(
    broker: str, good: Path, foreign: Path, authority: Authority, doors: Callable[..., int]
) -> None:
    elsewhere = doors(authority.certificate("redis", names="DNS:redis"), broker)
    port, plain = doors(good, broker), urlsplit(broker).port or 0

    def why(url: str, tls: Path | None = good) -> str:
        with pytest.raises(PreceptorError) as raised:
            check_broker(HouseSettings(broker_url=url, tls=tls).broker_url)
        assert raised.value.reason == "TLS_FAILED"
        assert "PRECEPTOR_TLS" in raised.value.next_step
        assert (urlsplit(broker).password or "") not in raised.value.message
        return raised.value.message

    assert "its certificate does not name 127.0.0.1 (subjectAltName)" in why(by_tls(broker, elsewhere))
    assert "its certificate is refused: unable to get local issuer" in why(by_tls(broker, port), foreign)
    assert "it speaks TLS; write rediss://" in why(by_tls(broker, port).replace("rediss", "redis"))
    assert "it does not speak TLS; write redis://" in why(by_tls(broker, plain))
    # And Celery looks at the name as well.
    app = make_app(HouseSettings(broker_url=by_tls(broker, elsewhere), tls=good).broker_url)
    with pytest.raises(Exception, match="CERTIFICATE_VERIFY_FAILED"):
        submit(app, trial_batch("wrong"), 1)
    with pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch_result(app, "none.1")
    app.close()
    # A password that is wrong is one behind TLS, too; and a Redis that is away is away.
    for url, reason in (
        (f"rediss://:wrong@127.0.0.1:{port}/0", "BROKER_REFUSED"),
        (by_tls(broker, free_port()), "BROKER_UNREACHABLE"),
    ):
        with pytest.raises(PreceptorError) as raised:
            check_broker(HouseSettings(broker_url=url, tls=good).broker_url)
        assert raised.value.reason == reason


@needs_openssl
def test_a_url_that_names_files_keeps_them(good: Path) -> None:
    url = "rediss://h:1/0?ssl_ca_certs=/etc/ssl/certs/ca-certificates.crt"
    assert HouseSettings(broker_url=url, tls=good).broker_url == url
    assert HouseSettings(broker_url="rediss://h:1/0").broker_url == "rediss://h:1/0"
    assert HouseSettings(broker_url="redis://h:1/0", tls=good).broker_url == "redis://h:1/0"
    handed_on = HouseSettings(broker_url="rediss://h:1/0?db=3", tls=good).environment()["PRECEPTOR_BROKER_URL"]
    assert handed_on.startswith("rediss://h:1/0?db=3&ssl_ca_certs=")
    assert HouseSettings(broker_url=handed_on, tls=good).broker_url == handed_on


@needs_openssl
def test_a_worker_with_the_wrong_authority_ends_with_2_and_says_why(
    broker: str, good: Path, foreign: Path, doors: Callable[..., int]
) -> None:
    own = {key: value for key, value in os.environ.items() if not key.startswith("PRECEPTOR_")}
    settings = {"PRECEPTOR_BROKER_URL": by_tls(broker, doors(good, broker)), "PRECEPTOR_TLS": str(foreign)}
    done = subprocess.run(
        [sys.executable, "-m", "student.worker"],
        cwd=ROOT,
        env=own | settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "its certificate is refused: unable to get local issuer certificate" in done.stderr
    assert "(TLS_FAILED)" in done.stderr
    assert "Traceback" not in done.stderr


# PostgreSQL, which speaks TLS by itself.


@needs_openssl
def test_postgresql_over_tls_looks_at_authority_and_host_and_says_what_is_wrong(
    postgres: Postgres, authority: Authority, good: Path, foreign: Path, tmp_path: Path
) -> None:
    folder = Path(str(postgres.run("SHOW data_directory")[0][0]))
    for name in ("cert.pem", "key.pem"):
        shutil.copy(good / name, folder)
        if os.getuid() == 0:
            shutil.chown(folder / name, "postgres", "postgres")
    postgres.run("ALTER SYSTEM SET ssl_cert_file = 'cert.pem'")
    postgres.run("ALTER SYSTEM SET ssl_key_file = 'key.pem'")
    postgres.run("ALTER SYSTEM SET ssl = on")
    postgres.run("SELECT pg_reload_conf()")

    def ask(options: str, host: str = "127.0.0.1") -> tuple[str, bool]:
        url = ServiceSettings(database_url=postgres.url(options=options).replace("127.0.0.1", host)).database("public")
        return server_version(make_url(url))

    def refused(options: str) -> str:
        with pytest.raises(PreceptorError) as raised:
            ask(options)
        assert raised.value.reason == "DATABASE_REFUSED"
        return raised.value.message

    try:
        ours = f"sslmode=verify-full&sslrootcert={good / 'ca.pem'}"
        wait_until(lambda: ask("sslmode=prefer")[1], 20)
        assert ask(ours)[1]
        assert ask(ours, "localhost")[1]
        assert not ask("sslmode=disable")[1]
        assert "certificate verify failed" in refused(f"sslmode=verify-full&sslrootcert={foreign / 'ca.pem'}")
        assert "root certificate file" in refused(f"sslmode=verify-full&sslrootcert={tmp_path / 'none.pem'}")
        elsewhere = authority.certificate("postgres", names="DNS:db")
        for name in ("cert.pem", "key.pem"):
            shutil.copyfile(elsewhere / name, folder / name)
        postgres.run("SELECT pg_reload_conf()")

        def another_name() -> bool:
            try:
                ask(ours)
            except PreceptorError as error:
                return "does not match host name" in error.message and error.reason == "DATABASE_REFUSED"
            return False

        wait_until(another_name, 20)
    finally:
        postgres.run("ALTER SYSTEM RESET ALL")
        postgres.run("SELECT pg_reload_conf()")
