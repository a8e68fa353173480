"""How sure a number is: means, standard errors and bootstrap intervals that respect passages.

Answers about one passage rise and fall together, so the passage is what is drawn again (cluster bootstrap, percentile
interval; Efron & Tibshirani 1993, ch. 13; Field & Welsh 2007 for clusters). Everything is seeded: the same outcomes
give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

# Drawn indices are made in slices, so that many passages and resamples need little memory.
_SLICE = 256
# A difference in shares below this is not told from none by any number of questions that somebody would write.
SMALLEST_DIFFERENCE = 0.005
# A two-sided 95% interval that excludes 0 with a chance of 80%.
_QUANTILES = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95% interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """Right answers to the questions of one passage; ``right`` may be a fraction (a mean over seeds)."""

    right: float
    questions: int


def clustered_mean(values: Sequence[float], clusters: Sequence[int]) -> tuple[float, float | None]:
    """The mean of ``values`` and its standard error, values of one cluster being dependent.

    The error is the cluster-robust one with the usual small-sample factor G/(G-1); with a single cluster the values
    count as independent; None where there are fewer than two values. Raises ValueError without values.
    """
    if not values:
        raise ValueError("no values")
    data = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    if len(data) < 2:
        return mean, None
    _, labels = np.unique(np.asarray(clusters), return_inverse=True)
    groups = int(labels.max()) + 1
    if groups == 1:
        return mean, float(data.std(ddof=1) / math.sqrt(len(data)))
    sums = np.bincount(labels, weights=data - mean, minlength=groups)
    variance = float((sums**2).sum()) * groups / (groups - 1) / len(data) ** 2
    return mean, math.sqrt(variance)


def accuracy(clusters: Sequence[Cluster], seed: int, resamples: int) -> Estimate | None:
    """The share of right answers over all questions; None without questions."""
    right, questions = _arrays(clusters)
    if questions.sum() == 0:
        return None
    drawn = _draws(len(clusters), seed, resamples)
    return _interval(float(right.sum() / questions.sum()), _ratio(right, questions, drawn))


def paired_difference(
    first: Sequence[Cluster], second: Sequence[Cluster], seed: int, resamples: int
) -> Estimate | None:
    """Share of right answers of ``first`` minus that of ``second``, measured on the same passages in the same order;
    both are drawn again together. None without questions. Raises ValueError for different lengths."""
    if len(first) != len(second):
        raise ValueError("paired clusters must have the same length")
    right_1, questions_1 = _arrays(first)
    right_2, questions_2 = _arrays(second)
    if questions_1.sum() == 0 or questions_2.sum() == 0:
        return None
    drawn = _draws(len(first), seed, resamples)
    mean = float(right_1.sum() / questions_1.sum() - right_2.sum() / questions_2.sum())
    return _interval(mean, _ratio(right_1, questions_1, drawn) - _ratio(right_2, questions_2, drawn))


def needed_passages(first: Sequence[Cluster], second: Sequence[Cluster]) -> int | None:
    """So many passages like these would show a difference of the size that was seen: its 95% interval excludes 0 with
    80% power.

        G = ceil( (z_0.975 + z_0.8)^2 * s^2 / D^2 )

    with D the difference of the shares and s^2 the variance between passages of what each adds to it,
    z_i = (r1_i - p1 q1_i) / mean(q1) - (r2_i - p2 q2_i) / mean(q2): the sample size for a paired mean (Cohen 1988,
    ch. 2; passages as units: Donner & Klar 2000, ch. 5) of a ratio that was made linear (Cochran 1977, sec. 6.4).
    The noise of seeds is in it, since each passage has fine-tunes of its own. The size that was seen is itself
    uncertain: if the true difference is half of it, four times as many are needed.

    None where the difference is below SMALLEST_DIFFERENCE, and where its spread is not known (fewer than two passages,
    no questions). Raises ValueError for different lengths.
    """
    if len(first) != len(second):
        raise ValueError("paired clusters must have the same length")
    right_1, questions_1 = _arrays(first)
    right_2, questions_2 = _arrays(second)
    if len(first) < 2 or questions_1.sum() == 0 or questions_2.sum() == 0:
        return None
    share_1, share_2 = right_1.sum() / questions_1.sum(), right_2.sum() / questions_2.sum()
    difference = float(share_1 - share_2)
    if abs(difference) < SMALLEST_DIFFERENCE:
        return None
    parts = (right_1 - share_1 * questions_1) / questions_1.mean() - (
        right_2 - share_2 * questions_2
    ) / questions_2.mean()
    return max(2, math.ceil(_QUANTILES**2 * float(parts.var(ddof=1)) / difference**2))


def needed_questions(first: Sequence[Cluster], second: Sequence[Cluster]) -> int | None:
    """``needed_passages`` in questions, at as many per passage as here."""
    passages = needed_passages(first, second)
    if passages is None:
        return None
    return math.ceil(passages * sum(cluster.questions for cluster in first) / len(first))


def _arrays(clusters: Sequence[Cluster]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    right = np.array([cluster.right for cluster in clusters], dtype=np.float64)
    return right, np.array([cluster.questions for cluster in clusters], dtype=np.float64)


def _draws(count: int, seed: int, resamples: int) -> NDArray[np.float64]:
    """How often each of ``count`` passages is drawn: [resamples, count]. Rows are the same for the same seed."""
    generator = np.random.default_rng(seed)
    rows = []
    for start in range(0, resamples, _SLICE):
        size = min(_SLICE, resamples - start)
        rows.append(generator.multinomial(count, np.full(count, 1 / count), size=size))
    return np.concatenate(rows).astype(np.float64)


def _ratio(
    right: NDArray[np.float64], questions: NDArray[np.float64], drawn: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Accuracy of each resample; a resample without a question (all its passages empty) is NaN and left out."""
    asked = drawn @ questions
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(asked > 0, (drawn @ right) / asked, np.nan)


def _interval(mean: float, resampled: NDArray[np.float64]) -> Estimate:
    valid = resampled[~np.isnan(resampled)]
    low, high = np.percentile(valid, [2.5, 97.5])
    return Estimate(mean, float(low), float(high))
