"""Whole runs against scripted services behind real gRPC servers: results, failures, cancel, resume, swaps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preceptor.testing.scripted_evaluator import ScriptedEvaluator
from preceptor.testing.scripted_house import ScriptedHouse
from preceptor.testing.scripted_teacher import ScriptedTeacher
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import teacher_pb2
from preceptor.v1 import types_pb2 as types
from tests.orchestrated import (
    Orchestrator,
    OrchestratorProcess,
    create_request,
    orchestrator_here,
    run_config,
)


def results(summary: dict[str, Any]) -> dict[str, Any]:
    """What two runs of one config must share: everything but time, memory and the run's id."""
    kept = {key: summary[key] for key in ("seed", "config_sha256", "rounds", "heldout", "policies", "student")}
    kept["rounds"] = [{key: of[key] for key in of if key != "seconds"} for of in summary["rounds"]]
    return kept


def without_cached(value: Any) -> Any:
    """The same without the counts of what was known before."""
    if isinstance(value, dict):
        return {key: without_cached(item) for key, item in value.items() if key != "cached"}
    return [without_cached(item) for item in value] if isinstance(value, list) else value


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def undisturbed(tmp_path: Path, request: pb.CreateRunRequest, **evaluator: Any) -> dict[str, Any]:
    """The summary of a run that nothing happens to."""
    home = tmp_path / "undisturbed"
    with ScriptedHouse(home, evaluator=ScriptedEvaluator(**evaluator)) as house, orchestrator_here(house, home) as o:
        run_id = o.create(request)
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        return results(o.summary(run_id))


def test_a_run_reaches_its_end_and_the_teacher_learnt_from_every_round(tmp_path: Path) -> None:
    with ScriptedHouse(tmp_path) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(create_request())
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        summary = o.summary(run_id)
        active = house.teacher.GetPolicy(teacher_pb2.GetPolicyRequest(), None).policy  # type: ignore[arg-type]
    assert len(house.teacher.updates) == 2
    assert house.teacher.updates[1].parent_id != house.teacher.updates[0].parent_id
    assert summary["policies"][-1] == active.id
    assert all(arm is not None for arm in summary["heldout"]["arms"].values())
    for of, update in zip(summary["rounds"], house.teacher.updates, strict=True):
        assert of["evaluations"]["succeeded"] == len(update.examples)
        assert of["evaluations"]["malformed"] > 0
        assert sum(of["evaluations"][k] for k in ("succeeded", "failed", "malformed")) == of["self_edits"] == 12


def test_the_same_config_again_gives_the_same_result_from_known_evaluations(tmp_path: Path) -> None:
    with ScriptedHouse(tmp_path) as house, orchestrator_here(house, tmp_path) as o:
        summaries = []
        for _ in range(2):
            run_id = o.create(create_request())
            o.finish(run_id)
            summaries.append(o.summary(run_id))
    first, second = summaries
    assert without_cached(results(first)) == without_cached(results(second))
    assert [of["evaluations"]["cached"] for of in first["rounds"]] == [0, 0]
    for of in second["rounds"]:
        assert of["evaluations"]["cached"] == of["evaluations"]["succeeded"]
    assert second["throughput"]["trials"] == 0


def test_failed_evaluations_are_counted_and_left_out_and_never_score(tmp_path: Path) -> None:
    def unlucky(task: types.Task, edit: types.SelfEdit) -> bool:
        return task.passage.title == "river 1" or (edit.directive.epochs == 8 and edit.documents[0].startswith("good"))

    evaluator = ScriptedEvaluator(fails=unlucky)
    with ScriptedHouse(tmp_path, evaluator=evaluator) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(create_request())
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        summary, lines = o.summary(run_id), o.self_edits(run_id)
    failed = [line for line in lines if line.failure.reason]
    assert failed
    assert not any(line.HasField("reward") for line in failed)
    assert sum(of["evaluations"]["failed"] for of in summary["rounds"]) == len(failed)
    assert len(house.teacher.updates[0].examples) == summary["rounds"][0]["evaluations"]["succeeded"]
    oracle = summary["heldout"]["arms"]["oracle"]
    assert oracle["failed"] >= 1
    assert oracle["passages"] == 4 - oracle["failed"]
    assert oracle["accuracy"] > 0.7  # what is left was not dragged down by zeros
    assert any("failed" in note for note in summary["notes"])


