"""The words of the domain as plain values: what is to be learnt and what is written to teach it.

Frozen dataclasses, free of protobuf (``preceptor.convert`` translates at the edge) and of torch. Texts are
ordinary ``str``; nothing here has a unit unless its field says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal


class Bank(StrEnum):
    """Which purpose a question serves; the three banks phrase the same facts differently."""

    REWARD = "reward"  # trains the teacher
    GATE = "gate"  # decides promotions
    SEALED = "sealed"  # opened only for the held-out measurement


class LossMask(StrEnum):
    """Which tokens of a study document carry loss."""

    ALL = "all"
    AFTER_MARKER = "after_marker"  # only what follows the marker (the answer of a Q/A line); all where there is none
    OUTPUTS_ONLY = "outputs_only"  # only what follows the marker; nothing where there is none


class FineTuning(StrEnum):
    """How a student's weights are changed."""

    LORA = "lora"  # low-rank adapters over a frozen base, many trained together
    FULL = "full"  # all weights, one trial at a time


# How the learning rate goes on after the warm-up.
Schedule = Literal["linear", "constant", "cosine"]
# Which layers of a Llama-, Qwen- or Mistral-shaped block get an adapter, by the name that a directive has for them.
TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its gold answer; ``aliases`` are further right ones; ``written``: by a model, not by people."""

    text: str
    answer: str
    bank: Bank = Bank.REWARD
    aliases: tuple[str, ...] = ()
    written: bool = False


@dataclass(frozen=True, slots=True)
class Augmentations:
    """Which variants of its demonstrations a few-shot task is trained on, beside leave-one-out and leave-two-out tasks
    in permuted order; of inputs and outputs alike. Whoever asks for one says that the rule does not change under it."""

    basic: bool = False  # rotations, flips, reflections, transposition, translation
    size: bool = False  # cells doubled and tripled in size
    chain: bool = False  # two of the others, one after the other
    repeat: bool = False  # grids repeated along an axis
    colours: bool = True  # permuted colours


@dataclass(frozen=True, slots=True)
class Directive:
    """Training settings chosen by the teacher. ``None`` leaves a setting to the run's default."""

    learning_rate: float | None = None  # AdamW peak learning rate, e.g. 3e-3
    epochs: int | None = None  # passes over the documents
    replay_share: float | None = None  # share of trained documents drawn from the replay corpus, 0..0.9
    rank: int | None = None  # LoRA rank
    loss_mask: LossMask | None = None
    targets: str | None = None  # a key of TARGETS
    fine_tuning: FineTuning | None = None
    augmentations: Augmentations | None = None  # of few-shot tasks alone

    def over(self, default: Directive) -> Directive:
        """This directive, with ``default`` where it says nothing."""
        changes = {
            name: getattr(default, name)
            for name in self.__dataclass_fields__
            if getattr(self, name) is None and getattr(default, name) is not None
        }
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class SelfEdit:
    """What the teacher writes for a task: study documents, a directive, or both."""

    documents: tuple[str, ...]
    directive: Directive = Directive()


@dataclass(frozen=True, slots=True)
class Passage:
    """A text whose facts the student should absorb, with the questions that measure whether it did."""

    title: str
    text: str
    questions: tuple[Question, ...]
    labels: Mapping[str, str] = field(default_factory=dict)  # e.g. {"genre": "narrative", "people": "3"}
    # Edits known to whoever made the task, by arm name ("oracle", "shuffled_facts"): ceilings and controls of the
    # held-out measurement. The teacher never sees them.
    reference_edits: Mapping[str, SelfEdit] = field(default_factory=dict)

    def questions_of(self, bank: Bank) -> tuple[Question, ...]:
        """The questions of one bank, in their order."""
        return tuple(q for q in self.questions if q.bank is bank)


# A grid is rows of colours 0..9.
Grid = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class GridPair:
    """An input grid and the output grid that belongs to it."""

    input: Grid
    output: Grid


@dataclass(frozen=True, slots=True)
class FewShotTask:
    """Demonstrations of an unknown rule and held-out queries (ARC)."""

    name: str
    demonstrations: tuple[GridPair, ...]
    queries: tuple[GridPair, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    reference_edits: Mapping[str, SelfEdit] = field(default_factory=dict)  # as a passage's


Task = Passage | FewShotTask


def title_of(task: Task) -> str:
    """What people call it: a passage's title, a few-shot task's name."""
    return task.title if isinstance(task, Passage) else task.name
