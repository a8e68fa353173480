"""The rule by which labelled tasks stop a run."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.canary import Mean, clearly_fell, difference, mean_of, rewards
from orchestrator.entries import EditKey, Entry, canary_stage
from orchestrator.plan import canary_places
from preceptor.config import LEAST_CANARY
from preceptor.errors import PreceptorError
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import types_pb2 as types
from tests.orchestrated import create_request, passage, run_config

some_rewards = st.dictionaries(st.integers(0, 20), st.floats(-1, 1), max_size=20)


@given(some_rewards)
def test_what_did_not_change_did_not_fall(values: dict[int, float]) -> None:
    assert not clearly_fell(difference(values, values))


@given(some_rewards, some_rewards)
def test_at_most_one_of_two_has_fallen_below_the_other(one: dict[int, float], other: dict[int, float]) -> None:
    assert not (clearly_fell(difference(one, other)) and clearly_fell(difference(other, one)))


@given(some_rewards, some_rewards, st.floats(0.01, 1))
def test_who_has_fallen_has_fallen_even_more_if_he_earns_less(
    one: dict[int, float], other: dict[int, float], less: float
) -> None:
    if clearly_fell(difference(one, other)):
        assert clearly_fell(difference({task: value - less for task, value in one.items()}, other))


@given(st.dictionaries(st.integers(0, 20), st.floats(-1, 1), max_size=LEAST_CANARY - 1), st.floats(-1, 1))
def test_too_few_tasks_show_nothing(values: dict[int, float], change: float) -> None:
    assert not clearly_fell(difference({task: value + change for task, value in values.items()}, values))


def test_a_fall_is_clear_by_the_error_of_the_paired_difference() -> None:
    before = {task: task / 10 for task in range(8)}  # how hard a task is cancels
    after = {task: value - 0.1 + 0.02 * (task % 2) for task, value in before.items()}
    assert clearly_fell(difference(after, before))
    noisy = {task: value - 0.1 + (0.5 if task % 2 else -0.5) for task, value in before.items()}
    assert not clearly_fell(difference(noisy, before))
    assert not clearly_fell(difference(before, after))


def test_only_tasks_that_both_rounds_measured_are_compared() -> None:
    found = difference({1: 0.0, 2: 1.0, 9: -1.0}, {1: 1.0, 2: 1.0, 8: 1.0})
    assert found.count == 2
    assert found.value == -0.5


def test_equal_policies_are_stopped_wrongly_in_few_looks() -> None:
    """Two errors and eight tasks: one-sided 4% (Student's t with 7 degrees of freedom)."""
    dice = random.Random(3)
    falls = sum(clearly_fell(mean_of([dice.gauss(0, 0.3) for _ in range(8)])) for _ in range(4000))
    assert 0.03 < falls / 4000 < 0.056


def test_a_mean_of_nothing_and_of_one_says_so() -> None:
    assert mean_of([]) == Mean(None, None, 0)
    assert mean_of([0.25]) == Mean(0.25, None, 1)


def test_a_malformed_self_edit_counts_as_nothing_and_a_failure_is_left_out() -> None:
    def entry(task: int, index: int = 0, **more: object) -> Entry:
        return Entry(EditKey(canary_stage(1), "", task, index), f"task-{task}", "policy", "", **more)  # type: ignore[arg-type]

    good = evaluator.Evaluation(state=evaluator.EVALUATION_STATE_SUCCEEDED, reward=types.Reward(value=0.5))
    failed = evaluator.Evaluation(state=evaluator.EVALUATION_STATE_FAILED)
    found = rewards([entry(0, evaluation=good), entry(1, malformed="no document"), entry(2, evaluation=failed)])
    assert found == {0: 0.5, 1: 0.0}
    found = rewards([entry(0, 0, evaluation=good), entry(0, 1, malformed="none"), entry(0, 2, evaluation=failed)])
    assert found == {0: 0.25}


def test_the_canary_is_a_choice_by_the_seed_among_labelled_tasks() -> None:
    tasks = [passage(f"town {i}") for i in range(9)]
    for task in tasks[::2]:
        del task.passage.questions[:]
    chosen = canary_places(run_config(tasks={"canary": 4, "questions": "written"}), tasks)
    assert chosen == [1, 3, 5, 7]
    tasks = [passage(f"town {i}") for i in range(9)]
    choices = {tuple(canary_places(run_config(seed=seed, tasks={"canary": 4}), tasks)) for seed in range(5)}
    assert len(choices) > 1
    assert all(list(some) == sorted(set(some)) for some in choices)


@pytest.mark.parametrize("canary", [5, 6])
def test_a_canary_that_leaves_nothing_or_has_no_labels_is_refused(canary: int) -> None:
    from orchestrator.validation import validated

    with pytest.raises(PreceptorError, match=r"canary|set aside") as refused:
        validated(create_request(run_config(tasks={"canary": canary}), train=5))
    assert refused.value.reason == "BAD_CONFIG"
    assert refused.value.metadata["field"] == "tasks.canary"
