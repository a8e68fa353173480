"""What is left of each passage after every edit: chains of edits, the forgetting matrix, what was kept. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

    @property
    def whole(self) -> bool:
        """Whether it came to its end, and with anything learnt at all."""
        return not self.broken and bool(self.before)

    def take(self, evaluation: evaluator.Evaluation) -> None:
        """What the next edit came to."""
        (trial,), union = evaluation.trials, self.material.union
        if not self.before:
            self.before = list(union.by_passage(evaluation.baseline.correct))
            self.probes_before = evaluation.baseline.probes_correct
            # after edits that had nothing to study all was as before
            self.rows = [list(self.before) for _ in self.rows]
            self.probes = [self.probes_before for _ in self.probes]
        self.rows.append(list(union.by_passage(trial.correct)))
        self.probes.append(trial.probes_correct)
        self.tokens.append(trial.trained_tokens)
        self.seconds.append(trial.seconds)
        if trial.HasField("adapter"):
            self.student.adapters.append(trial.adapter)

    def repeat(self) -> None:
        """There was nothing to study: all is as it was, which is not known before anything was measured."""
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
    """Of chains of one way. Intervals: passages (probes) are drawn again, with all that the seeds have of them."""
    learnt: dict[str, list[bool]] = {}
    kept: dict[str, list[bool]] = {}
    final: dict[str, list[bool]] = {}
    for chain in chains:
        for number, (passage, last) in enumerate(zip(chain.material.subject.passages, chain.rows[-1], strict=True)):
            own = chain.rows[min(number, len(chain.rows) - 1)][number]
            learnt.setdefault(passage.text, []).extend(own)
            kept.setdefault(passage.text, []).extend(now for then, now in zip(own, last, strict=True) if then)
            final.setdefault(passage.text, []).extend(last)
    old: dict[int, list[bool]] = {}
    for chain in chains:
        for number, (then, now) in enumerate(zip(chain.probes_before, chain.probes[-1], strict=True)):
            if then:
                old.setdefault(number, []).append(now)

    def estimate(answers: Iterable[Sequence[bool]]) -> Estimate | None:
        return accuracy([Cluster(sum(right), len(right)) for right in answers], 0, resamples)

    return Kept(
        way=chains[0].way,
        learnt=estimate(learnt.values()),
        kept=estimate(kept.values()),
        final=estimate(final.values()),
        old=estimate(old.values()),
        tokens=fmean(sum(chain.tokens) for chain in chains),
        seconds=fmean(sum(chain.seconds) for chain in chains),
    )


def matrix(chains: Sequence[Chain]) -> list[list[float | None]]:
    """[edits + 1, passages + 1]: the share of right answers to each passage, and in the last column of the old
    knowledge that is left, before any edit and after each; all seeds pooled. None where nothing was asked."""
    edits = len(chains[0].rows)
    rows: list[list[float | None]] = []
    for after in range(edits + 1):
        row: list[float | None] = []
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


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
