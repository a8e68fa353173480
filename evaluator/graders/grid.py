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

import json
import re
from collections import Counter
from collections.abc import Sequence

from evaluator.graders.grader import Given, Verdict
from preceptor.tasks import Grid

ATTEMPTS = 2

_BETWEEN_ATTEMPTS = re.compile(r"^[ \t]*---[ \t]*$", re.MULTILINE)
_FENCE = re.compile(r"\A```\w*\n(.*?)\n?```\Z", re.DOTALL)
_LABEL = re.compile(r"\A[A-Za-z][A-Za-z ]{0,30}[0-9]?:\s*")
_ROW = re.compile(r"\[?[ \t]*([0-9]+|[0-9](?:[ \t]*,[ \t]*[0-9]|[ \t]+[0-9])+)[ \t]*\]?")
_LISTS = re.compile(r"\[\s*\[")
_NOT_DIGITS = re.compile(r"[^0-9]+")


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


def read_grid(text: str) -> Grid | None:
    """The grid that ``text`` is; None where it is none, or more than one."""
    text = text.strip()
    if fenced := _FENCE.match(text):
        text = fenced[1].strip()
    text = _LABEL.sub("", text, count=1)
    rows = _from_json(text) if _LISTS.match(text) else _from_lines(text)
    return rows if rows and rows[0] and len({len(row) for row in rows}) == 1 else None


def attempts(answer: str) -> list[Grid]:
    """The grids of an answer, in order; none where one is unreadable or there are too many."""
    found = [read_grid(part) for part in _BETWEEN_ATTEMPTS.split(answer)]
    return [grid for grid in found if grid is not None] if None not in found and len(found) <= ATTEMPTS else []


def vote(answers: Sequence[str]) -> list[Grid]:
    """The two most frequent grids of sampled answers of one grid each, the most frequent first.

    Ties go to the grid that came first; unreadable answers have no vote. Fewer than two where fewer were said.
    """
    counted = Counter(grid for answer in answers if (grid := read_grid(answer)) is not None)
    return [grid for grid, _ in counted.most_common(ATTEMPTS)]  # equal counts stay in the order of their first vote


def _is_right(given: Given) -> bool:
    golds = {read_grid(gold) for gold in (given.question.answer, *given.question.aliases)} - {None}
    return not golds.isdisjoint(attempts(given.answer))


def _from_lines(text: str) -> Grid | None:
    rows = []
    for line in re.split(r"[/\n]", text):
        if (row := _ROW.fullmatch(line.strip())) is None:
            return None
        rows.append(tuple(map(int, _NOT_DIGITS.sub("", row[1]))))
    return tuple(rows)


def _from_json(text: str) -> Grid | None:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not all(isinstance(row, list) and all(type(cell) is int and 0 <= cell <= 9 for cell in row) for row in rows):
        return None
    return tuple(map(tuple, rows))
