"""A few-shot task in a request: read and checked, and what a worker makes of it.

A worker knows no grids. Of a task and a self-edit's directive the evaluator makes training documents, and of each query
whole prompts, one a view. Documents depend on the task, the directive's augmentations and the settings alone: all
candidates that ask for the same augmentations learn from the same documents, whatever their seed.
"""

from __future__ import annotations

from dataclasses import dataclass

from preceptor.convert import augmentations_from_proto, task_from_proto
from preceptor.errors import PreceptorError
from preceptor.few_shot.grids import grid_fault
from preceptor.few_shot.training import training_documents
from preceptor.few_shot.views import View, views
from preceptor.limits import MAX_DOCUMENTS, MAX_MADE_CHARACTERS, MAX_PAIRS, MAX_VOTES
from preceptor.question_faults import grid_answer_fault
from preceptor.tasks import Augmentations, FewShotTask
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import types_pb2 as types

DEFAULT_DOCUMENTS = 64
_SEED = 0


@dataclass(frozen=True, slots=True)
class FewShotSettings:
    """How few-shot tasks become documents and questions, with every default filled in."""

    max_documents: int
    votes: int
    separator: str


def read_settings(message: pb.FewShotSettings) -> FewShotSettings:
    """With defaults. Raises PreceptorError(INVALID_REQUEST)."""
    for name, most in (("max_documents", MAX_DOCUMENTS), ("votes", MAX_VOTES)):
        if (value := getattr(message, name)) > most:
            raise _invalid(f"protocol.few_shot.{name}", f"must be at most {most} (given: {value})")
    if message.separator not in ("", " "):
        raise _invalid("protocol.few_shot.separator", f"must be empty or one blank (given: {message.separator[:9]!r})")
    return FewShotSettings(message.max_documents or DEFAULT_DOCUMENTS, message.votes or 1, message.separator)


def read_task(message: types.Task, place: str, max_new_tokens: int) -> FewShotTask:
    """A task all of whose grids are grids and all of whose queries have outputs that an answer can hold.

    Raises PreceptorError(INVALID_REQUEST) naming the grid.
    """
    given = message.few_shot
    for name, what in (("demonstrations", "demonstration"), ("queries", "query with its output")):
        if not 1 <= len(getattr(given, name)) <= MAX_PAIRS:
            raise _invalid(f"{place}.few_shot.{name}", f"must be 1..{MAX_PAIRS}: a task needs a {what}")
    task = task_from_proto(message)
    assert isinstance(task, FewShotTask)
    for name, pairs in (("demonstrations", task.demonstrations), ("queries", task.queries)):
        for number, pair in enumerate(pairs):
            for side, grid in (("input", pair.input), ("output", pair.output)):
                if fault := grid_fault(grid):
                    raise _invalid(f"{place}.few_shot.{name}[{number}].{side}", fault)
    for number, query in enumerate(task.queries):
        if fault := grid_answer_fault(query.output, max_new_tokens):
            raise _invalid(f"{place}.few_shot.queries[{number}].output", fault)
    return FewShotTask("", task.demonstrations, task.queries)


class Material:
    """What one task gives: documents to train on and prompts to answer."""

    def __init__(self, task: FewShotTask, settings: FewShotSettings) -> None:
        self._task, self._settings = task, settings
        # A group of self-edits chooses among few augmentations, and documents of a large task take 40 ms to make.
        self._made: dict[Augmentations, tuple[str, ...]] = {}

    @property
    def views(self) -> tuple[tuple[View, ...], ...]:
        """How each query is asked."""
        return views(self._task, self._settings.votes, self._settings.separator)

    def documents(self, directive: types.Directive) -> tuple[str, ...]:
        """What a self-edit with this directive trains on. Raises PreceptorError(INVALID_REQUEST)."""
        wanted = augmentations_from_proto(directive.augmentations)
        if wanted not in self._made:
            most, separator = self._settings.max_documents, self._settings.separator
            self._made[wanted] = training_documents(
                self._task, wanted, max_documents=most, separator=separator, seed=_SEED
            )
        made = self._made[wanted]
        if (size := sum(map(len, made))) > MAX_MADE_CHARACTERS:
            problem = f"makes documents of {size} characters of a task; at most {MAX_MADE_CHARACTERS} are allowed"
            raise _invalid("protocol.few_shot.max_documents", problem)
        return made


def _invalid(place: str, problem: str) -> PreceptorError:
    return PreceptorError("INVALID_REQUEST", f"{place} {problem}", field=place)
