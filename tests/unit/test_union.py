"""Several passages as one."""

from __future__ import annotations

import pytest

from preceptor.convert import bank_to_proto, task_to_proto
from preceptor.errors import PreceptorError
from preceptor.limits import MAX_DOCUMENTS, MAX_QUESTIONS
from preceptor.tasks import Bank, Passage, Question
from preceptor.union import union_edit, union_task
from preceptor.v1 import types_pb2 as types

SEALED = bank_to_proto(Bank.SEALED)


def passage(name: str, *questions: tuple[str, str, Bank]) -> types.Task:
    asked = tuple(Question(text, answer, bank) for text, answer, bank in questions)
    return task_to_proto(Passage(name, f"All about {name}.", asked))


def test_a_union_has_the_questions_of_one_bank_and_tells_them_apart_again() -> None:
    union = union_task(
        [
            passage("Ada", ("Where is Ada?", "Rome", Bank.SEALED), ("And Ada?", "no", Bank.REWARD)),
            passage("Bela", ("Is Bela here?", "no", Bank.REWARD)),
            passage("Cora", ("Where is Cora?", "Bonn", Bank.SEALED), ("What has Cora?", "a harp", Bank.SEALED)),
        ],
        SEALED,
    )
    assert [question.answer for question in union.task.passage.questions] == ["Rome", "Bonn", "a harp"]
    assert union.counts == (1, 0, 2)
    assert union.by_passage("abc") == ["a", "", "bc"]
    assert union.task.passage.text == "All about Ada.\n\nAll about Bela.\n\nAll about Cora."
    with pytest.raises(ValueError, match="4 values for 3 questions"):
        union.by_passage("abcd")


def test_what_two_passages_ask_alike_is_asked_once_whatever_the_second_one_says() -> None:
    union = union_task(
        [
            passage("Ada", ("Where is Ada?", "Rome", Bank.SEALED)),
            passage("Cora", ("where is  ADA", "Bonn", Bank.SEALED), ("Where is Cora?", "Bonn", Bank.SEALED)),
            passage("Dora", ("Where is Ada?", "Rome", Bank.SEALED)),
        ],
        SEALED,
    )
    assert (union.counts, union.left_out) == ((1, 1, 0), 2)
    assert union.task.passage.questions[0].answer == "Rome"


def test_more_than_one_task_may_hold_is_refused() -> None:
    many = [(f"What is number {number}?", str(number), Bank.SEALED) for number in range(MAX_QUESTIONS // 2 + 1)]
    others = [(f"Which is {text}", answer, bank) for text, answer, bank in many]
    with pytest.raises(PreceptorError, match=f"at most {MAX_QUESTIONS}"):
        union_task([passage("Ada", *many), passage("Bela", *others)], SEALED)
    with pytest.raises(PreceptorError, match="too many for one update"):
        union_edit([types.SelfEdit(documents=["a fact"] * (MAX_DOCUMENTS // 2 + 1))] * 2)


def test_the_union_of_self_edits_has_all_documents_and_no_directive() -> None:
    first = types.SelfEdit(documents=["a", "b"], directive=types.Directive(epochs=3))
    union = union_edit([first, types.SelfEdit(documents=["c"])])
    assert list(union.documents) == ["a", "b", "c"]
    assert not union.directive.HasField("epochs")
