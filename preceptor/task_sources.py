"""From a run's config to its tasks: a world that ships, or people's own files.

``gather_tasks(config)`` is a pure function of the config and the files it names: the seed decides which passages are
held out and, where a passage's questions name no bank, which question is in which. They are divided once:

* for training, a quarter (but at least one) is the sealed bank, as many are the gate, and the others give rewards; of
  two questions one gives rewards and one is sealed; a single one gives rewards;
* held out, all are sealed, as nothing is ever rewarded there.

Which question goes where depends on the seed and the passage's text alone. ``RunTasks.banks`` says how it was done.
Few-shot tasks have no questions to divide (``preceptor.few_shot.sources``). A run has tasks of one kind.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from preceptor.config import RunConfig
from preceptor.errors import PreceptorError
from preceptor.few_shot.sources import (
    BANKS,
    FewShotTasks,
    gather_few_shot,
    heldout_count,
    heldout_few_shot,
    holds_few_shot,
    refuse_written,
)
from preceptor.names import derived_seed
from preceptor.question_faults import answer_fault
from preceptor.task_files import ReadPassage, TaskFile, read_probes, read_replay, read_task_file
from preceptor.task_problems import Problem, raise_problems
from preceptor.tasks import Bank, FewShotTask, Passage, Question, Task


@dataclass(frozen=True, slots=True)
class RunTasks:
    """What a run learns from and is measured on: passages, or few-shot tasks. ``banks`` says how the questions came to
    their banks, ``notes`` what else people should know; ``places`` tells where each text of a file stands (file, line
    or 0), a few-shot task by its name, for errors that only a service can find."""

    train: tuple[Task, ...]
    heldout: tuple[Task, ...]
    probes: tuple[Question, ...]
    replay_documents: tuple[str, ...]
    banks: str
    notes: tuple[str, ...] = ()
    places: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def place_of(self, task: Task) -> tuple[str, int] | None:
        """File and line of a task that was read from a file."""
        return self.places.get(task.text if isinstance(task, Passage) else task.name)


def passages_of(tasks: Sequence[Task]) -> tuple[Passage, ...]:
    """The tasks where only passages will do. Raises PreceptorError(BAD_CONFIG)."""
    passages = tuple(task for task in tasks if isinstance(task, Passage))
    if len(passages) < len(tasks):
        raise PreceptorError("BAD_CONFIG", "has few-shot tasks, and this is for passages", field="tasks")
    return passages


def gather_tasks(config: RunConfig) -> RunTasks:
    """All tasks of a run. Raises PreceptorError(FILE_NOT_FOUND, BAD_TASK_FILE, BAD_CONFIG)."""
    tasks = config.tasks
    if tasks.world:
        found = _mosaic(config) if tasks.world == "mosaic" else _almanac(config)
    elif tasks.solutions_path or holds_few_shot(Path(tasks.path or "")):
        found = _few_shot(gather_few_shot(config))
    else:
        found = _from_files(config)
    if tasks.probes_path:
        found = replace(found, probes=read_probes(Path(tasks.probes_path)))
    if tasks.replay_path:
        found = replace(found, replay_documents=read_replay(Path(tasks.replay_path)))
    labelled = sum(_is_labelled(one) for one in found.train)
    tasks.check_canary(labelled, len(found.train))
    return found


def _is_labelled(task: Task) -> bool:
    if isinstance(task, FewShotTask):
        return True
    return any(question.answer.strip() for question in task.questions_of(Bank.REWARD))


def _few_shot(found: FewShotTasks) -> RunTasks:
    return RunTasks(found.train, found.heldout, (), (), BANKS, found.notes, found.places)


def _mosaic(config: RunConfig) -> RunTasks:
    # Imported here: people with files of their own need no world.
    from worlds.mosaic.tasks import few_shot_tasks

    refuse_written(config)
    train = few_shot_tasks(config.seed, "train", config.tasks.train)
    if config.tasks.heldout_path:
        other = heldout_few_shot(config)
        return _few_shot(replace(other, train=train))
    return _few_shot(FewShotTasks(train, few_shot_tasks(config.seed, "heldout", config.tasks.heldout), (), {}))


def _almanac(config: RunConfig) -> RunTasks:
    from worlds.almanac.memory import replay_documents, retention_probes
    from worlds.almanac.passages import passages

    tasks = config.tasks
    heldout: Sequence[Passage] = passages(config.seed, "heldout", tasks.heldout)
    banks = "the world's own, each in words of its own"
    notes: tuple[str, ...] = ()
    reads: Sequence[ReadPassage] = ()
    if tasks.heldout_path:
        file = read_task_file(Path(tasks.heldout_path))
        file.raise_problems()
        reads = _shuffled(file.passages, config.seed)[: tasks.heldout]
        heldout, problems = _sealed(reads, config)
        raise_problems(file.path, problems)
        banks, notes = f"{banks}; held out: {_banks(reads, config.seed)}", file.notes
    return RunTasks(
        train=tuple(passages(config.seed, "train", tasks.train)),
        heldout=tuple(heldout),
        probes=tuple(retention_probes()),
        replay_documents=tuple(replay_documents()),
        banks=banks,
        notes=notes,
        places=_places(reads),
    )


def _from_files(config: RunConfig) -> RunTasks:
    tasks = config.tasks
    file = read_task_file(
        Path(tasks.path or ""),
        questions_needed=tasks.questions == "given",
        answers_needed=config.reward.needs_answers,
    )
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
    few = [read for read in train if not read.named_banks and len(read.passage.questions) < len(Bank)]
    if few and tasks.questions == "given":
        notes.append(_too_few(few))
    rewarded, of_train = _rewarded(train, config)
    sealed, of_heldout = _sealed(heldout, config)
    raise_problems(file.path, (*of_train, *of_heldout))
    return RunTasks(
        train=rewarded,
        heldout=sealed,
        probes=(),
        replay_documents=(),
        banks=_banks([*train, *heldout], config.seed),
        notes=tuple(notes),
        places=_places([*train, *heldout]),
    )


def _overlap(file: TaskFile, other: TaskFile) -> tuple[Problem, ...]:
    """Held-out passages that are trained on: a measurement on them would mean nothing."""
    own = {read.passage.text: read for read in file.passages}
    return tuple(
        Problem(read.file, read.line, read.field, f"is also a training passage ({own[read.passage.text].place})")
        for read in other.passages
        if read.passage.text in own
    )


def _rewarded(reads: Sequence[ReadPassage], config: RunConfig) -> tuple[tuple[Passage, ...], list[Problem]]:
    """Training passages with their banks; a problem for each without a question to be rewarded for."""
    passages = [read.passage if read.named_banks else divided(read.passage, config.seed) for read in reads]
    problems = []
    for read, passage in zip(reads, passages, strict=True):
        if config.tasks.questions == "given" and not passage.questions_of(Bank.REWARD):
            problems.append(Problem.at(read.place, "is a training passage without a question of bank reward"))
        if config.reward.needs_answers:
            problems += _long_answers(read, passage, Bank.REWARD, config)
    return tuple(passages), problems


def _sealed(reads: Sequence[ReadPassage], config: RunConfig) -> tuple[tuple[Passage, ...], list[Problem]]:
    """Held-out passages with their banks; a problem for each without a sealed question, with its answer."""
    passages, problems = [], []
    for read in reads:
        passage = read.passage
        if not read.named_banks:
            passage = replace(passage, questions=tuple(replace(q, bank=Bank.SEALED) for q in passage.questions))
        passages.append(passage)
        if not passage.questions_of(Bank.SEALED):
            problems.append(Problem.at(read.place, "is a held-out passage without a question of bank sealed"))
        for question, place in zip(passage.questions, read.questions_at, strict=True):
            if question.bank is Bank.SEALED and not question.answer:
                problems.append(Problem.at(place(), "is asked in the final measurement and has no answer"))
        problems += _long_answers(read, passage, Bank.SEALED, config)
    return tuple(passages), problems


def _long_answers(read: ReadPassage, passage: Passage, bank: Bank, config: RunConfig) -> Iterator[Problem]:
    """Gold answers of the bank that is asked that no student could give."""
    for question, place in zip(passage.questions, read.questions_at, strict=True):
        if question.bank is bank and (fault := answer_fault(question, config.answers.max_new_tokens)):
            yield Problem.at(place(), fault)


def bank_sizes(questions: int) -> dict[Bank, int]:
    """How many questions of a training passage go to each bank where the file names none."""
    sealed = max(1, questions // 4) if questions > 1 else 0
    gate = max(1, questions // 4) if questions > 2 else 0
    return {Bank.REWARD: questions - gate - sealed, Bank.GATE: gate, Bank.SEALED: sealed}


def divided(passage: Passage, seed: int) -> Passage:
    """A training passage whose questions name no bank, with a bank for each."""
    banks = [bank for bank, size in bank_sizes(len(passage.questions)).items() for _ in range(size)]
    random.Random(derived_seed("banks", seed, passage.text)).shuffle(banks)
    questions = (replace(question, bank=bank) for question, bank in zip(passage.questions, banks, strict=True))
    return replace(passage, questions=tuple(questions))


def _banks(reads: Sequence[ReadPassage], seed: int) -> str:
    """How the questions came to their banks, for people."""
    named = sum(read.named_banks for read in reads)
    if named == len(reads):
        return "named in the file"
    divided = f"divided once by seed {seed}"
    return f"named in the file for {named} passages, {divided} for {len(reads) - named}" if named else divided


def _too_few(reads: Sequence[ReadPassage]) -> str:
    """Says of training passages that they cannot fill three banks, and what became of that."""
    shown = ", ".join(f"{read.place} has {len(read.passage.questions)}" for read in reads[:3])
    more = f" and {len(reads) - 3} more" if len(reads) > 3 else ""
    return (
        f"training passages with fewer questions than the {len(Bank)} banks: {len(reads)} ({shown}{more});"
        " one question gives the reward, of two the other is sealed, none is left for the gate"
    )


def _places(reads: Sequence[ReadPassage]) -> dict[str, tuple[str, int]]:
    return {read.passage.text: (read.file, read.line) for read in reads}


def _shuffled(reads: Sequence[ReadPassage], seed: int) -> list[ReadPassage]:
    """In the seed's order, whatever the order in the file."""
    order = sorted(reads, key=lambda read: read.passage.text)
    random.Random(derived_seed("split", seed)).shuffle(order)
    return order
