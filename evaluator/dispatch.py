"""One thread between SQL and the queue: submits batches, fetches results, notices lost workers; rewards are Marking's.

SQL is the truth and the queue a copy: whatever dies, the next start finds the batches that are not final and goes on.
What is promised:

* A batch is WAITING in SQL before anything is sent, and sent before it is SUBMITTED: a crash between the two sends it
  again under the same Celery id, which is the same work.
* A batch whose lease was seen and is gone for ``lease_grace`` without a result is lost: it is submitted again under the
  next attempt. So is one that no worker ever took while the queue has been empty for ``orphan_seconds`` (Redis lost its
  data). A result that an earlier attempt brings late is the same work and is taken.
* A batch that was lost ``max_attempts`` times is cut in halves, which get one more attempt each, and so on: a trial
  that kills its workers does not take its neighbours along, and costs log2 of the batch's size attempts more.
* After ``max_attempts`` submissions a trial FAILS with TRIAL_LOST, or with its own reason where that may pass by itself
  (``TRANSIENT``). Any other reason is final at once. Running out of memory together is tried again in halves.
* While Redis is away nothing counts as lost, and nothing is.
* Trials that nobody waits for any more are named to whoever holds their batch, or will: within a beat (2 s) they are
  left. What an attempt was told to leave it leaves for good, so a trial that is asked for again meanwhile is run by
  another attempt or another batch, and a result of the old one changes nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from evaluator.batch_store import BatchRecord, BatchStore, part_of
from evaluator.broker import Broker
from evaluator.database import BatchState
from evaluator.marking import Marking
from evaluator.store import EvaluationStore
from preceptor.errors import PreceptorError
from preceptor.names import celery_task_id, split_task_id
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types

log = logging.getLogger(__name__)

# Reasons that may be gone at the next try. The others are properties of the work: they would come back.
TRANSIENT = frozenset(
    # CANCELLED: the trial is wanted, so it was another attempt that was told to leave it.
    {"MODEL_UNREACHABLE", "TRIAL_OUT_OF_MEMORY", "TRIAL_TIMEOUT", "TRIAL_FAILED", "ARTIFACT_NOT_FOUND", "CANCELLED"}
)
# Leases are renewed every 2 s; looking more often than once a second shows nothing new.
LEASE_LOOK_SECONDS = 1.0
FIRST_BACKOFF_SECONDS = 0.25
MAX_BACKOFF_SECONDS = 5.0
# Nothing is under way: a look at SQL now and then, though every change wakes the thread.
IDLE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """Numbers of the dispatcher; times in seconds."""

    max_attempts: int = 3  # submissions of the same work
    in_flight: int = 256  # batches on the queue at once; the rest waits in SQL and costs no memory
    poll_seconds: float = 0.05  # 20 looks a second, each one round trip
    lease_grace: float = 3.0  # after a lease has expired: one beat and a half; with it a kill is noticed in about 11 s
    orphan_seconds: float = 60.0  # longer than a worker needs from taking a job to its first beat


@dataclass(slots=True)
class _Flight:
    """A batch under way, as the thread remembers it between looks."""

    record: BatchRecord
    last_sign: float  # when its lease was last seen, or when it was last known to be in the queue

    @property
    def task_ids(self) -> list[str]:
        """All attempts whose result would be taken."""
        record = self.record
        return [celery_task_id(record.id, attempt) for attempt in range(record.since, record.attempt + 1)]


class Dispatcher:
    """The thread. ``step`` is one turn of it, for tests that hold the clock (seconds, monotonic)."""

    def __init__(
        self,
        batches: BatchStore,
        evaluations: EvaluationStore,
        broker: Broker,
        marking: Marking,
        limits: DispatchLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batches, self._evaluations, self._broker, self._marking = batches, evaluations, broker, marking
        self._limits, self._clock = limits, clock
        self._flights: dict[str, _Flight] | None = None  # None: not yet read from SQL
        self._work_may_wait = True  # spares SQL a look in every turn; only ever set by others, cleared before a look
        self._next_look = 0.0
        self._backoff = 0.0
        self._cancelled_may_wait = True  # likewise
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="dispatch", daemon=True)
        self.trials_done = 0
        self.peak_memory_bytes = 0

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, deadline: float = 10.0) -> None:
        """Ends the thread after its present turn; what is under way stays under way."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(deadline)

    def wake(self) -> None:
        """There may be new batches."""
        self._work_may_wait = True
        self._wake.set()

    def tell_cancelled(self) -> None:
        """There may be cancelled trials that a worker is at."""
        self._cancelled_may_wait = True
        self._wake.set()

    def settle(self, evaluation_ids: Sequence[str]) -> None:
        """Scores those of these evaluations whose trials are all known."""
        self._marking.settle(self._evaluations.ready(evaluation_ids=evaluation_ids))

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                pause = self.step()
            except Exception:  # the thread must live: each turn starts from SQL again, so the next one can succeed
                log.exception("a turn of the dispatcher failed; trying again in %.0f s", MAX_BACKOFF_SECONDS)
                self._flights, self._work_may_wait, self._cancelled_may_wait = None, True, True
                pause = MAX_BACKOFF_SECONDS
            self._wake.wait(pause)
            self._wake.clear()

    def step(self) -> float:
        """One turn: results, leases, submissions. Returns how long to pause."""
        flights = self._recover() if self._flights is None else self._flights
        try:
            self._tell_cancelled(flights)
            self._take_results(flights)
            if self._clock() >= self._next_look:
                self._look_at_leases(flights)
                self._next_look = self._clock() + LEASE_LOOK_SECONDS
            self._submit_waiting(flights)
        except PreceptorError as error:
            if error.reason != "BROKER_UNREACHABLE":
                raise
            return self._broker_away(error, flights)
        if self._backoff:
            log.info("the broker answers again")
            self._backoff = 0.0
        return self._limits.poll_seconds if flights else IDLE_SECONDS

    def _recover(self) -> dict[str, _Flight]:
        """Reads what is under way from SQL, and finishes what was answered but not scored."""
        now = self._clock()
        self._flights = {record.id: _Flight(record, now) for record in self._batches.under_way()}
        self._marking.settle(self._evaluations.all_ready())
        return self._flights

    def _broker_away(self, error: PreceptorError, flights: dict[str, _Flight]) -> float:
        self._work_may_wait = self._cancelled_may_wait = True  # what was to be sent may not have been
        if not self._backoff:
            log.warning("%s; waiting for it (%d batches under way)", error, len(flights))
        self._backoff = min(max(self._backoff * 2, FIRST_BACKOFF_SECONDS), MAX_BACKOFF_SECONDS)
        for flight in flights.values():  # nobody can beat: no time passes for leases
            flight.last_sign = self._clock() + self._backoff
        return self._backoff

    def _tell_cancelled(self, flights: dict[str, _Flight]) -> None:
        if not self._cancelled_may_wait:
            return
        self._cancelled_may_wait = False
        told = self._batches.cancellations()
        for cancellation in told:
            self._broker.cancel(cancellation.task_id, cancellation.trial_ids)
            batch, attempt = split_task_id(cancellation.task_id)
            # A later attempt is somebody's who asked for the same again.
            if cancellation.whole and batch in flights and flights[batch].record.attempt == attempt:
                del flights[batch]
        if told:
            self._batches.told(told[-1].seq)

    def _take_results(self, flights: dict[str, _Flight]) -> None:
        task_ids = [task_id for flight in flights.values() for task_id in flight.task_ids]
        for task_id, result in self._broker.results(task_ids).items():
            batch, attempt = split_task_id(task_id)
            if (flight := flights.get(batch)) is not None and attempt >= flight.record.since:
                self._take(flights, flight, attempt, result)

    def _take(self, flights: dict[str, _Flight], flight: _Flight, attempt: int, result: trial.TrialBatchResult) -> None:
        record = flight.record
        self.peak_memory_bytes = max(self.peak_memory_bytes, result.peak_memory_bytes)
        payload = self._batches.wanted(record.id)
        if payload is None:  # cancelled meanwhile
            del flights[record.id]
            return
        outcomes = outcomes_of(payload, result, record.tries)
        passing = [item.trial_id for item in outcomes if item.failure.reason in TRANSIENT]
        if passing and attempt < record.attempt:
            flight.record = replace(record, since=attempt + 1)  # a later attempt is under way already
            return
        again = passing if record.tries < self._limits.max_attempts else []
        del flights[record.id]
        if again:
            log.warning(
                "batch %s: %d of %d trials are tried again: %s",
                record.id,
                len(again),
                len(outcomes),
                next(item.failure.message for item in outcomes if item.trial_id in again),
            )
        memory = any(item.failure.reason == "TRIAL_OUT_OF_MEMORY" for item in outcomes)
        halves = 2 if memory and len(again) > 1 else 1
        if again and len(again) == len(outcomes) and halves == 1:
            self._batches.try_again(record.id, record.attempt, discard=True)
            self._work_may_wait = True
            return
        final = [item for item in outcomes if item.trial_id not in again]
        successors = [part_of(payload, part) for part in _split(again, halves)]
        self._work_may_wait = self._work_may_wait or bool(successors)
        recorded = self._batches.record(record.id, attempt, final, successors, record.tries)
        self.trials_done += len(recorded)
        self._marking.settle(self._evaluations.ready(trial_ids=recorded))

    def _look_at_leases(self, flights: dict[str, _Flight]) -> None:
        if not flights:
            return
        held = {
            split_task_id(task_id)[0]
            for task_id in self._broker.holders([t for f in flights.values() for t in f.task_ids])
        }
        queue_empty = self._broker.depth() == 0
        now = self._clock()
        for flight in list(flights.values()):
            record = flight.record
            if record.id in held:
                flight.last_sign = now
                if record.state is BatchState.SUBMITTED:
                    self._batches.mark_running(record.id)
                    flight.record = replace(record, state=BatchState.RUNNING)
            elif record.state is BatchState.RUNNING:
                if now - flight.last_sign > self._limits.lease_grace:
                    self._lost(flights, flight, "its worker's lease is gone")
            elif not queue_empty:
                flight.last_sign = now
            elif now - flight.last_sign > self._limits.orphan_seconds:
                self._lost(flights, flight, "no worker has it and the queue is empty")

    def _lost(self, flights: dict[str, _Flight], flight: _Flight, why: str) -> None:
        record = flight.record
        del flights[record.id]
        if record.tries < self._limits.max_attempts:
            log.warning("batch %s, attempt %d: %s; submitting it again", record.id, record.attempt, why)
            self._batches.try_again(record.id, record.attempt, discard=False)
            self._work_may_wait = True
            return
        payload = self._batches.wanted(record.id)
        if payload is None:  # cancelled meanwhile
            return
        ids = [item.id for item in payload.trials]
        if len(ids) > 1:  # perhaps one of them kills the workers, and the others are innocent
            log.warning("batch %s: %s; its halves get one more attempt each", record.id, why)
            halves = [part_of(payload, part) for part in _split(ids, 2)]
            self._batches.record(record.id, record.attempt, [], halves, record.tries)
            self._work_may_wait = True
            return
        log.error("batch %s: %s; given up after %d attempts", record.id, why, record.tries)
        lost = types.Failure(reason="TRIAL_LOST", message=f"batch {record.id}: {why}", attempts=record.tries)
        results = [trial.TrialResult(trial_id=ids[0], failure=lost)]
        self._marking.settle(
            self._evaluations.ready(trial_ids=self._batches.record(record.id, record.attempt, results))
        )

    def _submit_waiting(self, flights: dict[str, _Flight]) -> None:
        room = self._limits.in_flight - len(flights)
        if room <= 0 or not self._work_may_wait:
            return
        self._work_may_wait = False
        waiting = self._batches.waiting(room)
        if len(waiting) == room:
            self._work_may_wait = True
        for batch in waiting:
            record = batch.record
            if batch.unwanted:  # first, so that its worker knows from the first beat
                self._broker.cancel(celery_task_id(record.id, record.attempt), batch.unwanted)
            self._broker.submit(batch.payload, record.attempt)
            # Where it is not marked it was cancelled between the look and now; its worker will be told.
            if self._batches.mark_submitted(record.id, record.attempt):
                submitted = replace(record, state=BatchState.SUBMITTED, tries=record.tries + 1)
                flights[record.id] = _Flight(submitted, self._clock())


def outcomes_of(payload: trial.TrialBatch, result: trial.TrialBatchResult, tries: int) -> list[trial.TrialResult]:
    """One result for each trial of the batch, in order; failures carry how often they were tried."""
    by_id = {item.trial_id: item for item in result.results}
    outcomes = []
    for item in payload.trials:
        outcome = trial.TrialResult(trial_id=item.id)
        if result.HasField("failure"):
            outcome.failure.CopyFrom(result.failure)
        elif item.id in by_id:
            outcome.CopyFrom(by_id[item.id])
        else:
            outcome.failure.reason, outcome.failure.message = "TRIAL_FAILED", "the worker's result lacks this trial"
        if outcome.HasField("failure"):
            outcome.failure.attempts = max(tries, 1)
        outcomes.append(outcome)
    return outcomes


def _split(items: Sequence[str], parts: int) -> list[Sequence[str]]:
    if not items:
        return []
    middle = (len(items) + 1) // parts
    return [items] if parts == 1 else [items[:middle], items[middle:]]
