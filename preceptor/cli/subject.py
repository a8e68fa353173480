"""What self-edits are evaluated on by hand: one passage of a file or of the world, read as a run would read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from preceptor.config import RunConfig, load_config
from preceptor.errors import PreceptorError
from preceptor.question_faults import answer_fault
from preceptor.task_files import ReadPassage, read_probes, read_replay, read_task_file
from preceptor.task_problems import Problem, raise_problems
from preceptor.task_sources import divided, gather_tasks, passages_of
from preceptor.tasks import Bank, Passage, Question

if TYPE_CHECKING:
    from preceptor.v1.types_pb2 import Task

# So many titles are shown to choose from.
SHOWN_TITLES = 8
WORLD = "almanac"


@dataclass(frozen=True, slots=True)
class Subject:
    """A passage with its questions in their banks, and what the student is asked and shown beside it."""

    passage: Passage
    probes: tuple[Question, ...]
    replay_documents: tuple[str, ...]
    notes: tuple[str, ...]

    def task(self) -> Task:
        """As the evaluator is sent it."""
        from preceptor.convert import task_to_proto

        task = task_to_proto(self.passage)
        task.ClearField("reference_edits")
        return task


def read_config(config: Path | None, overrides: Sequence[str], task: str | None, world: str | None) -> RunConfig:
    """The config, with its tasks from ``task`` (a path) or ``world`` where one is given.

    Raises PreceptorError(FILE_NOT_FOUND, BAD_CONFIG, INVALID_REQUEST).
    """
    if task is not None:
        source = ["tasks.world=", f"tasks.path={json.dumps(task)}"]
    elif world is not None:
        name, colon, number = world.partition(":")
        if name != WORLD or (colon and not number):
            raise PreceptorError(
                "INVALID_REQUEST", f"{world!r} is not {WORLD} or {WORLD}:NUMBER, e.g. {WORLD}:3", field="--world"
            )
        source = ["tasks.path=", f"tasks.world={WORLD}"]
    else:
        source = []
    return load_config(config, [*overrides, *source])


def read_subject(config: RunConfig, passage: str, bank: Bank) -> Subject:
    """The passage (a title, or a number counted from 1) of the config's tasks, with at least one question in ``bank``.

    Raises PreceptorError(FILE_NOT_FOUND, BAD_TASK_FILE, INVALID_REQUEST).
    """
    if config.tasks.world:
        return _of_world(config, passage)
    tasks = config.tasks
    file = read_task_file(Path(tasks.path or ""), answers_needed=config.reward.needs_answers)
    file.raise_problems()
    chosen = _chosen(file.passages, passage, file.path)
    notes = list(file.notes) if len(file.passages) == 1 else []  # of many, most are about others
    found = chosen.passage
    if not chosen.named_banks:
        found = divided(found, config.seed)
        counts = ", ".join(f"{len(found.questions_of(one))} {one}" for one in Bank if found.questions_of(one))
        notes.append(f"its questions name no bank; they are divided by seed {config.seed}, as in a run: {counts}")
    raise_problems(file.path, _faults(chosen, found, bank, config))
    return Subject(
        passage=found,
        probes=read_probes(Path(tasks.probes_path)) if tasks.probes_path else (),
        replay_documents=read_replay(Path(tasks.replay_path)) if tasks.replay_path else (),
        notes=tuple(notes),
    )


def _of_world(config: RunConfig, passage: str) -> Subject:
    number = int(passage) if passage.isascii() and passage.isdigit() and len(passage) < 6 else 0
    if passage and not number:
        raise PreceptorError(
            "INVALID_REQUEST",
            f"{passage!r} is no number; the world's passages are counted from 1, e.g. --world {WORLD}:3",
            field="--passage",
        )
    count = number or 1
    tasks = gather_tasks(
        config.model_copy(
            update={"tasks": config.tasks.model_copy(update={"train": count, "heldout": 0, "heldout_path": None})}
        )
    )
    return Subject(passages_of(tasks.train)[count - 1], tasks.probes, tasks.replay_documents, tasks.notes)


def _chosen(passages: Sequence[ReadPassage], wanted: str, path: str) -> ReadPassage:
    if not wanted:
        if len(passages) == 1:
            return passages[0]
        raise _no_choice(f"has {len(passages)} passages; choose one", passages, path)
    titled = [read for read in passages if read.passage.title == wanted] or [
        read for read in passages if read.passage.title.casefold() == wanted.casefold()
    ]
    if len(titled) == 1:
        return titled[0]
    if titled:
        numbers = ", ".join(str(passages.index(read) + 1) for read in titled[:SHOWN_TITLES])
        raise PreceptorError(
            "INVALID_REQUEST",
            f"has {len(titled)} passages with the title {wanted!r}; choose one by its number: {numbers}"
            + (" ..." if len(titled) > SHOWN_TITLES else ""),
            file=path,
            field="--passage",
        )
    if wanted.isascii() and wanted.isdigit() and 1 <= int(wanted[:9]) <= len(passages):
        return passages[int(wanted) - 1]
    raise _no_choice(f"has no passage {wanted!r}", passages, path)


def _no_choice(problem: str, passages: Sequence[ReadPassage], path: str) -> PreceptorError:
    shown = [f"\n  {number} {read.passage.title}" for number, read in enumerate(passages[:SHOWN_TITLES], 1)]
    if len(passages) > SHOWN_TITLES:
        shown.append(f"\n  ... {len(passages)} (`preceptor tasks check {path}` lists all)")
    message = f"{problem} by --passage NUMBER or TITLE:{''.join(shown)}\n "
    return PreceptorError("INVALID_REQUEST", message, file=path, field="--passage")


def _faults(read: ReadPassage, passage: Passage, bank: Bank, config: RunConfig) -> list[Problem]:
    """What makes the bank's questions no measurement."""
    if not passage.questions_of(bank):
        others = ", ".join(one for one in Bank if passage.questions_of(one))
        return [Problem.at(read.place, f"has no question in the bank {bank}, only in {others}")]
    return [
        Problem.at(place(), fault)
        for question, place in zip(passage.questions, read.questions_at, strict=True)
        if question.bank is bank and (fault := answer_fault(question, config.answers.max_new_tokens))
    ]
