"""Differences of two self-edits' rewards."""

from __future__ import annotations

import math

import pytest

from evaluator.reward import Marks, Weights, measure
from preceptor.paired import Difference, difference, t95
from preceptor.v1 import evaluator_pb2 as pb

RIGHT, WRONG = (True,) * 8, (False,) * 8
MIXED = (True, False) * 4
WEIGHTS = Weights(gain=1.0, retention_loss=0.5, tokens=0.1)


def evaluation(marks: dict[int, Marks], baseline: Marks) -> pb.Evaluation:
    """As the evaluator makes it: by ascending seed."""
    score = measure([marks[seed] for seed in sorted(marks)], baseline, WEIGHTS)
    made = pb.Evaluation(reward=score.reward)
    for place, seed in enumerate(sorted(marks)):
        made.trials.add(
            seed=seed,
            value=score.values_S[place],
            values=score.values_S_Q[place],
            probes_correct=marks[seed].probes_correct,
        )
    return made


def marks(correct: tuple[bool, ...], probes: tuple[bool, ...] = (True, True), tokens: int = 0) -> Marks:
    return Marks(correct, (-1.0,) * len(correct), probes, tokens=tokens)


BASELINE = marks(WRONG)


def test_with_the_same_seeds_the_difference_is_that_of_the_rewards() -> None:
    one = evaluation({1: marks(RIGHT, tokens=900), 2: marks(MIXED, (True, False))}, BASELINE)
    other = evaluation({1: marks(MIXED), 2: marks(WRONG)}, BASELINE)
    found = difference(one, other, WEIGHTS.retention_loss)
    assert found is not None
    assert found.mean == pytest.approx(one.reward.value - other.reward.value)
    assert found.seeds == 2
    opposite = difference(other, one, WEIGHTS.retention_loss)
    assert opposite is not None
    assert (opposite.mean, opposite.stderr) == pytest.approx((-found.mean, found.stderr))


def test_what_a_seed_does_to_both_is_no_noise() -> None:
    one = evaluation({1: marks(RIGHT), 2: marks((True,) * 4 + (False,) * 4)}, BASELINE)
    other = evaluation({1: marks((True,) * 4 + (False,) * 4), 2: marks(WRONG)}, BASELINE)
    found = difference(one, other)
    assert found is not None
    assert found.mean == pytest.approx(0.5)
    assert found.seed_stderr == 0
    assert one.reward.seed_stderr > 0.2


def test_only_shared_seeds_are_compared() -> None:
    one = evaluation({1: marks(RIGHT), 2: marks(WRONG)}, BASELINE)
    found = difference(one, evaluation({1: marks(WRONG)}, BASELINE))
    assert found is not None
    assert (found.mean, found.seeds, found.seed_stderr) == (1.0, 1, None)
    assert difference(one, evaluation({3: marks(WRONG)}, BASELINE)) is None


def test_the_probes_bring_an_error_of_their_own_where_they_count() -> None:
    one = evaluation({1: marks(RIGHT, (True, False))}, BASELINE)
    other = evaluation({1: marks(RIGHT, (True, True))}, BASELINE)
    assert difference(one, other) == Difference(-0.25, 0.0, None, 8, 1)
    weighted = difference(one, other, WEIGHTS.retention_loss)
    assert weighted is not None
    assert weighted.stderr == pytest.approx(0.25)
    assert not weighted.clear


def test_the_difference_on_a_single_question_is_never_clear() -> None:
    baseline = marks((False,))
    found = difference(
        evaluation({1: marks((True,)), 2: marks((True,))}, baseline),
        evaluation({1: marks((False,)), 2: marks((False,))}, baseline),
    )
    assert found is not None
    assert (found.mean, found.clear) == (1.0, False)


def test_a_handful_of_questions_is_never_enough() -> None:
    assert not Difference(1.0, 0.0, 0.0, questions=5, seeds=3).clear
    assert Difference(1.0, 0.0, 0.0, questions=6, seeds=3).clear


def test_what_is_clear_for_these_questions_need_not_be_for_others() -> None:
    found = Difference(0.3, 0.2, 0.03, questions=8, seeds=3)
    assert (found.clear, found.clear_on_these) == (False, True)
    assert found.questions_needed == 14  # 8 * (1.96 * 0.2 / 0.3)^2 = 13.7
    assert not Difference(0.3, 0.2, None, questions=8, seeds=1).clear_on_these
    assert Difference(0.0, 0.0, 0.0, questions=8, seeds=3).questions_needed is None
    assert Difference(1.0, 0.0, 0.0, questions=4, seeds=3).questions_needed == 6


@pytest.mark.parametrize(
    ("degrees", "exact"), [(0, math.inf), (1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (30, 2.042)]
)
def test_the_quantiles_of_students_t(degrees: int, exact: float) -> None:
    assert t95(degrees) == pytest.approx(exact, rel=0.01)
