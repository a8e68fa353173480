"""The reward's formula, checked by properties and by numbers worked out by hand."""

import math
import random
from collections.abc import Sequence
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluator.reward import Marks, Weights, measure
from preceptor.paired import variance_of_mean
from preceptor.v1 import types_pb2 as types

logprobs = st.floats(-30, 0)


def reward(trained: Sequence[Marks], baseline: Marks, weights: Weights, *, written: bool = False) -> types.Reward:
    return measure(trained, baseline, weights, written=written).reward


@st.composite
def marks_of(draw: st.DrawFn, questions: int, probes: int) -> Marks:
    return Marks(
        tuple(draw(st.lists(st.booleans(), min_size=questions, max_size=questions))),
        tuple(draw(st.lists(logprobs, min_size=questions, max_size=questions))),
        tuple(draw(st.lists(st.booleans(), min_size=probes, max_size=probes))),
    )


@st.composite
def experiments(draw: st.DrawFn) -> tuple[list[Marks], Marks]:
    questions, probes, seeds = draw(st.integers(1, 6)), draw(st.integers(0, 5)), draw(st.integers(1, 4))
    trained = [draw(marks_of(questions, probes)) for _ in range(seeds)]
    return trained, draw(marks_of(questions, probes))


@given(experiments())
def test_the_terms_stay_within_their_bounds(experiment: tuple[list[Marks], Marks]) -> None:
    trained, baseline = experiment
    found = reward(trained, baseline, Weights(1.0, 0.5, 0.0))
    assert -1 <= found.terms["gain"] <= 1
    assert -1.5 <= found.value <= 1.5
    assert found.stderr >= 0
    assert math.isfinite(found.stderr)
    assert found.terms["gain"] == pytest.approx(found.accuracy - found.baseline_accuracy)
    if baseline.probes_correct:
        assert -1 <= found.terms["retention_loss"] <= 1
        assert found.terms["retention_loss"] == pytest.approx(found.baseline_retention - found.retention)
    assert found.HasField("retention") == bool(baseline.probes_correct)


@given(experiments(), st.floats(0, 3), st.floats(0, 3), st.floats(0, 3))
def test_the_value_is_the_weighted_sum_of_the_terms(
    experiment: tuple[list[Marks], Marks], gain: float, retention: float, gold: float
) -> None:
    found = reward(*experiment, Weights(gain, retention, gold))
    expected = gain * found.terms["gain"] + gold * found.terms["gold_logprob_gain"]
    expected -= retention * dict(found.terms).get("retention_loss", 0.0)
    assert found.value == pytest.approx(expected)


@given(marks_of(4, 3), st.integers(1, 4))
def test_answers_equal_to_the_baselines_earn_nothing_without_doubt(marks: Marks, seeds: int) -> None:
    found = reward([marks] * seeds, marks, Weights(1, 1, 1))
    assert found.value == 0
    assert found.stderr == 0


@given(experiments(), st.data())
def test_one_more_right_answer_never_earns_less(experiment: tuple[list[Marks], Marks], data: st.DataObject) -> None:
    trained, baseline = experiment
    index = data.draw(st.integers(0, len(baseline.correct) - 1))
    better = list(trained[0].correct)
    better[index] = True
    improved = [Marks(tuple(better), trained[0].gold_logprobs, trained[0].probes_correct), *trained[1:]]
    assert reward(improved, baseline, Weights()).value >= reward(trained, baseline, Weights()).value


@given(experiments())
def test_exchanging_trained_and_baseline_turns_the_sign(experiment: tuple[list[Marks], Marks]) -> None:
    (one, *_), other = experiment
    weights = Weights(1, 0.5, 0.1)
    assert reward([one], other, weights).value == pytest.approx(-reward([other], one, weights).value)


@given(experiments())
def test_the_order_of_the_seeds_does_not_matter(experiment: tuple[list[Marks], Marks]) -> None:
    trained, baseline = experiment
    forward, backward = (reward(order, baseline, Weights(1, 1, 1)) for order in (trained, trained[::-1]))
    assert forward.value == pytest.approx(backward.value)
    assert forward.stderr == pytest.approx(backward.stderr)


def test_the_error_with_one_seed_is_that_of_the_paired_differences() -> None:
    baseline = Marks((False, True, False, False), (0.0,) * 4)
    trained = Marks((True, True, True, False), (0.0,) * 4)  # differences 1, 0, 1, 0
    found = reward([trained], baseline, Weights())
    assert found.value == 0.5
    assert found.stderr == pytest.approx(stdev([1, 0, 1, 0]) / 2)


def test_retention_adds_to_the_error_in_quadrature() -> None:
    baseline = Marks((False,) * 4, (0.0,) * 4, (True,) * 4)
    trained = Marks((True, True, False, False), (0.0,) * 4, (True, True, True, False))
    found = reward([trained], baseline, Weights(1.0, 2.0))
    assert found.value == pytest.approx(0.5 - 2 * 0.25)
    expected = math.hypot(stdev([1, 1, 0, 0]) / 2, 2 * stdev([0, 0, 0, 1]) / 2)
    assert found.stderr == pytest.approx(expected)


