"""What a self-edit earned, as a statistic: pure functions from graded answers to a Reward.

Letters: Q questions, P retention probes, S seeds (one trial each). Everything is a paired difference to the untouched
student's answers to the same questions, so what is easy or hard for both cancels out.

    gain               mean over Q, S of  right(trained) - right(untouched)                     -1..1
    retention_loss     mean over P, S of  right(untouched) - right(trained), on the probes      -1..1
    gold_logprob_gain  mean over Q, S of  log p(gold | trained) - log p(gold | untouched)       nats per question
    value              w.gain * gain - w.retention_loss * retention_loss + w.gold_logprob_gain * gold_logprob_gain

``retention_loss`` keeps its sign (an edit that *improves* old knowledge has a negative loss): cutting it at zero would
turn noise on the probes into a penalty that does not exist.

Standard error of the value. The two terms over questions are added per question first, v[s][q], so their correlation
is accounted for. Then
    variance = var_q(mean over s of v) / Q  +  max(0, seed component) / S
    seed component = var_s(mean over q of v) - (mean square of the interaction) / Q
which is the two-way random-effects estimate: questions and seeds are both drawn from a larger population. With one seed
the second part is unknown and taken as zero: **the error then says how far another set of questions would move the
value, and nothing about another seed.** The retention term's error is estimated in the same way over the probes
and added in quadrature, which assumes that its noise is independent of that on the questions.
With a single question (or probe) there is no spread to look at; the largest difference it could have is used instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from preceptor.v1 import types_pb2 as types


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of the terms. Finite; zero leaves a term out of the value (it is still reported)."""

    gain: float = 1.0
    retention_loss: float = 0.0
    gold_logprob_gain: float = 0.0


@dataclass(frozen=True, slots=True)
class Marks:
    """The graded answers of one trial: Q questions, P probes."""

    correct: tuple[bool, ...]
    gold_logprobs: tuple[float, ...]  # nats, summed over the gold answer's tokens
    probes_correct: tuple[bool, ...] = ()

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return fmean(self.correct)

    @property
    def retention(self) -> float | None:
        """Share of right answers to the probes; None without probes."""
        return fmean(self.probes_correct) if self.probes_correct else None


def reward(trained: Sequence[Marks], baseline: Marks, weights: Weights) -> types.Reward:
    """The reward of S >= 1 trained students against the untouched one.

    Raises ValueError where there is no trial or no question, or where the trials answered different numbers of
    questions: that is a failed evaluation, never a reward.
    """
    sizes = {
        (len(marks.correct), len(marks.gold_logprobs), len(marks.probes_correct)) for marks in (*trained, baseline)
    }
    if not trained or len(sizes) != 1 or (size := sizes.pop())[0] == 0 or size[0] != size[1]:
        raise ValueError("a reward needs trials that answered the same questions as the baseline, at least one")
    gains = [_differences(marks.correct, baseline.correct) for marks in trained]
    log_gains = [_differences(marks.gold_logprobs, baseline.gold_logprobs) for marks in trained]
    losses = [_differences(baseline.probes_correct, marks.probes_correct) for marks in trained]

    terms = {"gain": _mean(gains), "gold_logprob_gain": _mean(log_gains)}
    value = weights.gain * terms["gain"] + weights.gold_logprob_gain * terms["gold_logprob_gain"]
    per_question = [
        [weights.gain * gain + weights.gold_logprob_gain * log for gain, log in zip(of_gain, of_log, strict=True)]
        for of_gain, of_log in zip(gains, log_gains, strict=True)
    ]
    widest = abs(weights.gain) + abs(weights.gold_logprob_gain * terms["gold_logprob_gain"])
    error2 = variance_of_mean(per_question, widest)
    answer = types.Reward(questions=len(baseline.correct), seeds=len(trained))
    if baseline.probes_correct:
        terms["retention_loss"] = _mean(losses)
        value -= weights.retention_loss * terms["retention_loss"]
        error2 += weights.retention_loss**2 * variance_of_mean(losses, 1.0)
        answer.retention = fmean(fmean(marks.probes_correct) for marks in trained)
        answer.baseline_retention = fmean(baseline.probes_correct)
    answer.value = value
    answer.stderr = math.sqrt(error2)
    for name in sorted(terms):
        answer.terms[name] = terms[name]
    answer.accuracy = fmean(marks.accuracy for marks in trained)
    answer.baseline_accuracy = baseline.accuracy
    return answer


def variance_of_mean(values_S_Q: Sequence[Sequence[float]], widest: float) -> float:  # noqa: N803  (sizes in the name)
    """Variance of the mean over S x Q values (module docstring); ``widest`` stands in for the spread of one column."""
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


def _differences(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [float(a) - float(b) for a, b in zip(left, right, strict=True)]


def _mean(values_S_Q: Sequence[Sequence[float]]) -> float:  # noqa: N803
    return fmean(value for row in values_S_Q for value in row)
