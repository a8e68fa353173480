"""``preceptor probe`` against real services: what a container's supervisor hears."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from preceptor.cli import main
from preceptor.leases import LeaseBoard, WorkerStatus
from preceptor.redis_server import EmbeddedRedis
from preceptor.server import Server
from preceptor.settings import ServiceSettings


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(["any"], lambda _server: None, ServiceSettings(host="127.0.0.1", port=0, grace_seconds=1))
    yield server
    server.stop()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    embedded = EmbeddedRedis(tmp_path / "redis", port)
    process = subprocess.Popen(embedded.command)
    client = redis.Redis.from_url(embedded.url)
    end = time.monotonic() + 20
    while True:
        try:
            client.ping()
            break
        except redis.ConnectionError:
            assert time.monotonic() < end
            time.sleep(0.05)
    client.close()
    yield embedded.url
    process.terminate()
    process.wait(10)


def test_a_service_is_asked_at_its_own_port_on_this_machine(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRECEPTOR_PORT", str(server.port))
    monkeypatch.setenv("PRECEPTOR_HOST", "0.0.0.0")
    # As in a container, where others reach it under its name.
    monkeypatch.setenv("PRECEPTOR_EVALUATOR_ADDRESS", "evaluator:7103")
    monkeypatch.setenv("PRECEPTOR_TOKEN", "health-needs-none")
    assert main(["probe", "evaluator"]) == 0
    assert capsys.readouterr().out.startswith(f"evaluator serves at localhost:{server.port}")
    server.stop()
    assert main(["probe", "evaluator"]) == 1
    assert f"evaluator does not answer at localhost:{server.port}" in capsys.readouterr().out


def test_without_a_port_the_one_of_its_address_is_asked(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PRECEPTOR_PORT", raising=False)
    monkeypatch.setenv("PRECEPTOR_TEACHER_ADDRESS", f"teacher:{server.port}")
    assert main(["probe", "teacher"]) == 0


def test_a_worker_is_well_while_the_one_of_this_host_beats(
    broker: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    password = tmp_path / "password"
    password.write_text(broker.split(":")[2].partition("@")[0])
    monkeypatch.setenv("PRECEPTOR_BROKER_URL", "redis://" + broker.partition("@")[2])
    monkeypatch.setenv("PRECEPTOR_BROKER_PASSWORD_FILE", str(password))
    board = LeaseBoard(broker)
    board.beat(WorkerStatus("another-host:1"))
    assert main(["probe", "worker"]) == 1
    assert "has not been heard of" in capsys.readouterr().out
    board.beat(WorkerStatus(f"{socket.gethostname()}:7", task_id="batch.1", steps_done=12))
    assert main(["probe", "worker"]) == 0
    assert "beats, at batch.1, 12 steps" in capsys.readouterr().out


def test_what_is_wrong_with_the_settings_or_redis_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRECEPTOR_BROKER_URL", "redis://:secret@127.0.0.1:1/0")
    assert main(["probe", "worker"]) == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "secret" not in said
    monkeypatch.setenv("PRECEPTOR_BROKER_PASSWORD_FILE", "/nothing")
    assert main(["probe", "worker"]) == 2
    assert "/nothing cannot be read" in capsys.readouterr().err


def test_it_is_light() -> None:
    """Asked every few seconds by every container: nothing of what takes seconds to import may come with it."""
    code = (
        "import sys; from preceptor.cli import main; main(['probe', 'worker']); main(['probe', 'evaluator']);"
        "heavy = {'torch', 'transformers', 'celery', 'sqlalchemy', 'numpy', 'rich', 'matplotlib', 's3fs',"
        "         'opentelemetry'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    environment = {"PATH": "/usr/bin:/bin", "PRECEPTOR_BROKER_URL": "redis://127.0.0.1:1/0", "PRECEPTOR_PORT": "1"}
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=repository, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
