"""What a student is to learn, read as a run would read it, every passage of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from preceptor.config import RunConfig, load_config
from preceptor.errors import PreceptorError
from preceptor.question_faults import answer_fault
from preceptor.task_files import read_probes, read_replay, read_task_file
from preceptor.task_problems import Problem, raise_problems
from preceptor.task_sources import divided, gather_tasks, passages_of
from preceptor.tasks import Bank, Passage, Question

WORLD = "almanac"
WORLD_PASSAGES = 8


@dataclass(frozen=True, slots=True)
class Subject:
    """Passages, what the student must not forget, and what is replayed to help it. ``places``: where a passage of a
    file stands, by its text."""

    passages: tuple[Passage, ...]
    probes: tuple[Question, ...]
    replay_documents: tuple[str, ...]
    notes: tuple[str, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)


def read_config(config: Path | None, overrides: Sequence[str], tasks: Path | None, world: str | None) -> RunConfig:
    """The config, with its tasks from ``tasks`` or ``world`` (``almanac`` or ``almanac:COUNT``) where one is given.

    Raises PreceptorError(FILE_NOT_FOUND, BAD_CONFIG, INVALID_REQUEST).
    """
    source: list[str] = []
    if tasks is not None:
        source = ["tasks.world=", f"tasks.path={json.dumps(str(tasks))}"]
    elif world is not None:
        name, colon, count = world.partition(":")
        if name != WORLD or (colon and not (count.isascii() and count.isdigit() and 0 < int(count[:6]) <= 10_000)):
            raise PreceptorError(
                "INVALID_REQUEST", f"{world!r} is not {WORLD} or {WORLD}:COUNT, e.g. {WORLD}:8", field="--world"
            )
        source = ["tasks.path=", "tasks.heldout_path=", f"tasks.world={WORLD}"]
        source.append(f"tasks.heldout={int(count) if colon else WORLD_PASSAGES}")
    return load_config(config, [*overrides, *source])


def read_subject(config: RunConfig) -> Subject:
    """Every passage of the config's tasks; of the world those that no teacher is trained on (its held-out ones).

    Each needs a question that chooses its self-edit (bank reward), and at least one passage a sealed one.
    Raises PreceptorError(FILE_NOT_FOUND, BAD_TASK_FILE, BAD_CONFIG).
    """
    if config.tasks.world:
        if config.tasks.world != WORLD:
            problem = f"{config.tasks.world} has few-shot tasks; a student is adapted to passages"
            raise PreceptorError("BAD_CONFIG", problem, field="tasks.world")
        one = config.tasks.model_copy(update={"train": 1, "heldout": max(config.tasks.heldout, 1)})
        found = gather_tasks(config.model_copy(update={"tasks": one}))
        return Subject(passages_of(found.heldout), found.probes, found.replay_documents, found.notes)
    return _of_file(config)


def _of_file(config: RunConfig) -> Subject:
    tasks = config.tasks
    file = read_task_file(Path(tasks.path or ""), answers_needed=config.reward.needs_answers)
    file.raise_problems()
    problems: list[Problem] = []
    passages, unsealed = [], []
    for read in file.passages:
        if not isinstance(read.passage, Passage):
            problems.append(Problem.at(read.place, "is a few-shot task; a student is adapted to passages"))
            continue
        passage = read.passage if read.named_banks else divided(read.passage, config.seed)
        passages.append(passage)
        if not passage.questions_of(Bank.REWARD):
            problems.append(Problem.at(read.place, "has no question of bank reward, which choose its self-edit"))
        if not passage.questions_of(Bank.SEALED):
            unsealed.append(passage.title)
        for question, place in zip(passage.questions, read.questions_at, strict=True):
            if question.bank in (Bank.REWARD, Bank.SEALED):
                if fault := answer_fault(question, config.answers.max_new_tokens):
                    problems.append(Problem.at(place(), fault))
                if question.bank is Bank.SEALED and not question.answer.strip():
                    problems.append(Problem.at(place(), "is asked before and after, and has no answer"))
    if passages and len(unsealed) == len(passages) and not problems:
        words = "no passage has a sealed question (two questions or more, or one with bank sealed): nothing would tell"
        problems.append(Problem(file.path, 0, "", f"{words} whether the student has learnt anything"))
    raise_problems(file.path, problems)
    notes = list(file.notes)
    if unsealed:
        shown = ", ".join(repr(title) for title in unsealed[:3]) + (", ..." if len(unsealed) > 3 else "")
        notes.append(f"{len(unsealed)} passages have no sealed question: the table does not tell of {shown}")
    if not tasks.probes_path:
        notes.append("no probes were given (--probes): what the student forgets is not known")
    if not tasks.replay_path:
        notes.append("nothing was given to replay (--replay): old knowledge is not protected")
    return Subject(
        passages=tuple(passages),
        probes=read_probes(Path(tasks.probes_path)) if tasks.probes_path else (),
        replay_documents=read_replay(Path(tasks.replay_path)) if tasks.replay_path else (),
        notes=tuple(notes),
        places={read.passage.text: str(read.place) for read in file.passages if isinstance(read.passage, Passage)},
    )
