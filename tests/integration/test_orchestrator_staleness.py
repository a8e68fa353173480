"""Rounds that are written ahead by an older policy: who writes what, beside what, and what a crash changes."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from preceptor.config import RunConfig
from preceptor.testing.scripted_evaluator import ScriptedEvaluator
from preceptor.testing.scripted_house import ScriptedHouse
from preceptor.testing.scripted_teacher import ScriptedTeacher
from preceptor.v1 import orchestrator_pb2 as pb
from tests.integration.test_orchestrator_runs import results, until, without_cached
from tests.orchestrated import OrchestratorProcess, create_request, orchestrator_here, run_config

ROUNDS = 4


def config(staleness: int) -> RunConfig:
    rounds = {"count": ROUNDS, "tasks": 3, "self_edits": 4, "staleness": staleness}
    return run_config(rounds=rounds, heldout={"fixed_strategies": ()})


def finished(tmp_path: Path, staleness: int, **evaluator: Any) -> tuple[ScriptedHouse, dict[str, Any], list[Any]]:
    """The services after a run, its summary and its ledger."""
    home = tmp_path / f"{staleness}-{len(list(tmp_path.iterdir()))}"
    home.mkdir()
    with (
        ScriptedHouse(home, evaluator=ScriptedEvaluator(**evaluator)) as house,
        orchestrator_here(house, home) as o,
    ):
        run_id = o.create(create_request(config(staleness)))
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        return house, o.summary(run_id), o.self_edits(run_id)


@pytest.mark.parametrize("staleness", [0, 1, 2, 8])
def test_a_round_is_written_by_the_policy_of_so_many_rounds_before(tmp_path: Path, staleness: int) -> None:
    house, summary, ledger = finished(tmp_path, staleness)
    policies = [house.teacher.updates[0].parent_id, *(of["policy"] for of in summary["rounds"])]
    assert len(set(policies)) == ROUNDS + 1
    for number, update in enumerate(house.teacher.updates, 1):
        writer = policies[max(0, number - 1 - staleness)]
        assert update.parent_id == policies[number - 1]  # it learns on from the latest, whoever wrote
        lines = [line for line in ledger if line.round == number]
        assert {line.policy_id for line in lines} == {example.policy_id for example in update.examples} == {writer}


def test_every_reward_says_which_student_it_is_about(tmp_path: Path) -> None:
    house, summary, ledger = finished(tmp_path, 1)
    commit = summary["student"]["commit"]
    assert {example.student_commit for update in house.teacher.updates for example in update.examples} == {commit}
    assert {line.student_commit for line in ledger if not line.malformed} == {commit}


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_next_round_is_written_while_this_one_is_measured_and_only_then(tmp_path: Path, staleness: int) -> None:
    teacher, evaluator = ScriptedTeacher(), ScriptedEvaluator(seconds=2.0)
    with ScriptedHouse(tmp_path, teacher, evaluator) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(create_request(config(staleness)))
        until(lambda: o.progress(run_id).evaluations_done > 0)
        progress = o.progress(run_id)
        assert progress.evaluations_running > 0
        assert progress.round == 1
        assert teacher.updates == []
        assert {line.round for line in o.self_edits(run_id)} == set(range(1, staleness + 2))
        o.cancel(run_id)


def test_whatever_takes_its_time_the_result_is_the_same(tmp_path: Path) -> None:
    summaries = [results(finished(tmp_path, 1, seconds=seconds)[1]) for seconds in (0.0, 0.3)]
    assert summaries[0] == summaries[1]
    assert without_cached(results(finished(tmp_path, 0)[1])) != without_cached(summaries[0])


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_orchestrator_goes_on_and_nothing_changes(tmp_path: Path, seed: int) -> None:
    _, expected, _ = finished(tmp_path, 1)
    home = tmp_path / "killed"
    home.mkdir()
    dice = random.Random(seed)
    with ScriptedHouse(home, ScriptedTeacher(group_seconds=0.05), ScriptedEvaluator(seconds=0.3)) as house:
        process = OrchestratorProcess(house, home)
        process.start()
        run_id = process.client.create(create_request(config(1)))
        for _ in range(2):
            time.sleep(dice.uniform(0.3, 1.5))
            process.kill()
            process.start()
        assert process.client.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        summary, ledger = process.client.summary(run_id), process.client.self_edits(run_id)
        process.terminate()
    places = [(line.round, line.task_id, line.index) for line in ledger]
    assert len(places) == len(set(places)) == ROUNDS * 12
    assert without_cached(results(summary)) == without_cached(results(expected))
