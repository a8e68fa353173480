"""What a run may be asked: everything that can be found wrong before it starts is said at CreateRun, by its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from orchestrator.plan import labelled_places
from preceptor.config import RunConfig, parse_config_json
from preceptor.convert import directive_from_proto, questions_from_proto, task_from_proto
from preceptor.errors import PreceptorError
from preceptor.few_shot.grids import grid_fault
from preceptor.few_shot.views import views
from preceptor.limits import (
    MAX_DOCUMENTS,
    MAX_LABELS,
    MAX_NAME_CHARACTERS,
    MAX_PAIRS,
    MAX_PROBES,
    MAX_PROMPT_CHARACTERS,
    MAX_QUESTIONS,
    MAX_REFERENCE_EDITS,
    MAX_REPLAY_DOCUMENTS,
    MAX_TASKS,
    MAX_TEXT_CHARACTERS,
    MAX_TITLE_CHARACTERS,
    check_name,
)
from preceptor.names import canonical_json, message_json, task_id, task_title
from preceptor.question_faults import answer_fault, grid_answer_fault, question_faults
from preceptor.self_edit_files import directive_fault
from preceptor.tasks import TARGETS, Bank, FewShotTask
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import types_pb2 as types

_REWARD = (types.QUESTION_BANK_REWARD, types.QUESTION_BANK_UNSPECIFIED)
_SEALED = (*_REWARD, types.QUESTION_BANK_SEALED)


def validated(request: pb.CreateRunRequest) -> RunConfig:
    """The request's config. Raises PreceptorError (BAD_CONFIG, BAD_TASK_FILE, INVALID_REQUEST)."""
    check_name("request_id", request.request_id)
    config = parse_config_json(request.config_json)
    _check_sizes(request)
    _check_kinds(request, config)
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
    seen = {_material(task) for task in request.tasks}
    for position, task in enumerate(request.heldout_tasks):
        if _material(task) in seen:
            raise _bad("heldout_tasks", position, task, "is among the training tasks, too", "")
    for position, probe in enumerate(questions_from_proto(request.probes, "probes")):
        if not probe.text.strip() or not probe.answer.strip():
            raise PreceptorError(
                "BAD_TASK_FILE", f"probe {position + 1} lacks its question or its answer", field=f"probes[{position}]"
            )
        if fault := answer_fault(probe, config.answers.max_new_tokens):
            raise PreceptorError("BAD_TASK_FILE", f"probe {position + 1}: {fault}", field=f"probes[{position}]")
    return config


def _material(task: types.Task) -> tuple[str, str]:
    """What of a task the student could be trained on; without the questions, which may differ."""
    if task.HasField("few_shot"):
        return "", canonical_json([message_json(pair) for pair in task.few_shot.demonstrations])
    return task.passage.title, task.passage.text


def _check_kinds(request: pb.CreateRunRequest, config: RunConfig) -> None:
    """The tasks of a run are of one kind, and the config asks for nothing that this kind has not."""
    first: types.Task | None = None
    for field, tasks in (("tasks", request.tasks), ("heldout_tasks", request.heldout_tasks)):
        for position, task in enumerate(tasks):
            if task.WhichOneof("kind") is None:
                raise _bad(field, position, task, "is neither a passage nor a few-shot task", "kind")
            first = first or task
            if task.WhichOneof("kind") != first.WhichOneof("kind"):
                problem = "is of another kind than the tasks before it; a run has passages or few-shot tasks"
                raise _bad(field, position, task, problem, "kind")
    few_shot = first is not None and first.HasField("few_shot")
    if few_shot:
        places = {
            "heldout.in_context": config.heldout.in_context and "in which the untouched student is in context anyway",
            "heldout.formats": config.heldout.formats and "of which nobody writes documents",
            "training.include_passage": config.training.include_passage and "which have no text of their own",
            "tasks.questions": config.tasks.questions == "written" and "whose queries are their questions",
        }
        for field, why in places.items():
            if why:
                raise PreceptorError(
                    "BAD_CONFIG", f"{field} is not for few-shot tasks, {why}; leave it out", field=field
                )
    else:
        for number, strategy in enumerate(config.heldout.fixed_strategies):
            for key, wrong in (
                ("augmentations", strategy.augmentations is not None),
                ("loss_mask", strategy.loss_mask == "outputs_only"),
            ):
                if wrong:
                    field = f"heldout.fixed_strategies.{number}.{key}"
                    said = f"{key} = outputs_only" if key == "loss_mask" else key
                    raise PreceptorError("BAD_CONFIG", f"{said} is for few-shot tasks alone", field=field)


