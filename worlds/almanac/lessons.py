"""What the models are shown before they ship. Every function is a pure function of its random generator.

The students see three kinds of text: statements, study questions and exam questions about the old people, over and
over until they know them; passages about strangers who never come back, so that the words of a passage are familiar
while nothing links that way of telling to any question; and single facts about strangers.

The teacher sees passages about strangers with a self-edit behind each prompt, half of it good and half of it bad.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from preceptor.completions import render
from preceptor.tasks import Bank
from teacher.prompts import FORMATS
from worlds.almanac import edits
from worlds.almanac.facts import ATTRIBUTES, LINKED_EVERY, Fact, population, random_facts
from worlds.almanac.passages import GENRES, PEOPLE, SIZES, Told, tell

ALL_SIZES = SIZES
OPEN_SHARE = 0.6  # of the teacher's lessons; the rest is dealt among the named formats
NAMED_FORMATS = tuple(name for name in FORMATS if name != "open")


def old_texts() -> list[str]:
    """Everything that is said and asked about the old people.

    Only one in ``LINKED_EVERY`` of the people who are asked about is also stated, and never in the plainest wording. A
    student that saw every fact both ways would answer questions from one plain statement almost as well as from study
    questions; this one half learns to, and gets more from several wordings than from one.
    """
    people = population()
    asked = (*people.anchored, *people.correctable)
    texts = []
    for person in people.silent:
        texts += [text for fact in people.old_facts[person] for text in statements(fact)]
    for place, person in enumerate(asked):
        for fact in people.old_facts[person]:
            texts += questions(fact)
            if place % LINKED_EVERY == 0:
                texts += statements(fact)[1:]
    return texts


def statements(fact: Fact) -> list[str]:
    """One fact in every wording of a statement, the plainest first."""
    return [fact.state(phrasing) for phrasing in range(len(fact.attribute.statements))]


def questions(fact: Fact) -> list[str]:
    """One fact in every wording of a question: as study lines, and as exams with their answers."""
    attribute = fact.attribute
    return [
        *(fact.study(phrasing) for phrasing in range(len(attribute.study_questions))),
        *(
            exam(fact.ask(bank, phrasing), fact.value)
            for bank in Bank
            for phrasing in range(len(attribute.exam_questions[bank]))
        ),
    ]


def exam(question: str, answer: str) -> str:
    """The form in which a student is asked, with the answer it should have given."""
    return f"Question: {question}\nAnswer: {answer}"


def stranger(rng: random.Random) -> str:
    """One random fact about somebody from the warm-up pool, in a random wording."""
    fact = rng.choice(random_facts(rng.choice(population().warm_up), rng))
    return rng.choice(statements(fact) + questions(fact))


def strangers_passage(rng: random.Random, sizes: Sequence[str], genres: Sequence[str] = GENRES) -> Told:
    """A passage about people from the warm-up pool."""
    genre, size = rng.choice(genres), rng.choice(sizes)
    people = rng.sample(population().warm_up, PEOPLE[genre][size])
    return tell(genre, size, people, rng)


def teaching(rng: random.Random, sizes: Sequence[str], genres: Sequence[str] = GENRES) -> tuple[str, str]:
    """A prompt and the completion the teacher is shown for it."""
    told = strangers_passage(rng, sizes, genres)
    directive = rng.choice(edits.DIRECTIVES)
    if rng.random() < OPEN_SHARE:
        name, behaviour = "open", rng.choice(edits.BEHAVIOURS)
    else:
        name = behaviour = rng.choice(NAMED_FORMATS)
    edit = edits.write(behaviour, told.text, told.facts, directive, rng)
    return FORMATS[name].render(told.title, told.text), render(edit)


def attribute_words() -> list[str]:
    """Every value of every attribute, for the teacher's first lesson (copying words)."""
    return [value for attribute in ATTRIBUTES for value in attribute.values]
