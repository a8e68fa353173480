"""``preceptor gc`` as a user has it: a real teacher and a real evaluator behind it, an orchestrator that knows runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from preceptor.cli import main
from preceptor.server import Server
from preceptor.settings import ServiceSettings
from preceptor.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from tests.contract.cli_services import Orchestrator
from tests.contract.test_evaluator_service import serving
from tests.contract.test_teacher_service import Running
from tests.contract.test_teacher_storage import made

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT


@dataclass
class House:
    """A teacher with one policy of each run, by the run's state."""

    teacher: Running
    policies: dict[str, str]


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    first = Running(tmp_path)
    runs = ("running", "failed", "succeeded", "cancelled")
    policies = {run: made(first, request_id=run, seed=seed, owner=run).id for seed, run in enumerate(runs)}
    first.stop()
    orchestrator = Orchestrator()  # type: ignore[abstract]
    for run in runs:
        orchestrator.add(run, orchestrator_pb2.RunState.Value(f"RUN_STATE_{run.upper()}"))
    server = Server(
        ["preceptor.v1.OrchestratorService"],
        lambda one: orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(orchestrator, one),
        ServiceSettings(grace_seconds=1),
    )
    teacher = Running(tmp_path)
    with serving(tmp_path) as evaluator:
        monkeypatch.setenv("PRECEPTOR_HOME", str(tmp_path))
        monkeypatch.setenv("PRECEPTOR_TEACHER_ADDRESS", teacher.address)
        monkeypatch.setenv("PRECEPTOR_EVALUATOR_ADDRESS", evaluator.address)
        monkeypatch.setenv("PRECEPTOR_ORCHESTRATOR_ADDRESS", f"127.0.0.1:{server.port}")
        yield House(teacher, policies)
    teacher.stop()
    server.stop()


def test_what_would_go_is_told_and_then_goes_but_for_what_runs_need(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        assert main(["gc", *arguments]) == 0
        return capsys.readouterr().out

    over = {house.policies["succeeded"], house.policies["cancelled"]}
    assert "nothing to collect" in said("--dry-run"), "nothing is old"
    would: dict[str, Any] = json.loads(said("--dry-run", "--keep-days", "0", "--json"))
    assert {item["name"] for item in would["garbage"] if item["kind"] == "adapter"} == over
    assert would["bytes"] == sum(item["bytes"] for item in would["garbage"]) > 1000
    table = said("--dry-run", "--keep-days", "0")
    assert all(name in table for name in over)
    assert "would go (--dry-run)" in table
    table = said("--keep-days", "0")
    assert all(name in table for name in over)
    assert "removed" in table
    assert "nothing to collect" in said("--keep-days", "0")
    left = {stored.name for stored in house.teacher.teacher.policies._artifacts.list()}
    assert left == {house.policies["running"], house.policies["failed"]}, "one goes on, the other may be resumed"


def test_without_a_stack_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRECEPTOR_HOME", str(tmp_path))
    monkeypatch.setenv("PRECEPTOR_ORCHESTRATOR_ADDRESS", "127.0.0.1:1")
    assert main(["gc"]) == 2
    assert "STACK_NOT_UP" in capsys.readouterr().err
