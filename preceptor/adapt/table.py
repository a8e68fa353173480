"""Before and after: sealed questions and old knowledge, with intervals. Pure functions.

Intervals are of ``preceptor.statistics``: passages are drawn again (of probes, each for itself), before and after
together. They say how far other passages would move a number; one update has one seed, and another one could come out
otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preceptor.statistics import Cluster, Estimate, accuracy, paired_difference
from preceptor.union import Union
from preceptor.v1 import evaluator_pb2 as evaluator


@dataclass(frozen=True, slots=True)
class Row:
    """What was asked, and the share of right answers before and after, with their 95% intervals."""

    name: str
    questions: int
    before: Estimate
    after: Estimate
    difference: Estimate

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "questions": self.questions,
            "before": _values(self.before),
            "after": _values(self.after),
            "difference": _values(self.difference),
        }


def before_and_after(
    evaluation: evaluator.Evaluation, union: Union, kept: Sequence[bool], *, seed: int, resamples: int
) -> list[Row]:
    """Rows of one SUCCEEDED evaluation of the union: all sealed questions, those of passages whose self-edit was kept
    and of the others (where there are both), and the probes (where there are any). A row without a question is left
    out."""
    before = _clusters(union.by_passage(evaluation.baseline.correct))
    after = _clusters(union.by_passage(evaluation.trials[0].correct))
    parts = {"sealed questions": [True] * len(kept)}
    if any(kept) and not all(kept):
        parts |= {"of passages it studied": list(kept), "of the others": [not one for one in kept]}
    rows = []
    for name, chosen in parts.items():
        pair = [[cluster for cluster, wanted in zip(some, chosen, strict=True) if wanted] for some in (before, after)]
        rows.append(_row(name, pair[0], pair[1], seed, resamples))
    probes = [
        [Cluster(float(right), 1) for right in trial.probes_correct]
        for trial in (evaluation.baseline, evaluation.trials[0])
    ]
    rows.append(_row("what it knew", probes[0], probes[1], seed, resamples))
    return [row for row in rows if row is not None]


def passage_shares(evaluation: evaluator.Evaluation, union: Union) -> list[tuple[float | None, float | None]]:
    """Share of right answers before and after, for each passage; None without questions."""
    before = union.by_passage(evaluation.baseline.correct)
    after = union.by_passage(evaluation.trials[0].correct)
    return [(_share(one), _share(other)) for one, other in zip(before, after, strict=True)]


def kept_share(before: Sequence[bool], after: Sequence[bool]) -> float | None:
    """Of what was right before, the share that is right after; None where nothing was."""
    known = [now for then, now in zip(before, after, strict=True) if then]
    return sum(known) / len(known) if known else None


def _row(name: str, before: Sequence[Cluster], after: Sequence[Cluster], seed: int, resamples: int) -> Row | None:
    if not before:
        return None
    first, last = accuracy(before, seed, resamples), accuracy(after, seed, resamples)
    difference = paired_difference(after, before, seed, resamples)
    if first is None or last is None or difference is None:
        return None
    return Row(name, sum(cluster.questions for cluster in before), first, last, difference)


def _clusters(passages: Sequence[Sequence[bool]]) -> list[Cluster]:
    return [Cluster(float(sum(correct)), len(correct)) for correct in passages]


def _share(correct: Sequence[bool]) -> float | None:
    return sum(correct) / len(correct) if correct else None


def _values(estimate: Estimate) -> dict[str, float]:
    return {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}
