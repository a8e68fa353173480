"""ARC's files in and out. Three layouts, told apart by what is in them:

* Kaggle's two files: ``challenges.json``, ``{name: {"train": [{"input", "output"}], "test": [{"input"}]}}``, and
  ``solutions.json``, ``{name: [output, ...]}`` in the order of the tests
* one task as a file, ``{"train": [...], "test": [{"input", "output"}]}``, named by the file
* a folder of such files

One task that is no task is left out, each with its place, and the others go on; a file that is none of these is a
problem as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.few_shot.grids import grid_fault
from preceptor.json_places import JsonPlaces
from preceptor.limits import MAX_NAME_CHARACTERS, MAX_PAIRS, MAX_TASKS
from preceptor.task_problems import (
    InvalidJson,
    Place,
    Problem,
    field_name,
    kind,
    parse_json,
    read_text,
    require_file,
    shown,
)
from preceptor.tasks import FewShotTask, Grid, GridPair


@dataclass(frozen=True, slots=True)
class ReadFewShot:
    """A task and where it stands."""

    task: FewShotTask
    file: str
    line: int
    field: str

    @property
    def place(self) -> Place:
        """Where it stands."""
        return Place(self.file, self.line, self.field)


@dataclass(frozen=True, slots=True)
class ArcFile:
    """What was read from one path. ``left_out``: the first fault of each task that is left out; ``problems``: what
    makes a file as a whole unusable; ``notes``: what was passed over, for people."""

    path: str
    tasks: tuple[ReadFewShot, ...]
    left_out: tuple[Problem, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


class _Fault(Exception):
    """What is wrong with a task, at a path of keys and indexes within it."""

    def __init__(self, at: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.at, self.message = at, message


@dataclass(frozen=True, slots=True)
class _File:
    """A file's values and the lines they stand in."""

    path: Path
    values: Any
    places: JsonPlaces

    def problem(self, at: Sequence[str | int], message: str) -> Problem:
        """A problem with the value at a path."""
        return Problem(str(self.path), self.places.line(at), field_name(at), message)


def is_few_shot(value: object) -> bool:
    """Whether the values of a JSON file look like few-shot tasks: tasks by name, or one task."""
    if not isinstance(value, dict):
        return False
    return _is_task(value) or (bool(value) and any(_is_task(task) for task in value.values()))


def read_arc(path: Path, solutions: Path | None = None, *, outputs_needed: bool = True) -> ArcFile:
    """All tasks of a file or a folder, in the order of the file, of a folder by name.

    ``outputs_needed``: a task with a query whose output is not known is left out.
    Raises PreceptorError(FILE_NOT_FOUND).
    """
    require_file(path, "task file")
    if solutions is not None:
        require_file(solutions, "file of solutions")
    problems: list[Problem] = []
    answers = _load(solutions, problems) if solutions is not None else None
    if answers is not None and not isinstance(answers.values, dict):
        problems.append(answers.problem((), f"must be an object of outputs by task, is {kind(answers.values)}"))
        answers = None
    tasks: list[ReadFewShot] = []
    left_out: list[Problem] = []
    names: set[str] = set()
    known: dict[tuple[GridPair, ...], str] = {}
    for file, name, at, value in _values(path, problems):
        names.add(name)
        given = answers.values.get(name) if answers is not None else None
        try:
            task = _task(name, value, given, outputs_needed)
            if (other := known.setdefault(task.demonstrations, name)) != name:  # one could be held out
                raise _Fault((), f"has the same demonstrations as {other}")
        except _Fault as fault:
            in_answers = answers is not None and fault.at[:1] == ("solutions",)
            where = answers if answers is not None and in_answers else file
            left_out.append(where.problem((name, *fault.at[1:]) if in_answers else (*at, *fault.at), fault.message))
        else:
            tasks.append(ReadFewShot(task, str(file.path), file.places.line(at), field_name(at)))
        if len(tasks) >= MAX_TASKS:
            problems.append(Problem(str(path), 0, "", f"has more than {MAX_TASKS} tasks; divide it"))
            break
    if not tasks and not problems:
        problems += left_out or [Problem(str(path), 0, "", "has no tasks")]
    return ArcFile(
        str(path), tuple(tasks), tuple(left_out), tuple(problems), tuple(_notes(path, left_out, answers, names))
    )


def challenges_json(tasks: Sequence[FewShotTask]) -> dict[str, Any]:
    """The tasks as Kaggle's ``challenges.json`` has them; the queries without outputs."""
    return {
        task.name: {
            "train": [{"input": _rows(pair.input), "output": _rows(pair.output)} for pair in task.demonstrations],
            "test": [{"input": _rows(pair.input)} for pair in task.queries],
        }
        for task in tasks
    }


def solutions_json(tasks: Sequence[FewShotTask]) -> dict[str, Any]:
    """The outputs of the queries as Kaggle's ``solutions.json`` has them; tasks with an unknown one are not in it."""
    return {
        task.name: [_rows(pair.output) for pair in task.queries]
        for task in tasks
        if all(pair.output for pair in task.queries)
    }


