"""The overlap audit: copying is seen however it is dressed, honest study material is not taken for it."""

from __future__ import annotations

import json
import os
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evaluator.overlap import audit, words
from preceptor.tasks import Bank, Question
from preceptor.v1 import evaluator_pb2 as pb
from worlds.almanac import edits
from worlds.almanac.passages import passages_with_facts

QUESTION = Question("In which year did the old bridge over the Arle fall?", "1871")
SENTENCES = st.lists(
    st.sampled_from(["the", "a", "of", "in", "old", "bridge", "river", "fell", "did", "year", "who"]), max_size=12
)
QUESTIONS = st.lists(
    st.builds(
        lambda some, gold: Question(" ".join(some) + "?", gold), SENTENCES, st.sampled_from(["1871", "the river"])
    ),
    max_size=4,
)
DOCUMENTS = st.lists(SENTENCES.map(" ".join), max_size=4)


def copied(document: str, question: Question = QUESTION, text: str = "") -> pb.OverlapAudit:
    return audit([document], text, [question])


@pytest.mark.parametrize(
    "document",
    [
        "Question: In which year did the old bridge over the Arle fall? Answer: 1871",
        "in WHICH year - did the OLD bridge (over the Arle) fall: 1871",
        "In which year did the òld bridge over the Arlé fall? It fell in 1871.",
        "In which\nyear did the\told bridge over the Arle fall?\n1871",
        "\uff29\uff4e which year did the old bridge over the Arle fall? 1871",
        "In which ye\u200bar did the ol\u00add bridge over the Arle fall? 1871",
        "In which year exactly did the old bridge over the Arle fall? 1871",
    ],
)
def test_a_copied_question_is_seen_in_any_dress(document: str) -> None:
    found = copied(document)
    assert (found.copied, found.answers_stated, found.exam_form) == (1, 1, 1)
    assert list(found.examples) == [QUESTION.text]
    assert found.mean >= 0.5


@pytest.mark.parametrize(
    "document",
    [
        "The old bridge over the Arle fell in 1871.",
        "Question: When did the bridge fall down? Answer: 1871",
        "The Arle has carried away every bridge; the one before this went in 1871.",
    ],
)
def test_a_document_that_states_the_answer_in_its_own_words_copies_nothing(document: str) -> None:
    found = copied(document)
    assert (found.copied, found.answers_stated, found.exam_form) == (0, 1, 0)


def test_what_the_tasks_own_text_says_counts_for_nothing() -> None:
    question = Question("Who wrote 'the old bridge over the Arle will fall'?", "Halloran")
    sentence = "Halloran wrote that the old bridge over the Arle will fall."
    assert copied(sentence, question).copied == 1
    assert copied(sentence, question, text=f"In her diary {sentence}").copied == 0


def test_sequences_from_different_documents_are_not_added_up() -> None:
    halves = ["In which year did the", "old bridge over the Arle fall"]
    found = audit(halves, "", [QUESTION])
    assert found.copied == 0
    assert 0 < found.mean < 0.5
    assert audit([" ".join(halves)], "", [QUESTION]).copied == 1


def test_exam_form_needs_the_answer_behind_the_question_and_near_it() -> None:
    assert copied(f"1871. {QUESTION.text}").exam_form == 0
    assert copied(f"{QUESTION.text} Nobody knows.").exam_form == 0
    assert copied(f"{QUESTION.text} Nobody knows. {'And so on. ' * 20} 1871").exam_form == 0
    assert copied(f"{QUESTION.text} {'And so on. ' * 20} {QUESTION.text} 1871").exam_form == 1
    choice = Question("Did the miller or the baker build the old bridge?", "the baker")
    assert copied("Did the miller or the baker build the old bridge? The miller.", choice).exam_form == 0


