"""Grids: many ways to write one, one way to be right."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluator.graders.grader import Given, Verdict
from evaluator.graders.grid import GridMatch, attempts
from evaluator.graders.rack import Graders
from preceptor.few_shot.text import read_grid
from preceptor.tasks import Grid, Question

GRID: Grid = ((0, 1, 2), (3, 4, 5))
GRIDS = st.integers(1, 6).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(0, 9), min_size=width, max_size=width).map(tuple), min_size=1, max_size=6
    ).map(tuple)
)


def lines(grid: Grid, cells: str = "", rows: str = "\n") -> str:
    return rows.join(cells.join(map(str, row)) for row in grid)


WAYS = (
    lines,
    lambda grid: lines(grid, " "),
    lambda grid: lines(grid, ","),
    lambda grid: lines(grid, ", ", "\r\n"),
    lambda grid: lines(grid, rows="/"),
    lambda grid: lines(grid, rows=" / "),
    lambda grid: json.dumps(grid),
    lambda grid: json.dumps(grid, indent=1),
    lambda grid: "\n".join(json.dumps(row) for row in grid),
    lambda grid: f"\n  {lines(grid)} \n\n",
    lambda grid: f"```\n{lines(grid)}\n```",
    lambda grid: f"```json\n{json.dumps(grid)}\n```",
    lambda grid: f"Output: {lines(grid)}",
    lambda grid: f"Test output 1:\n{lines(grid, ' ')}",
)


def grade(gold: str, answer: str, *aliases: str) -> Verdict:
    return GridMatch().grade([Given(Question("?", gold, aliases=aliases), answer)])[0]


@given(GRIDS, st.sampled_from(range(len(WAYS))), st.sampled_from(range(len(WAYS))))
def test_a_grid_is_right_however_it_and_the_gold_are_written(grid: Grid, way: int, other: int) -> None:
    assert read_grid(WAYS[way](grid)) == grid
    assert grade(WAYS[way](grid), WAYS[other](grid)) == Verdict(True)


@given(GRIDS, GRIDS)
def test_another_shape_or_cell_is_surely_wrong(grid: Grid, other: Grid) -> None:
    assert grade(lines(grid), lines(other)) == Verdict(grid == other)


@given(GRIDS, st.data())
def test_one_changed_cell_is_wrong(grid: Grid, data: st.DataObject) -> None:
    row, column = data.draw(st.integers(0, len(grid) - 1)), data.draw(st.integers(0, len(grid[0]) - 1))
    changed = [list(one) for one in grid]
    changed[row][column] = (changed[row][column] + data.draw(st.integers(1, 9))) % 10
    assert grade(lines(grid), lines(tuple(map(tuple, changed)))) == Verdict(False)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "  \n ",
        "012\n34",
        "012 345",
        "10 3\n4 5",
        "01 23\n45 67",
        "012\n\n345",
        "The output is\n012\n345",
        "012\n345\nthat is it",
        "Output: Output: 012/345",
        "012/345/",
        "-1 2",
        "1.0",
        "[]",
        "[[]]",
        "[[0, 1, 2], [3, 4]]",
        "[[0, 1, 2], [3, 4, 5]",
        "[[0, 1, 10]]",
        "[[true, false]]",
        "[[0.0]]",
        "[[0, 1, 2], 3]",
        "[[[0]]]",
        '[["0"]]',
        "[[NaN]]",
        "[" * 100_000,
        "[[" + "9" * 5000 + "]]",
        "²³",
        "\u0661\u0662",
        "\ud800",
    ],
)
def test_what_is_no_grid_is_not_read(answer: str) -> None:
    assert read_grid(answer) is None
    assert grade(lines(GRID), answer) == Verdict(False)


@given(st.text(alphabet="0123 ,/[]\n-`:a", max_size=40), st.text(max_size=20))
def test_any_text_gets_a_verdict(answer: str, gold: str) -> None:
    verdict = grade(gold, answer)
    assert verdict.sure
    assert not (verdict.right and read_grid(gold) is None)


def test_two_attempts_with_the_line_between_them_three_are_too_many() -> None:
    right, wrong = lines(GRID), "9/9"
    assert grade(right, f"{wrong}\n---\n{right}").right
    assert grade(right, f"{right}\n --- \n{wrong}").right
    assert not grade(right, f"{wrong}\n---\n9").right
    assert not grade(right, f"{wrong}\n---\n{right}\n---\n8").right
    assert not grade(right, f"{right}\n\n{wrong}").right
    assert not grade(right, f"{right}\n---\nor nothing").right
    assert attempts(f"{wrong}\n---\n{right}") == [((9,), (9,)), GRID]


def test_an_alias_is_right() -> None:
    assert grade("01/10", "[[1, 0], [0, 1]]", "10\n01").right


def test_a_gold_that_is_no_grid_matches_nothing() -> None:
    assert grade("blue", "blue") == Verdict(False)
    assert grade("", "") == Verdict(False)


def test_the_rack_has_it() -> None:
    assert isinstance(Graders().named("grid"), GridMatch)


DATA = os.environ.get("PRECEPTOR_TEST_DATA", "")


@pytest.mark.skipif(not (Path(DATA) / "arc/solutions.json").is_file(), reason="PRECEPTOR_TEST_DATA has no arc")
def test_every_grid_of_arc_is_itself_and_no_other() -> None:
    solutions = json.loads((Path(DATA) / "arc/solutions.json").read_text())
    challenges = json.loads((Path(DATA) / "arc/challenges.json").read_text())
    for name, outputs in solutions.items():
        for output, test in zip(outputs, challenges[name]["test"], strict=True):
            gold = json.dumps(output)
            grid, question = tuple(map(tuple, output)), tuple(map(tuple, test["input"]))
            assert all(grade(gold, way(grid)).right for way in WAYS)
            assert grade(gold, lines(question)).right == (question == grid)
            transposed = tuple(zip(*grid, strict=True))
            assert grade(gold, lines(transposed)).right == (transposed == grid)
