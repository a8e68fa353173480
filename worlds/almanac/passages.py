"""The passages a run learns from: three genres, three sizes, two splits that share nobody.

``passages(seed, split, count)`` is a pure function. Passage ``i`` does not depend on ``count``, genres and sizes take
turns, and the people of ``train`` and ``heldout`` are dealt from one shuffled list, so they never overlap. Within a
split a name may come back (with other facts) once the list is used up.

Genres:

* ``register``: columns of numbered entries; a value never stands beside its name.
* ``narrative``: prose about one person after another, with pronouns.
* ``correction``: an old entry the student knows, and what is right instead; only the right value counts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from preceptor.tasks import Bank, Passage, Question
from worlds.almanac import edits
from worlds.almanac.facts import ATTRIBUTES, Fact, Person, population, random_facts

SPLITS = ("train", "heldout")
GENRES = ("register", "narrative", "correction")
SIZES = ("small", "medium", "large")
PEOPLE = {  # a correction changes two facts of a person, the other genres tell four
    "register": {"small": 2, "medium": 3, "large": 4},
    "narrative": {"small": 2, "medium": 3, "large": 4},
    "correction": {"small": 2, "medium": 4, "large": 6},
}
CORRECTED_FACTS = 2


@dataclass(frozen=True, slots=True)
class Told:
    """A passage before it is wrapped: its text and its facts in the order in which the text tells them."""

    genre: str
    size: str
    title: str
    text: str
    facts: tuple[Fact, ...]


def passages(seed: int, split: str, count: int) -> list[Passage]:
    """The first ``count`` passages of ``split`` under ``seed``.

    Raises ValueError if the split is unknown.
    """
    return [passage for _, passage in passages_with_facts(seed, split, count)]


def passages_with_facts(seed: int, split: str, count: int) -> list[tuple[Told, Passage]]:
    """The same passages, each with what it tells; for writing edits by rule (``bench/strategies.py``).

    Raises ValueError if the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    everybody = population()
    newcomers = _dealt(everybody.newcomers, seed, split)
    correctable = _dealt(everybody.correctable, seed, split)
    taken = {"newcomers": 0, "correctable": 0}
    result = []
    for index in range(count):
        rng = random.Random(f"almanac/{seed}/{split}/{index}")
        genre = GENRES[index % len(GENRES)]
        size = SIZES[(index // len(GENRES)) % len(SIZES)]
        pool, name = (correctable, "correctable") if genre == "correction" else (newcomers, "newcomers")
        number = PEOPLE[genre][size]
        people = [pool[(taken[name] + offset) % len(pool)] for offset in range(number)]
        taken[name] += number
        told = tell(genre, size, people, rng)
        result.append((told, as_passage(told, rng)))
    return result


def tell(genre: str, size: str, people: Sequence[Person], rng: random.Random) -> Told:
    """A text of one genre about these people, with facts drawn from ``rng``."""
    return _TELLERS[genre](size, people, rng)


def as_passage(told: Told, rng: random.Random) -> Passage:
    """The passage with its three banks of questions and its reference edits."""
    questions = tuple(
        Question(fact.ask(bank, rng.randrange(len(fact.attribute.exam_questions[bank]))), fact.value, bank)
        for bank in Bank
        for fact in told.facts
    )
    people = len({fact.person for fact in told.facts})
    return Passage(
        title=told.title,
        text=told.text,
        questions=questions,
        labels={"genre": told.genre, "size": told.size, "people": str(people), "facts": str(len(told.facts))},
        reference_edits={
            "oracle": edits.oracle(told.facts),
            "shuffled_facts": edits.oracle(edits.mispaired(told.facts, rng)),
        },
    )


def _dealt(people: Sequence[Person], seed: int, split: str) -> list[Person]:
    """This split's half of ``people``, in the seed's order."""
    order = list(people)
    random.Random(f"almanac/{seed}/deal").shuffle(order)
    return order[SPLITS.index(split) :: len(SPLITS)]


# -- register ----------------------------------------------------------------------------------------------------------

_COLUMNS = {"home": "Roofs", "trade": "Guilds", "animal": "Stables", "instrument": "Bands"}
_REGISTER_TITLES = ("Register of the valley", "Roll of the parish", "Ledger of the county")


def _register(size: str, people: Sequence[Person], rng: random.Random) -> Told:
    known = {person: random_facts(person, rng) for person in people}
    names = ", ".join(f"{number} {person.name}" for number, person in enumerate(people, 1))
    sentences = [f"Entries: {names}."]
    facts = []
    columns = list(range(len(ATTRIBUTES)))
    rng.shuffle(columns)
    for column in columns:
        cells = ", ".join(f"{number} {known[person][column].value}" for number, person in enumerate(people, 1))
        sentences.append(f"{_COLUMNS[ATTRIBUTES[column].key]}: {cells}.")
        facts += [known[person][column] for person in people]
    return Told("register", size, rng.choice(_REGISTER_TITLES), " ".join(sentences), tuple(facts))


# -- narrative ---------------------------------------------------------------------------------------------------------

_NARRATIVE_TITLES = ("A tale of the valley", "Evenings by the river", "News from the road")
_OPENINGS = (
    "Last spring the road brought {n}.",
    "Then there was {n}.",
    "Much was said of {n}.",
    "Nobody forgets {n}.",
)
_TALES = {
    "home": (
        "Under a roof in {v} {she} sleeps.",
        "After the rain {she} walked to {v} and stayed.",
    ),
    "trade": (
        "Bread comes to {her} from the toil of a {v}.",
        "Once an uncle made {her} a {v}.",
    ),
    "animal": (
        "A {v} waits at {hers} door.",
        "Through the fields {she} leads a {v}.",
    ),
    "instrument": (
        "At dusk the {v} is heard from {hers} window.",
        "For a feast {she} takes the {v} along.",
    ),
}


def _narrative(size: str, people: Sequence[Person], rng: random.Random) -> Told:
    sentences, facts = [], []
    for person in people:
        sentences.append(rng.choice(_OPENINGS).format(n=person.name))
        known = list(random_facts(person, rng))
        rng.shuffle(known)
        for fact in known:
            sentences.append(_with_pronouns(rng.choice(_TALES[fact.attribute.key]), person, v=fact.value))
        facts += known
    return Told("narrative", size, rng.choice(_NARRATIVE_TITLES), " ".join(sentences), tuple(facts))


def _with_pronouns(template: str, person: Person, **words: str) -> str:
    she, her, hers = person.pronouns
    return template.format(she=she, her=her, hers=hers, **words)


# -- correction --------------------------------------------------------------------------------------------------------

_CORRECTION_TITLES = ("Corrections to the almanac", "What the last edition got wrong", "Errata")
_DOUBTS = (
    "The last edition was wrong about {n}.",
    "Strike the lines on {n}.",
    "A reader wrote to us about {n}.",
)
_REPAIRS = {
    "home": (
        "Not {old} but {v} is where {she} sleeps.",
        "We put {her} in {old}, and it should be {v}.",
    ),
    "trade": (
        "Not the toil of a {old} but of a {v} brings {her} bread.",
        "We called {her} a {old}, and it should be {v}.",
    ),
    "animal": (
        "Not a {old} but a {v} waits at {hers} door.",
        "We gave {her} a {old}, and it should be {v}.",
    ),
    "instrument": (
        "Not the {old} but the {v} is heard from {hers} window.",
        "We lent {her} the {old}, and it should be {v}.",
    ),
}


def _correction(size: str, people: Sequence[Person], rng: random.Random) -> Told:
    sentences, facts = [], []
    for person in people:
        sentences.append(rng.choice(_DOUBTS).format(n=person.name))
        # People from the warm-up pool have no history; any value serves as the old one.
        history = population().old_facts.get(person) or random_facts(person, rng)
        for old in rng.sample(history, CORRECTED_FACTS):
            value = rng.choice([v for v in old.attribute.values if v != old.value])
            repair = rng.choice(_REPAIRS[old.attribute.key])
            sentences.append(_with_pronouns(repair, person, old=old.value, v=value))
            facts.append(Fact(person, old.attribute, value))
    return Told("correction", size, rng.choice(_CORRECTION_TITLES), " ".join(sentences), tuple(facts))


_TELLERS: dict[str, Callable[[str, Sequence[Person], random.Random], Told]] = {
    "register": _register,
    "narrative": _narrative,
    "correction": _correction,
}
