"""Who lives in the valley, what can be known about a person, and every way to say or ask it.

A fact is (person, attribute, value). Names are pairs of known words and values are single known words, because a
student whose embeddings are frozen cannot learn a word it has never seen. Phrasings come in three kinds that never
mix:

* ``statements`` and ``study_questions`` are what self-edits are written in;
* ``exam_questions`` (one list per bank) are what answers are measured with; no edit contains one;
* the ways a *passage* tells a fact live in ``passages``: the student was never shown that they answer anything.

The old people are what the students know from pretraining. They depend on ``WORLD_SEED`` alone, not on a run's seed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice

from preceptor.tasks import Bank

WORLD_SEED = 20_417  # fixes the old people and the pools of names; the shipped students were trained on it


@dataclass(frozen=True, slots=True, order=True)
class Person:
    """Somebody in the valley; ``pronouns`` are subject, object, possessive."""

    first: str
    last: str
    pronouns: tuple[str, str, str]

    @property
    def name(self) -> str:
        """First and last name."""
        return f"{self.first} {self.last}"


@dataclass(frozen=True, slots=True)
class Attribute:
    """One thing that can be known about a person. ``{n}`` stands for the name, ``{v}`` for the value.

    No phrasing begins with a name: in a byte-level vocabulary a word at the start of a line is another token than
    the same word after a space, and a tiny model should not spend its capacity on that.
    """

    key: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    study_questions: tuple[str, ...]
    exam_questions: Mapping[Bank, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Fact:
    """Something true (or, in a control, something false) about a person."""

    person: Person
    attribute: Attribute
    value: str

    def state(self, phrasing: int = 0) -> str:
        """The fact as a sentence."""
        return self._fill(self.attribute.statements[phrasing])

    def study(self, phrasing: int = 0) -> str:
        """The fact as a one-line question and answer, as a self-edit has it."""
        return f"Question: {self._fill(self.attribute.study_questions[phrasing])} Answer: {self.value}"

    def ask(self, bank: Bank, phrasing: int = 0) -> str:
        """The fact as an exam question (without its answer)."""
        return self._fill(self.attribute.exam_questions[bank][phrasing])

    def _fill(self, template: str) -> str:
        return template.format(n=self.person.name, v=self.value)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_SHE = ("she", "her", "her")
_HE = ("he", "him", "his")
_WOMEN = _words(
    """
    Ada Beth Cora Dina Edda Faye Gina Hilda Iris Jana Kira Lena Mona Nora Olga Petra Rosa Sina Tara Ursa Vera
    Wanda Yara Zita
    """
)
_MEN = _words(
    """
    Alec Boris Conrad Dirk Emil Fritz Georg Hugo Igor Jonas Karl Lukas Milan Niels Otto Paul Ralf Simon Theo
    Ulf Victor Walter Yorick Zeno
    """
)
_LAST = _words(
    """
    Abbot Birch Carver Dorn Elms Falk Grove Holt Irving Jarvis Kessler Lund Marsh Nash Ostler Pike Quill
    Reeve Stone Thorn Upton Vance Wilde Yates Alder Brandt Cole Drake Ember Frost Gale Heath Ivory Judd Kemp
    Lake Moss North Oaks Penn Rook Shaw Tull Usher Voss Ward York Zell
    """
)

FIRST_NAMES: Mapping[str, tuple[str, str, str]] = {**dict.fromkeys(_WOMEN, _SHE), **dict.fromkeys(_MEN, _HE)}
LAST_NAMES = _LAST

HOME = Attribute(
    "home",
    _words(
        """
        Arlow Bexmoor Corvale Dunmere Eskby Farrow Gorsey Hexton Inverley Jorvale Kelby Larkham Merrin Norwick
        Oxmere Pelham Quarley Redmoor Selwick Tarnby Ulverton Velden Wexley Yarrow Zennor Ashdale Brinley Calder
        Dolby Elmford Fernby Glenvale
        """
    ),
    (
        "The home of {n} is {v}.",
        "In {v} lives {n}.",
        "Look for {n} in {v}.",
        "The town of {n} is {v}.",
    ),
    ("Where is the home of {n}?", "Which town is home to {n}?"),
    {
        Bank.REWARD: ("In what place does {n} live?", "Where would you visit {n}?"),
        Bank.GATE: ("Where does {n} reside?", "Which place does {n} come from?"),
        Bank.SEALED: ("To which town do you write for {n}?", "Where has {n} settled?"),
    },
)
TRADE = Attribute(
    "trade",
    _words(
        """
        baker brewer cooper dyer farmer fisher glazier hatter jeweller joiner lawyer mason miller miner nurse
        painter potter printer roofer sailor shepherd singer smith tailor tanner teacher thatcher trader vintner
        warden weaver wheelwright
        """
    ),
    (
        "By trade {n} is a {v}.",
        "As a {v} works {n}.",
        "People hire {n} as a {v}.",
        "The work of {n} is that of a {v}.",
    ),
    ("What is the trade of {n}?", "As what does {n} work?"),
    {
        Bank.REWARD: ("How does {n} earn a living?", "What job does {n} have?"),
        Bank.GATE: ("What does {n} do all day?", "Which craft feeds {n}?"),
        Bank.SEALED: ("What is the calling of {n}?", "For which profession is {n} known?"),
    },
)
ANIMAL = Attribute(
    "animal",
    _words(
        """
        badger beaver camel cat cow crow deer dog donkey dove duck falcon ferret fox frog goat goose hare
        hedgehog hen horse lamb lizard mule parrot pig pony rabbit raven swan toad turtle
        """
    ),
    (
        "The animal of {n} is a {v}.",
        "At home {n} keeps a {v}.",
        "One sees {n} with a {v}.",
        "The pet of {n} is a {v}.",
    ),
    ("What is the animal of {n}?", "Which pet does {n} keep?"),
    {
        Bank.REWARD: ("Which beast does {n} own?", "What creature lives with {n}?"),
        Bank.GATE: ("What does {n} feed each morning?", "Which creature follows {n}?"),
        Bank.SEALED: ("What kind of beast has {n} tamed?", "Which companion does {n} have?"),
    },
)
INSTRUMENT = Attribute(
    "instrument",
    _words(
        """
        accordion bagpipe banjo bassoon bell bugle cello chimes clarinet cornet cymbal drum fiddle flute gong
        guitar harp horn lute lyre mandolin oboe organ piano piccolo recorder sitar tambourine trombone trumpet
        tuba zither
        """
    ),
    (
        "The instrument of {n} is the {v}.",
        "On the {v} plays {n}.",
        "With the {v} {n} makes music.",
        "The music of {n} comes from the {v}.",
    ),
    ("What is the instrument of {n}?", "On what does {n} play?"),
    {
        Bank.REWARD: ("What does {n} make music with?", "Which sound do you hear from {n}?"),
        Bank.GATE: ("What does {n} bring to a concert?", "What did {n} learn to play?"),
        Bank.SEALED: ("Which instrument is in the hands of {n}?", "What does {n} practise at night?"),
    },
)
ATTRIBUTES = (HOME, TRADE, ANIMAL, INSTRUMENT)

OLD_ANCHORED = 64  # old people that no passage ever mentions: probes and replay are about them
OLD_CORRECTABLE = 64  # old people whom corrections are about
OLD_SILENT = 64  # old people of whom the student heard statements and never a question
LINKED_EVERY = 8  # of the anchored and correctable, each eighth was both stated and asked; the others only asked
WARM_UP_NAMES = 1_000  # names that only the warm-up of the models uses


@dataclass(frozen=True, slots=True)
class Population:
    """Every possible name, dealt to purposes that never share one."""

    anchored: tuple[Person, ...]
    correctable: tuple[Person, ...]
    silent: tuple[Person, ...]
    warm_up: tuple[Person, ...]
    newcomers: tuple[Person, ...]
    old_facts: Mapping[Person, tuple[Fact, ...]]  # of all old people; one fact per attribute, in their order


@cache
def population() -> Population:
    """The valley, always the same."""
    rng = random.Random(f"almanac/{WORLD_SEED}/people")
    everybody = [Person(first, last, pronouns) for first, pronouns in FIRST_NAMES.items() for last in LAST_NAMES]
    rng.shuffle(everybody)
    dealt = iter(everybody)
    anchored, correctable, warm_up, silent = (
        tuple(islice(dealt, number)) for number in (OLD_ANCHORED, OLD_CORRECTABLE, WARM_UP_NAMES, OLD_SILENT)
    )
    old_facts = {person: random_facts(person, rng) for person in (*anchored, *correctable, *silent)}
    return Population(anchored, correctable, silent, warm_up, tuple(dealt), old_facts)


def random_facts(person: Person, rng: random.Random) -> tuple[Fact, ...]:
    """One random fact per attribute about ``person``."""
    return tuple(Fact(person, attribute, rng.choice(attribute.values)) for attribute in ATTRIBUTES)
