"""From a run's config to its few-shot tasks: which file is one, whose solutions are where, which task is held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from preceptor.config import RunConfig
from preceptor.errors import PreceptorError
from preceptor.few_shot.arc_files import ArcFile, ReadFewShot, is_few_shot, read_arc
from preceptor.names import derived_seed
from preceptor.question_faults import grid_answer_fault
from preceptor.task_problems import (
    InvalidJson,
    Place,
    Problem,
    join,
    parse_json,
    raise_problems,
    read_text,
    require_file,
)
from preceptor.tasks import FewShotTask, Task

BANKS = "none: the queries of few-shot tasks are what is asked"
# As Kaggle names its two files: arc-agi_training_challenges.json and arc-agi_training_solutions.json.
_CHALLENGES, _SOLUTIONS = "challenges", "solutions"
# Of a folder of tasks, looked at to know that it is one.
_LOOKED_AT = 3


@dataclass(frozen=True, slots=True)
class FewShotTasks:
    """Tasks of a run. ``places`` tells where each stands, by its name."""

    train: tuple[FewShotTask, ...]
    heldout: tuple[FewShotTask, ...]
    notes: tuple[str, ...]
    places: dict[str, tuple[str, int]]


def holds_few_shot(path: Path) -> bool:
    """Whether a file or folder holds few-shot tasks. What cannot be read holds none: whoever reads it says why.

    Raises PreceptorError(FILE_NOT_FOUND).
    """
    require_file(path, "task file")
    if path.is_dir():
        try:
            some = list(islice(path.glob("*.json"), _LOOKED_AT))
        except OSError:
            return False
        return any(_is_few_shot(one) for one in some)
    return path.suffix == ".json" and _is_few_shot(path)


def solutions_of(path: Path, given: str | None) -> Path | None:
    """The file of solutions that belongs to a file of challenges: the one that is named, or the one beside it."""
    if given:
        return Path(given)
    beside = path.with_name(path.name.replace(_CHALLENGES, _SOLUTIONS))
    return beside if path.is_file() and beside != path and beside.is_file() else None


def read_few_shot(path: Path, solutions: str | None, *, outputs_needed: bool = True) -> ArcFile:
    """The tasks of a path, with the solutions that belong to it. Raises PreceptorError(FILE_NOT_FOUND)."""
    return read_arc(path, solutions_of(path, solutions), outputs_needed=outputs_needed)


def gather_few_shot(config: RunConfig) -> FewShotTasks:
    """A run's few-shot tasks from files. Tasks that are none are left out, with a note.

    Raises PreceptorError(FILE_NOT_FOUND, BAD_TASK_FILE, BAD_CONFIG).
    """
    tasks = config.tasks
    path = Path(tasks.path or "")
    refuse_written(config)
    file = read_few_shot(path, tasks.solutions_path)
    raise_problems(file.path, file.problems)
    own = _shuffled(file.tasks, config.seed)
    if tasks.heldout_path:
        heldout = heldout_few_shot(config)
        shown = {read.task.demonstrations: read.place for read in own}
        raise_problems(
            file.path,
            [
                Problem.at(Place(*heldout.places[task.name], task.name), f"is also a training task ({place})")
                for task in heldout.heldout
                if (place := shown.get(task.demonstrations))
            ],
        )
        train = own[: tasks.train]
        chosen, notes, places = heldout.heldout, heldout.notes, heldout.places
    else:
        count = heldout_count(len(own), tasks.train, tasks.heldout)
        train, rest = own[count:][: tasks.train], own[:count]
        chosen, notes, places = tuple(read.task for read in rest), (), _places(rest)
        if count < tasks.heldout:
            notes = (
                f"{file.path} has {len(own)} usable tasks: {len(train)} to train on and {count} held out"
                f" (asked for: {tasks.train} and {tasks.heldout})",
            )
        _raise_long_answers(file.path, rest, config)
    _raise_long_answers(file.path, train, config)
    return FewShotTasks(tuple(read.task for read in train), chosen, (*file.notes, *notes), _places(train) | places)


def heldout_few_shot(config: RunConfig) -> FewShotTasks:
    """The held-out tasks of ``tasks.heldout_path``, and no others. Raises as ``gather_few_shot``."""
    tasks = config.tasks
    path = Path(tasks.heldout_path or "")
    if not tasks.heldout_solutions_path and not holds_few_shot(path):
        raise PreceptorError("BAD_CONFIG", f"{path} holds no few-shot tasks, as the training tasks are", field=_HELDOUT)
    file = read_few_shot(path, tasks.heldout_solutions_path)
    raise_problems(file.path, file.problems)
    reads = _shuffled(file.tasks, config.seed)[: tasks.heldout]
    _raise_long_answers(file.path, reads, config)
    return FewShotTasks((), tuple(read.task for read in reads), file.notes, _places(reads))


def few_shot_only(tasks: Sequence[Task]) -> tuple[FewShotTask, ...]:
    """The tasks where only few-shot tasks will do. Raises PreceptorError(BAD_CONFIG)."""
    found = tuple(task for task in tasks if isinstance(task, FewShotTask))
    if len(found) < len(tasks):
        raise PreceptorError("BAD_CONFIG", "has passages, and this is for few-shot tasks", field="tasks")
    return found


def refuse_written(config: RunConfig) -> None:
    """Few-shot tasks need no questions to be written, and no canary: their outputs are known.

    Raises PreceptorError(BAD_CONFIG).
    """
    if config.tasks.questions == "written":
        raise PreceptorError("BAD_CONFIG", "few-shot tasks have queries; none are written", field="tasks.questions")
    if config.tasks.canary:
        raise PreceptorError("BAD_CONFIG", "few-shot tasks have outputs and need no canary", field="tasks.canary")


def heldout_count(tasks: int, train: int, heldout: int) -> int:
    """How many of ``tasks`` are held out where ``train`` and ``heldout`` are asked for.

    As many as asked if there are enough for both; else in the same proportion, at least one each; one task alone is
    for training.
    """
    if heldout == 0 or tasks < 2:
        return 0
    if tasks >= train + heldout:
        return heldout
    return min(max(round(tasks * heldout / (train + heldout)), 1), tasks - 1)


_HELDOUT = "tasks.heldout_path"


def _is_few_shot(path: Path) -> bool:
    text = read_text(path, lambda *_: None)
    try:
        return text is not None and is_few_shot(parse_json(text))
    except InvalidJson:
        return False


def _raise_long_answers(path: str, reads: Sequence[ReadFewShot], config: RunConfig) -> None:
    raise_problems(
        path,
        [
            Problem(read.file, read.line, join(read.field, f"test[{number}].output"), fault)
            for read in reads
            for number, query in enumerate(read.task.queries)
            if (fault := grid_answer_fault(query.output, config.answers.max_new_tokens))
        ],
    )


def _places(reads: Sequence[ReadFewShot]) -> dict[str, tuple[str, int]]:
    return {read.task.name: (read.file, read.line) for read in reads}


def _shuffled(reads: Sequence[ReadFewShot], seed: int) -> list[ReadFewShot]:
    """In the seed's order, whatever the order in the file."""
    order = sorted(reads, key=lambda read: read.task.name)
    random.Random(derived_seed("split", seed)).shuffle(order)
    return order
