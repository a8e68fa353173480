"""What the evaluations of one group of self-edits say together: who is better, how surely, and how much of it is noise.

Candidates of a group share their seeds (common random numbers: same initialisation, order and replay draws), so what a
seed does to all of them cancels in a difference. What is left is the noise of one trial, with variance ``noise``:

* from seeds: two candidates that share n >= 2 seeds give an estimate of it, half the variance over seeds of the
  difference of their values, with n - 1 degrees of freedom;
* from questions: within one seed, the variance over questions of the difference of two candidates' answers, divided by
  twice the number of questions. It also counts real differences between questions, so it errs to the safe side; it is
  all there is with one seed, and afterwards it is weighted like ``QUESTION_DOF`` degrees of freedom, because one or two
  differences of seeds are often close by chance.

Every function takes evaluations that SUCCEEDED, with at least one trial each, perhaps with different numbers of seeds.
The same self-edit twice has the same evaluation (the same id) twice; that they agree says nothing about noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, variance

from preceptor.v1 import evaluator_pb2 as pb

QUESTION_DOF = 2.0


@dataclass(frozen=True, slots=True)
class Spread:
    """Where the variance between the rewards of a group's self-edits comes from. Both are variances of a reward; being
    estimates, they may be below 0."""

    signal: float  # between self-edits, with other seeds as well
    noise: float  # between seeds

    @property
    def reliability(self) -> float:
        """Share of the variance that is not seed noise, 0..1; 0 where there is no variance at all."""
        signal = max(self.signal, 0.0)
        return signal / (signal + max(self.noise, 0.0)) if signal else 0.0


def advantages(evaluations: Sequence[pb.Evaluation]) -> list[tuple[float, float]]:
    """Each reward minus the mean of all, and the standard error of that difference.

    A group of one has no difference: (0, 0).
    """
    if len(evaluations) < 2:
        return [(0.0, 0.0) for _ in evaluations]
    mean, count, noise = fmean(one.reward.value for one in evaluations), len(evaluations), trial_noise(evaluations)
    parts = [noise / len(one.trials) for one in evaluations]  # variance of each reward
    rest = math.fsum(parts) / count**2
    return [
        (one.reward.value - mean, math.sqrt(part * (1 - 2 / count) + rest))
        for one, part in zip(evaluations, parts, strict=True)
    ]


def spread(evaluations: Sequence[pb.Evaluation], again: Sequence[pb.Evaluation | None] = ()) -> Spread | None:
    """None where no two candidates share two seeds: what seeds do is not known then.

    ``again``: what each of them, or None, earned on fresh seeds. Where the others share no second seed, two that were
    measured again tell of noise.
    """
    noise, dof = _seed_noise(_distinct(evaluations))
    if dof == 0:
        pairs = [(one, other) for one, other in zip(evaluations, again, strict=bool(again)) if other is not None]
        if len(pairs) < 2:
            return None
        noise = _fresh_noise(pairs)
    of_reward = noise * fmean(1 / len(one.trials) for one in evaluations)
    return Spread(variance(one.reward.value for one in evaluations) - of_reward, of_reward)


def reliability(evaluations: Sequence[pb.Evaluation]) -> float | None:
    """Share of the variance between the group's self-edits that is not seed noise; None where seeds are not known."""
    found = spread(evaluations)
    return None if found is None else found.reliability


def pooled(spreads: Sequence[Spread]) -> Spread | None:
    """The mean of several groups; its reliability is far less noisy than the mean of theirs. None without groups."""
    if not spreads:
        return None
    return Spread(fmean(one.signal for one in spreads), fmean(one.noise for one in spreads))


def trial_noise(evaluations: Sequence[pb.Evaluation]) -> float:
    """Variance of one trial's value around its candidate's mean, what the seed does to all candidates left out."""
    evaluations = _distinct(evaluations)
    from_seeds, dof = _seed_noise(evaluations)
    from_questions = _question_noise(evaluations)
    if from_questions is None:
        if dof:
            return from_seeds
        # One seed and one question: nothing is known, so no difference is taken for clear.
        values = [one.reward.value for one in evaluations]
        return (max(values) - min(values)) ** 2
    return (from_seeds * dof + from_questions * QUESTION_DOF) / (dof + QUESTION_DOF)


def _fresh_noise(pairs: Sequence[tuple[pb.Evaluation, pb.Evaluation]]) -> float:
    """The estimate from candidates that were measured when they were chosen and again on fresh seeds.

    Two candidates differ by d when they were chosen and by e on fresh seeds: the true difference and noise of its own.
    So the mean of e (e - d) is the variance of that noise. The plain variance of d - e would be too small, by a third
    where luck alone chose the best two of five, because choosing makes d small. By that, this one errs to the safe side
    where the two do differ (by a fifth in a simulation with differences of half the noise). One group's estimate may be
    negative; it is there to be pooled.
    """
    found = []
    for (one, one_again), (other, other_again) in combinations(pairs, 2):
        chosen, fresh = one.reward.value - other.reward.value, one_again.reward.value - other_again.reward.value
        found.append(fresh * (fresh - chosen) / (1 / len(one_again.trials) + 1 / len(other_again.trials)))
    return fmean(found)


def _distinct(evaluations: Sequence[pb.Evaluation]) -> list[pb.Evaluation]:
    return list({one.id or str(number): one for number, one in enumerate(evaluations)}.values())


def _seed_noise(evaluations: Sequence[pb.Evaluation]) -> tuple[float, int]:
    """The estimate from shared seeds and its degrees of freedom (of the candidates, not of their many pairs)."""
    squares, pair_dof, shared = 0.0, 0, 0
    by_seed = [{trial.seed: trial.value for trial in one.trials} for one in evaluations]
    for one, other in combinations(by_seed, 2):
        common = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
        if len(common) > 1:
            squares += variance(common) / 2 * (len(common) - 1)
            pair_dof += len(common) - 1
            shared = max(shared, len(common))
    if not pair_dof:
        return 0.0, 0
    several = sum(len(one) > 1 for one in by_seed)
    return squares / pair_dof, min(pair_dof, (several - 1) * (shared - 1))


def _question_noise(evaluations: Sequence[pb.Evaluation]) -> float | None:
    """The estimate from questions, mean over pairs and shared seeds; None with fewer than two questions."""
    found = []
    by_seed = [{trial.seed: trial.values for trial in one.trials} for one in evaluations]
    for one, other in combinations(by_seed, 2):
        for seed in one.keys() & other.keys():
            differences = [a - b for a, b in zip(one[seed], other[seed], strict=True)]
            if len(differences) > 1:
                found.append(variance(differences) / len(differences) / 2)
    return fmean(found) if found else None