def test_a_round_with_too_many_failures_ends_the_run_and_a_resume_tries_them_again(tmp_path: Path) -> None:
    request = create_request()
    expected = undisturbed(tmp_path, request)
    evaluator = ScriptedEvaluator(fails=lambda _task, _edit: True)
    with ScriptedHouse(tmp_path, evaluator=evaluator) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(request)
        run = o.finish(run_id)
        assert run.state == pb.RUN_STATE_FAILED
        assert run.failure.reason == "TOO_MANY_FAILURES"
        assert "TRIAL_LOST" in run.failure.message
        assert not house.teacher.updates
        evaluator.fails = lambda _task, _edit: False
        assert o.resume(run_id).state in (pb.RUN_STATE_PENDING, pb.RUN_STATE_RUNNING)
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        assert results(o.summary(run_id)) == expected


def test_a_round_in_which_everything_is_malformed_teaches_nothing_and_the_run_goes_on(tmp_path: Path) -> None:
    teacher = ScriptedTeacher(malformed_share=1.0)
    with ScriptedHouse(tmp_path, teacher=teacher) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(create_request())
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        summary = o.summary(run_id)
    assert not house.teacher.updates
    assert summary["rounds"][0]["reward"] == {"mean": None, "stderr": None, "count": 0}
    arms = summary["heldout"]["arms"]
    # Nothing was learnt from a malformed self-edit: the student is as it was, and that is counted.
    assert arms["trained_teacher"]["accuracy"] == arms["no_edit"]["accuracy"]
    assert arms["trained_teacher"]["malformed"] == 4


def test_a_measurement_without_rounds_compares_the_untrained_teacher_with_itself(tmp_path: Path) -> None:
    with ScriptedHouse(tmp_path) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(create_request(run_config(rounds={"count": 0})))
        o.finish(run_id)
        summary = o.summary(run_id)
    assert summary["heldout"]["differences"]["trained_minus_untrained"]["ci95"] == [0, 0]
    assert any("Nothing was gained over the untrained teacher" in note for note in summary["notes"])


def test_a_run_without_heldout_tasks_and_references_says_so(tmp_path: Path) -> None:
    with ScriptedHouse(tmp_path) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(create_request(heldout=0))
        o.finish(run_id)
        summary = o.summary(run_id)
    assert summary["heldout"] is None
    assert any("no held-out tasks" in note for note in summary["notes"])


@pytest.mark.parametrize("stage", ["writing", "evaluating", "updating"])
def test_cancel_works_within_seconds_at_any_stage_and_a_resume_ends_with_the_same_result(
    tmp_path: Path, stage: str
) -> None:
    request = create_request()
    expected = undisturbed(tmp_path, request)
    teacher = ScriptedTeacher(
        group_seconds=30 if stage == "writing" else 0, update_seconds=30 if stage == "updating" else 0
    )
    evaluator = ScriptedEvaluator(seconds=30 if stage == "evaluating" else 0)
    with ScriptedHouse(tmp_path, teacher, evaluator) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(request)
        reached = {
            "writing": lambda: bool(teacher.generations),
            "evaluating": lambda: len(evaluator.requests) >= 2,
            "updating": lambda: bool(teacher.updates),
        }
        until(reached[stage])
        start = time.monotonic()
        assert o.cancel(run_id).state == pb.RUN_STATE_CANCELLED
        assert o.finish(run_id).state == pb.RUN_STATE_CANCELLED
        until(lambda: run_id in evaluator.cancelled_owners, 5)
        assert time.monotonic() - start < 5
        teacher.group_seconds = teacher.update_seconds = evaluator.seconds = 0
        teacher.finish_updates()
        o.resume(run_id)
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        assert results(o.summary(run_id)) == expected


@pytest.mark.parametrize("name", ["teacher", "evaluator"])
def test_a_service_that_dies_and_comes_back_changes_nothing(tmp_path: Path, name: str) -> None:
    request = create_request()
    expected = undisturbed(tmp_path, request)
    teacher, evaluator = ScriptedTeacher(group_seconds=0.1, update_seconds=0.2), ScriptedEvaluator(seconds=0.3)
    with ScriptedHouse(tmp_path, teacher, evaluator) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(request)
        for _ in range(4):
            time.sleep(0.5)
            house.stop(name)
            time.sleep(0.4)
            house.start(name)
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        assert results(o.summary(run_id)) == expected


def test_a_service_that_stays_away_fails_the_run_which_can_be_resumed(tmp_path: Path) -> None:
    request = create_request()
    expected = undisturbed(tmp_path, request)
    evaluator = ScriptedEvaluator(seconds=0.5)
    with (
        ScriptedHouse(tmp_path, evaluator=evaluator) as house,
        orchestrator_here(house, tmp_path, patience_seconds=1.5) as o,
    ):
        run_id = o.create(request)
        until(lambda: len(evaluator.requests) >= 2)
        house.stop("evaluator")
        run = o.finish(run_id)
        assert run.state == pb.RUN_STATE_FAILED
        assert run.failure.reason == "SERVICE_UNREACHABLE"
        assert "evaluator" in run.failure.message
        house.start("evaluator")
        o.resume(run_id)
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        assert results(o.summary(run_id)) == expected


