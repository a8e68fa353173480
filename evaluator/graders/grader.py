"""What a grader is. Each has a name and a version that are part of every evaluation's identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from preceptor.tasks import Question


class Given(NamedTuple):
    """An answer that was given to a question (text, gold answer, aliases)."""

    question: Question
    answer: str


class Verdict(NamedTuple):
    """Right or wrong, and whether the grader stands by it.

    An unsure verdict is the grader's best guess. It counts as that where nobody else is asked; a cascade asks.
    """

    right: bool
    sure: bool = True


class Grader(Protocol):
    """Decides about answers: for the same answer always the same, whatever stands beside it in the batch."""

    @property
    def name(self) -> str:
        """What a protocol calls it."""
        ...

    @property
    def version(self) -> str:
        """Stands for everything a verdict depends on but question and answer. Changes with any decision."""
        ...

    @property
    def waits(self) -> bool:
        """Whether it asks somebody over a network: minutes instead of microseconds, and it can fail."""
        ...

    def grade(self, given: Sequence[Given]) -> list[Verdict]:
        """A verdict for each, in order.

        Raises PreceptorError(JUDGE_UNREACHABLE, JUDGE_UNREADABLE, JUDGE_REFUSED) where it waits: an outage is a
        failure, never a wrong answer.
        """
        ...


def grader_label(grader: Grader) -> str:
    """Name and version, as reports and identities carry them."""
    return f"{grader.name}/{grader.version}"
