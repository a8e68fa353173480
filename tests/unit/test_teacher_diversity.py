"""How different the self-edits of a group are, and what that earns."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher.algorithms.interface import LearningSettings
from teacher.diversity import distance, distances, diversity, word_pairs
from teacher.recipe import Rewarded, Update, UpdateSettings

TEXTS = st.lists(st.text("ab ", max_size=12), min_size=1, max_size=6)


def test_by_hand() -> None:
    one, other = word_pairs("the cat sat down"), word_pairs("the cat sat up")
    assert distance(one, other) == pytest.approx(1 - 2 / 4)
    assert distances(["the cat sat down", "the cat sat up", "no word of it"]) == pytest.approx([0.75, 0.75, 1.0])
    assert diversity({"a": ["x y", "x y"], "b": ["x y", "z"], "c": ["alone"]}) == pytest.approx(0.5)


def test_without_a_group_of_two_nothing_is_known() -> None:
    assert diversity({"a": ["x"], "b": ["y"]}) is None
    assert diversity({}) is None


@given(TEXTS)
def test_it_is_a_share_and_the_same_in_any_order(texts: list[str]) -> None:
    found = distances(texts)
    assert all(0 <= value <= 1 for value in found)
    assert distances(texts[::-1]) == found[::-1]
    assert distances(texts[:1] * 3) == [0.0] * 3


def rewarded(text: str, reward: float, group: str = "a") -> Rewarded:
    return Rewarded(group, "t", "x", text, "open", reward, 0.0)


ALIKE = tuple(rewarded(text, 0.5) for text in ("the cat sat down", "the cat sat up", "a dog ran off"))


@pytest.mark.parametrize("name", ["rest_em", "grpo", "rloo"])
def test_of_equal_rewards_the_unlike_one_is_learnt_from_where_that_is_paid(name: str) -> None:
    unpaid = Update("base-1", ALIKE, UpdateSettings(algorithm=name), 0, False)
    assert unpaid.lessons() == []
    paid = replace(unpaid, settings=replace(unpaid.settings, diversity=0.1))
    assert max(paid.lessons(), key=lambda lesson: lesson.weight).example == ALIKE[2]
    assert paid.diversity == unpaid.diversity == pytest.approx(5 / 6)
    assert paid.policy_id("commit") != unpaid.policy_id("commit")


def test_being_different_lifts_no_group_as_a_whole_over_the_bar() -> None:
    bad = tuple(replace(one, reward=-0.5 + 0.01 * i) for i, one in enumerate(ALIKE))
    settings = UpdateSettings(LearningSettings(top_k=8), diversity=0.4)
    assert Update("base-1", bad, settings, 0, False).lessons() == []


def test_a_given_advantage_moves_with_the_reward() -> None:
    measured = tuple(replace(one, advantage=0.0, advantage_stderr=0.001) for one in ALIKE)
    update = Update("base-1", measured, UpdateSettings(algorithm="rloo", diversity=1.0), 0, False)
    by_text = {lesson.example.completion: lesson.weight for lesson in update.lessons()}
    # 3/2 of the distance from the mean distance (3/4, 3/4 and 1: 5/6), all but unshrunk
    assert by_text[ALIKE[2].completion] == pytest.approx(1.5 * (1 - 5 / 6), rel=1e-3)
