"""Which self-edits are kept."""

from __future__ import annotations

import statistics
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from teacher.algorithms.interface import Candidate, LearningSettings
from teacher.algorithms.rest_em import ALGORITHM

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        group=st.sampled_from("abc"),
        completion=st.text("xyz", max_size=3),
        reward=st.one_of(st.sampled_from([-0.5, 0.0, 0.1, 0.5]), st.floats(-2, 2)),
        stderr=st.sampled_from([0.0, 0.1]),
        advantage=st.one_of(st.none(), st.floats(-1, 1)),
        advantage_stderr=st.sampled_from([0.0, 0.1]),
        only_compared=st.booleans(),
    ),
    max_size=24,
)
SETTINGS = st.builds(
    LearningSettings,
    top_k=st.integers(1, 4),
    min_reward=st.floats(-1, 1),
    min_advantage=st.floats(0, 2),
    min_reward_z=st.sampled_from([0.0, 1.0, 2.0]),
    min_advantage_z=st.sampled_from([0.0, 1.0, 2.0]),
)


def select(candidates: list[Candidate], settings: LearningSettings) -> list[int]:
    """Places of what is kept, all of which weighs 1."""
    weighted = ALGORITHM.weigh(candidates, settings)
    assert all(one.weight == 1 for one in weighted)
    return [one.index for one in weighted]


def passes(candidate: Candidate, candidates: list[Candidate], settings: LearningSettings, slack: float) -> bool:
    """Whether every bar, moved by ``slack``, is passed; said again, in other words than the code's."""
    if candidate.only_compared or not candidate.reward > settings.min_reward + settings.min_reward_z * candidate.stderr:
        return False
    group = [c for c in candidates if c.group == candidate.group]
    rewards = [c.reward for c in group]
    advantage, error = candidate.advantage, candidate.advantage_stderr
    if advantage is None:
        if len(group) == 1:
            return True
        weights = [(c is candidate) - 1 / len(group) for c in group]
        advantage = candidate.reward - statistics.fmean(rewards)
        error = sum((w * c.stderr) ** 2 for w, c in zip(weights, group, strict=True)) ** 0.5
    bar = max(settings.min_advantage * statistics.pstdev(rewards), settings.min_advantage_z * error)
    return advantage + slack > bar


@given(CANDIDATES, SETTINGS)
def test_kept_ones_pass_every_bar(candidates: list[Candidate], settings: LearningSettings) -> None:
    kept = [candidates[i] for i in select(candidates, settings)]
    assert all(passes(candidate, candidates, settings, 1e-9) for candidate in kept)
    for group in "abc":
        of_group = [c for c in kept if c.group == group]
        assert len(of_group) <= settings.top_k
        assert len({c.completion for c in of_group}) == len(of_group)


@given(CANDIDATES, SETTINGS)
def test_nothing_better_that_passes_is_left_behind(candidates: list[Candidate], settings: LearningSettings) -> None:
    kept = select(candidates, settings)
    for index, candidate in enumerate(candidates):
        if index in kept or not passes(candidate, candidates, settings, -1e-9):
            continue
        of_group = [candidates[i] for i in kept if candidates[i].group == candidate.group]
        if candidate.completion not in {c.completion for c in of_group}:
            assert len(of_group) == settings.top_k
            assert all(c.reward >= candidate.reward for c in of_group)


@given(CANDIDATES, SETTINGS, st.sampled_from(["min_reward_z", "min_advantage_z"]))
def test_a_higher_bar_keeps_no_more(candidates: list[Candidate], settings: LearningSettings, bar: str) -> None:
    higher = replace(settings, **{bar: getattr(settings, bar) + 1})
    assert len(select(candidates, higher)) <= len(select(candidates, settings))


@given(CANDIDATES, SETTINGS)
def test_what_is_there_for_comparison_is_never_kept(candidates: list[Candidate], settings: LearningSettings) -> None:
    assert not any(candidates[i].only_compared for i in select(candidates, settings))


def test_a_gain_that_its_own_error_may_be_is_not_kept() -> None:
    candidates = [Candidate("a", "sure", 0.3, 0.1), Candidate("a", "lucky", 0.4, 0.3), Candidate("a", "bad", -0.5)]
    assert select(candidates, LearningSettings()) == [1, 0]
    assert select(candidates, LearningSettings(min_reward_z=2)) == [0]


def test_an_advantage_that_its_own_error_may_be_is_not_kept() -> None:
    def group(stderr: float) -> list[Candidate]:
        return [
            Candidate("a", "x", 0.5, 0.3, advantage=0.1, advantage_stderr=stderr),
            Candidate("a", "y", 0.3, 0.3, advantage=-0.1, advantage_stderr=stderr),
        ]

    settings = LearningSettings(min_advantage_z=2)
    assert select(group(0.04), settings) == [0]  # paired, it is clear
    assert select(group(0.06), settings) == []
    alone = [Candidate("a", "x", 0.5, 0.3), Candidate("a", "y", 0.3, 0.3)]
    assert select(alone, settings) == []  # as if the errors were independent: 0.1 +- 0.21


def test_those_for_comparison_count_in_the_mean() -> None:
    low = Candidate("a", "low", -1.0, only_compared=True)
    best = [Candidate("a", "x", 0.2), Candidate("a", "y", 0.3)]
    assert select(best, LearningSettings()) == [1]
    assert select([*best, low], LearningSettings()) == [1, 0]


def test_a_group_of_one_is_judged_by_its_reward_alone() -> None:
    assert select([Candidate("a", "x", 0.1), Candidate("b", "y", -0.1)], LearningSettings()) == [0]


def test_of_equal_rewards_the_surer_one_is_kept() -> None:
    candidates = [Candidate("a", "x", 0.5, 0.2), Candidate("a", "y", 0.5, 0.1), Candidate("a", "z", 0.0)]
    assert select(candidates, LearningSettings(top_k=1)) == [1]


def test_as_many_as_the_group_has_keeps_all_that_are_positive_and_above_the_mean() -> None:
    rewards = [0.5, 0.4, 0.3, 0.05, -0.2]
    candidates = [Candidate("a", str(i), reward) for i, reward in enumerate(rewards)]
    assert select(candidates, LearningSettings(top_k=5)) == [0, 1, 2]
