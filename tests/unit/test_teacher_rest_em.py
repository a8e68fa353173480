"""Which self-edits are kept."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher.rest_em import Candidate, SelectionSettings, select

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        group=st.sampled_from("abc"),
        completion=st.text("xyz", max_size=3),
        reward=st.one_of(st.sampled_from([-0.5, 0.0, 0.1, 0.5]), st.floats(-2, 2)),
        stderr=st.sampled_from([0.0, 0.1]),
    ),
    max_size=24,
)
SETTINGS = st.builds(
    SelectionSettings, top_k=st.integers(1, 4), min_reward=st.floats(-1, 1), min_advantage=st.floats(0, 2)
)


@given(CANDIDATES, SETTINGS)
def test_kept_ones_pass_every_bar(candidates: list[Candidate], settings: SelectionSettings) -> None:
    kept = [candidates[i] for i in select(candidates, settings)]
    for candidate in kept:
        assert candidate.reward > settings.min_reward
        rewards = [c.reward for c in candidates if c.group == candidate.group]
        if len(rewards) > 1:
            bar = statistics.fmean(rewards) + settings.min_advantage * statistics.pstdev(rewards)
            assert candidate.reward > bar - 1e-12
    for group in "abc":
        of_group = [c for c in kept if c.group == group]
        assert len(of_group) <= settings.top_k
        assert len({c.completion for c in of_group}) == len(of_group)


@given(CANDIDATES, SETTINGS)
def test_nothing_better_is_left_behind(candidates: list[Candidate], settings: SelectionSettings) -> None:
    kept = {i: candidates[i] for i in select(candidates, settings)}
    for index, candidate in enumerate(candidates):
        of_group = [c for c in kept.values() if c.group == candidate.group]
        if index in kept or not of_group or candidate.completion in {c.completion for c in of_group}:
            continue
        if candidate.reward > min(c.reward for c in of_group):
            assert len(of_group) == settings.top_k
            assert all(c.reward >= candidate.reward for c in of_group)


@given(CANDIDATES, SETTINGS, st.integers(0, 1000))
def test_the_order_of_arrival_does_not_matter(
    candidates: list[Candidate], settings: SelectionSettings, seed: int
) -> None:
    shuffled = list(candidates)
    random.Random(seed).shuffle(shuffled)
    assert [shuffled[i] for i in select(shuffled, settings)] == [candidates[i] for i in select(candidates, settings)]


@given(st.floats(0.01, 5), st.integers(2, 9))
def test_a_group_of_equals_teaches_nothing(reward: float, size: int) -> None:
    assert select([Candidate("a", str(i), reward) for i in range(size)], SelectionSettings()) == []


def test_a_group_of_one_is_judged_by_its_reward_alone() -> None:
    assert select([Candidate("a", "x", 0.1), Candidate("b", "y", -0.1)], SelectionSettings()) == [0]


def test_of_equal_rewards_the_surer_one_is_kept() -> None:
    candidates = [Candidate("a", "x", 0.5, 0.2), Candidate("a", "y", 0.5, 0.1), Candidate("a", "z", 0.0)]
    assert select(candidates, SelectionSettings(top_k=1)) == [1]


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_failure_is_no_reward(reward: float) -> None:
    with pytest.raises(ValueError, match="reward"):
        select([Candidate("a", "x", reward)], SelectionSettings())
