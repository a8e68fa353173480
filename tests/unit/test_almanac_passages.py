"""Promises of the generated world: what a run may rely on when it trains and measures on it."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest

from preceptor.completions import Limits, parse, render
from preceptor.tasks import Bank, Passage
from worlds.almanac import edits
from worlds.almanac.facts import ATTRIBUTES, FIRST_NAMES, LAST_NAMES, population
from worlds.almanac.memory import replay_documents, retention_probes
from worlds.almanac.passages import GENRES, SIZES, passages, passages_with_facts

COUNT = 36


def names_in(passage: Passage) -> set[str]:
    words = re.findall(r"\w+", passage.text)
    return {f"{a} {b}" for a, b in pairwise(words) if a in FIRST_NAMES and b in LAST_NAMES}


def test_same_seed_gives_the_same_passages() -> None:
    assert passages(3, "train", COUNT) == passages(3, "train", COUNT)


def test_another_seed_gives_other_passages() -> None:
    assert not {p.text for p in passages(3, "train", COUNT)} & {p.text for p in passages(4, "train", COUNT)}


def test_a_passage_does_not_depend_on_how_many_are_asked_for() -> None:
    assert passages(3, "heldout", COUNT)[:5] == passages(3, "heldout", 5)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split"):
        passages(3, "test", 1)


@pytest.mark.parametrize("seed", [0, 7])
def test_train_and_heldout_share_nobody(seed: int) -> None:
    trained = set().union(*map(names_in, passages(seed, "train", 80)))
    heldout = set().union(*map(names_in, passages(seed, "heldout", COUNT)))
    assert trained
    assert heldout
    assert not trained & heldout


def test_genres_and_sizes_take_turns() -> None:
    nine = passages(1, "train", 9)
    assert {(p.labels["genre"], p.labels["size"]) for p in nine} == {(g, s) for g in GENRES for s in SIZES}


def test_every_fact_is_asked_once_in_each_bank_and_the_text_holds_the_answers() -> None:
    for told, passage in passages_with_facts(5, "train", COUNT):
        for bank in Bank:
            answers = [q.answer for q in passage.questions_of(bank)]
            assert answers == [fact.value for fact in told.facts]
            assert len({q.text for q in passage.questions_of(bank)}) == len(told.facts) == int(passage.labels["facts"])
        assert all(answer in passage.text for answer in answers)


def test_the_three_banks_never_phrase_a_question_alike() -> None:
    for attribute in ATTRIBUTES:
        banks = [set(attribute.exam_questions[bank]) for bank in Bank]
        assert len(set().union(*banks)) == sum(map(len, banks))


def test_no_edit_and_no_passage_contains_an_exam_question() -> None:
    rng = random.Random(0)
    for told, passage in passages_with_facts(2, "heldout", COUNT):
        written = [passage.text, *passage.reference_edits["oracle"].documents]
        for behaviour in edits.BEHAVIOURS:
            written += edits.write(behaviour, told.text, told.facts, edits.DIRECTIVES[0], rng).documents
        everything = "\n".join(written)
        assert not [q.text for q in passage.questions if q.text in everything]


def test_corrections_contradict_what_the_student_knows() -> None:
    known = {(f.person.name, f.attribute.key): f.value for facts in population().old_facts.values() for f in facts}
    corrections = [told for told, _ in passages_with_facts(2, "train", COUNT) if told.genre == "correction"]
    for told in corrections:
        for fact in told.facts:
            old = known[fact.person.name, fact.attribute.key]
            assert old != fact.value
            assert old in told.text


def test_oracle_states_every_fact_and_shuffled_facts_none() -> None:
    for told, passage in passages_with_facts(9, "heldout", COUNT):
        true = {fact.study() for fact in told.facts}
        assert set(passage.reference_edits["oracle"].documents) == true
        shuffled = passage.reference_edits["shuffled_facts"]
        assert len(shuffled.documents) == len(told.facts)
        assert not set(shuffled.documents) & true


def test_self_edits_of_every_behaviour_survive_the_teachers_text_form() -> None:
    rng = random.Random(0)
    for told, _ in passages_with_facts(9, "train", 9):
        for behaviour in edits.BEHAVIOURS:
            for directive in edits.DIRECTIVES:
                edit = edits.write(behaviour, told.text, told.facts, directive, rng)
                assert parse(render(edit), Limits()) == edit


def test_a_copy_is_the_passage_sentence_by_sentence() -> None:
    for told, _ in passages_with_facts(9, "train", 9):
        assert " ".join(edits.copy(told.text, told.facts)) == told.text


def test_nobody_who_is_probed_or_replayed_appears_in_a_passage() -> None:
    remembered = "\n".join([q.text for q in retention_probes()] + list(replay_documents()))
    for split in ("train", "heldout"):
        for passage in passages(1, split, 80):
            assert not [name for name in names_in(passage) if name in remembered]


def test_replay_never_tells_what_a_probe_asks() -> None:
    probed = {(fact.person.name, fact.value) for fact in _probed_facts()}
    told = replay_documents()
    assert len(retention_probes()) == len(probed)
    assert told
    assert not [1 for name, value in probed for document in told if name in document and document.endswith(f" {value}")]


def _probed_facts() -> list[object]:
    asked = {q.text: q.answer for q in retention_probes()}
    facts = [fact for person in population().anchored for fact in population().old_facts[person]]
    return [
        fact for fact in facts if any(asked.get(fact.ask(Bank.REWARD, phrasing)) == fact.value for phrasing in range(2))
    ]