def _check_sizes(request: pb.CreateRunRequest) -> None:
    """What the evaluator would refuse an hour later is refused now."""
    for field, what, count, most in (
        ("tasks", "tasks", len(request.tasks), MAX_TASKS),
        ("heldout_tasks", "tasks", len(request.heldout_tasks), MAX_TASKS),
        ("probes", "probes", len(request.probes), MAX_PROBES),
        ("replay_documents", "documents", len(request.replay_documents), MAX_REPLAY_DOCUMENTS),
        ("replay_documents", "characters", sum(map(len, request.replay_documents)), MAX_TEXT_CHARACTERS),
        ("banks", "characters", len(request.banks), MAX_TITLE_CHARACTERS),
    ):
        if count > most:
            problem = f"{field} has {count} {what}; at most {most} are allowed"
            raise PreceptorError("INVALID_REQUEST", problem, field=field)
    for position, document in enumerate(request.replay_documents):
        if not document.strip():
            raise PreceptorError("INVALID_REQUEST", "is empty", field=f"replay_documents[{position}]")


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
        if too_much := _size_fault(task):
            raise _bad(field, position, task, too_much, "")
        if task.HasField("few_shot"):
            _check_few_shot(field, position, task, config.answers.max_new_tokens)
        else:
            _check_passage(field, position, task, banks, bank_words, config, answers_needed)
        in_context = config.heldout.in_context and field == "heldout_tasks"
        if (size := _longest_prompt(task, config, in_context)) > MAX_PROMPT_CHARACTERS:
            problem = f"makes a prompt of {size} characters; at most {MAX_PROMPT_CHARACTERS} are allowed"
            raise _bad(field, position, task, problem, "few_shot" if task.HasField("few_shot") else "passage.text")
        if task.id != task_id(task):
            raise _bad(field, position, task, "has an id that is not its content's", "id")
        if task.id in seen:
            raise _bad(field, position, task, f"is the same as task {seen[task.id] + 1}", "")
        seen[task.id] = position


def _check_passage(
    field: str,
    position: int,
    task: types.Task,
    banks: tuple[int, ...],
    bank_words: str,
    config: RunConfig,
    answers_needed: bool,
) -> None:
    if not task.passage.text.strip():
        raise _bad(field, position, task, "has an empty text", "passage.text")
    try:
        questions = questions_from_proto(task.passage.questions, "passage.questions")
    except PreceptorError as error:
        raise _bad(field, position, task, f"has a bad question: {error.message}", error.metadata["field"]) from None
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


def _check_few_shot(field: str, position: int, task: types.Task, max_new_tokens: int) -> None:
    """Demonstrations to learn from, queries whose outputs are known and can be answered, and grids that are grids."""
    for part in ("demonstrations", "queries"):
        pairs = getattr(task.few_shot, part)
        if not 1 <= len(pairs) <= MAX_PAIRS:
            problem = f"has {len(pairs)} {part}; it needs 1..{MAX_PAIRS}"
            raise _bad(field, position, task, problem, f"few_shot.{part}")
        for number, pair in enumerate(pairs):
            for side in ("input", "output"):
                grid = tuple(tuple(row.cells) for row in getattr(pair, side).rows)
                fault = grid_fault(grid)
                if not fault and (part, side) == ("queries", "output"):
                    fault = grid_answer_fault(grid, max_new_tokens)
                if fault:
                    where = f"few_shot.{part}[{number}].{side}"
                    raise _bad(field, position, task, f"has a bad grid: {where} {fault}", where)


