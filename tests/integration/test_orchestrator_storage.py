"""Runs on a disk that is full: they wait, say so, can be cancelled, and end as if nothing had been."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from preceptor.errors import PreceptorError
from preceptor.testing.scripted_evaluator import ScriptedEvaluator
from preceptor.testing.scripted_house import ScriptedHouse
from preceptor.testing.scripted_teacher import ScriptedTeacher
from preceptor.v1 import orchestrator_pb2 as pb
from tests.integration.test_orchestrator_runs import results, undisturbed, until
from tests.orchestrated import OrchestratorProcess, create_request, orchestrator_here
from tests.small_disk import small_disk

WAITING = "waiting for the disk"


@pytest.mark.parametrize("stage", ["writing", "evaluating", "updating"])
def test_a_run_without_room_waits_and_ends_with_the_same_result(tmp_path: Path, stage: str) -> None:
    request = create_request()
    expected = undisturbed(tmp_path, request)
    teacher = ScriptedTeacher(group_seconds=0.2, update_seconds=0.5)
    evaluator = ScriptedEvaluator(seconds=0.3)
    with (
        small_disk(tmp_path / "disk", 8) as disk,
        ScriptedHouse(tmp_path, teacher, evaluator) as house,
        orchestrator_here(house, disk.path) as o,
    ):
        run_id = o.create(request)
        reached = {
            "writing": lambda: bool(teacher.generations),
            "evaluating": lambda: len(evaluator.requests) >= 3,
            "updating": lambda: bool(teacher.updates),
        }
        until(reached[stage])
        disk.fill()
        until(lambda: WAITING in o.progress(run_id).phase)
        assert str(disk.path) in o.progress(run_id).phase
        assert o.run(run_id).state == pb.RUN_STATE_RUNNING
        time.sleep(2.5)  # it looks again, and still there is none
        assert WAITING in o.progress(run_id).phase
        assert not evaluator.cancelled_owners
        disk.free()
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        assert results(o.summary(run_id)) == expected


def test_a_run_that_waits_for_room_can_be_cancelled_and_it_is_written_down_when_there_is_some(tmp_path: Path) -> None:
    evaluator = ScriptedEvaluator(seconds=0.3)
    with (
        small_disk(tmp_path / "disk", 8) as disk,
        ScriptedHouse(tmp_path, evaluator=evaluator) as house,
        orchestrator_here(house, disk.path) as o,
    ):
        request = create_request()
        run_id = o.create(request)
        until(lambda: len(evaluator.requests) >= 3)
        disk.fill()
        until(lambda: WAITING in o.progress(run_id).phase)
        with pytest.raises(PreceptorError, match="is ended; that it was cancelled is written down") as raised:
            o.cancel(run_id)
        assert raised.value.reason == "DISK_FULL"
        assert evaluator.cancelled_owners == [run_id]
        asked = len(evaluator.requests)
        disk.free()
        assert o.finish(run_id).state == pb.RUN_STATE_CANCELLED
        assert len(evaluator.requests) == asked  # nothing more was done for it
        o.resume(run_id)
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED


def test_a_run_that_waits_for_room_survives_the_process_too(tmp_path: Path) -> None:
    request = create_request()
    expected = undisturbed(tmp_path, request)
    evaluator = ScriptedEvaluator(seconds=0.3)
    with small_disk(tmp_path / "disk", 8) as disk, ScriptedHouse(tmp_path, evaluator=evaluator) as house:
        process = OrchestratorProcess(house, disk.path)
        process.start()
        run_id = process.client.create(request)
        until(lambda: len(evaluator.requests) >= 3)
        disk.fill()
        until(lambda: WAITING in process.client.progress(run_id).phase)
        assert process.terminate() == 0  # it does not wait for room to end
        process.start()
        until(lambda: WAITING in process.client.progress(run_id).phase)
        process.kill()
        process.start()
        until(lambda: WAITING in process.client.progress(run_id).phase)
        disk.free()
        assert process.client.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        assert results(process.client.summary(run_id)) == expected
        assert process.terminate() == 0


def test_a_run_that_cannot_be_stored_is_refused_with_the_disk_named(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", 8) as disk,
        ScriptedHouse(tmp_path) as house,
        orchestrator_here(house, disk.path) as o,
    ):
        disk.fill()
        request = create_request()
        with pytest.raises(PreceptorError) as refused:
            o.create(request)
        assert refused.value.reason == "DISK_FULL"
        assert str(disk.path) in str(refused.value)
        disk.free()
        assert o.finish(o.create(request)).state == pb.RUN_STATE_SUCCEEDED


def test_a_second_orchestrator_on_one_home_executes_nothing_and_names_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECEPTOR_GRACE_SECONDS", "0.5")
    evaluator = ScriptedEvaluator(seconds=0.3)
    with ScriptedHouse(tmp_path, evaluator=evaluator) as house:
        first, second = OrchestratorProcess(house, tmp_path), OrchestratorProcess(house, tmp_path)
        first.start()
        run_id = first.client.create(create_request())
        with pytest.raises(AssertionError, match=r"another process has it \(pid \d+\)"):
            second.start()
        assert first.client.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        assert first.terminate() == 0
        second.start()
        assert second.client.run(run_id).state == pb.RUN_STATE_SUCCEEDED
        assert second.terminate() == 0
