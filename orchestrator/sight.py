"""What the orchestrator tells of its runs: gauges of those under way, and a trace of each.

A run's trace has its rounds, and in them what the other services did for them. Its evaluations have traces of their
own, which are linked to the round and begin with the writing of their self-edit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from orchestrator.entries import EditKey, Kind, round_stage
from preceptor import metrics as m
from preceptor.telemetry import OFF, Telemetry
from preceptor.tracing import about, evaluation_place, run_place
from preceptor.v1 import orchestrator_pb2 as pb

if TYPE_CHECKING:
    from orchestrator.evaluator_client import Reported
    from orchestrator.progress import Progress


class RunSight:
    """One run's. May be called from any thread."""

    def __init__(self, telemetry: Telemetry = OFF, run_id: str = "") -> None:
        self._traces, self._run_id = telemetry.traces, run_id
        self._lock = threading.Lock()
        self._written: dict[tuple[str, int], tuple[float, float]] = {}  # by stage and task: began, ended
        self._told: set[tuple[EditKey, Kind]] = set()

    @contextmanager
    def run(self) -> Iterator[None]:
        """The run is executed while the context is open."""
        with self._traces.span("run", at=run_place(self._run_id)):
            yield

    @contextmanager
    def round(self, number: int) -> Iterator[None]:
        """A round is under way while the context is open."""
        at = run_place(self._run_id, round_stage(number))
        with (
            about(round=str(number)),
            self._traces.span("round", within=run_place(self._run_id), at=at, attributes={"round": number}),
        ):
            yield

    def wrote(self, stage: str, task: int, seconds: float) -> None:
        """The self-edits of a task have come; ``seconds`` is their share of the time of their batch."""
        if self._traces.on:
            now = time.time()
            with self._lock:
                self._written[stage, task] = now - seconds, now

    def reported(self, number: int, reports: Iterable[Reported]) -> None:
        """Evaluations of a round were created, or are final."""
        if not self._traces.on:
            return
        link = run_place(self._run_id, round_stage(number))
        for report in reports:
            for key in report.keys:
                with self._lock:
                    told = (key, report.kind) in self._told
                    written = None if told else self._written.get((key.stage, key.task))
                    self._told.add((key, report.kind))
                if written is None or report.final:
                    continue
                self._traces.record(
                    "written by the teacher",
                    *written,
                    within=evaluation_place(report.evaluation.id),
                    links=[link],
                    attributes={"run": self._run_id, "round": number, "task": key.task, "self_edit": key.index},
                )


def run_gauges(active: Mapping[str, Progress]) -> Iterator[m.Sample]:
    """Of the runs under way."""
    yield m.sample(m.RUNS, len(active))
    for run_id, progress in active.items():
        now = progress.snapshot(pb.RUN_STATE_RUNNING)
        yield m.sample(m.RUN_ROUND, now.round, run=run_id)
        yield m.sample(m.RUN_DONE, now.done_share, run=run_id)
        if now.rewards:
            yield m.sample(m.RUN_REWARD, now.rewards[-1].mean, run=run_id)
            yield m.sample(m.RUN_REWARD_ERROR, now.rewards[-1].stderr, run=run_id)