def _rows(grid: Grid) -> list[list[int]]:
    return [list(row) for row in grid]


def _is_task(value: object) -> bool:
    return isinstance(value, dict) and {"train", "test"} <= value.keys()


def _values(path: Path, problems: list[Problem]) -> Iterator[tuple[_File, str, tuple[str, ...], Any]]:
    """Every task's file, name, place in the file and value."""
    for one in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        file = _load(one, problems)
        if file is None:
            continue
        if not isinstance(file.values, dict):
            problems.append(file.problem((), f"must be an object of tasks by name, is {kind(file.values)}"))
        elif _is_task(file.values):
            yield file, one.stem, (), file.values
        elif path.is_dir() or not is_few_shot(file.values):
            problems.append(file.problem((), 'must be a task or tasks by name: {"train": [...], "test": [...]}'))
        else:
            for name, value in file.values.items():
                yield file, name, (name,), value


def _load(path: Path, problems: list[Problem]) -> _File | None:
    text = read_text(path, lambda file, line, field, message: problems.append(Problem(file, line, field, message)))
    if text is None:
        return None
    try:
        return _File(path, parse_json(text), JsonPlaces(text))
    except InvalidJson as error:
        problems.append(Problem(str(path), error.line, "", str(error)))
        return None


def _task(name: str, value: object, solutions: object, outputs_needed: bool) -> FewShotTask:
    """Raises _Fault; a path that begins with "solutions" is one in that file."""
    if not 1 <= len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
        raise _Fault((), f"must have a name of 1..{MAX_NAME_CHARACTERS} printable characters")
    if not isinstance(value, dict):
        raise _Fault((), f"must be an object with train and test, is {kind(value)}")
    train, test = (_list(value, key) for key in ("train", "test"))
    demonstrations = tuple(_pair(pair, ("train", at), output_needed=True) for at, pair in enumerate(train))
    queries = tuple(_pair(pair, ("test", at), output_needed=False) for at, pair in enumerate(test))
    if solutions is not None:
        queries = _solved(queries, solutions)
    for at, query in enumerate(queries):
        if outputs_needed and not query.output:
            raise _Fault(("test", at, "output"), "is missing, and no solution gives it")
    return FewShotTask(name, demonstrations, queries)


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    found = value.get(key)
    if not isinstance(found, list) or not found:
        problem = (
            "is missing" if key not in value else "is empty" if found == [] else f"must be a list, is {kind(found)}"
        )
        raise _Fault((key,), problem)
    if len(found) > MAX_PAIRS:
        raise _Fault((key,), f"has {len(found)} pairs; at most {MAX_PAIRS} are allowed")
    return found


def _pair(value: object, at: tuple[str | int, ...], *, output_needed: bool) -> GridPair:
    if not isinstance(value, dict):
        raise _Fault(at, f"must be an object with input and output, is {kind(value)}")
    for key in ("input", "output") if output_needed else ("input",):
        if key not in value:
            raise _Fault((*at, key), "is missing")
    output = value.get("output")
    return GridPair(_grid(value["input"], (*at, "input")), _grid(output, (*at, "output")) if output is not None else ())


def _solved(queries: tuple[GridPair, ...], solutions: object) -> tuple[GridPair, ...]:
    """The queries with the outputs of the solutions. Raises _Fault, also where a query's own output differs."""
    if not isinstance(solutions, list):
        raise _Fault(("solutions",), f"must be a list of outputs, is {kind(solutions)}")
    if len(solutions) != len(queries):
        raise _Fault(("solutions",), f"has {len(solutions)} outputs for {len(queries)} tests")
    outputs = [_grid(grid, ("solutions", at)) for at, grid in enumerate(solutions)]
    for at, (query, output) in enumerate(zip(queries, outputs, strict=True)):
        if query.output and query.output != output:
            raise _Fault(("solutions", at), "differs from the output that the task has")
    return tuple(GridPair(query.input, output) for query, output in zip(queries, outputs, strict=True))


def _grid(value: object, at: tuple[str | int, ...]) -> Grid:
    if not isinstance(value, list):
        raise _Fault(at, f"must be a list of rows, is {kind(value)}")
    for place, row in enumerate(value):
        if not isinstance(row, list):
            raise _Fault((*at, place), f"must be a list of colours, is {kind(row)}")
        for column, cell in enumerate(row):
            if isinstance(cell, bool) or not isinstance(cell, int):
                raise _Fault((*at, place, column), f"must be a colour 0..9, is {shown(cell)}")
    if fault := grid_fault(value):
        raise _Fault(at, fault)
    return tuple(tuple(row) for row in value)


def _notes(path: Path, left_out: Sequence[Problem], answers: _File | None, names: set[str]) -> Iterator[str]:
    if left_out:
        first = "; ".join(map(str, left_out[:3])) + ("; ..." if len(left_out) > 3 else "")
        yield f"{path}: {len(left_out)} of {len(names)} tasks left out ({first})"
    if answers is not None and (strange := sorted(answers.values.keys() - names)):
        yield f"{answers.path}: {len(strange)} solutions of tasks that {path} does not have ({', '.join(strange[:3])})"
