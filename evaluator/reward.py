"""What a self-edit earned, as a statistic: pure functions from graded answers to a Reward.

Letters: Q questions, P retention probes, S seeds (one trial each). Everything is a paired difference to the untouched
student's answers to the same questions, so what is easy or hard for both cancels out.

    gain                   mean over Q, S of  right(trained) - right(untouched)                    -1..1
    gold_logprob_gain      mean over Q, S of  log p(gold | trained) - log p(gold | untouched)      nats per question
    gold_probability_gain  mean over Q, S of  p(gold | trained) - p(gold | untouched)              -1..1
    certainty_gain         mean over Q, S of  certainty(trained) - certainty(untouched)            nats per token
    agreement_gain         mean over Q, S of  agreement(trained) - agreement(untouched)            -1..1
    retention_loss         mean over P, S of  right(untouched) - right(trained), on the probes     -1..1
    overlap                share of the questions that the self-edit copies; 0 for written ones    0..1
    tokens                 mean over S of trained tokens, in thousands
    seconds                mean over S of a worker's seconds

    value = sum of w.term * term over the first five  -  sum of w.term * term over the last four

``gold_probability_gain`` is the gain that sampled instead of greedy answers would have if only the gold wording were
right: the same thing as ``gain`` without the jump from almost to just right, and with half of its seed noise
(docs/log.md). ``gold_logprob_gain`` also sees differences far from the point where answers turn right, which is what a
first look after a few steps needs. ``retention_loss`` keeps its sign (an edit that *improves* old knowledge has a
negative loss): cutting it at zero would turn noise on the probes into a penalty that does not exist. Certainty and
agreement need no gold answers; what is made of them is marked ``label_free``. What was not measured has no term.

Standard error of the value. The terms over questions are added per question first, v[s][q], so their correlation
is accounted for. Then
    variance = var_q(mean over s of v) / Q  +  max(0, seed component) / S
    seed component = var_s(mean over q of v) - (mean square of the interaction) / Q
which is the two-way random-effects estimate: questions and seeds are both drawn from a larger population. With one seed
the second part is unknown and taken as zero: **the error then says how far another set of questions would move the
value, and nothing about another seed.** The retention term's error is estimated in the same way over the probes
and added in quadrature, which assumes that its noise is independent of that on the questions; that of the seconds
likewise.
With a single question (or probe) there is no spread to look at; the largest difference it could have is used instead.
``seed_stderr`` asks the smaller question: how far other seeds would move the value, the questions being these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev, variance

from preceptor.paired import variance_of_mean
from preceptor.v1 import types_pb2 as types


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of the terms. Finite; zero leaves a term out of the value (it is still reported)."""

    gain: float = 1.0
    retention_loss: float = 0.0
    gold_logprob_gain: float = 0.0
    gold_probability_gain: float = 0.0
    overlap: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    certainty_gain: float = 0.0
    agreement_gain: float = 0.0

    @property
    def label_free(self) -> bool:
        """Whether the student's own confidence is part of the value."""
        return self.certainty_gain != 0 or self.agreement_gain != 0


@dataclass(frozen=True, slots=True)
class Marks:
    """What one trial showed: Q questions, P probes. An empty tuple was not measured."""

    correct: tuple[bool, ...] = ()
    gold_logprobs: tuple[float, ...] = ()  # nats, summed over the gold answer's tokens
    probes_correct: tuple[bool, ...] = ()
    certainties: tuple[float, ...] = ()  # nats, mean over the answer's tokens
    agreements: tuple[float, ...] = ()  # 0..1
    tokens: int = 0
    seconds: float = 0.0

    @property
    def accuracy(self) -> float | None:
        """Share of right answers; None where none was graded."""
        return fmean(self.correct) if self.correct else None

    @property
    def retention(self) -> float | None:
        """Share of right answers to the probes; None without probes."""
        return fmean(self.probes_correct) if self.probes_correct else None

    @property
    def questions(self) -> int:
        """How many questions were asked. Raises ValueError where the measurements disagree."""
        sizes = {len(values) for values in self.by_question().values() if values}
        if len(sizes) != 1:
            raise ValueError(f"a trial answered {sorted(sizes) or 'no'} questions")
        return sizes.pop()

    def by_question(self) -> dict[str, tuple[float, ...]]:
        """What is compared question by question, by the name of its term."""
        return {
            "gain": tuple(map(float, self.correct)),
            "gold_logprob_gain": self.gold_logprobs,
            "gold_probability_gain": tuple(map(math.exp, self.gold_logprobs)),
            "certainty_gain": self.certainties,
            "agreement_gain": self.agreements,
        }


