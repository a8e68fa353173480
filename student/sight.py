"""What a worker tells of its batches: seconds by phase, memory, and its part of the traces of those who wait for them.

A batch trains the trials of many evaluations together, so each of their traces has the whole batch in it, with its
phases one after the other; where a batch was trained in several banks, each phase is the sum of theirs.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from preceptor import metrics as m
from preceptor.queue import EVALUATIONS, SENT
from preceptor.telemetry import OFF, Telemetry
from preceptor.tracing import Attributes, Place, about, evaluation_place
from preceptor.v1 import trial_pb2 as wire


@dataclass(frozen=True, slots=True)
class Message:
    """What a message says beside its body: when it was sent (unix seconds; 0: unknown), and who waits for it."""

    sent: float = 0.0
    evaluations: tuple[str, ...] = ()

    @classmethod
    def of(cls, request: object) -> Message:
        """Of a Celery request, whose headers may be anybody's."""
        sent, evaluations = getattr(request, SENT, 0.0), getattr(request, EVALUATIONS, ())
        return cls(
            float(sent) if isinstance(sent, int | float) else 0.0,
            tuple(map(str, evaluations)) if isinstance(evaluations, list | tuple) else (),
        )


NO_MESSAGE = Message()


class WorkerSight:
    """One worker's. May be called from any thread."""

    def __init__(self, telemetry: Telemetry = OFF, worker: str = "", device: str = "") -> None:
        self._metrics, self._traces = telemetry.metrics, telemetry.traces
        self._worker, self._device = worker, device

    def at_scrape(self, busy: Callable[[], bool], students: Callable[[], Collection[str]]) -> None:
        """Has these asked at each scrape."""

        def look() -> Iterable[m.Sample]:
            yield m.sample(m.WORKER_BUSY, busy())
            yield m.sample(m.LOADED_BASES, len(students()))

        self._metrics.at_scrape(look)
        self._metrics.at_scrape(m.gpu_memory)

    @contextmanager
    def at_work(self, task_id: str, message: Message) -> Iterator[None]:
        """A message was taken from the queue and is worked on while the context is open: log lines name it."""
        now = time.time()
        if message.sent:
            self._metrics.observe(m.TRIAL_PHASE_SECONDS, max(now - message.sent, 0.0), phase="queue")
            for evaluation in message.evaluations:
                self._traces.record(
                    "on the queue", message.sent, now, within=evaluation_place(evaluation), attributes={"task": task_id}
                )
        with about(batch=task_id):
            yield

    def given_up(self) -> None:
        """The batch is left to somebody else."""
        self._metrics.count(m.WORKER_BATCHES, outcome="given_up")

    def ran(self, result: wire.TrialBatchResult, message: Message, task_id: str, began: float) -> None:
        """A batch that began then (unix seconds) has come to an end, well or not."""
        ended = time.time()
        phases = {"load": result.load_seconds, "train": result.train_seconds, "answer": result.answer_seconds}
        failure = result.failure.reason if result.HasField("failure") else ""
        self._metrics.count(m.WORKER_BATCHES, outcome=failure or "done")
        self._metrics.count(m.WORKER_TRIALS, sum(not one.HasField("failure") for one in result.results))
        self._metrics.count(m.TRAINED_TOKENS, sum(one.trained_tokens for one in result.results))
        if not failure:
            for phase, seconds in phases.items():
                self._metrics.observe(m.TRIAL_PHASE_SECONDS, seconds, phase=phase)
            other = max(ended - began - sum(phases.values()), 0.0)
            self._metrics.observe(m.TRIAL_PHASE_SECONDS, other, phase="other")
        if not message.evaluations:
            return
        told: Attributes = {
            "batch": task_id,
            "worker": self._worker,
            "device": self._device,
            "trials": len(result.results),
            "evaluations": len(message.evaluations),
            "trained_tokens": sum(one.trained_tokens for one in result.results),
        }
        answering = ended - phases["answer"]
        times = {
            "load": (began, began + phases["load"]),
            "train": (max(answering - phases["train"], began), answering),
            "answer": (answering, ended),
        }
        for evaluation in message.evaluations:
            whole = evaluation_place(evaluation)
            batch = Place(whole.trace_id, secrets.token_hex(8))
            self._traces.record("trial batch", began, ended, within=whole, at=batch, error=failure, attributes=told)
            if not failure:
                for phase, (start, end) in times.items():
                    if phases[phase]:  # a baseline is not trained
                        self._traces.record(phase, start, end, within=batch)
