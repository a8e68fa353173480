"""What the evaluator tells of its work: gauges at a scrape, counters, and its part of each evaluation's trace.

An evaluation's trace begins with a span of its whole life, from being asked for to its final state, which is sent when
it is final. Within it: asked for (linked to the round that asked), waiting in SQL, on the queue and with a worker (both
told by the worker, which hears in the message's headers for whom it works), grading. Attempts that were lost are spans
without length, with their reason.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import func, select

from evaluator.attempts import Ending
from evaluator.database import LIVE, Database, State, evaluation_trials, evaluations, trials
from evaluator.database import BatchState as Batch
from evaluator.lanes import Lanes
from evaluator.overview import Overview
from preceptor import metrics as m
from preceptor.telemetry import OFF, Telemetry
from preceptor.tracing import Attributes, current, evaluation_place
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial

log = logging.getLogger(__name__)

# Of a batch that more wait for (of a baseline, all of a task may), those that came later are not told in its message.
MOST_NAMED = 512

_BATCH_STATES = {Batch.WAITING: "waiting", Batch.SUBMITTED: "queued", Batch.RUNNING: "running"}
_END_STATES = {
    pb.EVALUATION_STATE_SUCCEEDED: "succeeded",
    pb.EVALUATION_STATE_FAILED: "failed",
    pb.EVALUATION_STATE_CANCELLED: "cancelled",
}


class Sight:
    """May be called from any thread. Costs nothing where nobody looks."""

    def __init__(self, database: Database | None = None, telemetry: Telemetry = OFF) -> None:
        """``database`` is needed where somebody follows traces."""
        self._database = database
        self._metrics, self._traces = telemetry.metrics, telemetry.traces

    def at_scrape(
        self, overview: Overview, lanes: Lanes, workers: Callable[[], Collection[object]], grading: Callable[[], int]
    ) -> None:
        """Has these asked at each scrape; each by itself, so that a Redis that is away hides nothing else."""

        def batches() -> Iterator[m.Sample]:
            states, queues = dict.fromkeys(_BATCH_STATES, 0), dict.fromkeys(lanes.queues, 0)
            for (student, state), count in overview.batches_by_student().items():
                states[state] += count
                queues[lanes.of(student).queue] += count
            for state, count in states.items():
                yield m.sample(m.BATCHES, count, state=_BATCH_STATES[state])
            for queue, count in queues.items():
                yield m.sample(m.UNFINISHED_BATCHES, count, queue=queue)

        def states() -> Iterator[m.Sample]:
            counts = overview.counts()
            for state in LIVE:
                yield m.sample(m.EVALUATIONS, counts.get(state, 0), state=state.lower())
            yield m.sample(m.DEAD_LETTERS, counts.get(State.FAILED, 0))
            yield m.sample(m.GRADING_WAITS, grading())

        self._metrics.at_scrape(batches)
        self._metrics.at_scrape(states)
        self._metrics.at_scrape(lambda: [m.sample(m.WORKERS, len(workers()))])

    def asked(self, answers: Collection[tuple[str, bool]], began: float) -> None:
        """Evaluations were asked for: ids, and whether each had succeeded before."""
        known = sum(cached for _, cached in answers)
        self._metrics.count(m.EVALUATIONS_ASKED, known, known="yes")
        self._metrics.count(m.EVALUATIONS_ASKED, len(answers) - known, known="no")
        if self._traces.on:
            ended, place = time.time(), current()
            for one in {one for one, cached in answers if not cached}:
                self._traces.record(
                    "asked for",
                    began,
                    ended,
                    within=evaluation_place(one),
                    links=[place] if place else [],
                    attributes={"evaluation": one},
                )

    def evaluations_of(self, batch_ids: Sequence[str]) -> Mapping[str, Sequence[tuple[str, float]]]:
        """For each of these batches the evaluations that wait for it, and when they were asked for (unix seconds),
        oldest first; none where nobody follows traces."""
        if self._database is None or not (self._traces.on and batch_ids):
            return {}
        try:
            return _evaluations_of(self._database, batch_ids)
        except Exception as error:  # the work does not fail because it cannot be seen
            log.debug("nobody knows for whom the batches are: %s", error)
            return {}

    def sent(self, batch: str, attempt: int, waiting: Iterable[tuple[str, float]]) -> None:
        """An attempt at a batch goes onto the queue, for these evaluations."""
        now = time.time()
        if attempt == 1:
            for evaluation, created in waiting:
                self._traces.record(
                    "waiting in SQL", created, now, within=evaluation_place(evaluation), attributes={"batch": batch}
                )

    def attempt(self, end: str) -> None:
        """A submitted batch has ended so: see ``preceptor.metrics.ATTEMPTS``."""
        self._metrics.count(m.ATTEMPTS, end=end)

    def lost(self, end: str, batch: str, attempt: int, ending: Ending) -> None:
        """An attempt ended without a result, as ``attempt`` says. To be told before the batch is changed."""
        self.attempt(end)
        now = time.time()
        for evaluation, _ in self.evaluations_of([batch]).get(batch, ()):
            self._traces.record(
                "attempt lost",
                now,
                now,
                within=evaluation_place(evaluation),
                error=ending.message,
                attributes={"batch": batch, "attempt": attempt, "worker": ending.worker, "steps": ending.steps},
            )

    def final_trials(self, results: Iterable[trial.TrialResult], trial_ids: Collection[str]) -> None:
        """Those of these results became final."""
        for result in results:
            if result.trial_id in trial_ids:
                outcome = result.failure.reason if result.HasField("failure") else "done"
                self._metrics.count(m.TRIALS, outcome=outcome)

    def trouble(self, reason: str) -> None:
        """A turn of the dispatcher failed."""
        self._metrics.count(m.DISPATCH_TROUBLE, reason=reason)

    @contextmanager
    def grading(self, evaluation_id: str) -> Iterator[None]:
        """The answers of an evaluation are graded while the context is open."""
        began = time.perf_counter()
        try:
            with self._traces.span("grading", within=evaluation_place(evaluation_id)):
                yield
        finally:
            self._metrics.observe(m.GRADING_SECONDS, time.perf_counter() - began)

    def cancelled(self, ended: Sequence[str], get: Callable[[Sequence[str]], Iterable[pb.Evaluation]]) -> None:
        """These were cancelled, and nobody waits for them any more."""
        self._metrics.count(m.EVALUATIONS_FINISHED, len(ended), state="cancelled")
        if not self._traces.on:
            return
        try:
            shown = list(get(ended[:MOST_NAMED]))
        except Exception as error:  # they are cancelled, whether it can be told or not
            log.debug("nobody is told that evaluations were cancelled: %s", error)
            return
        for one in shown:
            if one.state == pb.EVALUATION_STATE_CANCELLED:  # unless somebody has asked for the same again
                self._end_trace(one, "CANCELLED", {})

    def finished(self, evaluations: Iterable[pb.Evaluation]) -> None:
        """These became final."""
        for one in evaluations:
            began, ended = _seconds(one.create_time), _seconds(one.finish_time)
            self._metrics.count(m.EVALUATIONS_FINISHED, state=_END_STATES[one.state])
            told: dict[str, str | float | bool] = {}
            if one.state == pb.EVALUATION_STATE_FAILED:
                self._metrics.count(m.EVALUATION_FAILURES, reason=one.failure.reason)
            self._metrics.observe(m.EVALUATION_SECONDS, ended - began)
            if one.HasField("reward"):
                look = not {"gain", "agreement_gain"} & set(one.reward.terms)  # no answers were asked for
                told |= {"reward": one.reward.value, "reward_stderr": one.reward.stderr, "look": look}
                self._metrics.observe(m.REWARD, one.reward.value, kind="look" if look else "reward")
                if not look:
                    self._metrics.observe(m.REWARD_ERROR, one.reward.stderr)
                    if one.reward.HasField("seed_stderr"):
                        self._metrics.observe(m.SEED_ERROR, one.reward.seed_stderr)
            self._end_trace(one, one.failure.reason, told)

    def _end_trace(self, one: pb.Evaluation, error: str, told: Attributes) -> None:
        attributes = {"evaluation": one.id, "student": one.student.name, **told}
        began, ended = _seconds(one.create_time), _seconds(one.finish_time)
        self._traces.record("evaluation", began, ended, at=evaluation_place(one.id), error=error, attributes=attributes)


def _evaluations_of(database: Database, batch_ids: Sequence[str]) -> dict[str, list[tuple[str, float]]]:
    """For each of these batches, which evaluations wait for it and when they were asked for, oldest first."""
    query = (
        select(trials.c.batch_id, evaluations.c.id, evaluations.c.created, func.min(evaluations.c.seq).label("seq"))
        .join(evaluation_trials, evaluation_trials.c.trial_id == trials.c.id)
        .join(evaluations, evaluations.c.id == evaluation_trials.c.evaluation_id)
        .where(trials.c.batch_id.in_(batch_ids), evaluations.c.state.in_(LIVE))
        .group_by(trials.c.batch_id, evaluations.c.id, evaluations.c.created)
        .order_by("seq")
    )
    found: dict[str, list[tuple[str, float]]] = {batch: [] for batch in batch_ids}
    with database.read() as tx:
        for row in tx.execute(query):
            found[row.batch_id].append((row.id, row.created))
    return {batch: some[:MOST_NAMED] for batch, some in found.items()}


def _seconds(time: Timestamp) -> float:
    return time.seconds + time.nanos / 1e9