@dataclass(frozen=True, slots=True)
class Score:
    """A reward and what it is made of."""

    reward: types.Reward
    values_S_Q: tuple[tuple[float, ...], ...]  # noqa: N815  each question's share of the value, by seed
    values_S: tuple[float, ...]  # noqa: N815  what the value would be with this seed alone


def measure(
    trained: Sequence[Marks], baseline: Marks, weights: Weights, *, copied: int = 0, written: bool = False
) -> Score:
    """The reward of S >= 1 trained students against the untouched one.

    ``copied``: how many questions the self-edit copies; ``written``: whether a model wrote questions. Raises ValueError
    where there is no trial or no question, where the trials were not measured alike, or where a term that has a weight
    was not measured: that is a failed evaluation, never a reward.
    """
    shapes = {_shape(marks) for marks in (*trained, baseline)}
    if not trained or len(shapes) != 1:
        raise ValueError("a reward needs trials that answered the same questions as the baseline, at least one")
    questions, probes = baseline.questions, len(baseline.probes_correct)
    w = asdict(weights)
    terms: dict[str, float] = {}
    shares_S_Q = [[0.0] * questions for _ in trained]  # noqa: N806
    widest = 0.0  # the largest that a single question could differ by
    untouched = baseline.by_question()
    for name, before in untouched.items():
        if not before:
            if w[name]:
                raise ValueError(f"{name} has a weight and was not measured")
            continue
        differences = [_differences(marks.by_question()[name], before) for marks in trained]
        terms[name] = _mean(differences)
        bounded = name not in ("gold_logprob_gain", "certainty_gain")
        widest += abs(w[name]) * (1.0 if bounded else abs(terms[name]))
        for shares, of_seed in zip(shares_S_Q, differences, strict=True):
            for question, difference in enumerate(of_seed):
                shares[question] += w[name] * difference
    losses = [_differences(baseline.probes_correct, marks.probes_correct) for marks in trained]
    penalties = {
        "overlap": [copied / questions] * len(trained),
        "tokens": [marks.tokens / 1000 for marks in trained],
        "seconds": [marks.seconds for marks in trained],
    }
    if probes:
        penalties["retention_loss"] = [fmean(row) for row in losses]
    terms |= {name: fmean(values) for name, values in penalties.items()}
    values_S = tuple(  # noqa: N806
        fmean(shares) - math.fsum(w[name] * values[seed] for name, values in penalties.items())
        for seed, shares in enumerate(shares_S_Q)
    )
    error2 = variance_of_mean(shares_S_Q, widest)
    if probes:
        error2 += weights.retention_loss**2 * variance_of_mean(losses, 1.0)
    if weights.seconds and len(trained) > 1:
        error2 += weights.seconds**2 * variance(penalties["seconds"]) / len(trained)
    found = types.Reward(
        value=fmean(values_S),
        stderr=math.sqrt(error2),
        terms=dict(sorted(terms.items())),
        questions=questions,
        seeds=len(trained),
        label_free=weights.label_free or written,
    )
    if baseline.correct:
        found.accuracy = fmean(fmean(marks.correct) for marks in trained)
        found.baseline_accuracy = fmean(baseline.correct)
    if probes:
        found.retention = fmean(fmean(marks.probes_correct) for marks in trained)
        found.baseline_retention = fmean(baseline.probes_correct)
    if len(trained) > 1:
        found.seed_stderr = stdev(values_S) / math.sqrt(len(trained))
    return Score(found, tuple(map(tuple, shares_S_Q)), values_S)


def _shape(marks: Marks) -> tuple[int, ...]:
    return (*(len(values) for values in marks.by_question().values()), len(marks.probes_correct))


def _differences(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [float(a) - float(b) for a, b in zip(left, right, strict=True)]


def _mean(values_S_Q: Sequence[Sequence[float]]) -> float:  # noqa: N803
    return fmean(value for row in values_S_Q for value in row)
