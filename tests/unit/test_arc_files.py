"""ARC's files: three layouts in, Kaggle's out; what is no task is named and left out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from preceptor.errors import PreceptorError
from preceptor.few_shot.arc_files import (
    challenges_json,
    is_few_shot,
    read_arc,
    solutions_json,
)

GRID = [[0, 1], [2, 3]]
TASK = {"train": [{"input": GRID, "output": [[1]]}], "test": [{"input": [[5]]}]}
SOLVED = {"train": TASK["train"], "test": [{"input": [[5]], "output": [[6]]}]}
# The same with another demonstration: a task that has those of another one is left out.
OTHER = {"train": [{"input": GRID, "output": [[2]]}], "test": TASK["test"]}
OTHER_SOLVED = {"train": OTHER["train"], "test": SOLVED["test"]}
ARC = Path(os.environ.get("PRECEPTOR_TEST_DATA", "")) / "arc"


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=1))
    return path


def test_kaggles_two_files_are_tasks_with_outputs(tmp_path: Path) -> None:
    found = read_arc(write(tmp_path / "c.json", {"a": TASK, "b": TASK}), write(tmp_path / "s.json", {"a": [[[6]]]}))
    assert [read.task.name for read in found.tasks] == ["a"]
    assert found.tasks[0].task.queries[0].output == ((6,),)
    assert found.tasks[0].task.demonstrations[0].input == ((0, 1), (2, 3))
    (fault,) = found.left_out
    assert (fault.file, fault.field) == (str(tmp_path / "c.json"), "b.test[0].output")
    assert fault.line > found.tasks[0].line
    assert "1 of 2 tasks left out" in found.notes[0]


def test_one_task_a_file_and_a_folder_of_them(tmp_path: Path) -> None:
    write(tmp_path / "x.json", SOLVED)
    assert [read.task.name for read in read_arc(tmp_path / "x.json").tasks] == ["x"]
    write(tmp_path / "a.json", OTHER_SOLVED)
    write(tmp_path / "z.json", "[]")
    found = read_arc(tmp_path)
    assert [read.task.name for read in found.tasks] == ["a", "x"]
    assert [(problem.file, problem.message) for problem in found.problems] == [
        (str(tmp_path / "z.json"), "must be an object of tasks by name, is a list")
    ]


def test_a_task_with_the_demonstrations_of_another_is_left_out(tmp_path: Path) -> None:
    found = read_arc(write(tmp_path / "c.json", {"a": SOLVED, "b": SOLVED, "c": OTHER_SOLVED}))
    assert [read.task.name for read in found.tasks] == ["a", "c"]
    assert [(fault.field, fault.message) for fault in found.left_out] == [("b", "has the same demonstrations as a")]


def test_outputs_may_be_missing_where_nobody_needs_them(tmp_path: Path) -> None:
    found = read_arc(write(tmp_path / "c.json", {"a": TASK}), outputs_needed=False)
    assert found.tasks[0].task.queries[0].output == ()
    assert found.left_out == ()


@pytest.mark.parametrize(
    ("task", "field", "message"),
    [
        (7, "bad", "must be an object with train and test, is a number"),
        ({"train": [], "test": SOLVED["test"]}, "bad.train", "is empty"),
        ({"train": TASK["train"]}, "bad.test", "is missing"),
        ({"train": "x", "test": SOLVED["test"]}, "bad.train", "must be a list, is a string"),
        ({"train": [{"input": GRID}], "test": SOLVED["test"]}, "bad.train[0].output", "is missing"),
        ({"train": [3], "test": SOLVED["test"]}, "bad.train[0]", "must be an object with input and output"),
        ({"train": [{"input": [[1, 2], [3]], "output": GRID}], "test": []}, "bad.test", "is empty"),
        ({"train": TASK["train"], "test": [{"input": [[1, 2], [3]]}]}, "bad.test[0].input", "rows of 1 to 2 cells"),
        ({"train": TASK["train"], "test": [{"input": [[1, 10]]}]}, "bad.test[0].input", "has the colour 10"),
        ({"train": TASK["train"], "test": [{"input": [[1, "a"]]}]}, "bad.test[0].input[0][1]", 'is "a"'),
        ({"train": TASK["train"], "test": [{"input": [[True]]}]}, "bad.test[0].input[0][0]", "is true"),
        ({"train": TASK["train"], "test": [{"input": [4]}]}, "bad.test[0].input[0]", "must be a list of colours"),
        ({"train": TASK["train"], "test": [{"input": [[0]] * 31}]}, "bad.test[0].input", "is 31 x 1"),
        ({"train": TASK["train"], "test": [{"input": GRID}]}, "bad.test[0].output", "is missing"),
        ({"train": TASK["train"] * 101, "test": SOLVED["test"]}, "bad.train", "has 101 pairs"),
    ],
)
def test_what_is_no_task_is_named_and_the_rest_goes_on(tmp_path: Path, task: Any, field: str, message: str) -> None:
    found = read_arc(write(tmp_path / "c.json", {"first": SOLVED, "bad": task, "last": OTHER_SOLVED}))
    assert [read.task.name for read in found.tasks] == ["first", "last"]
    assert found.problems == ()
    (fault,) = found.left_out
    assert fault.field == field
    assert message in fault.message
    assert fault.line > 1
    assert "1 of 3 tasks left out" in found.notes[0]
    assert field in found.notes[0]


@pytest.mark.parametrize(
    ("solutions", "field", "message"),
    [
        ({"a": [[[6]], [[7]]]}, "a", "has 2 outputs for 1 tests"),
        ({"a": [[[6, 60]]]}, "a[0]", "has the colour 60"),
        ({"a": [[[6], [1, 2]]]}, "a[0]", "rows of 1 to 2 cells"),
        ({"a": [6]}, "a[0]", "must be a list of rows"),
        ({"a": {"0": [[6]]}}, "a", "must be a list of outputs"),
    ],
)
def test_a_wrong_solution_is_named_in_its_own_file(tmp_path: Path, solutions: Any, field: str, message: str) -> None:
    found = read_arc(
        write(tmp_path / "c.json", {"a": TASK, "b": SOLVED}), write(tmp_path / "s.json", {**solutions, "c": []})
    )
    assert [read.task.name for read in found.tasks] == ["b"]
    (fault,) = found.left_out
    assert (fault.file, fault.field) == (str(tmp_path / "s.json"), field)
    assert message in fault.message
    assert "1 solutions of tasks" in found.notes[1]


def test_a_solution_may_not_contradict_its_task(tmp_path: Path) -> None:
    found = read_arc(write(tmp_path / "c.json", {"a": SOLVED, "b": SOLVED}), write(tmp_path / "s.json", {"a": [[[7]]]}))
    assert [read.task.name for read in found.tasks] == ["b"]
    assert "differs" in found.left_out[0].message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "is not valid JSON"),
        ("[1, 2]", "must be an object of tasks by name, is a list"),
        ('{"title": "x"}', "must be a task or tasks by name"),
        ("{}", "must be a task or tasks by name"),
    ],
)
def test_a_file_of_another_layout_is_a_problem_as_a_whole(tmp_path: Path, text: str, message: str) -> None:
    found = read_arc(write(tmp_path / "c.json", text))
    assert found.tasks == ()
    assert message in found.problems[0].message


def test_solutions_of_another_layout_are_a_problem(tmp_path: Path) -> None:
    found = read_arc(write(tmp_path / "c.json", {"a": SOLVED}), write(tmp_path / "s.json", [[[[6]]]]))
    assert "must be an object of outputs by task" in found.problems[0].message


def test_a_file_in_which_no_task_is_usable_is_a_problem(tmp_path: Path) -> None:
    found = read_arc(write(tmp_path / "c.json", {"a": TASK}))
    assert [problem.field for problem in found.problems] == ["a.test[0].output"]


@pytest.mark.parametrize("missing", ["c.json", "s.json"])
def test_a_missing_file_is_said_to_be_missing(tmp_path: Path, missing: str) -> None:
    for name in {"c.json", "s.json"} - {missing}:
        write(tmp_path / name, {"a": SOLVED})
    with pytest.raises(PreceptorError, match=missing) as caught:
        read_arc(tmp_path / "c.json", tmp_path / "s.json")
    assert caught.value.reason == "FILE_NOT_FOUND"


def test_few_shot_files_are_told_from_others() -> None:
    assert is_few_shot(TASK)
    assert is_few_shot({"a": TASK, "b": 3})
    assert not is_few_shot({"a": 3})
    assert not is_few_shot({})
    assert not is_few_shot([TASK])


def test_what_was_read_is_written_as_kaggle_has_it(tmp_path: Path) -> None:
    given, answers = {"a": TASK, "b": OTHER}, {"a": [[[6]]], "b": [[[0, 1]]]}
    found = read_arc(write(tmp_path / "c.json", given), write(tmp_path / "s.json", answers))
    tasks = [read.task for read in found.tasks]
    assert challenges_json(tasks) == given
    assert solutions_json(tasks) == answers


@pytest.mark.skipif(not (ARC / "solutions.json").is_file(), reason="PRECEPTOR_TEST_DATA has no arc")
def test_the_real_files_come_out_as_they_went_in() -> None:
    tasks = [read.task for read in read_arc(ARC / "challenges.json", ARC / "solutions.json").tasks]
    assert challenges_json(tasks) == json.loads((ARC / "challenges.json").read_text())
    assert solutions_json(tasks) == json.loads((ARC / "solutions.json").read_text())
