from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.statistics import (
    SMALLEST_DIFFERENCE,
    Cluster,
    accuracy,
    clustered_mean,
    needed_passages,
    needed_questions,
    paired_difference,
)

clusters = st.lists(
    st.integers(1, 8).flatmap(lambda n: st.integers(0, n).map(lambda right: Cluster(right, n))), min_size=1, max_size=12
)


@given(clusters, st.integers(0, 2**62))
def test_an_interval_lies_in_the_range_of_shares_and_is_the_same_for_the_same_seed(
    found: list[Cluster], seed: int
) -> None:
    estimate = accuracy(found, seed, 100)
    assert estimate is not None
    assert 0 <= estimate.low <= estimate.high <= 1
    assert estimate.mean == pytest.approx(sum(c.right for c in found) / sum(c.questions for c in found))
    assert accuracy(found, seed, 100) == estimate


@given(clusters)
def test_the_difference_of_an_arm_with_itself_is_exactly_zero(found: list[Cluster]) -> None:
    estimate = paired_difference(found, found, 1, 100)
    assert estimate is not None
    assert (estimate.mean, estimate.low, estimate.high) == (0, 0, 0)


@given(clusters)
def test_swapping_the_arms_mirrors_the_difference(found: list[Cluster]) -> None:
    other = [Cluster(c.questions - c.right, c.questions) for c in found]
    there, back = paired_difference(found, other, 3, 200), paired_difference(other, found, 3, 200)
    assert there is not None
    assert back is not None
    assert there.mean == pytest.approx(-back.mean)
    assert there.low == pytest.approx(-back.high)


def test_equal_passages_have_no_spread_and_unequal_ones_have() -> None:
    same = accuracy([Cluster(2, 4)] * 10, 0, 500)
    spread = accuracy([Cluster(0, 4), Cluster(4, 4)] * 5, 0, 500)
    assert same is not None
    assert spread is not None
    assert same.low == same.high == 0.5
    assert spread.low < 0.3
    assert spread.high > 0.7


def test_passages_weigh_by_their_questions() -> None:
    estimate = accuracy([Cluster(10, 10), Cluster(0, 30)], 0, 100)
    assert estimate is not None
    assert estimate.mean == 0.25


def test_pairing_removes_what_both_arms_share() -> None:
    easy_and_hard = [Cluster(right, 10) for right in (0, 9, 1, 8, 0, 9, 2, 7)]
    better = [Cluster(c.right + 1, 10) for c in easy_and_hard]
    difference = paired_difference(better, easy_and_hard, 0, 1000)
    assert difference is not None
    assert difference.low == pytest.approx(0.1)
    assert difference.high == pytest.approx(0.1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        rates = generator.beta(2, 2, size=40)  # passages differ
        found = [Cluster(int(generator.binomial(5, rate)), 5) for rate in rates]
        estimate = accuracy(found, trial, 300)
        assert estimate is not None
        covered += estimate.low <= 0.5 <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99


def test_nothing_asked_gives_no_estimate() -> None:
    assert accuracy([], 0, 100) is None
    assert accuracy([Cluster(0, 0)], 0, 100) is None
    assert paired_difference([], [], 0, 100) is None


def test_arms_of_different_passages_are_refused() -> None:
    with pytest.raises(ValueError, match="same length"):
        paired_difference([Cluster(1, 1)], [], 0, 100)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20))
def test_with_a_cluster_for_each_value_the_error_is_the_usual_one(values: list[float]) -> None:
    mean, stderr = clustered_mean(values, list(range(len(values))))
    assert mean == pytest.approx(float(np.mean(values)))
    assert stderr == pytest.approx(float(np.std(values, ddof=1)) / math.sqrt(len(values)), abs=1e-9)


def test_values_that_repeat_within_a_cluster_do_not_add_certainty() -> None:
    _, once = clustered_mean([0.0, 1.0, 0.5], [0, 1, 2])
    _, thrice = clustered_mean([0.0, 1.0, 0.5] * 3, [0, 1, 2] * 3)
    assert once is not None
    assert thrice == pytest.approx(once)


def test_a_single_value_has_no_known_error() -> None:
    assert clustered_mean([0.3], [0]) == (0.3, None)
    with pytest.raises(ValueError, match="no values"):
        clustered_mean([], [])


def two_arms(
    generator: np.random.Generator, passages: int, better: float, *, questions: int = 6
) -> tuple[list[Cluster], list[Cluster]]:
    """Passages that are easy or hard for both arms, of unequal size; the first arm is better by ``better`` on average,
    on some passages more than on others."""
    first, second = [], []
    for _ in range(passages):
        size = int(generator.integers(questions - 2, questions + 3))
        rate = generator.uniform(0.2, 0.6)
        raised = np.clip(rate + better + generator.choice([-0.15, 0.15]), 0, 1)
        first.append(Cluster(int(generator.binomial(size, raised)), size))
        second.append(Cluster(int(generator.binomial(size, rate)), size))
    return first, second


@pytest.mark.parametrize("better", [0.1, 0.2])
def test_the_needed_passages_show_the_difference_four_times_out_of_five(better: float) -> None:
    generator = np.random.default_rng(1)
    # The formula's inputs from very many passages; then fresh experiments of the size that it says.
    needed = needed_passages(*two_arms(generator, 4000, better))
    assert needed is not None
    seen = 0
    for trial in range(300):
        estimate = paired_difference(*two_arms(generator, needed, better), trial, 300)
        assert estimate is not None
        seen += estimate.low > 0
    assert 0.72 <= seen / 300 <= 0.88  # 0.8 +- 3 standard errors


def test_half_the_difference_needs_four_times_as_many_passages() -> None:
    spread = [Cluster(right, 10) for right in (0, 10, 0, 10, 0, 10, 0, 10)]
    small = needed_passages(spread, [Cluster(4.5, 10)] * 8)
    large = needed_passages(spread, [Cluster(4.0, 10)] * 8)
    assert small is not None
    assert large is not None
    assert small / large == pytest.approx(4, rel=0.02)


@given(clusters, st.data())
def test_what_is_needed_does_not_depend_on_who_is_first_and_is_more_than_there_is_where_nothing_shows(
    found: list[Cluster], data: st.DataObject
) -> None:
    other = [Cluster(data.draw(st.integers(0, c.questions)), c.questions) for c in found]
    there, back = needed_passages(found, other), needed_passages(other, found)
    assert there == back
    estimate = paired_difference(found, other, 0, 400)
    assert estimate is not None
    if there is None:
        assert len(found) < 2 or abs(estimate.mean) < SMALLEST_DIFFERENCE
    elif estimate.low <= 0 <= estimate.high and len(found) >= 8:
        assert there > len(found)
    questions = needed_questions(found, other)
    assert (questions is None) == (there is None)
    if there is not None and questions is not None:
        assert questions >= there  # a passage has at least one question here


def test_no_difference_and_no_spread_need_no_number() -> None:
    same = [Cluster(right, 4) for right in (1, 3, 0, 4)]
    assert needed_questions(same, same) is None
    assert needed_questions([Cluster(3, 4)], [Cluster(1, 4)]) is None
    assert needed_questions([], []) is None
    with pytest.raises(ValueError, match="same length"):
        needed_passages(same, same[:2])
