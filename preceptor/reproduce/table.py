"""Arms over several seeds: what the paper-shaped table says, and how two arms differ. Pure functions.

A seed has passages, trial seeds and a teacher of its own. All seeds' passages are pooled: an arm's accuracy is the
share of right answers to all questions, and intervals come from drawing *passages* again (``preceptor.statistics``),
each of which brings its own fine-tunes: how far other passages would move a number, these teachers given. A passage
that several seeds share (those of a file) is drawn with all its seeds, as its answers rise and fall together. How far
other seeds, and so other teachers, would is a second interval, of Student's t over the seeds' own numbers
(``seeds_ci95``): wide, as three seeds are few.

Pairs are of the same passage of the same seed. What failed is no measurement: it is left out of the arm and of its
pairs, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from preceptor import arms
from preceptor.paired import t95
from preceptor.statistics import Cluster, accuracy, needed_questions, paired_difference

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Outcome:
    """Right answers to one passage's questions after one arm's fine-tune (a mean over seeds of trials)."""

    right: float
    questions: int
    retention: float | None = None


@dataclass(slots=True)
class Arm:
    """One arm: outcomes by (seed, passage); None where the evaluation failed."""

    name: str
    label: str = ""  # for people, where the name is none of ``preceptor.arms``
    outcomes: dict[tuple[int, str], Outcome | None] = field(default_factory=dict)
    tokens: list[float] = field(default_factory=list)  # trained, a fine-tune: one number for each seed
    seconds: list[float] = field(default_factory=list)  # of a worker, a fine-tune: one number for each seed
    # Seconds spent before the arm could be used (choosing a strategy, rounds of training): one number for each seed.
    preparation: list[float] = field(default_factory=list)
    malformed: int = 0
    too_costly: int = 0
    left_out: str = ""  # why it could not be measured at all

    @property
    def failed(self) -> int:
        """Evaluations that came to nothing."""
        return sum(outcome is None for outcome in self.outcomes.values())

    @property
    def words(self) -> str:
        """For people."""
        return self.label or arms.words(self.name)


@dataclass(frozen=True, slots=True)
class Section:
    """Arms that were measured on the same passages, and differences between them: ``pairs`` of names, the first minus
    the second."""

    name: str
    title: str
    arms: Sequence[Arm]
    pairs: Sequence[tuple[str, str]]
    caption: str = ""
    price: float | None = None  # of a worker's hour


def arms_of(summaries: Mapping[int, Mapping[str, Any]]) -> list[Arm]:
    """The held-out arms of runs (their summaries by seed), in the order in which the summaries have them."""
    found: dict[str, Arm] = {}
    for seed, summary in summaries.items():
        heldout = summary.get("heldout") or {}
        tasks = heldout.get("tasks") or ()
        for name, said in (heldout.get("arms") or {}).items():
            if said is None:
                continue
            arm = found.setdefault(name, Arm(name))
            for task, outcome in zip(tasks, said["outcomes"], strict=True):
                arm.outcomes[seed, task] = outcome and Outcome(
                    outcome["right"], outcome["questions"], outcome["retention"]
                )
            for numbers, key in ((arm.tokens, "trained_tokens"), (arm.seconds, "worker_seconds")):
                if said.get(key) is not None:
                    numbers.append(said[key])
            arm.malformed += said["malformed"]
            arm.too_costly += said.get("too_costly", 0)
            arm.preparation.append(_preparation(name, summary))
        for name, why in (heldout.get("left_out") or {}).items():
            found.setdefault(name, Arm(name)).left_out = f"{why['reason']}: {why['message']}"
    return list(found.values())


def _preparation(arm: str, summary: Mapping[str, Any]) -> float:
    if arm == arms.FIXED:
        return float(summary["heldout"].get("selection_worker_seconds") or 0.0)
    if arm == arms.TRAINED:
        measured = sum(float(of.get("worker_seconds") or 0.0) for of in summary["rounds"])
        return measured + float(summary.get("update_seconds") or 0.0)
    return 0.0


def section_values(section: Section) -> dict[str, Any]:
    """The section as plain JSON values. What is not known is null."""
    by_name = {arm.name: arm for arm in section.arms}
    return {
        "name": section.name,
        "title": section.title,
        "caption": section.caption,
        "arms": [arm_values(arm, section.price) for arm in section.arms],
        "differences": [
            difference_values(by_name[first], by_name[second])
            for first, second in section.pairs
            if first in by_name and second in by_name
        ],
    }


def arm_values(arm: Arm, price: float | None = None) -> dict[str, Any]:
    """One row. ``cost``: of one fine-tune at ``price`` a worker's hour; ``preparation_cost`` comes once."""
    known = {key: outcome for key, outcome in arm.outcomes.items() if outcome is not None}
    estimate = accuracy(_clusters(known), 0, RESAMPLES) if known else None
    retained = [outcome.retention for outcome in known.values() if outcome.retention is not None]
    seeds = sorted({seed for seed, _ in known})
    seconds = _mean(arm.seconds)
    preparation = _mean(arm.preparation)
    return {
        "arm": arm.name,
        "words": arm.words,
        "accuracy": estimate.mean if estimate else None,
        "ci95": [estimate.low, estimate.high] if estimate else None,
        "by_seed": {str(seed): _share(known[key] for key in known if key[0] == seed) for seed in seeds},
        "retention": _mean(retained),
        "trained_tokens": _mean(arm.tokens),
        "worker_seconds": seconds,
        "preparation_seconds": preparation,
        "cost": None if price is None or seconds is None else seconds / 3600 * price,
        "preparation_cost": None if price is None or preparation is None else preparation / 3600 * price,
        "passages": len(known),
        "questions": sum(outcome.questions for outcome in known.values()),
        "seeds": len(seeds),
        "failed": arm.failed,
        "malformed": arm.malformed,
        "too_costly": arm.too_costly,
        "left_out": arm.left_out or None,
    }


