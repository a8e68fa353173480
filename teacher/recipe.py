"""What a new policy is made of: plain values with an id that is their content."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from preceptor.names import canonical_json, content_id
from teacher.rest_em import Candidate, SelectionSettings, select

# What came after policies were first made is part of an identity only where it is used, so that these keep their ids.
_LATER_OF_EXAMPLES = ("advantage", "advantage_stderr", "only_compared")
_LATER_OF_SELECTION = ("min_reward_z", "min_advantage_z")


@dataclass(frozen=True, slots=True)
class Rewarded:
    """A self-edit as it was written, for what, and what it earned."""

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
    the parent's adapter on."""

    selection: SelectionSettings = field(default_factory=SelectionSettings)
    tuning: FineTuning = field(default_factory=FineTuning)
    rank: int = 16
    alpha: float = 32.0


@dataclass(frozen=True, slots=True)
class Update:
    """Everything that a new policy is made of."""

    parent_id: str
    examples: tuple[Rewarded, ...]
    settings: UpdateSettings
    seed: int
    activate: bool  # once it is READY

    def policy_id(self, base_commit: str) -> str:
        """The id of the policy that this makes: a function of what it is made of, in any order of the examples."""
        examples = sorted(canonical_json(_said(example, _LATER_OF_EXAMPLES)) for example in self.examples)
        settings = asdict(self.settings) | {"selection": _said(self.settings.selection, _LATER_OF_SELECTION)}
        parts = ["update/1", base_commit, self.parent_id, examples, settings, self.seed]
        return content_id("policy", parts)

    def kept(self) -> list[Rewarded]:
        """The examples to learn from, in an order that does not depend on the order they came in."""
        candidates = [
            Candidate(e.group, e.completion, e.reward, e.stderr, e.advantage, e.advantage_stderr, e.only_compared)
            for e in self.examples
        ]
        return [self.examples[i] for i in select(candidates, self.settings.selection)]

    @property
    def groups(self) -> set[str]:
        """The groups that are offered."""
        return {example.group for example in self.examples}

    def to_bytes(self) -> bytes:
        """For the store."""
        return canonical_json(asdict(self)).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Update:
        """What ``to_bytes`` wrote."""
        values = json.loads(data)
        settings = values["settings"]
        return Update(
            parent_id=values["parent_id"],
            examples=tuple(Rewarded(**example) for example in values["examples"]),
            settings=UpdateSettings(
                SelectionSettings(**settings["selection"]),
                FineTuning(**settings["tuning"]),
                settings["rank"],
                settings["alpha"],
            ),
            seed=values["seed"],
            activate=values["activate"],
        )


def _said(values: Rewarded | SelectionSettings, later: Sequence[str]) -> dict[str, Any]:
    """The fields with their values, the ``later`` ones only where they differ from their default."""
    defaults = {field.name: field.default for field in fields(values)}
    said = asdict(values)
    return {name: value for name, value in said.items() if name not in later or value != defaults[name]}
