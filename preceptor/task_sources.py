"""From a run's config to its tasks: a world that ships, or people's own files.

``gather_tasks(config)`` is a pure function of the config and the files it names: the seed decides which passages are
held out and, where questions name no bank, which of them are sealed. A passage's questions are divided once:

* for training, half of them (rounded up) give rewards and the others are sealed; a single one gives rewards;
* held out, all are sealed, as nothing is ever rewarded there.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from preceptor.config import RunConfig
from preceptor.names import derived_seed
from preceptor.task_files import ReadPassage, TaskFile, read_probes, read_replay, read_task_file
from preceptor.task_problems import Problem, raise_problems
from preceptor.tasks import Bank, Passage, Question


@dataclass(frozen=True, slots=True)
class RunTasks:
    """What a run learns from and is measured on. ``notes`` are for people; ``places`` tells where each text of a
    file stands (file, line or 0), for errors that only a service can find."""

    train: tuple[Passage, ...]
    heldout: tuple[Passage, ...]
    probes: tuple[Question, ...]
    replay_documents: tuple[str, ...]
    notes: tuple[str, ...] = ()
    places: Mapping[str, tuple[str, int]] = field(default_factory=dict)


def gather_tasks(config: RunConfig) -> RunTasks:
    """All tasks of a run. Raises PreceptorError(FILE_NOT_FOUND, BAD_TASK_FILE)."""
    found = _from_world(config) if config.tasks.world else _from_files(config)
    if config.tasks.probes_path:
        found = replace(found, probes=read_probes(Path(config.tasks.probes_path)))
    if config.tasks.replay_path:
        found = replace(found, replay_documents=read_replay(Path(config.tasks.replay_path)))
    return found


def _from_world(config: RunConfig) -> RunTasks:
    # Imported here: people with files of their own need no world.
    from worlds.almanac.memory import replay_documents, retention_probes
    from worlds.almanac.passages import passages

    tasks = config.tasks
    notes: tuple[str, ...] = ()
    heldout: Sequence[Passage] = passages(config.seed, "heldout", tasks.heldout)
    if tasks.heldout_path:
        file = read_task_file(Path(tasks.heldout_path))
        file.raise_problems()
        heldout = _sealed(_shuffled(file.passages, config.seed)[: tasks.heldout])
        notes = file.notes
    return RunTasks(
        train=tuple(passages(config.seed, "train", tasks.train)),
        heldout=tuple(heldout),
        probes=tuple(retention_probes()),
        replay_documents=tuple(replay_documents()),
        notes=notes,
    )


def _from_files(config: RunConfig) -> RunTasks:
    tasks = config.tasks
    file = read_task_file(Path(tasks.path or ""))
    other = read_task_file(Path(tasks.heldout_path)) if tasks.heldout_path else None
    raise_problems(file.path, (*file.problems, *(other.problems + _overlap(file, other) if other else ())))
    own = _shuffled(file.passages, config.seed)
    notes = [*file.notes, *(other.notes if other else ())]
    if other:
        train, heldout = own[: tasks.train], _shuffled(other.passages, config.seed)[: tasks.heldout]
    else:
        count = heldout_count(len(own), tasks.train, tasks.heldout)
        train, heldout = own[count:][: tasks.train], own[:count]
        if count < tasks.heldout:
            notes.append(
                f"{file.path} has {len(own)} passages: {len(train)} to train on and {count} held out"
                f" (asked for: {tasks.train} and {tasks.heldout})"
            )
    single = sum(1 for read in train if not read.named_banks and len(read.passage.questions) == 1)
    if single:
        notes.append(f"training passages with one question only: {single}; it gives the reward and none is sealed")
    return RunTasks(
        train=_rewarded(train, config.seed),
        heldout=_sealed(heldout),
        probes=(),
        replay_documents=(),
        notes=tuple(notes),
        places={read.passage.text: (read.file, read.line) for read in (*train, *heldout)},
    )


def heldout_count(passages: int, train: int, heldout: int) -> int:
    """How many of ``passages`` are held out where ``train`` and ``heldout`` are asked for.

    As many as asked if there are enough for both; else in the same proportion, at least one each; one passage alone
    is for training.
    """
    if heldout == 0 or passages < 2:
        return 0
    if passages >= train + heldout:
        return heldout
    return min(max(round(passages * heldout / (train + heldout)), 1), passages - 1)


def _overlap(file: TaskFile, other: TaskFile) -> tuple[Problem, ...]:
    """Held-out passages that are trained on: a measurement on them would mean nothing."""
    own = {read.passage.text: read for read in file.passages}
    return tuple(
        Problem(read.file, read.line, read.field, f"is also a training passage ({_place(own[read.passage.text])})")
        for read in other.passages
        if read.passage.text in own
    )


def _rewarded(reads: Sequence[ReadPassage], seed: int) -> tuple[Passage, ...]:
    """Training passages, each with at least one question that gives rewards."""
    problems, passages = [], []
    for read in reads:
        passage = read.passage if read.named_banks else _divided(read.passage, seed)
        passages.append(passage)
        if not passage.questions_of(Bank.REWARD):
            problems.append(_lacks(read, "is a training passage without a question of bank reward"))
    raise_problems(reads[0].file, problems)
    return tuple(passages)


def _sealed(reads: Sequence[ReadPassage]) -> tuple[Passage, ...]:
    """Held-out passages, each with at least one sealed question."""
    problems, passages = [], []
    for read in reads:
        passage = read.passage
        if not read.named_banks:
            passage = replace(passage, questions=tuple(replace(q, bank=Bank.SEALED) for q in passage.questions))
        passages.append(passage)
        if not passage.questions_of(Bank.SEALED):
            problems.append(_lacks(read, "is a held-out passage without a question of bank sealed"))
    raise_problems(reads[0].file if reads else "", problems)
    return tuple(passages)


def _divided(passage: Passage, seed: int) -> Passage:
    places = list(range(len(passage.questions)))
    random.Random(derived_seed("banks", seed, passage.text)).shuffle(places)
    sealed = set(places[: len(places) // 2])
    return replace(
        passage,
        questions=tuple(
            replace(question, bank=Bank.SEALED if place in sealed else Bank.REWARD)
            for place, question in enumerate(passage.questions)
        ),
    )


def _shuffled(reads: Sequence[ReadPassage], seed: int) -> list[ReadPassage]:
    """In the seed's order, whatever the order in the file."""
    order = sorted(reads, key=lambda read: read.passage.text)
    random.Random(derived_seed("split", seed)).shuffle(order)
    return order


def _lacks(read: ReadPassage, message: str) -> Problem:
    return Problem(read.file, read.line, read.field, message)


def _place(read: ReadPassage) -> str:
    return f"{read.file}:{read.line}" if read.line else read.file
