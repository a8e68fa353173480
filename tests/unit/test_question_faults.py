"""Promises about a passage's questions: what makes a measurement mean something else is found, in any words."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.question_faults import answer_fault, question_faults
from preceptor.tasks import Bank, Question

texts = st.text(max_size=40)
questions = st.lists(
    st.builds(Question, texts, texts, st.sampled_from(Bank), st.lists(texts, max_size=2).map(tuple)), max_size=8
)


@given(texts, texts, questions)
def test_questions_that_are_left_have_no_fault(title: str, text: str, asked: list[Question]) -> None:
    """Leaving out what has a fault leaves none, so that a user comes to an end."""
    bad = {fault.index for fault in question_faults(title, text, asked)}
    left = [question for index, question in enumerate(asked) if index not in bad]
    assert not list(question_faults(title, text, left))


@given(questions)
def test_what_is_asked_again_as_it_was_can_be_left_out(asked: list[Question]) -> None:
    clean = [one for n, one in enumerate(asked) if n not in {f.index for f in question_faults("", "", asked)}]
    again = list(question_faults("", "", clean + clean))
    assert [fault.index for fault in again] == list(range(len(clean), 2 * len(clean)))
    assert all(fault.repeat for fault in again)


@pytest.mark.parametrize(
    ("text", "question", "found"),
    [
        ("Where does Ada live? In Lisbon.", "Where does Ada live?", True),
        ("WHERE\ndoes  ada-live: In Lisbon.", "Where does Ada live?", True),
        ("Nowhere does Ada live.", "Where does Ada live?", False),
        ("Where does Ada live-stream?", "Where does Ada live?", True),
        ("Where does Ada lives?", "Where does Ada live?", False),
        ("Who was he?", "Who was he?", False),  # three words may stand there by chance
        ("Où habite-t-elle ? À Lisbonne.", "Où habite-t-elle?", True),
    ],
)
def test_a_question_that_stands_in_the_passage_is_found_by_its_words(text: str, question: str, found: bool) -> None:
    asked = [Question(question, "x")]
    assert bool(list(question_faults("", text, asked))) is found
    assert bool(list(question_faults(text, "", asked))) is found


def test_signs_tell_questions_apart() -> None:
    asked = [Question("What is 3+4?", "7"), Question("What is 3-4?", "-1"), Question("What is 3 + 4?", "7")]
    assert not list(question_faults("", "", asked))


def test_an_alias_that_fits_is_enough() -> None:
    assert answer_fault(Question("?", "the whole of the long name"), 3)
    assert not answer_fault(Question("?", "the whole of the long name", aliases=("name",)), 3)
    assert not answer_fault(Question("?", ""), 1)


def test_many_questions_about_a_long_text_take_no_time() -> None:
    asked = [Question(f"Which of the many facts is number {n}?", "x") for n in range(2000)]
    began = time.perf_counter()
    assert not list(question_faults("long", "some words of a text " * 10_000, asked))
    assert time.perf_counter() - began < 10
