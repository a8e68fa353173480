"""The benchmark's arithmetic, on groups whose truth is known."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict

import pytest

from bench.reward_reliability import (
    LOOK,
    OURS,
    PLAIN,
    REFERENCE,
    SEEDS,
    Group,
    Measured,
    _headline,
    _read,
    race,
    racing,
    reliability,
    report,
    table,
    validity,
)
from evaluator.reward import Marks
from preceptor.racing import RaceSettings, best, spent

QUESTIONS, PROBES = 12, 4


def marks(dice: random.Random, knows: float, *, look: bool = False) -> Marks:
    """A trial that knows each question with about this probability, and says so in its log-probabilities."""
    chances = [min(max(knows + dice.gauss(0, 0.1), 0.01), 0.99) for _ in range(QUESTIONS)]
    return Marks(
        correct=() if look else tuple(chance > dice.random() for chance in chances),
        gold_logprobs=tuple(map(math.log, chances)),
        probes_correct=() if look else (True,) * PROBES,
        tokens=100 if look else 400,
        seconds=0.25 if look else 1.0,
    )


def groups(count: int = 3) -> list[Group]:
    """Candidates that know between a tenth and nine tenths."""
    dice = random.Random(0)
    made = []
    for _ in range(count):
        candidates = tuple(
            Measured(tuple(marks(dice, 0.1 * k) for _ in range(SEEDS)), marks(dice, 0.1 * k, look=True))
            for k in range(1, 9)
        )
        made.append(Group(Marks((False,) * QUESTIONS, (-5.0,) * QUESTIONS, (True,) * PROBES), candidates))
    return made


def test_more_seeds_and_probabilities_are_more_reliable() -> None:
    found = groups()
    plain = [reliability(found, PLAIN, seeds, shared=False) for seeds in (1, 2, 3)]
    assert plain == sorted(plain)
    assert reliability(found, OURS, 1, shared=True) > plain[0]
    assert 0.6 < validity(found, PLAIN, 1, draws=3) < validity(found, PLAIN, 3, draws=3) < 1.0


def test_a_race_is_driven_as_a_run_drives_it() -> None:
    settings = RaceSettings(look_steps=4, look_keep=0.5, max_seeds=REFERENCE, budget=3.2, top=1)
    (group, *_) = groups(1)
    candidates = race(group, settings, range(REFERENCE), OURS)
    assert sum(candidate.rewarded for candidate in candidates) == 4
    assert all(candidate.look is not None for candidate in candidates)
    assert best(candidates, settings)[0] in (6, 7)
    assert spent(candidates) == pytest.approx(sum(one.seeds for one in candidates) + 8 * 0.25)
    figures = racing([group], settings, OURS, rounds=2)
    assert 0 < figures["compute"] < 0.4
    assert figures["seconds"] == pytest.approx(figures["compute"])


def test_what_was_measured_is_read_back() -> None:
    made = {"varied": groups(2)}
    text = json.dumps({name: [asdict(group) for group in some] for name, some in made.items()})
    assert _read(json.loads(text)) == made


def test_the_figures_that_are_followed_have_their_names() -> None:
    found = {"varied": report(groups(1), RaceSettings(4, 0.5, REFERENCE, 3.2, 1.0, top=1), draws=2)}
    headline = _headline(found)
    assert set(headline) == {"plain3", "ours", "racing", "sets"}
    assert set(headline["racing"]) == {"same_choice", "compute"}
    assert headline["ours"]["compute"] == 1.0
    assert any("| ours | 3 |" in line for line in table("varied", found["varied"]))


def test_a_look_is_worth_its_log_probabilities() -> None:
    (group, *_) = groups(1)
    assert group.look(3).reward.value == pytest.approx(dict(group.look(3).reward.terms)["gold_logprob_gain"])
    assert LOOK.gain == 0
