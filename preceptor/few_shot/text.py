"""Grids as text, each on one line, and the texts that are made of them.

    Input: 012/345
    Output: 543/210

A student answers with one line, so a grid is one line: rows end in "/", cells stand side by side or have a blank
between them (``separator``), which some tokenizers need to see them one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from preceptor.tasks import FewShotTask, Grid, GridPair

# What stands before an output; behind its last occurrence begins what is to be learnt.
MARKER = "Output:"

_FENCE = re.compile(r"\A```\w*\n(.*?)\n?```\Z", re.DOTALL)
_LABEL = re.compile(r"\A[A-Za-z][A-Za-z ]{0,30}[0-9]?:\s*")
_ROW = re.compile(r"\[?[ \t]*([0-9]+|[0-9](?:[ \t]*,[ \t]*[0-9]|[ \t]+[0-9])+)[ \t]*\]?")
_LISTS = re.compile(r"\[\s*\[")
_NOT_DIGITS = re.compile(r"[^0-9]+")


def grid_text(grid: Grid, separator: str = "") -> str:
    """``012/345``, or ``0 1 2/3 4 5`` with a blank as separator."""
    return "/".join(separator.join(map(str, row)) for row in grid)


def read_grid(text: str) -> Grid | None:
    """The grid that ``text`` is, in any of the forms that ``evaluator.graders.grid`` names; None where it is none."""
    text = text.strip()
    if fenced := _FENCE.match(text):
        text = fenced[1].strip()
    text = _LABEL.sub("", text, count=1)
    rows = _from_json(text) if _LISTS.match(text) else _from_lines(text)
    return rows if rows and rows[0] and len({len(row) for row in rows}) == 1 else None


def pair_text(pair: GridPair, separator: str = "") -> str:
    """Two lines, the input's and the output's."""
    return f"Input: {grid_text(pair.input, separator)}\n{MARKER} {grid_text(pair.output, separator)}"


def prompt(demonstrations: Sequence[GridPair], query: Grid, separator: str = "") -> str:
    """What a student is asked: the demonstrations, then the query up to where its output begins."""
    return "\n".join(
        [*(pair_text(pair, separator) for pair in demonstrations), f"Input: {grid_text(query, separator)}\n{MARKER}"]
    )


def document(demonstrations: Sequence[GridPair], held_out: GridPair, separator: str = "") -> str:
    """What a student learns from: a prompt and the output that belongs to it."""
    return f"{prompt(demonstrations, held_out.input, separator)} {grid_text(held_out.output, separator)}"


def task_text(task: FewShotTask, separator: str = "") -> str:
    """What a teacher may see of a task: the demonstrations and the inputs of the queries."""
    shown = [pair_text(pair, separator) for pair in task.demonstrations]
    return "\n".join([*shown, *(f"Query: {grid_text(query.input, separator)}" for query in task.queries)])


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
