"""What the student must not forget, and what may be replayed to help it remember.

Both are about the *anchored* old people, whom no passage mentions. Every anchored person has one probed fact; replay
documents tell only facts that are not probed. Replay can therefore not teach a probe's answer again; it keeps the
student from bending everything it knows towards the new facts.
"""

from __future__ import annotations

from preceptor.tasks import Bank, Question
from worlds.almanac.facts import ATTRIBUTES, Fact, population


def retention_probes() -> tuple[Question, ...]:
    """One question about every anchored person."""
    return tuple(
        Question(fact.ask(Bank.REWARD, place % len(fact.attribute.exam_questions[Bank.REWARD])), fact.value)
        for place, fact in enumerate(_probed())
    )


def replay_documents() -> tuple[str, ...]:
    """Old facts that are not probed, as question and answer in the wordings that study material uses."""
    probed = set(_keys(_probed()))
    documents = []
    for place, fact in enumerate(fact for person in population().anchored for fact in population().old_facts[person]):
        if _key(fact) not in probed:
            documents.append(fact.study(place % len(fact.attribute.study_questions)))
    return tuple(documents)


def _probed() -> list[Fact]:
    people = population()
    return [people.old_facts[person][place % len(ATTRIBUTES)] for place, person in enumerate(people.anchored)]


def _key(fact: Fact) -> tuple[str, str]:
    return fact.person.name, fact.attribute.key


def _keys(facts: list[Fact]) -> list[tuple[str, str]]:
    return [_key(fact) for fact in facts]
