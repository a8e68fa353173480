from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.entries import EditKey, Entry, round_stage
from orchestrator.results import Round
from orchestrator.round_summary import overlap, round_summary, terms
from preceptor.config import RaceConfig
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import types_pb2 as types

COMMON = 77
values = st.floats(-1, 1, allow_subnormal=False)
# Of each self-edit: its task, and what it was worth with the common seed and with further ones.
written = st.lists(st.tuples(st.integers(0, 3), values, st.lists(values, max_size=3)), min_size=1, max_size=12)


def entries(lines: list[tuple[int, float, list[float]]], **more: Any) -> list[Entry]:
    found = []
    for index, (task, first, others) in enumerate(lines):
        trials = [evaluator.TrialReport(seed=COMMON, value=first, trained_tokens=100)]
        # Seeds stand in the order of their numbers, not in that of the race: some before the common one.
        trials += [evaluator.TrialReport(seed=COMMON + (at + 1) * (-1) ** at, value=v) for at, v in enumerate(others)]
        evaluation = evaluator.Evaluation(
            id=f"e{index}",
            state=evaluator.EVALUATION_STATE_SUCCEEDED,
            trials=sorted(trials, key=lambda trial: trial.seed),
            reward=types.Reward(value=(first + sum(others)) / (1 + len(others)), questions=4, terms={"gain": first}),
        )
        key = EditKey(round_stage(1), "", task, index)
        found.append(Entry(key, f"task {task}", "p", "text", evaluation=evaluation, **more))
    return found


def summary(lines: list[Entry], race: RaceConfig | None) -> dict[str, Any]:
    return round_summary(Round(1, tuple(lines), {}, "p", 0, 0), race, COMMON)


@given(written)
def test_more_seeds_for_some_do_not_move_the_mean_of_a_race(lines: list[tuple[int, float, list[float]]]) -> None:
    raced = summary(entries(lines), RaceConfig())["reward"]
    plain = summary(entries([(task, first, []) for task, first, _ in lines]), RaceConfig())["reward"]
    assert raced == plain
    assert raced["mean"] == pytest.approx(sum(first for _, first, _ in lines) / len(lines))
    assert raced["of"] == "first_seed"


@given(written)
def test_without_a_race_the_mean_is_that_of_the_rewards(lines: list[tuple[int, float, list[float]]]) -> None:
    of = summary(entries(lines), None)
    rewards = [(first + sum(others)) / (1 + len(others)) for _, first, others in lines]
    assert of["reward"]["mean"] == pytest.approx(sum(rewards) / len(rewards))
    assert of["trials"]["full"] == sum(1 + len(others) for _, _, others in lines)
    value = of["reliability"]["value"]
    assert value is None or 0 <= value <= 1
    if not any(others for _, _, others in lines):
        assert value is None  # one seed: unknown, not zero


@given(written, values)
def test_flattery_is_what_was_lost_on_fresh_seeds(lines: list[tuple[int, float, list[float]]], fresh: float) -> None:
    again = evaluator.Evaluation(
        id="fresh",
        state=evaluator.EVALUATION_STATE_SUCCEEDED,
        reward=types.Reward(value=fresh, seeds=2),
        trials=[evaluator.TrialReport(seed=seed, value=fresh) for seed in (1, 2)],
    )
    found = summary([replace(line, fresh=again) for line in entries(lines)], RaceConfig())["fresh"]
    assert found["count"] == len(lines)
    assert found["mean"] == pytest.approx(fresh)
    assert found["flattery"]["mean"] == pytest.approx(found["chosen_mean"] - found["mean"], abs=1e-9)


def test_a_fresh_measurement_that_failed_is_no_reward_and_no_zero() -> None:
    lost = evaluator.Evaluation(id="lost", state=evaluator.EVALUATION_STATE_FAILED)
    of = summary([replace(line, fresh=lost) for line in entries([(0, 0.5, [])])], RaceConfig())
    assert of["fresh"] is None
    assert of["evaluations"]["failed"] == 1


def test_a_repeated_self_edit_counts_its_fine_tunes_once() -> None:
    (line,) = entries([(0, 0.5, [0.2])])
    twice = [line, replace(line, key=replace(line.key, index=1))]
    assert summary(twice, None)["trials"] == {"full": 2, "looks": 0}


def test_a_stopped_self_edit_is_audited_by_its_look() -> None:
    look = evaluator.Evaluation(
        state=evaluator.EVALUATION_STATE_SUCCEEDED,
        reward=types.Reward(questions=4),
        overlap=evaluator.OverlapAudit(copied=4),
    )
    line = Entry(EditKey(round_stage(1), "", 0, 0), "t", "p", "text", look=look, stopped=True)
    found = overlap([line])
    assert found is not None
    assert (found["with_copied_questions"], found["copied_share"]) == (1, 1.0)


def test_terms_that_were_not_measured_are_absent() -> None:
    assert terms([]) == {}
    assert terms([types.Reward(terms={"gain": 0.5}), types.Reward(terms={"gain": 0.0, "overlap": 1.0})]) == {
        "gain": 0.25,
        "overlap": 1.0,
    }


def test_a_self_edit_that_was_written_twice_says_nothing_about_noise() -> None:
    lines = entries([(0, 0.5, [0.3]), (0, -0.5, [-0.1])])
    twins = [*lines, replace(lines[0], key=replace(lines[0].key, index=9))]
    assert summary(twins, None)["reliability"] == summary(lines, None)["reliability"]