def test_sigkill_of_the_orchestrator_at_any_moment_changes_nothing(tmp_path: Path) -> None:
    request = create_request()
    expected = undisturbed(tmp_path, request)
    teacher, evaluator = ScriptedTeacher(group_seconds=0.15, update_seconds=0.4), ScriptedEvaluator(seconds=0.5)
    with ScriptedHouse(tmp_path, teacher, evaluator) as house:
        process = OrchestratorProcess(house, tmp_path)
        process.start()
        run_id = process.client.create(request)
        points: list[Callable[[], bool]] = [
            lambda: bool(teacher.generations),  # writing
            lambda: len(evaluator.requests) >= 2,  # evaluating
            lambda: len(teacher.updates) >= 1,  # updating
            lambda: len(teacher.updates) >= 2,  # the last round's end
            lambda: any(r.protocol.bank == types.QUESTION_BANK_SEALED for r in evaluator.requests),  # held-out
        ]
        for reached in points:
            until(reached)
            process.kill()
            process.start()
        assert process.client.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        summary = process.client.summary(run_id)
        assert process.terminate() == 0
    assert results(summary) == expected
    assert summary["wall_seconds"] > 1


def test_a_drained_orchestrator_leaves_its_runs_to_the_next_one(tmp_path: Path) -> None:
    request = create_request()
    expected = undisturbed(tmp_path, request)
    evaluator = ScriptedEvaluator(seconds=0.5)
    with ScriptedHouse(tmp_path, evaluator=evaluator) as house:
        with orchestrator_here(house, tmp_path) as o:
            run_id = o.create(request)
            until(lambda: len(evaluator.requests) >= 2)
        assert not evaluator.cancelled_owners
        with orchestrator_here(house, tmp_path) as o:
            assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
            assert results(o.summary(run_id)) == expected


def test_every_round_of_every_run_starts_from_the_untouched_teacher(tmp_path: Path) -> None:
    with ScriptedHouse(tmp_path) as house, orchestrator_here(house, tmp_path) as o:
        for _ in range(2):  # the first run leaves its own policy active
            o.finish(o.create(create_request()))
        starts = [request.policy_id for request in house.teacher.generations if request.samples_per_task == 4]
    assert starts[0] == starts[2] == "base-scripted"
    assert starts[1] == starts[3] != "base-scripted"


def test_the_fixed_strategy_is_the_best_candidate_and_its_directive_holds(tmp_path: Path) -> None:
    teacher = ScriptedTeacher(malformed_share=0)
    with ScriptedHouse(tmp_path, teacher) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(create_request(run_config(heldout={"selection_tasks": 5})))
        o.finish(run_id)
        heldout = o.summary(run_id)["heldout"]
        requests = house.evaluator.requests
    chosen = heldout["selection_rewards"].index(max(heldout["selection_rewards"]))
    assert heldout["fixed_strategy"]["prompt_format"] == ("copy", "self_qa")[chosen]
    fixed = [request for request in requests if ".fixed." in request.request_id]
    edits = [edit for request in fixed for group in (request, *request.more) for edit in group.self_edits]
    assert [edit.directive.epochs for edit in edits] == [heldout["fixed_strategy"]["epochs"]] * 4
    # The measurement shares student, training, seeds and probes; only the study material differs.
    sealed = [request for request in requests if request.protocol.bank == types.QUESTION_BANK_SEALED]
    assert len({request.protocol.SerializeToString(deterministic=True) for request in sealed}) == 1


def test_ledger_lines_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    def ledger(home: Path) -> list[pb.LedgerSelfEdit]:
        with ScriptedHouse(home) as house, orchestrator_here(house, home) as o:
            run_id = o.create(create_request())
            o.finish(run_id)
            return o.self_edits(run_id)

    assert ledger(tmp_path / "a") == ledger(tmp_path / "b")


def test_a_slow_watcher_holds_nobody_up(tmp_path: Path) -> None:
    with ScriptedHouse(tmp_path) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(create_request())
        watch: Any = o.stub.WatchRun(pb.WatchRunRequest(run_id=run_id), timeout=30, wait_for_ready=True)
        next(watch)  # and then reads no more
        other: Orchestrator = o
        assert other.finish(run_id, 20).state == pb.RUN_STATE_SUCCEEDED
        watch.cancel()
