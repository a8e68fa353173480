"""One thread between SQL and the queue: submits batches, fetches results, notices lost workers; rewards are Marking's.

SQL is the truth and the queue a copy: whatever dies, the next start finds the batches that are not final and goes on.
What is promised:

* A batch is WAITING in SQL before anything is sent, and sent before it is SUBMITTED: a crash between the two sends it
  again under the same Celery id, which is the same work.
* A queue holds two batches for each worker that serves it, in turns between owners; the rest waits in SQL and costs no
  memory. A student may have a queue of its own (``evaluator.lanes``), and one that nobody serves holds up no other.
* A batch whose lease was seen and is gone for ``lease_grace`` without a result is lost: it is submitted again under the
  next attempt. So is one whose worker holds it and gets no further for ``stall_seconds``; as soon as somebody has begun
  the next attempt, the fence (``preceptor.leases``) has that worker leave. A result that an earlier attempt brings late
  is the same work and is taken; whoever is at a later one then is told to leave it.
* A batch that nobody took and that is not on the queue any more is submitted again, too, and that is not a try: at once
  where Redis has lost its data; after ``orphan_seconds`` where the queue is empty, or where a batch that was sent later
  has been begun (the queue is first in, first out, and a job can be lost on its way to a worker).
* A batch that was lost in ``max_attempts`` tries is cut in halves, which get one more try each, and so on: a trial that
  kills its workers does not take its neighbours along, and costs log2 of the batch's size tries more. Machines that die
  by themselves look the same, and a cut changes who trains together (the last bits of results, ADR 2), so it must be
  rarer than they: a batch of ten minutes on machines that die twice a day is lost five times in a row once in 10^9.
* After ``max_attempts`` tries a trial FAILS with TRIAL_LOST, or with its own reason where that may pass by itself. What
  follows from a result is ``evaluator.outcomes``.
* While Redis is away nothing counts as lost, and nothing is. Whatever a turn dies of (a full disk, a bug), the thread
  lives, reads SQL again and goes on.
* Trials that nobody waits for any more are named to whoever holds their batch, or will: within a beat (2 s) they are
  left. What an attempt was told to leave it leaves for good, so a trial that is asked for again meanwhile is run by
  another attempt or another batch, and a result of the old one changes nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from evaluator.attempts import History
from evaluator.batch_store import BatchStore, End, Waiting
from evaluator.broker import Broker
from evaluator.database import BatchState
from evaluator.flights import DispatchLimits, Flight, Look
from evaluator.lanes import Lane, Lanes
from evaluator.marking import Marking
from evaluator.outcomes import lost, verdict
from evaluator.sight import Sight
from preceptor.errors import PreceptorError
from preceptor.leases import Lease
from preceptor.names import celery_task_id, split_task_id
from preceptor.v1 import trial_pb2 as trial

log = logging.getLogger(__name__)

# Leases are renewed every 2 s; looking more often than once a second shows nothing new.
LOOK_SECONDS = 1.0
# Payloads (up to some MB each) in memory at once.
SUBMITTED_AT_ONCE = 16
# Results in one transaction: some ten milliseconds, in which no request is written.
TAKEN_AT_ONCE = 64
CANCELLED_AT_ONCE = 200
FIRST_BACKOFF_SECONDS = 0.25
MAX_BACKOFF_SECONDS = 5.0
# Nothing is under way: a look at SQL now and then, though every change wakes the thread.
IDLE_SECONDS = 5.0
FORGET_SECONDS = 60.0


class Dispatcher:
    """The thread. ``step`` is one turn of it, for tests that hold the clock (seconds, monotonic)."""

    def __init__(
        self,
        batches: BatchStore,
        history: History,
        broker: Broker,
        marking: Marking,
        limits: DispatchLimits,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        lanes: Lanes | None = None,
        sight: Sight | None = None,
    ) -> None:
        self._batches, self._history, self._broker, self._marking = batches, history, broker, marking
        self._limits, self._clock, self._wall_clock = limits, clock, wall_clock
        self._lanes = lanes or Lanes()
        self._sight = sight or Sight()
        self._flights: dict[str, Flight] | None = None  # None: to be read from SQL
        self._resting: dict[str, float] = {}  # batches that wait in SQL for a time to come
        self._sent: set[str] = set()  # attempts that are on the queue while SQL could not be told
        self._cancelled_may_wait = True  # as a lane's ``work_may_wait``
        self._submitted = 0  # flights so far
        self._next_look = self._next_forgetting = 0.0
        self._backoff = 0.0
        self._trouble = ""
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
        self._lanes.expect_work()
        self._wake.set()

    def tell_cancelled(self) -> None:
        """There may be cancelled trials that a worker is at."""
        self._cancelled_may_wait = True
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            pause = self.turn()
            if self._flights is None:  # it failed: whoever asks for more meanwhile does not make it better
                self._stopping.wait(pause)
            else:
                self._wake.wait(pause)
            self._wake.clear()

    def turn(self) -> float:
        """A step, whatever happens in it. Returns how long to pause."""
        try:
            pause = self.step()
        except Exception as error:
            # Each turn can start from SQL again, so the next one can succeed; what was half done is done again.
            self._flights, self._cancelled_may_wait = None, True
            self._lanes.expect_work()
            self._sight.trouble(error.reason if isinstance(error, PreceptorError) else "INTERNAL")
            if not isinstance(error, PreceptorError):
                log.exception("a turn of the dispatcher failed; trying again every %.0f s", MAX_BACKOFF_SECONDS)
            elif error.message != self._trouble:
                log.error("%s (%s); trying again every %.0f s", error, error.reason, MAX_BACKOFF_SECONDS)
                self._trouble = error.message
            return MAX_BACKOFF_SECONDS
        if self._trouble:
            log.info("the dispatcher goes on")
            self._trouble = ""
        return pause

    def step(self) -> float:
        """One turn: results, leases, submissions. Returns how long to pause."""
        flights = self._recover() if self._flights is None else self._flights
        try:
            self._tell_cancelled(flights)
            self._take_results(flights)
            if self._clock() >= self._next_look:
                self._look_at_workers(flights)
                self._next_look = self._clock() + LOOK_SECONDS
            self._submit_waiting(flights)
        except PreceptorError as error:
            if error.reason != "BROKER_UNREACHABLE":
                raise
            return self._broker_away(error, flights)
        if self._backoff:
            log.info("the broker answers again")
            self._backoff = 0.0
        self._marking.settle_left_out()
        self._forget()
        busy = flights or self._lanes.work_may_wait() or self._cancelled_may_wait
        return self._limits.poll_seconds if busy else IDLE_SECONDS

    def _recover(self) -> dict[str, Flight]:
        """Reads what is under way from SQL, and finishes what was answered but not scored."""
        now = self._clock()
        # In which order they were sent is not known; all of them before what is sent from now on.
        flights = {
            record.id: Flight(record, now, self._submitted, self._lanes.of(record.student).queue)
            for record in self._batches.under_way()
        }
        self._marking.settle_all()
        self._flights = flights
        return flights

    def _broker_away(self, error: PreceptorError, flights: dict[str, Flight]) -> float:
        self._cancelled_may_wait = True  # what was to be sent may not have been
        self._lanes.expect_work()
        self._sight.trouble(error.reason)
        if not self._backoff:
            log.warning("%s; waiting for it (%d batches under way)", error, len(flights))
        self._backoff = min(max(self._backoff * 2, FIRST_BACKOFF_SECONDS), MAX_BACKOFF_SECONDS)
        for flight in flights.values():  # nobody can beat: no time passes for leases
            flight.last_sign = flight.moved = self._clock() + self._backoff
        return self._backoff

    def _tell_cancelled(self, flights: dict[str, Flight]) -> None:
        if not self._cancelled_may_wait:
            return
        self._cancelled_may_wait = False
        told = self._batches.cancellations(CANCELLED_AT_ONCE)
        for cancellation in told:
            self._broker.cancel(cancellation.task_id, cancellation.trial_ids)
            batch, attempt = split_task_id(cancellation.task_id)
            # A later attempt is somebody's who asked for the same again.
            if cancellation.whole and batch in flights and flights[batch].record.attempt == attempt:
                del flights[batch]
        if told:
            self._batches.told(told)
            self._cancelled_may_wait = True  # until there is nothing more

    def _take_results(self, flights: dict[str, Flight]) -> None:
        task_ids = [task_id for flight in flights.values() for task_id in flight.task_ids]
        found = list(self._broker.results(task_ids).items())
        for start in range(0, len(found), TAKEN_AT_ONCE):
            self._take(flights, dict(found[start : start + TAKEN_AT_ONCE]))

    def _take(self, flights: dict[str, Flight], results: dict[str, trial.TrialBatchResult]) -> None:
        """Takes results that came together together: a transaction costs more than what is done in it."""
        wanted = self._batches.wanted(list({split_task_id(task_id)[0] for task_id in results}))
        ends: list[tuple[End, float]] = []
        for task_id, result in results.items():
            batch, attempt = split_task_id(task_id)
            flight = flights.get(batch)
            if flight is None or attempt < flight.record.since:
                continue
            self.peak_memory_bytes = max(self.peak_memory_bytes, result.peak_memory_bytes)
            record = flight.record
            found = verdict(wanted[batch], result, record.tries, self._limits.max_attempts)
            if found.passing and attempt < record.attempt:
                flight.record = replace(record, since=attempt + 1)  # a later attempt is under way already
                continue
            del flights[batch]
            self._note_begun(flight)
            if not wanted[batch]:  # cancelled meanwhile
                continue
            if found.again:
                text = "batch %s: %d of %d trials are tried again: %s"
                log.warning(text, batch, len(found.again), len(wanted[batch]), found.ending.message)
                self._lanes.expect_work()
            self._sight.attempt("results" if not found.again else "retried" if found.counts else "given_back")
            if found.whole:
                self._rest([batch], found.rest)
                self._batches.try_again(batch, attempt, found.ending, discard=True, counts=found.counts)
                continue
            end = End(batch, attempt, found.final, found.ending, found.again, found.halve, record.tries)
            ends.append((end, found.rest))
            self._cancelled_may_wait = self._cancelled_may_wait or attempt < record.attempt
        self._end(ends)

    def _end(self, ends: Sequence[tuple[End, float]]) -> None:
        """Ends batches; what of each runs again rests first, so many seconds."""
        if not ends:
            return
        final: list[str] = []
        for recorded, (end, rest) in zip(self._batches.record([end for end, _ in ends]), ends, strict=True):
            self._rest(recorded.batch_ids, rest)
            final += recorded.trial_ids
            self._sight.final_trials(end.results, recorded.trial_ids)
        self.trials_done += len(final)
        self._marking.settle_trials(final)

    def _rest(self, batch_ids: Sequence[str], seconds: float) -> None:
        if seconds:
            self._resting |= dict.fromkeys(batch_ids, self._clock() + seconds)

    def _note_begun(self, flight: Flight) -> None:
        lane = self._lanes.of(flight.record.student)
        lane.newest_begun = max(lane.newest_begun, flight.number)

    def _look_at_workers(self, flights: dict[str, Flight]) -> None:
        self._lanes.make_room(self._broker.workers(), self._limits.in_flight)
        waiting = [flight.record.id for flight in flights.values() if not flight.is_running]
        look = Look(
            leases=self._broker.holders([flight.task_id for flight in flights.values()]),
            fences=self._broker.begun(waiting),
            empty=[queue for queue, depth in self._broker.depths(self._lanes.queues).items() if depth == 0],
            queue_was_lost=self._broker.has_forgotten(),  # last: the answer is given once
            now=self._clock(),
        )
        begun = [flight for flight in flights.values() if flight.begins(look)]
        if begun:
            for flight in begun:
                self._note_begun(flight)
            workers_of = [(flight.record, look.leases.get(flight.task_id, Lease("")).worker) for flight in begun]
            self._batches.mark_running(workers_of)
        for flight in list(flights.values()):
            if why := flight.why_lost(look, self._limits):
                self._lost(flights, flight, why)
            elif flight.is_off_the_queue(look, self._limits, self._lanes.of(flight.record.student).newest_begun):
                self._orphaned(flights, flight)

    def _orphaned(self, flights: dict[str, Flight], flight: Flight) -> None:
        record, why = flight.record, "no worker has it and it is not on the queue any more"
        del flights[record.id]
        log.warning("batch %s, attempt %d: %s; submitting it again", record.id, record.attempt, why)
        self._sight.lost("dropped", record.id, record.attempt, flight.ending(why))
        self._batches.try_again(record.id, record.attempt, flight.ending(why), discard=False, counts=False)
        self._lanes.expect_work()

    def _lost(self, flights: dict[str, Flight], flight: Flight, why: str) -> None:
        record = flight.record
        del flights[record.id]
        if record.tries < self._limits.max_attempts:
            log.warning("batch %s, attempt %d: %s; submitting it again", record.id, record.attempt, why)
            self._sight.lost("lost", record.id, record.attempt, flight.ending(why))
            self._batches.try_again(record.id, record.attempt, flight.ending(why), discard=False)
            self._lanes.expect_work()
            return
        wanted = self._batches.wanted([record.id])[record.id]
        self._sight.lost("lost" if len(wanted) > 1 else "given_up", record.id, record.attempt, flight.ending(why))
        if len(wanted) > 1:  # perhaps one of them kills the workers, and the others are innocent
            log.warning("batch %s: %s; its halves get one more try each", record.id, why)
            end = End(record.id, record.attempt, (), flight.ending(why), wanted, halve=True, tries=record.tries)
            self._lanes.expect_work()
        else:
            log.error("batch %s: %s; given up after %d tries", record.id, why, record.tries)
            given_up = [lost(one, f"batch {record.id}: {why}", record.tries) for one in wanted]
            end = End(record.id, record.attempt, given_up, flight.ending(why))
        self._end([(end, 0.0)])

    def _submit_waiting(self, flights: dict[str, Flight]) -> None:
        now = self._clock()
        self._resting = {batch: until for batch, until in self._resting.items() if until > now}
        for lane in self._lanes:
            if lane.work_may_wait:
                self._fill(lane, flights)

    def _fill(self, lane: Lane, flights: dict[str, Flight]) -> None:
        on_it = sum(flight.queue == lane.queue for flight in flights.values())
        while (room := min(lane.most - on_it, SUBMITTED_AT_ONCE)) > 0:
            lane.work_may_wait = bool(self._resting)
            waiting = self._batches.waiting(room, self._resting, lane.student, self._lanes.dedicated)
            self._submit(flights, waiting, lane.queue)
            if len(waiting) < room:
                return
            on_it += len(waiting)
        lane.work_may_wait = True

    def _submit(self, flights: dict[str, Flight], waiting: Sequence[Waiting], queue: str) -> None:
        asked_for = self._sight.evaluations_of([batch.record.id for batch in waiting])
        for batch in waiting:
            evaluations = asked_for.get(batch.record.id, ())
            task_id = celery_task_id(batch.record.id, batch.record.attempt)
            if task_id in self._sent:
                continue
            if batch.unwanted:  # first, so that its worker knows from the first beat
                self._broker.cancel(task_id, batch.unwanted)
            self._broker.submit(batch.payload, batch.record.attempt, queue, [one for one, _ in evaluations])
            self._sight.sent(batch.record.id, batch.record.attempt, evaluations)
            self._sent.add(task_id)
        # One that is not marked was cancelled between the look and now; its worker will be told.
        marked = self._batches.mark_submitted(waiting)
        for record in (batch.record for batch in waiting):
            self._sent.discard(celery_task_id(record.id, record.attempt))
            if record.id in marked:
                submitted = replace(record, state=BatchState.SUBMITTED, tries=record.tries + 1)
                self._submitted += 1
                flights[record.id] = Flight(submitted, self._clock(), self._submitted, queue)

    def _forget(self) -> None:
        if self._clock() >= self._next_forgetting:
            self._history.forget(self._wall_clock() - self._limits.history_seconds)
            self._next_forgetting = self._clock() + FORGET_SECONDS
