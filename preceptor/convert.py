"""Proto at the edge, frozen dataclasses inside: the translation between ``preceptor.v1`` and ``preceptor.tasks``."""

from __future__ import annotations

from collections.abc import Iterable

from preceptor.errors import PreceptorError
from preceptor.limits import MAX_ALIASES, MAX_QUESTION_CHARACTERS
from preceptor.names import task_id
from preceptor.tasks import (
    Augmentations,
    Bank,
    Directive,
    FewShotTask,
    FineTuning,
    Grid,
    GridPair,
    LossMask,
    Passage,
    Question,
    SelfEdit,
    Task,
)
from preceptor.v1 import types_pb2 as types

_BANKS = {
    Bank.REWARD: types.QUESTION_BANK_REWARD,
    Bank.GATE: types.QUESTION_BANK_GATE,
    Bank.SEALED: types.QUESTION_BANK_SEALED,
}
_BANK_OF = {value: key for key, value in _BANKS.items()} | {types.QUESTION_BANK_UNSPECIFIED: Bank.REWARD}
_MASKS = {
    LossMask.ALL: types.LOSS_MASK_ALL,
    LossMask.AFTER_MARKER: types.LOSS_MASK_AFTER_MARKER,
    LossMask.OUTPUTS_ONLY: types.LOSS_MASK_OUTPUTS_ONLY,
}
_MASK_OF = {value: key for key, value in _MASKS.items()}
_FINE_TUNINGS = {FineTuning.LORA: types.FINE_TUNING_LORA, FineTuning.FULL: types.FINE_TUNING_FULL}
_FINE_TUNING_OF = {value: key for key, value in _FINE_TUNINGS.items()}


def bank_to_proto(bank: Bank) -> types.QuestionBank.ValueType:
    """The wire value of a bank."""
    return _BANKS[bank]


def bank_from_proto(bank: types.QuestionBank.ValueType, place: str = "bank") -> Bank:
    """The bank of a wire value; unspecified means reward. Raises PreceptorError(INVALID_REQUEST)."""
    if bank not in _BANK_OF:
        raise PreceptorError("INVALID_REQUEST", f"{place} {bank} is not a known bank", field=place)
    return _BANK_OF[bank]


def mask_to_proto(mask: LossMask) -> types.LossMask.ValueType:
    """The wire value of a loss mask."""
    return _MASKS[mask]


def mask_from_proto(mask: types.LossMask.ValueType) -> LossMask | None:
    """The loss mask of a wire value; None where it is unspecified or not known."""
    return _MASK_OF.get(mask)


def question_to_proto(question: Question) -> types.Question:
    """A question as a message."""
    return types.Question(
        text=question.text,
        answer=question.answer,
        bank=_BANKS[question.bank],
        aliases=question.aliases,
        written=question.written,
    )


def question_from_proto(
    message: types.Question, place: str = "question", most: int = MAX_QUESTION_CHARACTERS
) -> Question:
    """A question from a message; ``place`` names it in errors, ``most``: characters of its text.

    Raises PreceptorError(INVALID_REQUEST) for a bank that is not known, and for what is too long or too much.
    """
    bank = bank_from_proto(message.bank, f"{place}.bank")
    if len(message.aliases) > MAX_ALIASES:
        problem = f"must be at most {MAX_ALIASES} (given: {len(message.aliases)})"
        raise PreceptorError("INVALID_REQUEST", f"{place}.aliases {problem}", field=f"{place}.aliases")
    golds = (message.answer, *message.aliases)
    for text, allowed in ((message.text, most), *((gold, MAX_QUESTION_CHARACTERS) for gold in golds)):
        if len(text) > allowed:
            problem = f"has a text of {len(text)} characters; at most {allowed} are allowed"
            raise PreceptorError("INVALID_REQUEST", f"{place} {problem}", field=place)
    return Question(message.text, message.answer, bank, tuple(message.aliases), message.written)


def questions_from_proto(
    messages: Iterable[types.Question], place: str, most: int = MAX_QUESTION_CHARACTERS
) -> list[Question]:
    """Questions from the messages at a place. Raises PreceptorError(INVALID_REQUEST) naming it."""
    return [question_from_proto(message, f"{place}[{index}]", most) for index, message in enumerate(messages)]


