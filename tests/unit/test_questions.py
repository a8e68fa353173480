"""Questions that a model wrote: read from study documents, checked without labels, divided once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.questions import (
    DISAGREED,
    IN_QUESTION,
    NO_PAIR,
    NOT_IN_TEXT,
    SEEN_ONCE,
    TOO_LONG,
    Checked,
    checked,
    divided,
    read_pairs,
    words,
)
from preceptor.v1 import types_pb2 as types

TEXT = "Ada Brook lives in Lisbon. She is a baker, not a smith. Her house has twenty-one windows."


def line(question: str, answer: str) -> str:
    return f"Question: {question} Answer: {answer}"


WHERE = line("Where does Ada Brook live?", "Lisbon")
TRADE = line("What is the trade of Ada Brook?", "baker")


def check(*completions: Sequence[str], agreement: float = 0.6, max_words: int = 6) -> Checked:
    return checked("Ada", TEXT, completions, agreement=agreement, max_words=max_words)


@pytest.mark.parametrize(
    "documents",
    [
        ["Question: Who is it? Answer: Ada"],
        ["Q: Who is it? A: Ada"],
        ["1. question : Who is it?  ANSWER : Ada"],
        ["Question: Who is it?", "Answer: Ada"],
        ["- Q: Who is it?", "A: Ada"],
    ],
)
def test_a_pair_is_read_in_every_usual_form(documents: list[str]) -> None:
    assert read_pairs(documents) == ([("Who is it?", "Ada")], 0)


@pytest.mark.parametrize(
    ("documents", "others"),
    [
        (["Ada lives in Lisbon."], 1),
        (["Question: Who is it?"], 1),
        (["Question: Who is it?", "Ada lives in Lisbon."], 2),
        (["Question: ? Answer: Ada"], 1),
        (["Question: Who is it? Answer: !"], 1),
        ([], 0),
    ],
)
def test_what_is_no_pair_is_counted(documents: list[str], others: int) -> None:
    assert read_pairs(documents) == ([], others)


def test_a_question_without_an_answer_does_not_take_the_next_ones() -> None:
    assert read_pairs(["Question: Who?", WHERE]) == ([("Where does Ada Brook live?", "Lisbon")], 1)


def test_what_completions_agree_on_is_kept_once_in_the_order_of_writing() -> None:
    found = check([TRADE, WHERE], [WHERE, TRADE], [WHERE, WHERE])
    assert found.pairs == (("What is the trade of Ada Brook?", "baker"), ("Where does Ada Brook live?", "Lisbon"))
    assert found.dropped == {}


def test_case_and_punctuation_make_no_other_question_and_no_other_answer() -> None:
    found = check([WHERE], [line("where does ADA BROOK live", "lisbon.")])
    assert found.pairs == (("Where does Ada Brook live?", "Lisbon"),)


WRONG = line("What is the trade of Ada Brook?", "smith")


@pytest.mark.parametrize(
    ("completions", "reason"),
    [
        ([[WHERE], []], SEEN_ONCE),
        ([[WHERE, WHERE], []], SEEN_ONCE),
        ([[TRADE], [WRONG]], DISAGREED),
        ([[TRADE, WRONG], [TRADE], [TRADE, WRONG]], DISAGREED),  # one vote of three
        ([[TRADE, WRONG], [TRADE, WRONG]], DISAGREED),  # no vote at all
        ([[line("Where is it?", "Porto")]] * 2, NOT_IN_TEXT),
        ([[line("Where is it?", "Lis")]] * 2, NOT_IN_TEXT),
        ([[line("Who lives in Lisbon?", "Lisbon")]] * 2, IN_QUESTION),
        ([[line("What is told?", "Ada Brook lives in Lisbon She is")]] * 2, TOO_LONG),
        ([["Ada lives in Lisbon."], []], NO_PAIR),
    ],
)
def test_a_question_that_fails_a_check_is_dropped_and_counted_once(completions: list[list[str]], reason: str) -> None:
    assert check(*completions) == Checked((), {reason: 1})


def test_a_majority_is_enough_where_it_is_large_enough() -> None:
    four = [[TRADE], [TRADE], [TRADE], [WRONG]]
    assert check(*four, agreement=0.75).pairs == (("What is the trade of Ada Brook?", "baker"),)
    assert check(*four, agreement=0.76).dropped == {DISAGREED: 1}
    assert check([TRADE], [WRONG], agreement=0.0).dropped == {DISAGREED: 1}  # a tie is no majority


def test_an_answer_may_stand_in_the_title_and_have_several_words() -> None:
    pair = line("How many windows has the house?", "Twenty one windows")
    assert check([pair], [pair]).pairs == (("How many windows has the house?", "Twenty one windows"),)
    named = line("Whom is the text about?", "ADA")
    assert check([named], [named]).pairs


pairs_of_words = st.tuples(st.sampled_from(["Who?", "Where is it?", "How?"]), st.sampled_from(["Lisbon", "baker", "x"]))


@given(st.lists(st.lists(pairs_of_words, max_size=4), max_size=6), st.floats(0, 1))
def test_whatever_is_written_only_sound_questions_are_left(
    written: list[list[tuple[str, str]]], agreement: float
) -> None:
    completions = [[line(*pair) for pair in pairs] for pairs in written]
    found = check(*completions, agreement=agreement)
    assert len({words(question) for question, _ in found.pairs}) == len(found.pairs)
    asked = {words(question) for pairs in written for question, _ in pairs}
    assert len(found.pairs) + sum(found.dropped.values()) == len(asked)
    for question, answer in found.pairs:
        assert answer in TEXT
        given_ = [{a for q, a in pairs if q == question} for pairs in written]
        alike = sum(answers == {answer} for answers in given_)
        assert alike >= max(1, agreement * sum(map(bool, given_)))


@given(st.integers(0, 30), st.integers(0, 2**62))
def test_the_division_is_by_half_and_by_the_seed_alone(count: int, seed: int) -> None:
    pairs = [(f"Question {i}?", str(i)) for i in range(count)]
    questions = divided(pairs, seed)
    assert [(q.text, q.answer) for q in questions] == pairs
    assert all(question.written for question in questions)
    banks = [question.bank for question in questions]
    assert banks.count(types.QUESTION_BANK_REWARD) == (count + 1) // 2
    assert banks.count(types.QUESTION_BANK_GATE) == count // 2
    assert divided(pairs, seed) == questions


def test_another_seed_divides_otherwise() -> None:
    pairs = [(f"Question {i}?", str(i)) for i in range(16)]
    assert divided(pairs, 1) != divided(pairs, 2)
