"""What ``preceptor doctor`` finds out about a stack that an operator has set up wrongly, and what it says to do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preceptor import __version__
from preceptor.channel import Health
from preceptor.cli import main
from preceptor.cli.checks import GIB
from preceptor.redis_server import EmbeddedRedis
from preceptor.versions import CONTRACT_VERSION
from tests.contract.cli_services import Services


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PRECEPTOR_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    with Services() as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = EmbeddedRedis(tmp_path / "redis", port)
    process = subprocess.Popen(server.command, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 20
        while not listens(port):
            assert time.monotonic() < end
            time.sleep(0.05)
        yield server.url
    finally:
        process.terminate()
        process.wait(10)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def findings(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    main(["doctor", "--json"])
    out = capsys.readouterr().out
    assert "secret" not in out
    return {finding["what"]: finding for finding in json.loads(out)["findings"]}


def test_a_broker_is_checked_as_soon_as_it_is_named_and_a_wrong_password_is_told_from_a_wrong_host(
    redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECEPTOR_ORCHESTRATOR_ADDRESS", "127.0.0.1:1")  # no stack is up
    assert "redis" not in findings(capsys)
    monkeypatch.setenv("PRECEPTOR_BROKER_URL", redis_url)
    found = findings(capsys)
    assert found["redis"]["state"] == "ok"
    assert "workers" not in found  # nobody has said that there should be some
    place = redis_url.rpartition("@")[2]
    monkeypatch.setenv("PRECEPTOR_BROKER_URL", f"redis://:secret@{place}")
    refused = findings(capsys)["redis"]
    assert refused["state"] == "problem"
    assert "password" in refused["next_step"]
    monkeypatch.setenv("PRECEPTOR_BROKER_URL", "redis://:secret@127.0.0.1:1/0")
    away = findings(capsys)["redis"]
    assert away["state"] == "problem"
    assert "check that Redis runs" in away["next_step"]


@pytest.mark.parametrize(
    ("version", "contract", "state"),
    [
        (__version__, CONTRACT_VERSION, "ok"),
        ("9.9.9", CONTRACT_VERSION, "note"),
        ("9.9.9", CONTRACT_VERSION + 1, "problem"),
        ("", "", "ok"),
    ],
)
def test_another_version_is_named_with_both(
    services: Services,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    contract: object,
    state: str,
) -> None:
    answer = Health(True, version, str(contract), 0.0)
    monkeypatch.setattr("preceptor.cli.stack_checks.health_of", lambda _address, deadline: answer)
    found = findings(capsys)["orchestrator"]
    assert found["state"] == state
    assert (version or "unknown") in found["found"]
    if state != "ok":
        assert f"this is {__version__}" in found["found"]
        assert "same version" in found["next_step"]


@pytest.mark.parametrize(("ahead", "said"), [(3600.0, "3600 s ahead of"), (-90.0, "90 s behind"), (1.0, "")])
def test_a_clock_that_is_far_off_is_told(
    services: Services, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ahead: float, said: str
) -> None:
    answer = Health(True, __version__, str(CONTRACT_VERSION), ahead)
    monkeypatch.setattr("preceptor.cli.stack_checks.health_of", lambda _address, deadline: answer)
    found = findings(capsys)
    assert ("clock of the evaluator" in found) == bool(said)
    if said:
        assert said in found["clock of the evaluator"]["found"]
        assert found["clock of the evaluator"]["state"] == "note"


def test_the_services_tell_their_version_and_their_clock(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    found = findings(capsys)
    assert f"version {__version__}" in found["orchestrator"]["found"]
    assert not [what for what in found if what.startswith("clock")]


def test_a_second_stack_is_told(
    services: Services, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "another stack" not in findings(capsys)
    monkeypatch.setattr("preceptor.cli.stack_checks.is_serving", lambda _address, deadline: True)
    other = findings(capsys)["another stack"]
    assert "127.0.0.1:7104" in other["found"]
    assert services.environment["PRECEPTOR_ORCHESTRATOR_ADDRESS"] in other["found"]


@pytest.mark.parametrize(("free", "size", "state"), [(0.5, 10, "problem"), (3, 100, "note"), (6, 100, "ok")])
def test_a_disk_that_is_nearly_full_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, free: float, size: float, state: str
) -> None:
    monkeypatch.setenv("PRECEPTOR_ORCHESTRATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("preceptor.cli.checks.free_bytes", lambda _path: (int(free * GIB), int(size * GIB)))
    found = findings(capsys)["disk"]
    assert found["state"] == state
    assert f"{free:.1f} of {size:.1f} GiB free" in found["found"]