def _longest_prompt(task: types.Task, config: RunConfig, in_context: bool) -> int:
    """Characters of the longest prompt that has all of a task in it; 0 where there is none."""
    if task.HasField("few_shot"):
        made = task_from_proto(task)
        assert isinstance(made, FewShotTask)
        asked = config.few_shot
        size = max(len(view.prompt) for seen in views(made, 1, asked.separator) for view in seen)
        if MAX_PROMPT_CHARACTERS / 2 < size < MAX_PROMPT_CHARACTERS:  # other views are a little longer, or shorter
            size = max(len(view.prompt) for seen in views(made, asked.votes, asked.separator) for view in seen)
        return size
    if not in_context:
        return 0
    frame = config.answers.prompt
    longest = max((len(frame.replace("{question}", one.text)) for one in task.passage.questions), default=0)
    return len(task.passage.text) + 1 + longest


def _size_fault(task: types.Task) -> str:
    """What of a task is more than any service takes, or of its reference edits no self-edit; empty if nothing is."""
    passage = task.passage
    banks = Counter(question.bank for question in passage.questions)
    labels = [part for label in task.labels.items() for part in label]
    if len(task_title(task)) > MAX_TITLE_CHARACTERS or len(passage.text) > MAX_TEXT_CHARACTERS:
        return f"has more than {MAX_TITLE_CHARACTERS} characters of title or {MAX_TEXT_CHARACTERS} of text"
    if banks.total() > MAX_QUESTIONS * len(Bank) or any(count > MAX_QUESTIONS for count in banks.values()):
        return f"has more than {MAX_QUESTIONS} questions in a bank"
    if len(task.labels) > MAX_LABELS or any(len(part) > MAX_NAME_CHARACTERS for part in labels):
        return f"has more than {MAX_LABELS} labels, or one of more than {MAX_NAME_CHARACTERS} characters"
    if len(task.reference_edits) > MAX_REFERENCE_EDITS:
        return f"has more than {MAX_REFERENCE_EDITS} reference edits"
    for name, edit in task.reference_edits.items():
        if fault := _edit_fault(edit, task.HasField("few_shot")):
            return f"has a bad reference edit {name[:60]!r}: {fault}"
    return ""


def _edit_fault(edit: types.SelfEdit, few_shot: bool) -> str:
    if len(edit.documents) > MAX_DOCUMENTS or sum(map(len, edit.documents)) > MAX_TEXT_CHARACTERS:
        return f"it has more than {MAX_DOCUMENTS} documents or {MAX_TEXT_CHARACTERS} characters"
    if not all(document.strip() for document in edit.documents):
        return "it has an empty document"
    if few_shot and edit.documents:
        return "it has documents; those of a few-shot task are made of its demonstrations"
    directive = edit.directive
    for key, known in (("loss_mask", types.LossMask.values()), ("fine_tuning", types.FineTuning.values())):
        if getattr(directive, key) not in known:
            return f"{key} {getattr(directive, key)} is not known"
    if directive.loss_mask == types.LOSS_MASK_OUTPUTS_ONLY and not few_shot:
        return "loss_mask outputs_only is for few-shot tasks alone"
    if directive.HasField("augmentations") and not few_shot:
        return "augmentations are for few-shot tasks alone"
    if directive.targets and directive.targets not in TARGETS:
        return f"targets {directive.targets[:60]!r} is not one of {', '.join(TARGETS)}"
    settings = directive_from_proto(directive)
    for key in ("learning_rate", "epochs", "replay_share", "rank"):
        value = getattr(settings, key)
        if value is not None and (fault := directive_fault(key, value)):
            return f"{key} {fault}"
    return ""


def _bad(field: str, position: int, task: types.Task, problem: str, part: str) -> PreceptorError:
    place = f"{field}[{position}]" + (f".{part}" if part else "")
    title = f" ({task_title(task)[:60]!r})" if task_title(task) else ""
    return PreceptorError("BAD_TASK_FILE", f"task {position + 1}{title} {problem}", field=place)