def difference_values(first: Arm, second: Arm) -> dict[str, Any]:
    """``first`` minus ``second`` on the passages that both measured; all null where there are none."""
    shared = [key for key, of in first.outcomes.items() if of is not None and second.outcomes.get(key) is not None]
    ours = _clusters({key: of for key in shared if (of := first.outcomes[key]) is not None})
    theirs = _clusters({key: of for key in shared if (of := second.outcomes[key]) is not None})
    estimate = paired_difference(ours, theirs, 0, RESAMPLES) if shared else None
    unclear = estimate is not None and estimate.low <= 0 <= estimate.high
    by_seed = {
        str(seed): _share(first.outcomes[key] for key in shared if key[0] == seed)
        - _share(second.outcomes[key] for key in shared if key[0] == seed)
        for seed in sorted({seed for seed, _ in shared})
    }
    return {
        "first": first.name,
        "second": second.name,
        "words": f"{first.words} − {second.words}",
        "mean": estimate.mean if estimate else None,
        "ci95": [estimate.low, estimate.high] if estimate else None,
        "by_seed": by_seed,
        "seeds_ci95": _seeds_interval(list(by_seed.values())),
        "passages": len(shared),
        "seeds": len({seed for seed, _ in shared}),
        "verdict": verdict(estimate.low, estimate.high) if estimate else None,
        "needed_questions": _needed_questions(ours, theirs, len(shared)) if unclear else None,
    }


def verdict(low: float, high: float) -> str:
    """What may be said of a difference with this 95% interval."""
    return "better" if low > 0 else "worse" if high < 0 else "not told apart"


def pairs_with(first: str, others: Iterable[Arm]) -> list[tuple[str, str]]:
    """``first`` against every other arm that was measured."""
    return [(first, arm.name) for arm in others if arm.name != first and not arm.left_out]


def _seeds_interval(values: Sequence[float]) -> list[float] | None:
    """95% interval of the mean over seeds (Student's t); None with fewer than two."""
    if len(values) < 2:
        return None
    mean, half = fmean(values), t95(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return [mean - half, mean + half]


def _clusters(outcomes: Mapping[tuple[int, str], Outcome]) -> list[Cluster]:
    """By passage, over all its seeds, in the order in which the passages come."""
    by_passage: dict[str, list[Outcome]] = {}
    for (_, passage), outcome in outcomes.items():
        by_passage.setdefault(passage, []).append(outcome)
    return [Cluster(sum(of.right for of in some), sum(of.questions for of in some)) for some in by_passage.values()]


def _needed_questions(first: Sequence[Cluster], second: Sequence[Cluster], outcomes: int) -> int | None:
    """Questions, each counted once, whatever the number of seeds that ask it."""
    needed = needed_questions(first, second)
    return None if needed is None else math.ceil(needed * len(first) / outcomes)


def _share(outcomes: Iterable[Outcome | None]) -> float:
    known = [outcome for outcome in outcomes if outcome is not None]
    return sum(outcome.right for outcome in known) / sum(outcome.questions for outcome in known)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
