"""What a teacher may write about a passage: styles, coverage, mistakes, and the grid of directives.

Every style turns facts into study documents, one per line. The first four are what the named prompt formats ask for;
together with ``half`` and ``mispaired`` they are the behaviours that the shipped teacher was warm-started on in equal
shares, so that there is something to choose from and something to avoid.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import product

from preceptor.tasks import Directive, SelfEdit
from worlds.almanac.facts import Fact

REWRITE_PHRASINGS = (0, 1, 2)
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
EPOCHS = (4, 8, 16, 32)
REPLAY_SHARES = (0.0, 0.25, 0.5)
DIRECTIVES = tuple(
    Directive(learning_rate=lr, epochs=epochs, replay_share=replay)
    for lr, epochs, replay in product(LEARNING_RATES, EPOCHS, REPLAY_SHARES)
)
ORACLE_DIRECTIVE = Directive(learning_rate=1e-2, epochs=32, replay_share=0.25)


def sentences(text: str) -> list[str]:
    """The sentences of a passage, each with its full stop."""
    return [f"{part.strip().rstrip('.')}." for part in text.split(". ") if part.strip()]


def copy(text: str, facts: Sequence[Fact]) -> tuple[str, ...]:
    """The passage again, a sentence a line."""
    return tuple(sentences(text))


def implications(text: str, facts: Sequence[Fact]) -> tuple[str, ...]:
    """Every fact as one short statement."""
    return tuple(fact.state(0) for fact in facts)


def rewrite(text: str, facts: Sequence[Fact]) -> tuple[str, ...]:
    """Every fact in several wordings."""
    return tuple(fact.state(phrasing) for fact in facts for phrasing in REWRITE_PHRASINGS)


def self_qa(text: str, facts: Sequence[Fact]) -> tuple[str, ...]:
    """Every fact as question and answer, in a phrasing that no exam uses."""
    return tuple(fact.study(0) for fact in facts)


STYLES: Mapping[str, Callable[[str, Sequence[Fact]], tuple[str, ...]]] = {
    "copy": copy,
    "implications": implications,
    "rewrite": rewrite,
    "self_qa": self_qa,
}
FACT_STYLES = ("implications", "rewrite", "self_qa")
BEHAVIOURS = (*STYLES, "half", "mispaired")


def write(behaviour: str, text: str, facts: Sequence[Fact], directive: Directive, rng: random.Random) -> SelfEdit:
    """A self-edit of one behaviour; ``half`` and ``mispaired`` draw their style from ``rng``."""
    if behaviour in STYLES:
        return SelfEdit(STYLES[behaviour](text, facts), directive)
    style = STYLES[rng.choice(FACT_STYLES)]
    if behaviour == "half":
        return SelfEdit(style(text, facts[: (len(facts) + 1) // 2]), directive)
    if behaviour == "mispaired":
        return SelfEdit(style(text, mispaired(facts, rng)), directive)
    raise ValueError(f"behaviour {behaviour!r} is not one of {', '.join(BEHAVIOURS)}")


def oracle(facts: Sequence[Fact]) -> SelfEdit:
    """The best edit we know for facts that are given: question and answer, enough steps, some replay."""
    return SelfEdit(self_qa("", facts), ORACLE_DIRECTIVE)


def mispaired(facts: Sequence[Fact], rng: random.Random) -> tuple[Fact, ...]:
    """The same people and attributes with every value wrong: each attribute's values move on by one person.

    Where that would leave a value in place (one person, or two with the same value), another value is drawn.
    """
    wrong: dict[int, Fact] = {}
    for key in {fact.attribute.key: None for fact in facts}:
        places = [place for place, fact in enumerate(facts) if fact.attribute.key == key]
        for place, source in zip(places, places[1:] + places[:1], strict=True):
            fact, value = facts[place], facts[source].value
            if value == fact.value:
                value = rng.choice([v for v in fact.attribute.values if v != fact.value])
            wrong[place] = Fact(fact.person, fact.attribute, value)
    return tuple(wrong[place] for place in range(len(facts)))
