"""Several passages as one: what a student is asked that is to learn all of them in one update, and what it studies.

Pure functions. A question belongs to the passage that asked it first, so a union's answers can be told by passage
again (``Union.by_passage``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from preceptor.convert import questions_from_proto
from preceptor.errors import PreceptorError
from preceptor.limits import MAX_DOCUMENTS, MAX_QUESTIONS, MAX_TEXT_CHARACTERS
from preceptor.names import task_id
from preceptor.question_faults import question_faults
from preceptor.v1 import types_pb2 as types

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Union:
    """One passage made of several. ``counts``: how many of its questions each brought, in order; ``left_out``: how many
    were left out, because an earlier passage asks the same with another answer (or the same answer: then it is one
    question)."""

    task: types.Task
    counts: tuple[int, ...]
    left_out: int

    def by_passage(self, values: Sequence[T]) -> list[Sequence[T]]:
        """Values of the union's questions, one list for each passage."""
        found, start = [], 0
        for count in self.counts:
            found.append(values[start : start + count])
            start += count
        if start != len(values):
            raise ValueError(f"{len(values)} values for {start} questions")
        return found


def union_task(tasks: Sequence[types.Task], bank: types.QuestionBank.ValueType) -> Union:
    """All passages' questions of one bank as one task. Its text is all texts, as far as a text may reach.

    Raises PreceptorError(INVALID_REQUEST) for more questions than one task may have.
    """
    union = types.Task()
    union.passage.title = f"{len(tasks)} passages"
    union.passage.text = "\n\n".join(task.passage.text for task in tasks)[:MAX_TEXT_CHARACTERS]
    asked = [[question for question in task.passage.questions if question.bank == bank] for task in tasks]
    everything = [question for questions in asked for question in questions]
    faults = question_faults("", "", questions_from_proto(everything, "questions"))
    left_out = {id(everything[fault.index]) for fault in faults}
    kept = [[question for question in questions if id(question) not in left_out] for questions in asked]
    union.passage.questions.extend(question for questions in kept for question in questions)
    counts = tuple(map(len, kept))
    if sum(counts) > MAX_QUESTIONS:
        raise PreceptorError(
            "INVALID_REQUEST",
            f"{len(tasks)} passages have {sum(counts)} questions; at most {MAX_QUESTIONS} are asked together",
            field="tasks",
        )
    union.id = task_id(union)
    return Union(union, counts, len(left_out))


def union_edit(edits: Sequence[types.SelfEdit]) -> types.SelfEdit:
    """The documents of all, in order, without their directives: one update has one.

    Raises PreceptorError(INVALID_REQUEST) for more than one self-edit may have.
    """
    documents = [document for edit in edits for document in edit.documents]
    characters = sum(map(len, documents))
    if len(documents) > MAX_DOCUMENTS or characters > MAX_TEXT_CHARACTERS:
        raise PreceptorError(
            "INVALID_REQUEST",
            f"{len(documents)} documents of {characters} characters are too many for one update"
            f" (at most {MAX_DOCUMENTS} and {MAX_TEXT_CHARACTERS}); take fewer passages at a time",
            field="tasks",
        )
    return types.SelfEdit(documents=documents)
