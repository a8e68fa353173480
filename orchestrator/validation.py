"""What a run may be asked: everything that can be found wrong before it starts is said at CreateRun, by its place."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.plan import labelled_places
from preceptor.config import RunConfig, parse_config_json
from preceptor.convert import question_from_proto
from preceptor.errors import PreceptorError
from preceptor.names import task_id
from preceptor.question_faults import answer_fault, question_faults
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import types_pb2 as types

MAX_ID_CHARACTERS = 256

_REWARD = (types.QUESTION_BANK_REWARD, types.QUESTION_BANK_UNSPECIFIED)
_SEALED = (*_REWARD, types.QUESTION_BANK_SEALED)


def validated(request: pb.CreateRunRequest) -> RunConfig:
    """The request's config. Raises PreceptorError (BAD_CONFIG, BAD_TASK_FILE, INVALID_REQUEST)."""
    require_request_id(request.request_id)
    config = parse_config_json(request.config_json)
    needs_training = config.rounds.count > 0 or (request.heldout_tasks and config.heldout.fixed_strategies)
    if needs_training and not request.tasks:
        raise PreceptorError("INVALID_REQUEST", "there are no tasks to train on", field="tasks")
    if config.rounds.count == 0 and not request.heldout_tasks:
        raise PreceptorError("INVALID_REQUEST", "no rounds and no held-out tasks: nothing to do", field="heldout_tasks")
    # Questions that are written for a task are not there yet; a reward without labels needs no gold answers.
    needed = "reward" if config.tasks.questions == "given" else ""
    _check_tasks("tasks", request.tasks, _REWARD, needed, config, config.reward.needs_answers)
    config.tasks.check_canary(len(labelled_places(request.tasks)), len(request.tasks))
    _check_tasks("heldout_tasks", request.heldout_tasks, _SEALED, "sealed or reward", config, True)
    seen = {(task.passage.title, task.passage.text) for task in request.tasks}
    for position, task in enumerate(request.heldout_tasks):
        if (task.passage.title, task.passage.text) in seen:
            raise _bad("heldout_tasks", position, task, "is among the training tasks, too", "")
    for position, probe in enumerate(request.probes):
        if not probe.text.strip() or not probe.answer.strip():
            raise PreceptorError(
                "BAD_TASK_FILE", f"probe {position + 1} lacks its question or its answer", field=f"probes[{position}]"
            )
        if fault := answer_fault(question_from_proto(probe), config.answers.max_new_tokens):
            raise PreceptorError("BAD_TASK_FILE", f"probe {position + 1}: {fault}", field=f"probes[{position}]")
    return config


def require_request_id(request_id: str) -> None:
    """Raises INVALID_REQUEST for a mutating request without an id, or with an endless one."""
    if not 1 <= len(request_id) <= MAX_ID_CHARACTERS:
        problem = f"a mutating request needs a request_id of 1..{MAX_ID_CHARACTERS} characters"
        raise PreceptorError("INVALID_REQUEST", problem, field="request_id")


def _check_tasks(
    field: str,
    tasks: Sequence[types.Task],
    banks: tuple[int, ...],
    bank_words: str,
    config: RunConfig,
    answers_needed: bool,
) -> None:
    """``banks``: those that are asked; ``bank_words``: what a task must have of them, empty where nothing."""
    seen: dict[str, int] = {}
    for position, task in enumerate(tasks):
        if not task.HasField("passage"):
            raise _bad(field, position, task, "is no passage; only passages are trained on as yet", "kind")
        if not task.passage.text.strip():
            raise _bad(field, position, task, "has an empty text", "passage.text")
        questions = [question_from_proto(question) for question in task.passage.questions]
        for number, question in enumerate(questions):
            where = f"passage.questions[{number}]"
            if not question.text.strip():
                raise _bad(field, position, task, f"has an empty question (number {number + 1})", where)
            if answers_needed and not question.answer.strip():
                raise _bad(field, position, task, f"has a question without an answer: {question.text[:80]!r}", where)
            asked = answers_needed and task.passage.questions[number].bank in banks
            if asked and (problem := answer_fault(question, config.answers.max_new_tokens)):
                raise _bad(field, position, task, f"has a question that cannot be answered: {problem}", where)
        for fault in question_faults(task.passage.title, task.passage.text, questions):
            where = f"passage.questions[{fault.index}]"
            raise _bad(field, position, task, f"has a bad question: {fault.message}", where)
        if bank_words and not any(question.bank in banks for question in task.passage.questions):
            raise _bad(field, position, task, f"has no {bank_words} question", "passage.questions")
        if task.id != task_id(task):
            raise _bad(field, position, task, "has an id that is not its content's", "id")
        if task.id in seen:
            raise _bad(field, position, task, f"is the same as task {seen[task.id] + 1}", "")
        seen[task.id] = position


def _bad(field: str, position: int, task: types.Task, problem: str, part: str) -> PreceptorError:
    place = f"{field}[{position}]" + (f".{part}" if part else "")
    title = f" ({task.passage.title[:60]!r})" if task.passage.title else ""
    return PreceptorError("BAD_TASK_FILE", f"task {position + 1}{title} {problem}", field=place)
