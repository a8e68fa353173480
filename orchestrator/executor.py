"""Runs under way: each in its own thread, a bounded number at once, further ones PENDING.

Promises: a run that was RUNNING or PENDING when the process ended, however it ended, goes on when it starts again. A
run is executed by one thread at a time. A cancelled run ends within seconds and its evaluations are cancelled. A drain
stops the threads without changing any run's state. A run whose ledger cannot be written, for want of room on the disk,
waits and goes on by itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
from sqlalchemy import Engine

from orchestrator.execution import Execution, Services
from orchestrator.ledger import Ledger
from orchestrator.plan import RunPlan
from orchestrator.progress import Progress
from orchestrator.report import ReportRenderer
from orchestrator.run_store import CANCELLED, FAILED, FINAL, PENDING, RUNNING, SUCCEEDED, RunRecord, RunStore
from orchestrator.settings import OrchestratorSettings
from orchestrator.sight import run_gauges
from orchestrator.stop import Stopped
from orchestrator.timing import stored_seconds
from preceptor.channel import call
from preceptor.database import DatabaseError
from preceptor.errors import PreceptorError
from preceptor.metrics import RUNS_FINISHED, Sample
from preceptor.storage import ROOM_SECONDS
from preceptor.telemetry import OFF, Telemetry
from preceptor.tracing import about
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import types_pb2 as types

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
# Telling the others that nobody waits any more is a courtesy: their results would only be known for the next one.
CANCEL_DEADLINE_SECONDS = 5.0
# Clocks that differ by more are worth a line in the log; nothing depends on it.
CLOCK_SECONDS = 5.0


class RunExecutor:
    """Executes the runs of one store."""

    def __init__(
        self, engine: Engine, services: Services, settings: OrchestratorSettings, telemetry: Telemetry = OFF
    ) -> None:
        self._engine = engine
        self._services = services
        self._settings = settings
        self._telemetry = telemetry
        telemetry.metrics.at_scrape(self._gauges)
        self._store = RunStore(engine)
        self._renderer = ReportRenderer()
        self._pool = ThreadPoolExecutor(settings.max_running_runs, thread_name_prefix="run")
        self._lock = threading.Lock()
        self._one_at_a_time: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._active: dict[str, Execution] = {}
        self._waiting: dict[str, str] = {}  # runs that wait for the disk, and the words for it
        self._to_cancel: set[str] = set()  # runs whose cancelling could not be written down yet
        self._draining = threading.Event()

    @property
    def draining(self) -> bool:
        """Whether the process is about to end."""
        return self._draining.is_set()

    def start(self) -> None:
        """Goes on with every run that was not finished."""
        threading.Thread(target=self._poll_queue, name="queue-status", daemon=True).start()
        for run_id in self._store.unfinished():
            log.info("going on with %s", run_id)
            self.submit(run_id)

    def submit(self, run_id: str) -> None:
        """Executes the run as soon as there is a free place."""
        with self._lock:
            if not self._draining.is_set():  # else it is found again at the next start
                self._pool.submit(self._execute, run_id)

    def cancel(self, run_id: str) -> None:
        """Ends the run, whatever it does. Raises RUN_ALREADY_FINISHED.

        Where it cannot be written down, the run ends all the same, and it is written when there is room: raises
        DatabaseError, which says so.
        """
        try:
            moved = self._store.move(run_id, CANCELLED, only_from=(PENDING, RUNNING))
        except DatabaseError as error:
            if self._store.get(run_id).state in FINAL:
                raise
            with self._lock:
                self._to_cancel.add(run_id)
            self._end(run_id)
            message = f"run {run_id!r} is ended; that it was cancelled is written down when there is room: {error}"
            raise DatabaseError(error.reason, message) from None
        if moved:
            self._end(run_id)
        elif self._store.get(run_id).state != CANCELLED:
            raise PreceptorError("RUN_ALREADY_FINISHED", f"run {run_id!r} is finished")

    def resume(self, run_id: str) -> None:
        """Goes on with a failed or cancelled run; one that is under way goes on anyway.

        Raises RUN_ALREADY_FINISHED.
        """
        with self._lock:
            self._to_cancel.discard(run_id)
        if self._store.move(run_id, PENDING, only_from=(FAILED, CANCELLED)):
            self.submit(run_id)
        elif self._store.get(run_id).state == SUCCEEDED:
            raise PreceptorError("RUN_ALREADY_FINISHED", f"run {run_id!r} has succeeded")

    def progress(self, record: RunRecord) -> Progress:
        """The run's live progress, or what its ledger says where it is not executed now."""
        with self._lock:
            execution = self._active.get(record.id)
            waiting = self._waiting.get(record.id, "waiting for a free place" if record.state == PENDING else "")
        if execution is not None:
            return execution.progress
        plan = RunPlan.of(record)
        seconds = sum(stored_seconds(self._engine, record.id).values())
        progress = Progress(plan.config.rounds.count, plan.planned_self_edits, lambda: seconds)
        progress.show(Ledger(self._engine, record.id, record.created).entries())
        progress.enter(waiting, plan.config.rounds.count)
        if record.first_reward_seconds is not None:
            progress.first_reward(record.first_reward_seconds)
        return progress

    def drain(self) -> None:
        """Stops all threads; their runs go on at the next start."""
        with self._lock:
            self._draining.set()
            executions = list(self._active.values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for execution in executions:
            execution.stop.set()
            execution.progress.wake()

    def join(self, seconds: float) -> None:
        """Waits after ``drain`` until the threads have ended, at most so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with self._lock:
                if not self._active:
                    return
            time.sleep(0.05)

    def _execute(self, run_id: str) -> None:
        with self._lock:
            alone = self._one_at_a_time[run_id]
        with alone, about(run=run_id):  # a run that was cancelled and resumed at once: the old thread ends first
            while True:
                try:
                    self._execute_once(run_id)
                except DatabaseError as error:
                    words = f"waiting for the disk: {error}"
                    with self._lock:
                        if self._waiting.get(run_id) != words:  # once: the log may be on the same disk
                            log.warning("%s is %s", run_id, words)
                        self._waiting[run_id] = words
                else:
                    if run_id not in self._to_cancel:
                        return
                if self._draining.wait(ROOM_SECONDS):
                    return

    def _execute_once(self, run_id: str) -> None:
        """Executes a run that is to be executed, from where its ledger ends. Raises DatabaseError."""
        if run_id in self._to_cancel:
            self._store.move(run_id, CANCELLED, only_from=(PENDING, RUNNING))
        if self._draining.is_set() or not self._store.move(run_id, RUNNING, only_from=(PENDING, RUNNING)):
            with self._lock:
                self._waiting.pop(run_id, None)
                self._to_cancel.discard(run_id)
            return
        try:
            self._run(run_id)
            log.info("%s succeeded", run_id)
            self._count("succeeded")
        except Stopped:
            log.info("%s stopped", run_id)
            self._count("stopped")
        except DatabaseError:
            raise
        except PreceptorError as error:
            log.warning("%s failed: %s: %s", run_id, error.reason, error)
            self._fail(run_id, error.reason, str(error))
        except Exception as error:  # a bug: it must end in the run's state, not only in this thread
            log.exception("%s failed", run_id)
            self._fail(run_id, "INTERNAL", f"{type(error).__name__}: {error}")

    def _run(self, run_id: str) -> None:
        self._note_evaluator_clock(run_id)
        execution = Execution(
            self._engine,
            self._store.get(run_id),
            self._services,
            self._renderer,
            self._settings.patience_seconds,
            self._telemetry,
        )
        with self._lock:
            self._active[run_id] = execution
            self._waiting.pop(run_id, None)
            if self._draining.is_set() or run_id in self._to_cancel:
                execution.stop.set()
        try:
            # Cancelled between the move and the registration: nobody could have told the execution.
            if self._store.get(run_id).state == CANCELLED:
                execution.stop.set()
            execution.run()
        finally:
            try:
                if self._is_cancelled(run_id):
                    self._cancel_elsewhere(run_id)
            finally:
                with self._lock:
                    del self._active[run_id]
                execution.progress.wake()

    def _note_evaluator_clock(self, run_id: str) -> None:
        if self._store.evaluator_clock(run_id) is not None:
            return
        try:
            ahead = self._services.evaluator_ahead()
        except PreceptorError as error:  # it counts what was known before a little wrongly, if clocks differ at all
            log.warning("%s: the evaluator's clock is not known: %s", run_id, error)
            return
        if abs(ahead) > CLOCK_SECONDS:
            log.warning("the evaluator's clock is %+.0f s off ours; set both right (NTP)", ahead)
        self._store.note_evaluator_clock(run_id, ahead)

    def _end(self, run_id: str) -> None:
        """Ends what is done for a run that was cancelled."""
        with self._lock:
            execution = self._active.get(run_id)
        if execution is not None:
            execution.stop.set()  # its thread cancels the evaluations when it has ended
            execution.progress.wake()
        else:
            self._cancel_elsewhere(run_id)

    def _is_cancelled(self, run_id: str) -> bool:
        return run_id in self._to_cancel or self._store.get(run_id).state == CANCELLED

    def _count(self, outcome: str) -> None:
        self._telemetry.metrics.count(RUNS_FINISHED, outcome=outcome)

    def _gauges(self) -> Iterator[Sample]:
        with self._lock:
            active = {run_id: execution.progress for run_id, execution in self._active.items()}
        yield from run_gauges(active)

    def _fail(self, run_id: str, reason: str, message: str) -> None:
        self._count("failed")
        failure = types.Failure(reason=reason, message=message, attempts=1)
        self._store.move(run_id, FAILED, only_from=(RUNNING,), failure=failure)

    def _cancel_elsewhere(self, run_id: str) -> None:
        """Tells the other services that nobody waits any more for what the run has asked for."""
        # A late repetition must not end what the run has asked for since it was resumed.
        request_id = f"{run_id}.{self._store.get(run_id).resumes}.cancel"
        request = evaluator.CancelEvaluationsRequest(request_id=request_id, owner=run_id)
        try:
            call(self._services.evaluator.CancelEvaluations, request, deadline=CANCEL_DEADLINE_SECONDS)
        except PreceptorError as error:
            log.warning("%s: its evaluations could not be cancelled: %s", run_id, error)
        updates = teacher.CancelUpdatesRequest(request_id=request_id, owner=run_id)
        try:
            call(self._services.teacher.CancelUpdates, updates, deadline=CANCEL_DEADLINE_SECONDS)
        except PreceptorError as error:
            log.warning("%s: its updates could not be cancelled: %s", run_id, error)

    def _poll_queue(self) -> None:
        """Thread: tells live runs how many workers there are, and notes the largest memory seen."""
        own = psutil.Process()
        while not self._draining.wait(POLL_SECONDS):
            with self._lock:
                active = dict(self._active)
            if not active:
                continue
            peak, workers = own.memory_info().rss, None
            try:
                status = call(
                    self._services.evaluator.GetQueueStatus,
                    evaluator.GetQueueStatusRequest(),
                    deadline=POLL_SECONDS,
                )
                peak, workers = max(peak, status.worker_peak_memory_bytes), status.workers_alive
            except PreceptorError as error:
                log.debug("no queue status: %s", error)
            for run_id, execution in active.items():
                try:
                    self._store.raise_peak_memory(run_id, peak)
                except DatabaseError as error:  # the run itself will wait for it
                    log.debug("no peak memory: %s", error)
                if workers is not None:
                    execution.progress.workers(workers)