def test_gold_answers_are_whole_words_and_aliases_count() -> None:
    question = Question("Which beast does she own?", "cat", aliases=("tom cat", "C++"))
    assert copied("The catalogue is concatenated.", question).answers_stated == 0
    assert copied("A (cat) sleeps.", question).answers_stated == 1
    assert audit(["a tom", "cats"], "", [Question("Who?", "tom cats")]).answers_stated == 0  # not across documents
    assert copied("It is written in C++.", question).answers_stated == 1
    assert copied("+++", Question("What?", "++")).answers_stated == 0


@pytest.mark.parametrize("text", ["", "?!", "Who?", "\ud800"])
def test_a_question_of_a_word_or_none_is_never_copied(text: str) -> None:
    found = audit([text, "who is who?"], "", [Question(text, "x")])
    assert (found.copied, found.mean) == (0, 0.0)


def test_a_short_question_is_one_sequence() -> None:
    assert copied("Why did it fall? Because of ice.", Question("Why it?", "ice")).copied == 0
    assert copied("Why rain? Because of ice.", Question("Why rain?", "ice")).exam_form == 1


def test_scripts_without_blanks_are_read_character_by_character() -> None:
    question = Question("古い橋はいつ落ちましたか", "1871年")
    assert copied("問い：古い橋はいつ落ちましたか。答え：1871年", question).exam_form == 1
    assert copied("橋は1871年に落ちた", question).copied == 0


def test_nothing_to_look_at_is_no_overlap() -> None:
    assert audit([], "", [QUESTION]) == pb.OverlapAudit()
    assert audit(["words"], "text", []) == pb.OverlapAudit()


def test_three_examples_at_most_and_any_text_fits_into_the_message() -> None:
    asked = [Question(f"What did number {n} say to the \ud800 miller?", "no") for n in range(5)]
    found = audit([question.text for question in asked], "", asked)
    assert found.copied == 5
    assert len(found.examples) == 3
    assert pb.OverlapAudit.FromString(found.SerializeToString()) == found


@given(DOCUMENTS, SENTENCES, QUESTIONS)
def test_counts_are_of_questions_and_shares_are_shares(
    documents: list[str], text: list[str], asked: list[Question]
) -> None:
    found = audit(documents, " ".join(text), asked)
    assert 0 <= found.mean <= 1
    assert found.exam_form <= found.copied <= len(asked)
    assert found.exam_form <= found.answers_stated <= len(asked)
    assert len(found.examples) == min(3, found.copied)


@given(DOCUMENTS, SENTENCES, QUESTIONS)
def test_order_and_repetition_of_documents_change_nothing(
    documents: list[str], text: list[str], asked: list[Question]
) -> None:
    found = audit(documents, " ".join(text), asked)
    assert audit([*reversed(documents), *documents], " ".join(text), asked) == found


@given(DOCUMENTS, SENTENCES, QUESTIONS, SENTENCES)
def test_another_document_never_lowers_and_more_text_never_raises_it(
    documents: list[str], text: list[str], asked: list[Question], more: list[str]
) -> None:
    found = audit(documents, " ".join(text), asked)
    with_more = audit([*documents, " ".join(more)], " ".join(text), asked)
    assert with_more.mean >= found.mean
    assert with_more.copied >= found.copied
    assert with_more.exam_form >= found.exam_form
    assert audit(documents, " ".join([*text, *more]), asked).copied <= found.copied


@given(QUESTIONS)
@example([Question("the the?", "the river")])
def test_every_question_that_is_copied_whole_is_seen(asked: list[Question]) -> None:
    found = audit([f"{question.text} {question.answer}" for question in asked], "", asked)
    long_enough = sum(len(words(question.text)) > 1 for question in asked)
    assert found.copied == found.exam_form == long_enough


@given(st.lists(st.text(), max_size=3), st.text(), st.lists(st.tuples(st.text(), st.text()), max_size=3))
def test_any_text_is_read(documents: list[str], text: str, asked: list[tuple[str, str]]) -> None:
    audit(documents, text, [Question(question, answer) for question, answer in asked])


