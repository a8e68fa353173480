"""What a new policy is made of: plain values with an id that is their content."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from preceptor.names import canonical_json, content_id
from teacher.algorithms import ALGORITHMS
from teacher.algorithms.interface import Algorithm, Candidate, LearningSettings
from teacher.diversity import distances, diversity

# What came after policies were first made is part of an identity only where it is used, so that these keep their ids.
_LATER_OF_EXAMPLES = ("advantage", "advantage_stderr", "only_compared", "prompt", "policy_id")
_LATER_OF_SELECTION = ("min_reward_z", "min_advantage_z", "clip", "kl")
_LATER_OF_SETTINGS = ("algorithm", "diversity")


@dataclass(frozen=True, slots=True)
class Rewarded:
    """A self-edit as it was written, for what, and what it earned.

    ``prompt`` is what it was written on, where the prompt format may change; empty: the format still says.
    ``policy_id`` wrote it; empty: the parent of the update. ``student_commit`` is of the student that the reward is
    about: a stamp, which decides nothing and is no part of the policy's id.
    """

    group: str
    title: str
    text: str
    completion: str
    prompt_format: str
    reward: float
    stderr: float
    advantage: float | None = None
    advantage_stderr: float = 0.0
    only_compared: bool = False
    prompt: str = ""
    policy_id: str = ""
    student_commit: str = ""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A self-edit to learn from, and how much (see ``teacher.algorithms.interface.Weighted``)."""

    example: Rewarded
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class FineTuning:
    """``learning_rate`` is the peak of AdamW (no weight decay), reached after a tenth of the steps and falling
    linearly to nothing; ``epochs`` passes; ``batch_size`` sequences a step."""

    learning_rate: float = 1e-3
    epochs: int = 2
    batch_size: int = 8

    def steps(self, examples: int) -> int:
        """Optimiser steps for so many examples."""
        return self.epochs * math.ceil(examples / self.batch_size)


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """What is kept and how it is learnt. The LoRA rank and alpha are those of a first update; later ones train
    the parent's adapter on. ``diversity`` is the weight of what makes a self-edit unlike the others of its group."""

    selection: LearningSettings = field(default_factory=LearningSettings)
    tuning: FineTuning = field(default_factory=FineTuning)
    rank: int = 16
    alpha: float = 32.0
    algorithm: str = "rest_em"  # one of ALGORITHMS
    diversity: float = 0.0

    @property
    def learns_by(self) -> Algorithm:
        """The algorithm."""
        return ALGORITHMS[self.algorithm]


@dataclass(frozen=True, slots=True)
class Update:
    """Everything that a new policy is made of."""

    parent_id: str
    examples: tuple[Rewarded, ...]
    settings: UpdateSettings
    seed: int
    activate: bool  # once it is READY

    def of_parent(self, parent_id: str) -> Update:
        """The same with its parent named, and with no other name for it where it wrote an example itself."""
        written = (replace(one, policy_id="") if one.policy_id == parent_id else one for one in self.examples)
        return replace(self, parent_id=parent_id, examples=tuple(written))

    def policy_id(self, base_commit: str) -> str:
        """The id of the policy that this makes: a function of what it is made of, in any order of the examples."""
        said = [_said(example, _LATER_OF_EXAMPLES) for example in self.examples]
        examples = sorted(canonical_json({k: v for k, v in one.items() if k != "student_commit"}) for one in said)
        settings = _said(self.settings, _LATER_OF_SETTINGS)
        settings |= {"selection": _said(self.settings.selection, _LATER_OF_SELECTION)}
        parts = ["update/1", base_commit, self.parent_id, examples, settings, self.seed]
        return content_id("policy", parts)

    def lessons(self) -> list[Lesson]:
        """What to learn from, in an order that does not depend on the order the examples came in."""
        weighted = self.settings.learns_by.weigh(self._candidates(), self.settings.selection)
        return [Lesson(self.examples[one.index], one.weight) for one in weighted]

    def _candidates(self) -> list[Candidate]:
        """The examples as an algorithm sees them: with what their being different earns. That is more or less than
        what the group's self-edits earn by it on average, so that it lifts no group as a whole over ``min_reward``."""
        candidates = [
            Candidate(e.group, e.completion, e.reward, e.stderr, e.advantage, e.advantage_stderr, e.only_compared)
            for e in self.examples
        ]
        if not self.settings.diversity:
            return candidates
        for group in self.groups:
            places = [i for i, one in enumerate(candidates) if one.group == group]
            apart = distances([candidates[i].completion for i in places])
            mean = math.fsum(apart) / len(apart)
            for i, mine in zip(places, apart, strict=True):
                extra, one = self.settings.diversity * (mine - mean), candidates[i]
                advantage = None if one.advantage is None else one.advantage + extra
                candidates[i] = replace(one, reward=one.reward + extra, advantage=advantage)
        return candidates

    @property
    def groups(self) -> set[str]:
        """The groups that are offered."""
        return {example.group for example in self.examples}

    @property
    def diversity(self) -> float | None:
        """How different the offered self-edits of a group are (``teacher.diversity``); None where no group has two."""
        groups: dict[str, list[str]] = {}
        for example in self.examples:
            groups.setdefault(example.group, []).append(example.completion)
        return diversity(groups)

    @property
    def writers(self) -> set[str]:
        """Policies other than the parent whose probabilities the training needs."""
        needed = self.settings.learns_by.needs_history
        return {lesson.example.policy_id for lesson in self.lessons()} - {""} if needed else set()

    def to_bytes(self) -> bytes:
        """For the store."""
        return canonical_json(asdict(self)).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Update:
        """What ``to_bytes`` wrote."""
        values = json.loads(data)
        settings = values["settings"]
        nested = {
            "selection": LearningSettings(**settings["selection"]),
            "tuning": FineTuning(**settings["tuning"]),
        }
        return Update(
            parent_id=values["parent_id"],
            examples=tuple(Rewarded(**example) for example in values["examples"]),
            settings=UpdateSettings(**{**settings, **nested}),
            seed=values["seed"],
            activate=values["activate"],
        )


def _said(values: Rewarded | LearningSettings | UpdateSettings, later: Sequence[str]) -> dict[str, Any]:
    """The fields with their values, the ``later`` ones only where they differ from their default."""
    defaults = {field.name: field.default for field in fields(values)}
    said = asdict(values)
    return {name: value for name, value in said.items() if name not in later or value != defaults[name]}
