"""What a new policy is made of, and its id."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from teacher.algorithms.interface import LearningSettings
from teacher.recipe import Rewarded, Update, UpdateSettings

PAIR = tuple(Rewarded("a", "t", "x", text, "open", reward, 0.1) for text, reward in (("c", 0.5), ("d", 0.25)))
UPDATE = Update("base-1", PAIR, UpdateSettings(LearningSettings(2, 0.1, 0.5)), 7, False)


def test_a_policy_of_before_these_settings_keeps_its_id() -> None:
    # Made by the code before min_reward_z, min_advantage_z, advantages and examples for comparison.
    assert UPDATE.policy_id("commit") == "policy-366ae3bd5d2351978dcb654dd6a074e1"


@pytest.mark.parametrize(
    "other",
    [
        replace(UPDATE, settings=UpdateSettings(replace(UPDATE.settings.selection, min_reward_z=1.0))),
        replace(UPDATE, settings=UpdateSettings(replace(UPDATE.settings.selection, min_advantage_z=1.0))),
        replace(UPDATE, examples=(replace(PAIR[0], advantage=0.125, advantage_stderr=0.1), PAIR[1])),
        replace(UPDATE, examples=(replace(PAIR[0], advantage=0.0), PAIR[1])),
        replace(UPDATE, examples=(replace(PAIR[0], only_compared=True), PAIR[1])),
        replace(UPDATE, examples=(replace(PAIR[0], policy_id="policy-0"), PAIR[1])),
        replace(UPDATE, settings=replace(UPDATE.settings, algorithm="grpo")),
        replace(UPDATE, settings=replace(UPDATE.settings, diversity=0.1)),
        replace(UPDATE, settings=replace(UPDATE.settings, selection=replace(UPDATE.settings.selection, clip=0.3))),
        replace(UPDATE, settings=replace(UPDATE.settings, selection=replace(UPDATE.settings.selection, kl=0.1))),
    ],
)
def test_what_decides_the_selection_is_part_of_the_id_and_survives_the_store(other: Update) -> None:
    assert other.policy_id("commit") != UPDATE.policy_id("commit")
    assert Update.from_bytes(other.to_bytes()) == other


def test_a_stamp_that_decides_nothing_is_no_part_of_the_id_and_survives_the_store() -> None:
    stamped = replace(UPDATE, examples=tuple(replace(one, student_commit="0123") for one in PAIR))
    assert stamped.policy_id("commit") == UPDATE.policy_id("commit")
    assert Update.from_bytes(stamped.to_bytes()) == stamped


def test_the_parent_has_one_name() -> None:
    written = replace(UPDATE, examples=tuple(replace(one, policy_id="base-1") for one in PAIR))
    assert written.of_parent("base-1") == UPDATE
    assert written.of_parent("base-2").examples == written.examples


def test_an_update_that_an_older_version_stored_is_read() -> None:
    stored = json.loads(UPDATE.to_bytes())
    for example in stored["examples"]:
        for name in ("advantage", "advantage_stderr", "only_compared", "prompt", "policy_id", "student_commit"):
            del example[name]
    for name in ("min_reward_z", "min_advantage_z", "clip", "kl"):
        del stored["settings"]["selection"][name]
    for name in ("algorithm", "diversity"):
        del stored["settings"][name]
    assert Update.from_bytes(json.dumps(stored).encode()) == UPDATE
