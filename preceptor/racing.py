"""Which candidates of a group to measure next, so that the best of them are known for the least work.

Sequential elimination as for the best arms of a bandit (Karnin, Koren & Somekh 2013, "Almost Optimal Exploration in
Multi-Armed Bandits"; Maron & Moore 1997, "The Racing Algorithm"), with paired differences:

1. **Look**: every candidate is trained for a few steps with one seed, and only the gold answers' log-probabilities are
   measured. The worse part of the group goes no further.
2. **One seed** each for those that are left.
3. **Near-ties get more seeds**: as long as somebody inside the best ``top`` and somebody outside are closer than ``z``
   standard errors of their difference, such candidates get one more seed each, those with the fewest first, until the
   choice is clear, they have ``max_seeds``, or the budget is spent.

A race has no state but its evaluations: ``next_step`` is a pure function of what is known, so whoever drives it may die
and ask again. A candidate whose evaluation failed is out of the race: a failure is not a bad score.

**Rewards after a race are not unbiased**: who was lucky got more attention. The best are to be measured again on seeds
that had no part in the choice, and algorithms that need a reward of every candidate should not race.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from preceptor.groups import trial_noise
from preceptor.v1 import evaluator_pb2 as pb

SUCCEEDED = pb.EVALUATION_STATE_SUCCEEDED


@dataclass(frozen=True, slots=True)
class RaceSettings:
    """How a group is raced."""

    look_steps: int = 0  # optimiser steps of the first look; 0: none
    look_keep: float = 0.5  # share of the group that goes on after it
    max_seeds: int = 3  # of one candidate
    budget: float = 2.0  # trials per candidate on average; a look counts by its trained tokens
    z: float = 1.0  # standard errors that make a difference clear
    top: int = 1  # how many are to be found


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is known of one: its look and its latest evaluation with all steps, both in a final state."""

    look: pb.Evaluation | None = None
    evaluation: pb.Evaluation | None = None

    @property
    def looked(self) -> bool:
        """Whether its look gave a result."""
        return self.look is not None and self.look.state == SUCCEEDED

    @property
    def rewarded(self) -> bool:
        """Whether it has a reward."""
        return self.evaluation is not None and self.evaluation.state == SUCCEEDED

    @property
    def seeds(self) -> int:
        """How many seeds its reward stands on."""
        return len(self.evaluation.trials) if self.evaluation is not None and self.rewarded else 0

    @property
    def value(self) -> float:
        """Its reward; only where it has one."""
        assert self.evaluation is not None
        return self.evaluation.reward.value


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be measured next."""

    look: bool
    candidates: tuple[int, ...]  # ascending
    seeds: int  # how many of the race's seeds each of them has then


def next_step(candidates: Sequence[Candidate], settings: RaceSettings) -> Step | None:
    """The next step; None once the race is decided or nothing more may be spent."""
    everybody = range(len(candidates))
    if settings.look_steps and (unseen := [i for i in everybody if candidates[i].look is None]):
        return Step(True, tuple(unseen), 1)
    runners = _runners(candidates, settings)
    if waiting := [i for i in runners if candidates[i].evaluation is None]:
        return Step(False, tuple(waiting), 1)
    return _near_ties(candidates, settings)


def best(candidates: Sequence[Candidate], settings: RaceSettings) -> list[int]:
    """The ``top`` best of those that have a reward, best first; of equal rewards the one with fewer doubts, then the
    first."""
    rewarded = [i for i, candidate in enumerate(candidates) if candidate.rewarded]
    return sorted(rewarded, key=lambda i: (-candidates[i].value, -candidates[i].seeds, i))[: settings.top]


def stopped(candidates: Sequence[Candidate], settings: RaceSettings) -> list[bool]:
    """Who was left behind after the look, without a reward: others were better. No failure is among them."""
    runners = set(_runners(candidates, settings))
    return [candidate.looked and i not in runners for i, candidate in enumerate(candidates)]


def _runners(candidates: Sequence[Candidate], settings: RaceSettings) -> list[int]:
    """Who goes on after the look, ascending; everybody without one."""
    everybody = range(len(candidates))
    if not settings.look_steps:
        return list(everybody)
    looks = {i: one.look.reward.value for i, one in enumerate(candidates) if one.look is not None and one.looked}
    # One more than are wanted, where there are as many: else the look alone would make the choice.
    count = max(settings.top + 1, math.ceil(settings.look_keep * len(looks)))
    return sorted(sorted(looks, key=lambda i: (-looks[i], i))[:count])


def _near_ties(candidates: Sequence[Candidate], settings: RaceSettings) -> Step | None:
    """One more seed for those about whom the choice is not clear."""
    ranked = sorted((i for i, one in enumerate(candidates) if one.rewarded), key=lambda i: (-candidates[i].value, i))
    inside, outside = ranked[: settings.top], ranked[settings.top :]
    if not outside:
        return None
    noise = trial_noise([one.evaluation for one in candidates if one.evaluation is not None and one.rewarded])
    unclear: dict[int, float] = {}  # by candidate, its closest distance to the other side in standard errors
    for i in inside:
        for j in outside:
            error = math.sqrt(noise * (1 / candidates[i].seeds + 1 / candidates[j].seeds))
            distance = (candidates[i].value - candidates[j].value) / error if error else math.inf
            if distance < settings.z:
                for k in (i, j):
                    unclear[k] = min(distance, unclear.get(k, math.inf))
    extendable = [i for i in unclear if candidates[i].seeds < settings.max_seeds]
    if not extendable:
        return None
    seeds = min(candidates[i].seeds for i in extendable)
    chosen = sorted((i for i in extendable if candidates[i].seeds == seeds), key=lambda i: (unclear[i], i))
    affordable = math.floor(settings.budget * len(candidates) - spent(candidates) + 1e-9)
    chosen = chosen[: max(affordable, 0)]
    return Step(False, tuple(sorted(chosen)), seeds + 1) if chosen else None


def spent(candidates: Sequence[Candidate]) -> float:
    """What the race has cost so far, in trials: looks count by their trained tokens, failures as what they attempted
    is not known."""
    full = [trial.trained_tokens for one in candidates if one.evaluation is not None for trial in one.evaluation.trials]
    looks = [trial.trained_tokens for one in candidates if one.look is not None for trial in one.look.trials]
    of_looks = math.fsum(looks) / fmean(full) if full and any(full) else 0.0
    return len(full) + of_looks