# A control that is not an attack: what an honest teacher writes about the shipped world, in every style and behaviour.
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_honest_study_material_of_the_shipped_world_copies_nothing(split: str) -> None:
    rng = random.Random(1)
    for told, _ in passages_with_facts(5, split, 45):
        asked = [Question(fact.ask(bank, n), fact.value) for fact in told.facts for n in (0, 1) for bank in Bank]
        study = [fact.study(n) for fact in told.facts for n in (0, 1)]
        statements = [fact.state(n) for fact in told.facts for n in range(4)]
        for behaviour in edits.BEHAVIOURS:
            edit = edits.write(behaviour, told.text, told.facts, edits.ORACLE_DIRECTIVE, rng)
            assert audit(edit.documents, told.text, asked).copied == 0, behaviour
        for documents in (study, statements, [" ".join(study + statements)]):
            found = audit(documents, told.text, asked)
            assert (found.copied, found.answers_stated) == (0, len(asked))


def test_the_exam_of_the_shipped_world_is_seen_whole() -> None:
    for told, passage in passages_with_facts(5, "train", 9):
        asked = passage.questions_of(Bank.REWARD)
        exam = [f"Question: {question.text} Answer: {question.answer}" for question in asked]
        found = audit(exam, told.text, asked)
        assert found.copied == found.exam_form == len(asked)
        assert audit(exam, told.text, passage.questions_of(Bank.SEALED)).copied == 0


DATA = Path(os.environ.get("PRECEPTOR_TEST_DATA", ""))


@pytest.mark.skipif(not (DATA / "self_edits/qwen2.5-7b.jsonl").is_file(), reason="PRECEPTOR_TEST_DATA has none")
def test_real_self_edits_that_nobody_rewarded_for_copying_hardly_copy() -> None:
    """SEAL's self-edits and questions; a question belongs to the passage that has its answer and most of its words."""
    rows = [json.loads(line) for line in (DATA / "self_edits/qwen2.5-7b.jsonl").read_text().splitlines()]
    graded = [json.loads(line) for line in (DATA / "graded/answers.jsonl").read_text().splitlines()]
    known = {text: set(words(text)) for text in sorted({row["context"] for row in rows})}
    asked: dict[str, list[Question]] = defaultdict(list)
    for text, gold in sorted({(row["question"], row["gold"]) for row in graded}):
        own = set(words(text))
        having = [(len(own & known[one]), one) for one in known if gold.lower() in one.lower()]
        if having and max(having)[0] >= 0.6 * len(own):
            asked[max(having)[1]].append(Question(text, gold))
    copies: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    for row in rows:
        if questions := asked.get(row["context"]):
            kind = "questions" if row["format"] == "self-qa" else "statements"
            copies[kind] += audit([row["completion"]], row["context"], questions).copied
            total[kind] += len(questions)
    assert total["statements"] > 800
    assert copies["statements"] == 0
    assert copies["questions"] / total["questions"] < 0.02


def test_one_long_document_with_every_question_in_it_many_times_takes_seconds_not_minutes() -> None:
    asked = [Question(f"Which number did miller {n} whisper to the {n} old crows?", str(n)) for n in range(200)]
    document = " ".join(question.text for question in asked) * 90
    assert len(document) > 800_000
    began = time.process_time()
    assert audit([document], "", asked).copied == 200
    assert time.process_time() - began < 10


def test_a_thousand_documents_against_two_hundred_questions_take_well_under_a_tenth_of_a_second() -> None:
    rng = random.Random(2)
    vocabulary = [f"word{n}" for n in range(3000)]

    def sentences(number: int, length: int) -> Sequence[str]:
        return [" ".join(rng.choices(vocabulary, k=length)) for _ in range(number)]

    documents, text = sentences(1000, 25), sentences(1, 500)[0]
    asked = [Question(f"{one}?", rng.choice(vocabulary)) for one in sentences(200, 10)]
    took = []
    for _ in range(5):  # the quickest: others use this machine too
        began = time.process_time()
        audit(documents, text, asked)
        took.append(time.process_time() - began)
    assert min(took) < 0.1
