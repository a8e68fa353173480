"""What a group's evaluations say together, against simulated groups whose truth is known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import fmean

import pytest

from preceptor.groups import advantages, pooled, reliability, spread, trial_noise
from preceptor.v1 import evaluator_pb2 as pb


def evaluation(values_S_Q: Sequence[Sequence[float]], first_seed: int = 0) -> pb.Evaluation:  # noqa: N803
    """An evaluation with these values of each seed and question."""
    made = pb.Evaluation(state=pb.EVALUATION_STATE_SUCCEEDED)
    for seed, values in enumerate(values_S_Q, first_seed):
        made.trials.add(seed=seed, value=fmean(values), values=values)
    made.reward.value = fmean(trial.value for trial in made.trials)
    return made


def simulated(
    dice: random.Random, worth: Sequence[float], seeds: int | Sequence[int], *, noise: float, questions: int = 8
) -> list[pb.Evaluation]:
    """Candidates of this worth: a shared effect of the seed, noise of each trial, questions that differ a little."""
    common = [dice.gauss(0, 0.5) for _ in range(16)]
    counts = [seeds] * len(worth) if isinstance(seeds, int) else seeds
    made = []
    for mean, count in zip(worth, counts, strict=True):
        rows = []
        for seed in range(count):
            value = mean + common[seed] + dice.gauss(0, noise)
            rows.append([value + offset for offset in (-0.1, 0.1) * (questions // 2)])
        made.append(evaluation(rows))
    return made


def test_what_a_seed_does_to_all_candidates_is_no_noise() -> None:
    group = simulated(random.Random(0), [0.1, 0.2, 0.4], 3, noise=0.0)
    assert reliability(group) == pytest.approx(1.0)
    assert [error for _, error in advantages(group)] == pytest.approx([0.0] * 3, abs=1e-6)


def test_a_group_without_differences_has_no_reliability() -> None:
    dice = random.Random(1)
    found = pooled([one for _ in range(200) if (one := spread(simulated(dice, [0.3] * 6, 3, noise=0.2)))])
    assert found is not None
    assert found.signal == pytest.approx(0.0, abs=0.002)
    assert found.noise == pytest.approx(0.2**2 / 3, rel=0.1)
    assert found.reliability < 0.1


def test_the_reliability_is_the_share_of_variance_that_other_seeds_show_again() -> None:
    dice, worth = random.Random(2), [0.0, 0.1, 0.2, 0.3, 0.4]  # variance 0.025
    found = pooled([one for _ in range(300) if (one := spread(simulated(dice, worth, 4, noise=0.2)))])
    assert found is not None
    assert found.reliability == pytest.approx(0.025 / (0.025 + 0.04 / 4), abs=0.03)


def test_with_one_seed_nothing_is_said_about_seeds() -> None:
    group = simulated(random.Random(3), [0.1, 0.9], 1, noise=0.1)
    assert spread(group) is None
    assert reliability(group) is None
    assert pooled([]) is None


@pytest.mark.parametrize("seeds", [3, (1, 2, 4, 4, 6)])
def test_the_error_of_an_advantage_covers_the_truth(seeds: int | Sequence[int]) -> None:
    dice, worth, inside, count = random.Random(4), [0.0, 0.1, 0.2, 0.3, 0.4], 0, 0
    for _ in range(200):
        # Questions that do not differ say nothing of seeds: only the seeds' own estimate is looked at here.
        group = simulated(dice, worth, seeds, noise=0.2, questions=2)
        for evaluation_ in group:
            for trial in evaluation_.trials:
                del trial.values[1:]
        common = fmean(one.reward.value for one in group) - fmean(worth)
        for true, one, (advantage, error) in zip(worth, group, advantages(group), strict=True):
            assert advantage == pytest.approx(one.reward.value - common - 0.2)
            if isinstance(seeds, int):  # else the seeds' shared effect is part of it
                inside += abs(advantage - (true - 0.2)) < 2 * error
                count += 1
    assert not count or 0.88 <= inside / count <= 0.99


def test_one_seed_is_judged_by_its_questions() -> None:
    alike = [evaluation([[0.5, 0.5, 0.5, 0.5]]), evaluation([[0.4, 0.4, 0.4, 0.4]])]
    mixed = [evaluation([[1.0, 0.0, 1.0, 0.0]]), evaluation([[0.0, 0.8, 0.0, 0.8]])]
    assert trial_noise(alike) == pytest.approx(0.0)
    assert trial_noise(mixed) > 0.1
    assert trial_noise([evaluation([[0.5]]), evaluation([[0.1]])]) == pytest.approx(0.4**2)  # nothing is clear


def test_the_best_that_were_measured_again_tell_of_noise() -> None:
    dice, found = random.Random(8), []
    for worth in ([0.0] * 5, [0.0, 0.1, 0.2, 0.3, 0.4]):
        spreads = []
        for _ in range(1500):
            first = simulated(dice, worth, 1, noise=0.2)
            values = [one.reward.value for one in first]
            best = sorted(range(5), key=lambda i: -values[i])[:2]
            common = dice.gauss(0, 0.5)
            again = [
                evaluation([[mean + common + dice.gauss(0, 0.2)]], first_seed=100) if i in best else None
                for i, mean in enumerate(worth)
            ]
            one = spread(first, again)
            assert one is not None
            spreads.append(one)
        total = pooled(spreads)
        assert total is not None
        found.append(total.noise / 0.2**2)
        assert spread(first) is None
    assert found[0] == pytest.approx(1.0, abs=0.15)  # luck alone chose them
    assert 1.0 < found[1] < 1.35  # on the safe side


def test_the_same_self_edit_twice_says_nothing_about_noise() -> None:
    group = simulated(random.Random(6), [0.3, 0.1, 0.7], 2, noise=0.3)
    for number, one in enumerate(group):
        one.id = f"eval-{number}"
    assert trial_noise([*group, group[0], group[0]]) == trial_noise(group)


def test_a_group_of_one_has_no_advantage() -> None:
    assert advantages([evaluation([[0.5, 0.4]])]) == [(0.0, 0.0)]
    assert advantages([]) == []


def test_advantages_add_up_to_nothing() -> None:
    group = simulated(random.Random(5), [0.3, 0.1, 0.7], 2, noise=0.3)
    assert sum(advantage for advantage, _ in advantages(group)) == pytest.approx(0.0)
