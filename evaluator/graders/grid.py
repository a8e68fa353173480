"""Grids of digits, as few-shot tasks (ARC) ask for: read liberally, compared exactly. No model.

What is read as a grid, each row being one line:

    012        0 1 2        0,1,2        012/345        [[0, 1, 2],
    345        3 4 5        3,4,5                        [3, 4, 5]]

with one label before it ("Output:"), a code fence around it, and blanks and empty lines at its ends. Cells are single
digits: "10 3" is no row. Everything else is unreadable, and that is wrong: rows of different lengths, words beside
the grid, and two grids without a line ``---`` between them. With that line two attempts may be given, as ARC counts
them (Chollet 2019; SEAL, Zweiger et al. 2025); a third makes all of them wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from evaluator.graders.grader import Given, Verdict
from preceptor.few_shot.text import read_grid
from preceptor.few_shot.views import ATTEMPTS
from preceptor.tasks import Grid

BETWEEN_ATTEMPTS = "\n---\n"

_BETWEEN = re.compile(r"^[ \t]*---[ \t]*$", re.MULTILINE)


class GridMatch:
    """Right where one of at most two attempts has the shape and every cell of the gold grid or of an alias.

    A gold answer that is no grid matches nothing; requests with one are refused before anything is evaluated.
    """

    name = "grid"
    version = "1"
    waits = False

    def grade(self, given: Sequence[Given]) -> list[Verdict]:
        """Whether the grids are the same. Always sure."""
        return [Verdict(_is_right(item)) for item in given]


def attempts(answer: str) -> list[Grid]:
    """The grids of an answer, in order; none where one is unreadable or there are too many."""
    found = [read_grid(part) for part in _BETWEEN.split(answer)]
    return [grid for grid in found if grid is not None] if None not in found and len(found) <= ATTEMPTS else []


def _is_right(given: Given) -> bool:
    golds = {read_grid(gold) for gold in (given.question.answer, *given.question.aliases)} - {None}
    return not golds.isdisjoint(attempts(given.answer))
