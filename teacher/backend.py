"""What computes for the teacher: who draws completions, and who trains policies. The rest of it knows no model.

Three backends: ``teacher.in_process`` (transformers), ``teacher.served`` (a vLLM server draws, this process trains)
and ``teacher.fixed`` (a vendor's chat model draws, nobody trains).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from teacher.policy_store import Policy
from teacher.recipe import Lesson, UpdateSettings


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How tokens are drawn. ``temperature`` 0 takes the likeliest token."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512


@dataclass(frozen=True, slots=True)
class Row:
    """One completion to draw: which of a task's samples, and for which time. ``explained``: the prompt itself says what
    shape the answer must have."""

    task_id: str
    prompt: str
    sample: int
    draw: int
    explained: bool = False


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one row became. ``finished`` is False where it ran into its limit."""

    text: str
    tokens: int
    finished: bool


# Rows of the same prompt stand side by side. Each depends on its own contents, the seed and the settings alone (and, in
# its last bits, on its neighbours). Asks ``stopped`` now and then and raises PreceptorError(CANCELLED) when it says so.
Draw = Callable[[Sequence[Row], int, SamplingSettings, Callable[[], bool]], list[Drawn]]


class Author(Protocol):
    """Draws completions with any policy of one base."""

    def prompt_tokens(self, prompt: str) -> int:
        """How many tokens of ``context`` a prompt takes; 0 where nobody here can count them."""

    @property
    def context(self) -> int:
        """Tokens of a prompt with its completion, at most."""

    def writing(
        self, policy: Policy, adapter: Callable[[], Path | None], stopped: Callable[[], bool]
    ) -> AbstractContextManager[Draw]:
        """Makes the policy ready and keeps it so while the context lasts. ``adapter`` gives its folder, None where its
        weights are the base's; what that raises passes through. Raises PreceptorError(CANCELLED)."""


@dataclass(frozen=True, slots=True)
class TrainedPolicy:
    """An adapter as files by their names, and of its training what ``teacher.update.Trained`` says."""

    files: Mapping[str, bytes]
    first_loss: float
    final_loss: float
    steps: int
    kl: float | None = None


class Trainer(Protocol):
    """Makes policies."""

    def train(
        self,
        parent: Path | None,
        lessons: Sequence[Lesson],
        writers: Mapping[str, Path | None],
        settings: UpdateSettings,
        seed: int,
        on_step: Callable[[int], None],
        stopped: Callable[[], bool],
    ) -> TrainedPolicy:
        """Trains the adapter in the folder ``parent``, a new one where that is None, on the lessons, in this order.
        ``writers``: folders of the policies that wrote some of them (None: the base), where their probabilities are
        needed; the parent wrote all others.

        Raises PreceptorError: SEQUENCE_TOO_LONG, UPDATE_DIVERGED, and SHUTTING_DOWN when ``stopped`` says so.
        """


@dataclass(frozen=True, slots=True)
class Backend:
    """A base model by its folder or name and the hash of its contents, and who works with it. Without a trainer the
    teacher is fixed. ``close`` after everything else."""

    source: str
    commit: str
    author: Author
    trainer: Trainer | None
    close: Callable[[], None] = lambda: None


def row_digest(seed: int, task_id: str, sample: int, draw: int) -> bytes:
    """32 bytes that depend on the arguments and nothing else: a row's randomness."""
    return hashlib.sha256(f"{seed}\n{task_id}\n{sample}\n{draw}".encode()).digest()