def directive_to_proto(directive: Directive) -> types.Directive:
    """A directive as a message; what is None stays absent."""
    message = types.Directive()
    for name in ("learning_rate", "epochs", "replay_share", "rank"):
        value = getattr(directive, name)
        if value is not None:
            setattr(message, name, value)
    if directive.loss_mask is not None:
        message.loss_mask = mask_to_proto(directive.loss_mask)
    if directive.targets is not None:
        message.targets = directive.targets
    if directive.fine_tuning is not None:
        message.fine_tuning = _FINE_TUNINGS[directive.fine_tuning]
    if (wanted := directive.augmentations) is not None:
        message.augmentations.basic, message.augmentations.size = wanted.basic, wanted.size
        message.augmentations.chain, message.augmentations.repeat = wanted.chain, wanted.repeat
        message.augmentations.colours = wanted.colours
    return message


def directive_from_proto(message: types.Directive) -> Directive:
    """A directive from a message; what is absent is None."""
    return Directive(
        learning_rate=message.learning_rate if message.HasField("learning_rate") else None,
        epochs=message.epochs if message.HasField("epochs") else None,
        replay_share=message.replay_share if message.HasField("replay_share") else None,
        rank=message.rank if message.HasField("rank") else None,
        loss_mask=mask_from_proto(message.loss_mask),
        targets=message.targets or None,
        fine_tuning=_FINE_TUNING_OF.get(message.fine_tuning),
        augmentations=augmentations_from_proto(message.augmentations) if message.HasField("augmentations") else None,
    )


def augmentations_from_proto(message: types.Augmentations) -> Augmentations:
    """Augmentations from a message; colours are permuted unless it says otherwise."""
    colours = message.colours if message.HasField("colours") else True
    return Augmentations(message.basic, message.size, message.chain, message.repeat, colours)


def self_edit_to_proto(edit: SelfEdit) -> types.SelfEdit:
    """A self-edit as a message."""
    return types.SelfEdit(documents=edit.documents, directive=directive_to_proto(edit.directive))


def self_edit_from_proto(message: types.SelfEdit) -> SelfEdit:
    """A self-edit from a message."""
    return SelfEdit(tuple(message.documents), directive_from_proto(message.directive))


def task_to_proto(task: Task) -> types.Task:
    """A task as a message, with its content id."""
    message = types.Task(labels=dict(task.labels))
    if isinstance(task, Passage):
        message.passage.title = task.title
        message.passage.text = task.text
        message.passage.questions.extend(question_to_proto(q) for q in task.questions)
    else:
        message.few_shot.name = task.name
        message.few_shot.demonstrations.extend(_pair_to_proto(pair) for pair in task.demonstrations)
        message.few_shot.queries.extend(_pair_to_proto(pair) for pair in task.queries)
    for name, edit in task.reference_edits.items():
        message.reference_edits[name].CopyFrom(self_edit_to_proto(edit))
    message.id = task_id(message)
    return message


def task_from_proto(message: types.Task) -> Task:
    """A task from a message."""
    edits = {name: self_edit_from_proto(edit) for name, edit in message.reference_edits.items()}
    if message.HasField("few_shot"):
        return FewShotTask(
            name=message.few_shot.name,
            demonstrations=tuple(_pair_from_proto(pair) for pair in message.few_shot.demonstrations),
            queries=tuple(_pair_from_proto(pair) for pair in message.few_shot.queries),
            labels=dict(message.labels),
            reference_edits=edits,
        )
    return Passage(
        title=message.passage.title,
        text=message.passage.text,
        questions=tuple(question_from_proto(q) for q in message.passage.questions),
        labels=dict(message.labels),
        reference_edits=edits,
    )


def for_teacher(task: types.Task) -> types.Task:
    """The task as the teacher may see it: id, title and text (of a few-shot task the demonstrations and the queries'
    inputs) and nothing else; above all no questions, no reference edits, no labels, which may say anything."""
    bare = types.Task(id=task.id)
    if task.HasField("passage"):
        bare.passage.title = task.passage.title
        bare.passage.text = task.passage.text
    else:
        bare.few_shot.name = task.few_shot.name
        bare.few_shot.demonstrations.extend(task.few_shot.demonstrations)
        bare.few_shot.queries.extend(types.GridPair(input=pair.input) for pair in task.few_shot.queries)
    return bare


def _grid_to_proto(grid: Grid) -> types.Grid:
    return types.Grid(rows=[types.GridRow(cells=row) for row in grid])


def _pair_to_proto(pair: GridPair) -> types.GridPair:
    return types.GridPair(input=_grid_to_proto(pair.input), output=_grid_to_proto(pair.output))


def _pair_from_proto(message: types.GridPair) -> GridPair:
    def grid(rows: types.Grid) -> Grid:
        return tuple(tuple(row.cells) for row in rows.rows)

    return GridPair(grid(message.input), grid(message.output))
