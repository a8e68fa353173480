"""Races: who is measured next, when it ends, and that it finds the best for less."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.racing import Candidate, RaceSettings, Step, best, next_step, spent, stopped
from preceptor.v1 import evaluator_pb2 as pb

QUESTIONS, TOKENS, LOOK_TOKENS = 4, 1000, 250
FAILED = pb.Evaluation(state=pb.EVALUATION_STATE_FAILED)
Measure = Callable[[int, int], pb.Evaluation]  # candidate and seeds (0: a look)


def evaluation(values_S_Q: Sequence[Sequence[float]], tokens: int = TOKENS) -> pb.Evaluation:  # noqa: N803
    """A success with these values of each seed and question."""
    made = pb.Evaluation(state=pb.EVALUATION_STATE_SUCCEEDED)
    for seed, values in enumerate(values_S_Q):
        made.trials.add(seed=seed, value=fmean(values), values=values, trained_tokens=tokens)
    made.reward.value = fmean(trial.value for trial in made.trials)
    return made


def drive(count: int, settings: RaceSettings, measure: Measure) -> tuple[list[Candidate], list[Step]]:
    """A whole race."""
    candidates, steps = [Candidate() for _ in range(count)], []
    while (step := next_step(candidates, settings)) is not None:
        steps.append(step)
        assert len(steps) < 1000, "the race does not end"
        for i in step.candidates:
            found = measure(i, 0 if step.look else step.seeds)
            candidates[i] = replace(candidates[i], **{"look" if step.look else "evaluation": found})
    return candidates, steps


def measured(worth: Sequence[float], noise: float = 0.0, seed: int = 0) -> Measure:
    """Candidates of this worth, the same values whenever they are asked for; ``noise`` is that of one trial."""

    def measure(candidate: int, seeds: int) -> pb.Evaluation:
        dice = random.Random(f"{seed}/{candidate}")
        of_question = noise * QUESTIONS**0.5
        values = [[worth[candidate] + dice.gauss(0, of_question) for _ in range(QUESTIONS)] for _ in range(seeds or 1)]
        return evaluation(values, TOKENS if seeds else LOOK_TOKENS)

    return measure


def test_after_a_look_the_better_half_goes_on() -> None:
    worth = [0.1, 0.8, 0.3, 0.6, 0.2, 0.7]
    settings = RaceSettings(look_steps=4, look_keep=0.5, max_seeds=1, top=1)
    candidates, steps = drive(6, settings, measured(worth))
    assert steps == [Step(True, (0, 1, 2, 3, 4, 5), 1), Step(False, (1, 3, 5), 1)]
    assert stopped(candidates, settings) == [True, False, True, False, True, False]
    assert best(candidates, settings) == [1]
    assert spent(candidates) == pytest.approx(3 + 6 * LOOK_TOKENS / TOKENS)


def test_near_ties_get_more_seeds_and_the_others_do_not() -> None:
    settings = RaceSettings(max_seeds=4, budget=4, z=1.0, top=1)
    candidates, _ = drive(4, settings, measured([-2.0, 0.5, 0.5, -1.5], 0.02))
    assert [candidate.seeds for candidate in candidates] == [1, 4, 4, 1]


def test_a_clear_choice_ends_the_race() -> None:
    _, steps = drive(3, RaceSettings(max_seeds=8, budget=8, top=1), measured([0.0, 1.0, 0.1], 0.01))
    assert steps == [Step(False, (0, 1, 2), 1)]


def test_the_boundary_is_below_the_last_that_is_wanted() -> None:
    """With two wanted, it does not matter which of them is better."""
    settings = RaceSettings(max_seeds=8, budget=8, top=2)
    _, steps = drive(4, settings, measured([0.9, 0.9, 0.1, 0.0], 0.01))
    assert steps == [Step(False, (0, 1, 2, 3), 1)]
    candidates, _ = drive(4, settings, measured([0.9, 0.5, 0.5, 0.0], 0.01))
    seeds = [candidate.seeds for candidate in candidates]
    assert (seeds[0], seeds[3]) == (1, 1)
    assert min(seeds[1], seeds[2]) > 1


def test_a_failure_is_out_of_the_race_and_is_not_called_stopped() -> None:
    good = measured([0.1, 0.5, 0.9, 0.3])

    def measure(candidate: int, seeds: int) -> pb.Evaluation:
        return FAILED if (candidate, seeds) in ((0, 0), (2, 1)) else good(candidate, seeds)

    settings = RaceSettings(look_steps=4, look_keep=0.5, max_seeds=1, top=1)
    candidates, steps = drive(4, settings, measure)
    assert steps[1].candidates == (1, 2)
    assert best(candidates, settings) == [1]
    assert stopped(candidates, settings) == [False, False, False, True]


def test_a_group_of_failures_ends() -> None:
    settings = RaceSettings(look_steps=4, top=1)
    candidates, steps = drive(3, settings, lambda candidate, seeds: FAILED)
    assert len(steps) == 1
    assert best(candidates, settings) == []
    assert not any(stopped(candidates, settings))


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=8),
    st.floats(0, 0.5),
    st.integers(0, 3),
    st.builds(
        RaceSettings,
        look_steps=st.sampled_from([0, 4]),
        look_keep=st.floats(0.1, 1),
        max_seeds=st.integers(1, 5),
        budget=st.floats(1.3, 6),
        z=st.floats(0, 3),
        top=st.integers(1, 3),
    ),
)
def test_every_race_ends_within_its_limits(worth: list[float], noise: float, seed: int, settings: RaceSettings) -> None:
    measure = measured(worth, noise, seed)
    candidates, steps = drive(len(worth), settings, measure)
    assert all(candidate.seeds <= settings.max_seeds for candidate in candidates)
    first = sum(candidate.rewarded for candidate in candidates) + len(worth) * LOOK_TOKENS / TOKENS
    assert spent(candidates) <= max(settings.budget * len(worth), first) + 1e-6
    assert len(best(candidates, settings)) == min(settings.top, len(worth))
    assert not {i for i, gone in enumerate(stopped(candidates, settings)) if gone} & set(best(candidates, settings))
    # Nobody's seeds are skipped or asked for twice.
    for i in range(len(worth)):
        assert [step.seeds for step in steps if not step.look and i in step.candidates] == list(
            range(1, candidates[i].seeds + 1)
        )
    # It has no memory: another drive with the same answers is the same race.
    assert drive(len(worth), settings, measure)[1] == steps


def test_a_race_finds_the_best_for_less_than_measuring_everybody() -> None:
    """Simulated groups: the same choice as 8 seeds each, in most cases, for less than half."""
    settings, dice = RaceSettings(max_seeds=8, budget=3.2, z=1.0, top=1), random.Random(7)
    same, cost = [], []
    for number in range(150):
        worth = [dice.gauss(0.4, 0.25) for _ in range(8)]
        measure = measured(worth, 0.08, number)
        candidates, _ = drive(8, settings, measure)
        full = [measure(i, 8).reward.value for i in range(8)]
        same.append(best(candidates, settings)[0] == full.index(max(full)))
        cost.append(spent(candidates) / 64)
    assert fmean(same) >= 0.9
    assert fmean(cost) <= 0.4
