"""The groups of a round on their way to their rewards: what is to be measured next, from results alone.

Without a race every self-edit of a group gets all its seeds at once; with one, ``preceptor.racing`` says who is
measured next, and how far. Then, where the run has fresh seeds, the best of the group are measured again on seeds that
no candidate had.

A **heat** is some neighbouring groups that take every step together, so that a step of each, which may be two trials,
fills a batch of a worker. Which trials share a request, and so train together, follows from the heat and from the
results of its earlier steps, never from time; heats do not wait for one another.

A race keeps nothing but its results. Whoever goes on with a run that was interrupted starts its unfinished heats again
from nothing and asks the same again; the evaluator answers at once with what it knows (docs/adr/0009).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from orchestrator.entries import EditKey, Entry, Kind
from preceptor import racing

if TYPE_CHECKING:
    from orchestrator.evaluator_client import Reported, Submission
    from orchestrator.plan import RunPlan


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """How a group is measured: by a race, or ``seeds`` trials of each; then the ``top`` best with fresh seeds."""

    race: racing.RaceSettings | None
    seeds: int
    fresh_seeds: int
    top: int


@dataclass(frozen=True, slots=True, order=True)
class Measurement:
    """What is asked for: a look, all steps with the first ``seeds`` of the round, or so many fresh ones."""

    kind: Kind
    seeds: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What follows from a result: what to ask for next, and who is measured no further."""

    submissions: Sequence[Submission] = ()
    stopped: Sequence[EditKey] = ()


def next_measurement(group: Sequence[Entry], settings: GroupSettings) -> tuple[Measurement, list[Entry]] | None:
    """What to measure next of a group's valid self-edits, all of whose evaluations are final; None when it is done.

    A self-edit of which a measurement failed is asked for nothing more: a failure is not a bad score. One that was
    written twice is one candidate.
    """
    twins = _twins(group)
    candidates = _candidates(twins)
    if settings.race is not None:
        if (step := racing.next_step(candidates, settings.race)) is not None:
            kind = Kind.LOOK if step.look else Kind.FULL
            return Measurement(kind, step.seeds), _all(twins, step.candidates)
    elif waiting := [entry for entry in group if entry.evaluation is None]:
        return Measurement(Kind.FULL, settings.seeds), waiting
    if settings.fresh_seeds:
        top = settings.race or racing.RaceSettings(top=settings.top)
        again = [i for i in racing.best(candidates, top) if twins[i][0].fresh is None]
        if again:
            return Measurement(Kind.FRESH, settings.fresh_seeds), _all(twins, again)
    return None


def stopped(group: Sequence[Entry], settings: GroupSettings) -> set[EditKey]:
    """Who is measured no further after the looks, all of which are final, because others were better."""
    if settings.race is None:
        return set()
    twins = _twins(group)
    left = racing.stopped(_candidates(twins), settings.race)
    return {entry.key for same, is_left in zip(twins, left, strict=True) if is_left for entry in same}


def _twins(group: Sequence[Entry]) -> list[list[Entry]]:
    """The entries, those together that turned out to be the same self-edit: they share their evaluations."""
    found: dict[object, list[Entry]] = {}
    for entry in group:
        first = entry.look or entry.evaluation
        found.setdefault(entry.key if first is None else first.id, []).append(entry)
    return list(found.values())


def _candidates(twins: Sequence[Sequence[Entry]]) -> list[racing.Candidate]:
    return [racing.Candidate(same[0].look, same[0].evaluation) for same in twins]


def _all(twins: Sequence[Sequence[Entry]], chosen: Iterable[int]) -> list[Entry]:
    return sorted((entry for i in chosen for entry in twins[i]), key=lambda entry: entry.key)


@dataclass(slots=True)
class _Heat:
    groups: list[list[Entry]]  # valid self-edits only, by index
    waiting: set[EditKey] = field(default_factory=set)  # whose present measurement is not final
    stopped: set[EditKey] = field(default_factory=set)


class Heats:
    """The heats of one round. ``start`` may be called by another thread than ``take``."""

    def __init__(self, plan: RunPlan, number: int) -> None:
        self._plan = plan
        self._number = number
        self._lock = threading.Lock()
        self._of: dict[EditKey, _Heat] = {}

    def start(self, groups: Iterable[Sequence[Entry]]) -> Iterator[Submission]:
        """The first step of each heat, as soon as its groups are written."""
        for some in self._plan.heats(groups):
            heat = _Heat([[_untouched(entry) for entry in group if entry.self_edit is not None] for group in some])
            with self._lock:
                self._of |= {entry.key: heat for group in heat.groups for entry in group}
                submissions = self._step(heat)
            yield from submissions

    def take(self, report: Reported) -> Outcome:
        """Notes what was reported; says what follows where it was the last that its heat waited for."""
        if not report.final:
            return Outcome()
        with self._lock:
            heat = self._of[report.keys[0]]  # one evaluation is of one task, so of one heat
            for group in heat.groups:
                for place, entry in enumerate(group):
                    if entry.key in report.keys:
                        group[place] = _with(entry, report)
            heat.waiting.difference_update(report.keys)
            if heat.waiting:
                return Outcome()
            now = set().union(*(stopped(group, self._plan.groups) for group in heat.groups))
            new, heat.stopped = now - heat.stopped, now
            return Outcome(self._step(heat), sorted(new))

    def _step(self, heat: _Heat) -> list[Submission]:
        """The requests of the heat's next step, one for each kind of measurement that a group is due."""
        due: dict[Measurement, list[list[Entry]]] = {}
        for group in heat.groups:
            if (following := next_measurement(group, self._plan.groups)) is not None:
                measurement, entries = following
                due.setdefault(measurement, []).append(entries)
        heat.waiting = {entry.key for groups in due.values() for group in groups for entry in group}
        return [self._plan.round_submission(self._number, one, groups) for one, groups in sorted(due.items())]


def _untouched(entry: Entry) -> Entry:
    return replace(entry, look=None, evaluation=None, fresh=None, stopped=False)


def _with(entry: Entry, report: Reported) -> Entry:
    if report.kind is Kind.LOOK:
        return replace(entry, look=report.evaluation)
    if report.kind is Kind.FRESH:
        return replace(entry, fresh=report.evaluation)
    return replace(entry, evaluation=report.evaluation)
