"""Reads a CreateEvaluations request: everything is checked here, before anything is stored or sent.

Every complaint is PreceptorError(INVALID_REQUEST) (or GRADER_UNKNOWN, JUDGE_NOT_SET) with the place in ``field``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluator.graders.grader import Grader
from evaluator.graders.rack import WITHOUT_A_JUDGE, Graders
from evaluator.resolve import resolve_answers, resolve_training, resolve_weights
from evaluator.reward import Weights
from preceptor.convert import bank_from_proto, question_from_proto
from preceptor.errors import PreceptorError
from preceptor.names import task_id
from preceptor.tasks import Question
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types

# Limits on one request. A group of 1024 self-edits with 64 seeds would be days of work under one id.
MAX_SELF_EDITS = 1024
MAX_SEEDS = 64
MAX_TRIALS = 8192
MAX_QUESTIONS = 2000
MAX_PROBES = 10_000
MAX_DOCUMENTS = 1000
MAX_REPLAY_DOCUMENTS = 100_000
MAX_TEXT_CHARACTERS = 1_000_000
MAX_NAME_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class PlannedEdit:
    """A self-edit as it will be trained on."""

    self_edit: types.SelfEdit  # as it was given
    documents: tuple[str, ...]  # with the passage before them where the protocol asks for it
    settings: trial.TrainingSettings


@dataclass(frozen=True, slots=True)
class TaskEdits:
    """A task and its self-edits."""

    task_id: str
    text: str
    edits: tuple[PlannedEdit, ...]
    questions: tuple[Question, ...]  # of the protocol's bank


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """What to evaluate, checked and with every default filled in. The student is still open."""

    tasks: tuple[TaskEdits, ...]
    probes: tuple[Question, ...]
    replay_documents: tuple[str, ...]
    answers: trial.AnswerSettings
    grader: Grader
    weights: Weights
    seeds: tuple[int, ...]  # ascending


def read_request(message: pb.CreateEvaluationsRequest, graders: Graders = WITHOUT_A_JUDGE) -> EvaluationRequest:
    """The groups in a request."""
    check_name("request_id", message.request_id)
    check_name("owner", message.owner)
    protocol = message.protocol
    if protocol.bank not in types.QuestionBank.values():
        raise _invalid("protocol.bank", "is not a known bank")
    probes = tuple(question_from_proto(question) for question in protocol.probes)
    _check_questions("protocol.probes", probes, MAX_PROBES)
    _check_texts("protocol.replay_documents", protocol.replay_documents, MAX_REPLAY_DOCUMENTS)
    edits = len(message.self_edits) + sum(len(group.self_edits) for group in message.more)
    if edits > MAX_SELF_EDITS:
        raise _invalid("self_edits", f"must be 1..{MAX_SELF_EDITS} (given: {edits})")
    first = pb.TaskSelfEdits(task=message.task, self_edits=message.self_edits)
    return EvaluationRequest(
        tasks=(
            _read_group(first, protocol, ""),
            *(_read_group(group, protocol, f"more[{index}].") for index, group in enumerate(message.more)),
        ),
        probes=probes,
        replay_documents=tuple(protocol.replay_documents),
        answers=resolve_answers(protocol.answers),
        grader=graders.named(protocol.grader),
        weights=resolve_weights(protocol.weights),
        seeds=_read_seeds(protocol.seeds, edits),
    )


def _read_group(group: pb.TaskSelfEdits, protocol: pb.EvaluationProtocol, place: str) -> TaskEdits:
    task = group.task
    if task.HasField("few_shot"):
        raise _invalid(f"{place}task.few_shot", "few-shot tasks are not evaluated yet")
    if not task.HasField("passage"):
        raise _invalid(f"{place}task", "the task has no passage")
    name = task.id or task_id(task)
    bank = bank_from_proto(protocol.bank)
    asked = [question_from_proto(question) for question in task.passage.questions]
    questions = tuple(question for question in asked if question.bank is bank)
    if not questions:
        raise _invalid(
            f"{place}task.passage.questions",
            f"the task {name} ({task.passage.title!r}) has no questions in the bank {bank}",
        )
    _check_questions(f"{place}task.passage.questions", questions, MAX_QUESTIONS)
    if protocol.include_passage:
        _check_texts(f"{place}task.passage.text", [task.passage.text], 1)
    if not group.self_edits:
        raise _invalid(f"{place}self_edits", f"must be 1..{MAX_SELF_EDITS} (given: 0)")
    passage = (task.passage.text,) if protocol.include_passage else ()
    edits = []
    for index, edit in enumerate(group.self_edits):
        place_of_edit = f"{place}self_edits[{index}]"
        _check_texts(f"{place_of_edit}.documents", edit.documents, MAX_DOCUMENTS)
        settings = resolve_training(protocol.training, edit.directive, place_of_edit)
        edits.append(PlannedEdit(edit, (*passage, *edit.documents), settings))
    return TaskEdits(name, task.passage.text, tuple(edits), questions)


def check_student(student: types.PinnedStudent) -> None:
    """A pinned student must be pinned."""
    for name in ("source", "commit"):
        if not getattr(student, name):
            raise _invalid(
                f"student.{name}", "a pinned student needs source and commit; leave it out for the active one"
            )
    for index, adapter in enumerate(student.adapters):
        if not adapter.sha256:
            raise _invalid(f"student.adapters[{index}].sha256", "is empty")


def check_name(field: str, value: str) -> None:
    """Ids that a client chooses: not empty, not endless, and nothing that a log or a database could stumble over."""
    if not 1 <= len(value) <= MAX_NAME_CHARACTERS or not value.isprintable():
        raise _invalid(field, f"must have 1..{MAX_NAME_CHARACTERS} printable characters")


def _read_seeds(seeds: Sequence[int], edits: int) -> tuple[int, ...]:
    if not 1 <= len(seeds) <= MAX_SEEDS:
        raise _invalid("protocol.seeds", f"must be 1..{MAX_SEEDS} (given: {len(seeds)})")
    if len(set(seeds)) != len(seeds):
        raise _invalid("protocol.seeds", "a repeated seed is the same trial again")
    if len(seeds) * edits > MAX_TRIALS:
        raise _invalid("self_edits", f"self-edits x seeds must be at most {MAX_TRIALS}")
    return tuple(sorted(seeds))


def _check_questions(place: str, questions: Sequence[Question], most: int) -> None:
    if len(questions) > most:
        raise _invalid(place, f"must be at most {most} (given: {len(questions)})")
    for index, question in enumerate(questions):
        if not question.text.strip() or not question.answer.strip():
            raise _invalid(f"{place}[{index}]", f"question {index} has no text or no answer: {question.text[:80]!r}")


def _check_texts(place: str, texts: Sequence[str], most: int) -> None:
    if len(texts) > most:
        raise _invalid(place, f"must be at most {most} (given: {len(texts)})")
    for index, text in enumerate(texts):
        if not text.strip():
            raise _invalid(f"{place}[{index}]", "is empty")
    if sum(map(len, texts)) > MAX_TEXT_CHARACTERS:
        raise _invalid(place, f"has more than {MAX_TEXT_CHARACTERS} characters")


def _invalid(place: str, problem: str) -> PreceptorError:
    return PreceptorError("INVALID_REQUEST", problem, field=place)
