"""What a new policy is made of: plain values with an id that is their content."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from preceptor.names import canonical_json, content_id
from teacher.rest_em import Candidate, SelectionSettings, select
from teacher.update import FineTuning


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
        examples = sorted(canonical_json(asdict(example)) for example in self.examples)
        parts = ["update/1", base_commit, self.parent_id, examples, asdict(self.settings), self.seed]
        return content_id("policy", parts)

    def kept(self) -> list[Rewarded]:
        """The examples to learn from, in an order that does not depend on the order they came in."""
        candidates = [Candidate(e.group, e.completion, e.reward, e.stderr) for e in self.examples]
        return [self.examples[i] for i in select(candidates, self.settings.selection)]

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
