"""How two self-edits for one task differ, question by question and seed by seed; and the error of such a mean. Pure.

Two-way random effects: questions and seeds are both drawn from larger populations, and the same draws met both
self-edits, so what is hard for everybody and what a seed does to everybody cancels out (``evaluator.reward`` has the
formula; a reward is such a difference to the untouched student).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance

from preceptor.v1 import evaluator_pb2 as pb

# Fewer tell nothing apart: that five of five agree is chance in one of sixteen cases, either sign counted.
LEAST_QUESTIONS = 6
_Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Difference:
    """One reward minus another, over the seeds that both have."""

    mean: float
    stderr: float  # over questions (and probes) and seeds; with one seed over questions alone
    seed_stderr: float | None  # over seeds alone, the questions being these; None with one seed
    questions: int
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether other questions and other seeds would hardly change its sign: zero is outside the 95% interval (of
        Student's t, as the error is estimated from these questions), and there are LEAST_QUESTIONS or more."""
        if self.questions < LEAST_QUESTIONS:
            return False
        return abs(self.mean) > t95(self.questions - 1) * self.stderr

    @property
    def clear_on_these(self) -> bool:
        """The same for other seeds alone: True may hold for these very questions only. Never with one seed."""
        return self.seed_stderr is not None and abs(self.mean) > t95(self.seeds - 1) * self.seed_stderr

    @property
    def questions_needed(self) -> int | None:
        """About how many questions like these would make it clear, if it stayed as it is and the error is theirs.

        None where it is clear, or where there is no difference.
        """
        if self.clear or not self.mean:
            return None
        return max(LEAST_QUESTIONS, math.ceil(self.questions * (_Z95 * self.stderr / self.mean) ** 2))


def difference(one: pb.Evaluation, other: pb.Evaluation, retention_loss: float = 0.0) -> Difference | None:
    """What ``one`` earns more than ``other``. Both SUCCEEDED, for the same task under the same protocol but for the
    number of seeds. ``retention_loss``: that term's weight, for the error that the probes bring.

    None where they share no seed.
    """
    others = {trial.seed: trial for trial in other.trials}
    pairs = [(trial, others[trial.seed]) for trial in one.trials if trial.seed in others]
    if not pairs:
        return None
    of_seed = [left.value - right.value for left, right in pairs]
    error2 = _variance([_minus(left.values, right.values) for left, right in pairs])
    if retention_loss and all(left.probes_correct and right.probes_correct for left, right in pairs):
        probes = [_minus(left.probes_correct, right.probes_correct) for left, right in pairs]
        error2 += retention_loss**2 * _variance(probes)
    return Difference(
        mean=fmean(of_seed),
        stderr=math.sqrt(error2),
        seed_stderr=stdev(of_seed) / math.sqrt(len(of_seed)) if len(of_seed) > 1 else None,
        questions=len(pairs[0][0].values),
        seeds=len(of_seed),
    )


def t95(degrees: int) -> float:
    """Standard errors to each side of a 95% interval with so many degrees of freedom (Cornish-Fisher's expansion,
    within 1%; exact for one and two)."""
    if degrees <= 2:
        return (math.inf, 12.7062, 4.3027)[max(degrees, 0)]
    z, n = _Z95, degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def variance_of_mean(values_S_Q: Sequence[Sequence[float]], widest: float) -> float:  # noqa: N803  (sizes in the name)
    """Variance of the mean over S x Q values; ``widest`` stands in for the spread of one column."""
    seeds, questions = len(values_S_Q), len(values_S_Q[0])
    of_question = [fmean(column) for column in zip(*values_S_Q, strict=True)]
    of_seed = [fmean(row) for row in values_S_Q]
    result = variance(of_question) / questions if questions > 1 else widest**2
    if seeds > 1:
        component = variance(of_seed)
        if questions > 1:
            mean = fmean(of_seed)
            squares = math.fsum(
                (value - of_question[q] - of_seed[s] + mean) ** 2
                for s, row in enumerate(values_S_Q)
                for q, value in enumerate(row)
            )
            component -= squares / ((seeds - 1) * (questions - 1)) / questions
        result += max(0.0, component) / seeds
    return result


def _variance(differences_S_Q: Sequence[Sequence[float]]) -> float:  # noqa: N803
    # With a single question the difference itself stands in for its spread: it is never clear then.
    return variance_of_mean(differences_S_Q, max(abs(value) for row in differences_S_Q for value in row))


def _minus(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [float(a) - float(b) for a, b in zip(left, right, strict=True)]