def test_a_seed_that_moves_all_questions_is_in_the_error_of_several_seeds() -> None:
    # Two seeds that differ by 1 on every question: no spread over questions, all of it over seeds.
    assert variance_of_mean([[1.0] * 5, [0.0] * 5], 1.0) == pytest.approx(0.5 / 2)
    assert variance_of_mean([[1.0] * 5], 1.0) == 0


def test_one_question_says_as_little_as_can_be() -> None:
    assert reward([Marks((True,), (0.0,))], Marks((False,), (0.0,)), Weights()).stderr == 1.0


def test_the_error_covers_the_truth_as_often_as_it_should() -> None:
    """Simulated trials with known effects of question and seed; the interval of two errors must cover about 95%."""
    dice, covered, experiments_made = random.Random(0), 0, 400
    for _ in range(experiments_made):
        of_question = [dice.gauss(0, 0.3) for _ in range(30)]
        of_seed = [dice.gauss(0, 0.1) for _ in range(8)]
        values = [[0.2 + q + s + dice.gauss(0, 0.3) for q in of_question] for s in of_seed]
        error = math.sqrt(variance_of_mean(values, 1.0))
        covered += abs(fmean(map(fmean, values)) - 0.2) < 2 * error
    assert 0.9 <= covered / experiments_made <= 0.99


@pytest.mark.parametrize(
    ("trained", "baseline", "problem"),
    [
        ([], Marks((True,), (0.0,)), "same questions"),
        ([Marks((), ())], Marks((), ()), "no questions"),
        ([Marks((True,), (0.0,))], Marks((True, True), (0.0, 0.0)), "same questions"),
        ([Marks((True,), (0.0,))], Marks((True,), (0.0,), (True,)), "same questions"),
        ([Marks((True, True), (0.0,))], Marks((True, True), (0.0,)), r"\[1, 2\] questions"),
        ([Marks((), (0.0,))], Marks((), (0.0,)), "gain has a weight and was not measured"),
    ],
)
def test_answers_that_do_not_match_are_never_scored(trained: list[Marks], baseline: Marks, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        reward(trained, baseline, Weights())


def test_a_look_has_a_value_of_log_probabilities_and_no_accuracy() -> None:
    found = reward([Marks((), (-1.0, -3.0))], Marks((), (-2.0, -8.0)), Weights(gain=0, gold_logprob_gain=1))
    assert found.value == pytest.approx(3.0)
    assert set(found.terms) == {"gold_logprob_gain", "gold_probability_gain", "overlap", "tokens", "seconds"}
    assert found.accuracy == found.baseline_accuracy == 0


def test_the_probability_term_is_what_sampled_answers_would_gain() -> None:
    trained = Marks((True, False), (math.log(0.75), math.log(0.25)))
    found = reward([trained], Marks((False, False), (math.log(0.25), math.log(0.25))), Weights(0, 0, 0, 1.0))
    assert found.terms["gold_probability_gain"] == found.value == pytest.approx(0.25)


def test_costs_and_copied_questions_are_subtracted() -> None:
    trained = [
        Marks((True,) * 4, (0.0,) * 4, tokens=tokens, seconds=seconds) for tokens, seconds in ((500, 1), (1500, 3))
    ]
    weights = Weights(1.0, overlap=2.0, tokens=0.1, seconds=0.01)
    found = measure(trained, Marks((False,) * 4, (0.0,) * 4), weights, copied=1)
    assert dict(found.reward.terms) == pytest.approx(
        {"gain": 1, "gold_logprob_gain": 0, "gold_probability_gain": 0, "overlap": 0.25, "tokens": 1, "seconds": 2}
    )
    assert found.reward.value == pytest.approx(1 - 2 * 0.25 - 0.1 * 1 - 0.01 * 2)
    assert found.values_S == pytest.approx((1 - 0.5 - 0.05 - 0.01, 1 - 0.5 - 0.15 - 0.03))
    assert found.reward.seed_stderr == pytest.approx(stdev(found.values_S) / math.sqrt(2))


def test_confidence_needs_no_gold_answers_and_is_marked() -> None:
    untouched = Marks(certainties=(1.0, 2.0), agreements=(0.0, 0.5))
    trained = Marks(certainties=(3.0, 2.0), agreements=(1.0, 0.5))
    found = reward([trained], untouched, Weights(gain=0, certainty_gain=0.5, agreement_gain=1.0))
    assert found.value == pytest.approx(0.5 * 1.0 + 0.5)
    assert found.label_free
    assert "gain" not in found.terms


def test_what_is_measured_on_written_questions_is_marked() -> None:
    marks = Marks((True,), (0.0,))
    assert reward([marks], marks, Weights(), written=True).label_free
    assert not reward([marks], marks, Weights()).label_free


@given(experiments())
def test_the_parts_add_up_to_the_whole(experiment: tuple[list[Marks], Marks]) -> None:
    trained, baseline = experiment
    found = measure(trained, baseline, Weights(1.0, 0.5, 0.1, 0.3))
    assert fmean(found.values_S) == pytest.approx(found.reward.value)
    of_questions = fmean(fmean(row) for row in found.values_S_Q)
    assert of_questions - 0.5 * dict(found.reward.terms).get("retention_loss", 0.0) == pytest.approx(found.reward.value)
    assert found.reward.HasField("seed_stderr") == (len(trained) > 1)
