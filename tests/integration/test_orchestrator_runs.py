"""Whole runs against scripted services behind real gRPC servers: results, failures, cancel, resume, swaps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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
    """The same without the counts of what was known, and of who had asked, before."""
    if isinstance(value, dict):
        before = ("cached", "sealed_openings_before")
        return {key: without_cached(item) for key, item in value.items() if key not in before}
    return [without_cached(item) for item in value] if isinstance(value, list) else value


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def undisturbed(tmp_path: Path, request: pb.CreateRunRequest, **evaluator: Any) -> dict[str, Any]:
    """The summary of a run that nothing happens to, on SQLite."""
    home, scripted = tmp_path / "undisturbed", ScriptedEvaluator(**evaluator)
    with ScriptedHouse(home, evaluator=scripted) as house, orchestrator_here(house, home, database_url="") as o:
        run_id = o.create(request)
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        return results(o.summary(run_id))


@pytest.mark.usefixtures("databases")
def test_a_run_reaches_its_end_and_the_teacher_learnt_from_every_round(tmp_path: Path) -> None:
    teacher = ScriptedTeacher(malformed_share=0.3)
    with ScriptedHouse(tmp_path, teacher) as house, orchestrator_here(house, tmp_path) as o:
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


@pytest.mark.parametrize("wrong", [3600.0, -3600.0])
def test_what_was_known_before_is_counted_by_the_evaluators_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    monkeypatch.setattr("orchestrator.run_store.time", SimpleNamespace(time=lambda: time.time() + wrong))
    request = create_request(run_config(rounds={"max_failed_share": 0.0}))
    evaluator = ScriptedEvaluator(fails=lambda _task, edit: edit.directive.epochs == 8)
    with (
        ScriptedHouse(tmp_path, evaluator=evaluator) as house,
        orchestrator_here(house, tmp_path, evaluator_ahead=-wrong) as o,
    ):
        run_id = o.create(request)
        assert o.finish(run_id).failure.reason == "TOO_MANY_FAILURES"
        evaluator.fails = lambda _task, _edit: False
        o.resume(run_id)  # asks for whole groups again, of which it knows some itself
        o.finish(run_id)
        assert [of["evaluations"]["cached"] for of in o.summary(run_id)["rounds"]] == [0, 0]
        request.request_id = "again"
        second = o.create(request)
        o.finish(second)
        for of in o.summary(second)["rounds"]:
            assert of["evaluations"]["cached"] == of["evaluations"]["succeeded"]


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


@pytest.mark.usefixtures("databases")
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
    nothing = {"mean": None, "stderr": None, "count": 0}
    assert {key: summary["rounds"][0]["reward"][key] for key in nothing} == nothing
    arms = summary["heldout"]["arms"]
    # Nothing was learnt from a malformed self-edit: the student is as it was, and that is counted.
    assert arms["trained_teacher"]["accuracy"] == arms["no_edit"]["accuracy"]
    assert arms["trained_teacher"]["malformed"] == 4


class FixedTeacher(ScriptedTeacher):
    def GetPolicy(self, request: teacher_pb2.GetPolicyRequest, context: Any) -> teacher_pb2.GetPolicyResponse:
        response = super().GetPolicy(request, context)
        response.policy.fixed = True
        return response


def test_a_fixed_teachers_run_writes_and_measures_and_updates_nothing(tmp_path: Path) -> None:
    with ScriptedHouse(tmp_path, FixedTeacher()) as house, orchestrator_here(house, tmp_path) as o:
        refused = o.finish(o.create(create_request()))
        assert (refused.state, refused.failure.reason) == (pb.RUN_STATE_FAILED, "TEACHER_IS_FIXED")
        run_id = o.create(create_request(run_config(update={"algorithm": "none"})))
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        summary = o.summary(run_id)
    assert not house.teacher.updates
    assert set(summary["policies"]) == {"base-scripted"}
    assert all(of["evaluations"]["succeeded"] > 8 for of in summary["rounds"])


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
        until(lambda: run_id in teacher.cancelled_owners, 5)
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


@pytest.mark.usefixtures("databases")
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
        assert not house.teacher.cancelled_owners
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


# Races. A step of a race follows from the results of the one before.

RACE = {"race": {"look_steps": 3, "max_seeds": 3, "budget": 3.0}, "fresh_seeds": 2, "trials_together": 4}


def racing_request(**rounds: Any) -> pb.CreateRunRequest:
    return create_request(run_config(rounds={"count": 2, "tasks": 3, "self_edits": 6, **rounds}, reward=RACE))


def steps(evaluator: ScriptedEvaluator) -> dict[str, int]:
    """How many different requests of each kind of a race's step were asked."""
    sent = {request.request_id: request for request in evaluator.requests if ".round-" in request.request_id}
    found = {"look": 0, "full": 0, "more": 0, "fresh": 0}
    for name, request in sent.items():
        kind = next(kind for kind in ("look", "full", "fresh") if f".{kind}-" in name)
        found["more" if kind == "full" and len(request.protocol.seeds) > 1 else kind] += 1
    return found


