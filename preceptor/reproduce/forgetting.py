"""What is left of each passage after every edit: chains of edits, the forgetting matrix, what was kept. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from preceptor.adapt.subject import Subject
from preceptor.config import RunConfig
from preceptor.statistics import Cluster, Estimate, accuracy
from preceptor.union import Union
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import types_pb2 as types


@dataclass(frozen=True, slots=True)
class Material:
    """What one seed's chains have in common."""

    seed: int
    config: RunConfig
    subject: Subject
    union: Union
    student: types.PinnedStudent
    edits: Sequence[types.SelfEdit | None]  # of each passage; None: nothing valid was written


@dataclass(slots=True)
class Chain:
    """One seed's edits in one way, as far as they have come. Rows are by edit, then by passage."""

    material: Material
    way: str
    student: types.PinnedStudent
    rows: list[list[Sequence[bool]]] = field(default_factory=list)  # right or wrong, question by question
    probes: list[Sequence[bool]] = field(default_factory=list)  # likewise
    before: list[Sequence[bool]] = field(default_factory=list)
    probes_before: Sequence[bool] = ()
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    broken: bool = False

    def take(self, evaluation: evaluator.Evaluation) -> None:
        """What the next edit came to."""
        (trial,), union = evaluation.trials, self.material.union
        if not self.rows:
            self.before = list(union.by_passage(evaluation.baseline.correct))
            self.probes_before = evaluation.baseline.probes_correct
        self.rows.append(list(union.by_passage(trial.correct)))
        self.probes.append(trial.probes_correct)
        self.tokens.append(trial.trained_tokens)
        self.seconds.append(trial.seconds)
        if trial.HasField("adapter"):
            self.student.adapters.append(trial.adapter)

    def repeat(self) -> None:
        """There was nothing to study: all is as it was."""
        self.rows.append(self.rows[-1] if self.rows else [])
        self.probes.append(self.probes[-1] if self.probes else ())


@dataclass(frozen=True, slots=True)
class Kept:
    """What the chains of one way came to in the end, all seeds pooled."""

    way: str
    learnt: Estimate | None  # share of right answers to each passage right after its own edit
    kept: Estimate | None  # of these right answers, the share that is right after the last edit
    final: Estimate | None  # share of right answers to all passages after the last edit
    old: Estimate | None  # of the probes that were right before anything, the share that is right after the last edit
    tokens: float  # trained, all edits of a chain
    seconds: float  # of a worker, likewise

    def as_json(self) -> dict[str, Any]:
        """Plain values."""

        def values(estimate: Estimate | None) -> dict[str, float] | None:
            return None if estimate is None else {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}

        named = {name: values(getattr(self, name)) for name in ("learnt", "kept", "final", "old")}
        return {**named, "tokens": self.tokens, "seconds": self.seconds}


def kept_of(chains: Sequence[Chain], resamples: int) -> Kept:
    """Of chains of one way. Intervals: passages (probes) are drawn again."""
    learnt, kept, final = [], [], []
    for chain in chains:
        last = chain.rows[-1]
        for number, passage in enumerate(last):
            own = chain.rows[min(number, len(chain.rows) - 1)][number]
            learnt.append(Cluster(sum(own), len(own)))
            still = [now for then, now in zip(own, passage, strict=True) if then]
            kept.append(Cluster(sum(still), len(still)))
            final.append(Cluster(sum(passage), len(passage)))
    old: dict[int, list[bool]] = {}
    for chain in chains:
        for number, (then, now) in enumerate(zip(chain.probes_before, chain.probes[-1], strict=True)):
            if then:
                old.setdefault(number, []).append(now)
    probes = [Cluster(sum(values), len(values)) for values in old.values()]

    def estimate(clusters: Sequence[Cluster]) -> Estimate | None:
        return accuracy(clusters, 0, resamples) if any(cluster.questions for cluster in clusters) else None

    return Kept(
        way=chains[0].way,
        learnt=estimate(learnt),
        kept=estimate(kept),
        final=estimate(final),
        old=estimate(probes),
        tokens=fmean(sum(chain.tokens) for chain in chains),
        seconds=fmean(sum(chain.seconds) for chain in chains),
    )


def matrix(chains: Sequence[Chain]) -> list[list[float]]:
    """[edits + 1, passages + 1]: the share of right answers to each passage, and in the last column of the old
    knowledge that is left, before any edit and after each; all seeds pooled."""
    edits = len(chains[0].rows)
    rows = []
    for after in range(edits + 1):
        row = []
        for passage in range(len(chains[0].before)):
            shown = [(chain.rows[after - 1] if after else chain.before)[passage] for chain in chains]
            row.append(_share([right for one in shown for right in one]))
        old = [
            now
            for chain in chains
            for then, now in zip(
                chain.probes_before, chain.probes[after - 1] if after else chain.probes_before, strict=True
            )
            if then
        ]
        rows.append([*row, _share(old)])
    return rows


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else float("nan")
