"""Reads a CreateEvaluations request: everything is checked here, before anything is stored or sent.

Every complaint is PreceptorError(INVALID_REQUEST) (or GRADER_UNKNOWN, JUDGE_NOT_SET) with the place in ``field``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluator.asking import check_prompts
from evaluator.few_shot import Material, read_settings, read_task
from evaluator.graders.grader import Given, Grader
from evaluator.graders.grid import GridMatch
from evaluator.graders.rack import WITHOUT_A_JUDGE, Graders
from evaluator.resolve import resolve_answers, resolve_training, resolve_weights
from evaluator.reward import Weights
from preceptor.convert import bank_from_proto, questions_from_proto
from preceptor.errors import PreceptorError
from preceptor.few_shot.text import read_grid
from preceptor.few_shot.views import View
from preceptor.limits import (
    MAX_ADAPTERS,
    MAX_DOCUMENTS,
    MAX_GRADED,
    MAX_GRADED_CHARACTERS,
    MAX_LABELS,
    MAX_NAME_CHARACTERS,
    MAX_PROBES,
    MAX_QUESTION_CHARACTERS,
    MAX_QUESTIONS,
    MAX_REPLAY_DOCUMENTS,
    MAX_SAMPLES,
    MAX_SEEDS,
    MAX_SELF_EDITS,
    MAX_SOURCE_CHARACTERS,
    MAX_TEMPERATURE,
    MAX_TEXT_CHARACTERS,
    MAX_TITLE_CHARACTERS,
    MAX_TRIALS,
    MIN_TEMPERATURE,
    check_name,
)
from preceptor.names import task_id
from preceptor.question_faults import answer_fault, question_faults
from preceptor.tasks import Bank, Question
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types


@dataclass(frozen=True, slots=True)
class PlannedEdit:
    """A self-edit as it will be trained on."""

    self_edit: types.SelfEdit  # as it was given
    # With the passage before them where the protocol asks for it; of a few-shot task those that are made of it.
    documents: tuple[str, ...]
    settings: trial.TrainingSettings


@dataclass(frozen=True, slots=True)
class TaskEdits:
    """A task and its self-edits."""

    task_id: str
    text: str  # of a passage
    edits: tuple[PlannedEdit, ...]
    questions: tuple[Question, ...]  # of the protocol's bank; of a few-shot task its queries
    views: tuple[tuple[View, ...], ...] = ()  # how each query of a few-shot task is asked


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
    in_context: bool = False  # a trained student has the passage before each question


def read_request(message: pb.CreateEvaluationsRequest, graders: Graders = WITHOUT_A_JUDGE) -> EvaluationRequest:
    """The groups in a request."""
    check_name("request_id", message.request_id)
    check_name("owner", message.owner)
    protocol = message.protocol
    if protocol.bank not in types.QuestionBank.values():
        raise _invalid("protocol.bank", "is not a known bank")
    answers, weights = resolve_answers(protocol.answers), resolve_weights(protocol.weights)
    _check_measured(answers, weights)
    _check_count("protocol.probes", len(protocol.probes), MAX_PROBES)
    probes = tuple(questions_from_proto(protocol.probes, "protocol.probes"))
    _check_questions("protocol.probes", range(len(probes)), probes, answers)
    _check_grids("protocol.probes", range(len(probes)), probes, protocol.grader)
    _check_texts("protocol.replay_documents", protocol.replay_documents, MAX_REPLAY_DOCUMENTS)
    edits = len(message.self_edits) + sum(len(group.self_edits) for group in message.more)
    if edits > MAX_SELF_EDITS:
        raise _invalid("self_edits", f"must be 1..{MAX_SELF_EDITS} (given: {edits})")
    _check_count("more", len(message.more), MAX_SELF_EDITS)
    first = pb.TaskSelfEdits(task=message.task, self_edits=message.self_edits)
    groups = [("", first), *((f"more[{index}].", group) for index, group in enumerate(message.more))]
    few_shot = message.task.HasField("few_shot")
    tasks = []
    for place, group in groups:
        if group.task.HasField("few_shot") != few_shot:
            raise _invalid(f"{place}task", "a request has passages or few-shot tasks, not both: they are asked apart")
        read = _read_few_shot if few_shot else _read_group
        tasks.append(read(group, protocol, answers, weights, place))
    return EvaluationRequest(
        tasks=tuple(tasks),
        probes=probes,
        replay_documents=tuple(protocol.replay_documents),
        answers=answers,
        grader=graders.named(protocol.grader),
        weights=weights,
        seeds=_read_seeds(protocol.seeds, edits),
        in_context=protocol.in_context,
    )


def _check_measured(answers: trial.AnswerSettings, weights: Weights) -> None:
    """Every term with a weight must be one that the answers are asked for."""
    place = "protocol.answers"
    if answers.samples > MAX_SAMPLES:
        raise _invalid(f"{place}.samples", f"must be at most {MAX_SAMPLES} (given: {answers.samples})")
    if answers.temperature and not MIN_TEMPERATURE <= answers.temperature <= MAX_TEMPERATURE:
        bounds = f"{MIN_TEMPERATURE:g}..{MAX_TEMPERATURE:g}"
        raise _invalid(f"{place}.temperature", f"must be above 0, {bounds} (given: {answers.temperature})")
    if answers.logprobs_only:
        for name in ("gain", "retention_loss", "certainty_gain", "agreement_gain"):
            if getattr(weights, name):
                raise _invalid(f"protocol.weights.{name}", "is not measured where answers.logprobs_only is set")
        for name in ("samples", "certainty"):
            if getattr(answers, name):
                raise _invalid(f"{place}.{name}", "needs answers, and logprobs_only has none")
    if weights.agreement_gain and not answers.samples:
        raise _invalid(f"{place}.samples", "must be 1 or more where agreement_gain has a weight")
    if weights.certainty_gain and not answers.certainty:
        raise _invalid(f"{place}.certainty", "must be set where certainty_gain has a weight")


def _needs_answers(answers: trial.AnswerSettings, weights: Weights) -> bool:
    """Whether gold answers have a part in the reward; if not, questions may come without."""
    labelled = any((weights.gain, weights.gold_logprob_gain, weights.gold_probability_gain))
    return labelled or answers.logprobs_only or not weights.label_free


def _read_group(
    group: pb.TaskSelfEdits,
    protocol: pb.EvaluationProtocol,
    answers: trial.AnswerSettings,
    weights: Weights,
    place: str,
) -> TaskEdits:
    task = group.task
    if not task.HasField("passage"):
        raise _invalid(f"{place}task", "the task has no passage")
    _check_task(task, f"{place}task")
    name = task.id or task_id(task)
    bank = bank_from_proto(protocol.bank)
    given = questions_from_proto(task.passage.questions, f"{place}task.passage.questions")
    positions = [index for index, question in enumerate(given) if question.bank is bank]
    questions = tuple(given[index] for index in positions)
    if not questions:
        raise _invalid(
            f"{place}task.passage.questions",
            f"the task {name} ({task.passage.title!r}) has no questions in the bank {bank}",
        )
    _check_count(f"{place}task.passage.questions", len(questions), MAX_QUESTIONS)
    needed = _needs_answers(answers, weights)
    _check_questions(f"{place}task.passage.questions", positions, questions, answers, needed)
    _check_grids(f"{place}task.passage.questions", positions, questions, protocol.grader)
    for fault in question_faults("", "", questions):
        raise _invalid(f"{place}task.passage.questions[{positions[fault.index]}]", fault.message)
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


def _read_few_shot(
    group: pb.TaskSelfEdits,
    protocol: pb.EvaluationProtocol,
    answers: trial.AnswerSettings,
    weights: Weights,
    place: str,
) -> TaskEdits:
    """Neither banks nor gold answers that may be missing: a query has its output, or is no query."""
    _check_task(group.task, f"{place}task")
    for name in ("include_passage", "in_context"):
        if getattr(protocol, name):
            raise _invalid(f"protocol.{name}", "is for passages: demonstrations stand in every prompt as it is")
    task = read_task(group.task, f"{place}task", answers.max_new_tokens)
    material = Material(task, read_settings(protocol.few_shot))
    views = material.views
    check_prompts(f"{place}task.few_shot", [Question(view.prompt, "") for of_query in views for view in of_query])
    if not group.self_edits:
        raise _invalid(f"{place}self_edits", f"must be 1..{MAX_SELF_EDITS} (given: 0)")
    edits = []
    for index, edit in enumerate(group.self_edits):
        place_of_edit = f"{place}self_edits[{index}]"
        if edit.documents:
            raise _invalid(f"{place_of_edit}.documents", "are made of the demonstrations where the task is few-shot")
        settings = resolve_training(protocol.training, edit.directive, place_of_edit, few_shot=True)
        edits.append(PlannedEdit(edit, material.documents(edit.directive), settings))
    questions = tuple(Question(of_query[0].prompt, of_query[0].gold) for of_query in views)
    return TaskEdits(group.task.id or task_id(group.task), "", tuple(edits), questions, views)


def _check_task(task: types.Task, place: str) -> None:
    """What is not asked, trained on or graded must still be stored."""
    if task.id:
        check_name(f"{place}.id", task.id)
    _check_length(f"{place}.few_shot.name", task.few_shot.name, MAX_TITLE_CHARACTERS)
    _check_length(f"{place}.passage.title", task.passage.title, MAX_TITLE_CHARACTERS)
    _check_length(f"{place}.passage.text", task.passage.text, MAX_TEXT_CHARACTERS)
    # Of every bank as many as of the one that is asked.
    _check_count(f"{place}.passage.questions", len(task.passage.questions), MAX_QUESTIONS * len(Bank))
    _check_count(f"{place}.labels", len(task.labels), MAX_LABELS)


def read_answers(message: pb.GradeAnswersRequest) -> list[Given]:
    """What is to be graded. Raises PreceptorError(INVALID_REQUEST)."""
    _check_count("questions", len(message.questions), MAX_GRADED)
    if len(message.questions) != len(message.answers):
        raise _invalid("answers", f"{len(message.answers)} answers to {len(message.questions)} questions")
    golds = (text for asked in message.questions for text in (asked.text, asked.answer, *asked.aliases))
    characters = sum(map(len, message.answers)) + sum(map(len, golds))
    if characters > MAX_GRADED_CHARACTERS:
        most = f"at most {MAX_GRADED_CHARACTERS} are allowed"
        raise _invalid("answers", f"have {characters} characters, their questions included; {most}")
    for index, answer in enumerate(message.answers):
        _check_length(f"answers[{index}]", answer, MAX_QUESTION_CHARACTERS)
    questions = questions_from_proto(message.questions, "questions")
    return [Given(question, answer) for question, answer in zip(questions, message.answers, strict=True)]


def check_student(student: types.PinnedStudent) -> None:
    """A pinned student must be pinned."""
    for name, most in (
        ("name", MAX_NAME_CHARACTERS),
        ("source", MAX_SOURCE_CHARACTERS),
        ("commit", MAX_NAME_CHARACTERS),
    ):
        _check_length(f"student.{name}", getattr(student, name), most)
    _check_count("student.adapters", len(student.adapters), MAX_ADAPTERS)
    for name in ("source", "commit"):
        if not getattr(student, name):
            raise _invalid(
                f"student.{name}", "a pinned student needs source and commit; leave it out for the active one"
            )
    for index, adapter in enumerate(student.adapters):
        if not adapter.sha256:
            raise _invalid(f"student.adapters[{index}].sha256", "is empty")
        _check_length(f"student.adapters[{index}].sha256", adapter.sha256, MAX_NAME_CHARACTERS)
        _check_length(f"student.adapters[{index}].uri", adapter.uri, MAX_SOURCE_CHARACTERS)


def _read_seeds(seeds: Sequence[int], edits: int) -> tuple[int, ...]:
    if not 1 <= len(seeds) <= MAX_SEEDS:
        raise _invalid("protocol.seeds", f"must be 1..{MAX_SEEDS} (given: {len(seeds)})")
    if len(set(seeds)) != len(seeds):
        raise _invalid("protocol.seeds", "a repeated seed is the same trial again")
    if len(seeds) * edits > MAX_TRIALS:
        raise _invalid("self_edits", f"self-edits x seeds must be at most {MAX_TRIALS}")
    return tuple(sorted(seeds))


def _check_questions(
    place: str,
    positions: Sequence[int],
    questions: Sequence[Question],
    answers: trial.AnswerSettings,
    answers_needed: bool = True,
) -> None:
    """``positions``: where the questions stand in the message."""
    for index, question in zip(positions, questions, strict=True):
        if not question.text.strip() or (not question.answer.strip() and (answers_needed or question.answer)):
            raise _invalid(f"{place}[{index}]", f"question {index} has no text or no answer: {question.text[:80]!r}")
        if not answers.logprobs_only and (fault := answer_fault(question, answers.max_new_tokens)):
            raise _invalid(f"{place}[{index}]", fault)


def _check_grids(place: str, positions: Sequence[int], questions: Sequence[Question], grader: str) -> None:
    """A gold answer that is no grid would make every answer wrong where grids are compared."""
    for index, question in zip(positions, questions, strict=True):
        golds = [gold for gold in (question.answer, *question.aliases) if gold]  # none without labels
        if grader == GridMatch.name and any(read_grid(gold) is None for gold in golds):
            raise _invalid(f"{place}[{index}]", f"question {index} has a gold answer that the grader grid cannot read")


def _check_texts(place: str, texts: Sequence[str], most: int) -> None:
    _check_count(place, len(texts), most)
    for index, text in enumerate(texts):
        if not text.strip():
            raise _invalid(f"{place}[{index}]", "is empty")
    if sum(map(len, texts)) > MAX_TEXT_CHARACTERS:
        raise _invalid(place, f"has more than {MAX_TEXT_CHARACTERS} characters")


def _check_count(place: str, count: int, most: int) -> None:
    if count > most:
        raise _invalid(place, f"must be at most {most} (given: {count})")


def _check_length(place: str, text: str, most: int) -> None:
    if len(text) > most:
        raise _invalid(place, f"has {len(text)} characters; at most {most} are allowed")


def _invalid(place: str, problem: str) -> PreceptorError:
    return PreceptorError("INVALID_REQUEST", problem, field=place)