def test_a_race_stops_some_measures_the_best_again_and_offers_nobody_else(tmp_path: Path) -> None:
    with ScriptedHouse(tmp_path) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(racing_request())
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        lines, progress = o.self_edits(run_id), o.progress(run_id)
    assert min(steps(house.evaluator).values()) > 0
    stopped = [line for line in lines if line.stopped]
    assert stopped
    assert progress.self_edits_stopped == len(stopped)
    assert progress.evaluations_running == 0
    for line in lines:
        assert line.malformed == (not line.HasField("look"))
        assert (line.HasField("reward") or line.stopped) != line.malformed
        assert not (line.stopped and (line.HasField("reward") or line.HasField("fresh")))
        if line.HasField("fresh"):
            assert line.fresh.seeds == 2
    for number, update in enumerate(house.teacher.updates, 1):
        of_round = [line for line in lines if line.round == number]
        assert len(update.examples) == sum(line.HasField("reward") for line in of_round)
        eligible = [example for example in update.examples if not example.only_compared]
        assert len(eligible) == sum(line.HasField("fresh") for line in of_round)
        assert {example.reward for example in eligible} == {line.fresh.value for line in of_round if line.fresh.seeds}


def test_the_same_race_again_asks_the_same_and_ends_the_same(tmp_path: Path) -> None:
    def run(home: Path) -> tuple[set[bytes], list[pb.LedgerSelfEdit], dict[str, Any]]:
        evaluator = ScriptedEvaluator(seconds=0.05)
        with ScriptedHouse(home, evaluator=evaluator) as house, orchestrator_here(house, home) as o:
            run_id = o.create(racing_request())
            o.finish(run_id)
            sent = set()
            for request in evaluator.requests:
                request.request_id = request.request_id.removeprefix(run_id)
                request.ClearField("owner")
                sent.add(request.SerializeToString(deterministic=True))
            return sent, o.self_edits(run_id), results(o.summary(run_id))

    assert run(tmp_path / "a") == run(tmp_path / "b")


def test_sigkill_at_every_step_of_a_race_changes_nothing(tmp_path: Path) -> None:
    request = racing_request()
    expected = undisturbed(tmp_path, request)
    teacher, evaluator = ScriptedTeacher(group_seconds=0.15), ScriptedEvaluator(seconds=0.4)
    with ScriptedHouse(tmp_path, teacher, evaluator) as house:
        process = OrchestratorProcess(house, tmp_path)
        process.start()
        run_id = process.client.create(request)

        def asked(kind: str) -> Callable[[], bool]:
            return lambda: steps(evaluator)[kind] > 0

        for reached in map(asked, ("look", "full", "more", "fresh")):
            until(reached)
            time.sleep(0.2)  # in the middle of the step, some of it done
            process.kill()
            process.start()
        assert process.client.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        summary = process.client.summary(run_id)
        assert process.terminate() == 0
    assert results(summary) == expected
    bodies = {request.request_id: request.SerializeToString(deterministic=True) for request in evaluator.requests}
    assert len(bodies) < len(evaluator.requests)  # some was asked again, under the same ids
    assert all(bodies[one.request_id] == one.SerializeToString(deterministic=True) for one in evaluator.requests)


class Unlucky(ScriptedEvaluator):
    """Loses the looks of some self-edits, or all that comes after their looks."""

    def __init__(self, *, look: bool) -> None:
        super().__init__()
        self.look = look
        self.lucky = False

    def CreateEvaluations(self, request: Any, context: Any) -> Any:
        lost = request.protocol.answers.logprobs_only == self.look and not self.lucky
        self.fails = lambda _task, edit: lost and edit.directive.epochs == 8
        return super().CreateEvaluations(request, context)


@pytest.mark.parametrize("look", [True, False])
def test_a_failure_in_a_race_is_counted_and_is_no_reward(tmp_path: Path, look: bool) -> None:
    evaluator = Unlucky(look=look)  # type: ignore[abstract]
    with ScriptedHouse(tmp_path, evaluator=evaluator) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(racing_request(max_failed_share=1.0))
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        lines, progress = o.self_edits(run_id), o.progress(run_id)
    failed = [line for line in lines if line.failure.reason]
    assert failed
    assert not any(line.HasField("reward") or line.HasField("fresh") or line.stopped for line in failed)
    assert all(line.HasField("look") != look for line in failed)
    assert progress.evaluations_failed >= len(failed)
    for number, update in enumerate(house.teacher.updates, 1):
        of_round = [line for line in lines if line.round == number]
        assert len(update.examples) == sum(line.HasField("reward") for line in of_round)


@pytest.mark.parametrize("look", [True, False])
def test_a_race_that_lost_too_many_and_is_resumed_ends_as_an_undisturbed_one(tmp_path: Path, look: bool) -> None:
    request = racing_request(count=1, max_failed_share=0.0)
    expected = undisturbed(tmp_path, request)
    evaluator = Unlucky(look=look)  # type: ignore[abstract]
    with ScriptedHouse(tmp_path, evaluator=evaluator) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(request)
        run = o.finish(run_id)
        assert run.failure.reason == "TOO_MANY_FAILURES"
        assert "TRIAL_LOST" in run.failure.message
        evaluator.lucky = True
        o.resume(run_id)
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        assert results(o.summary(run_id)) == expected
        assert not any(line.failure.reason for line in o.self_edits(run_id))
