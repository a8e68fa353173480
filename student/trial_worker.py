"""The queue's side of a worker: claims, leases, repeated deliveries, giving up. One batch at a time.

Threads: Celery's consumer runs the batches; one beats, so that the others know that this worker lives, what it holds
and how far it is; one loads the active student while nothing else is to do; one watches all of them.

Promises
- Nothing is trained without a claim (``preceptor.leases``): a message that is delivered twice is trained once, and a
  batch that was given on to another worker meanwhile is left at the first step after the next beat. Both are
  acknowledged without a result; whoever holds the batch brings it.
- A batch is acknowledged only when its result is stored. One that was done already, by whichever attempt, is not done
  again.
- SIGTERM ends the worker within a training step; its batch's result is SHUTTING_DOWN, and the evaluator gives it to
  another at once. SIGKILL is noticed by the evaluator when the lease is not renewed.
- Trials that were cancelled are left at the first step after the next beat; a batch of which nothing is left ends.
- A batch that fails is a result that says so; the worker lives on. After DEVICE_FAILED it ends itself, with the result
  stored, and so does one that stands still (``student.watchdog``): both with the exit code 70, to be started again.
- Without Redis a worker waits: for a claim before it begins, with its result when it is through. What it is at goes on.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import redis
from celery import Celery
from celery.exceptions import Ignore, Reject

from preceptor.errors import PreceptorError
from preceptor.leases import BEAT_SECONDS, Answer, Claim, LeaseBoard, WorkerStatus
from preceptor.names import celery_task_id, split_task_id
from preceptor.queue import batch_from_payload, fetch_results, to_payload
from preceptor.v1 import trial_pb2 as wire
from student import payload as edge
from student.deployment import FAILURE_SECONDS, DeploymentBoard
from student.settings import WorkerSettings
from student.sight import NO_MESSAGE, Message, WorkerSight
from student.watchdog import Watchdog, end_process

if TYPE_CHECKING:  # torch comes after the settings are known to be right
    from student.base_cache import BaseCache
    from student.worker_job import TrialJob

log = logging.getLogger(__name__)
Found = TypeVar("Found")

# One beat with all its timeouts takes 20 s at most; a thread that says nothing for three times that is stuck.
BEAT_LIMIT_SECONDS = 60.0
# From SIGTERM on. A step takes less, storing a result in a Redis that is away has no end; supervisors wait 10 to 30 s.
STOP_SECONDS = 30.0
ASK_AGAIN_SECONDS = 1.0

# What the watchdog waits for, as its log names it.
_HEARTBEAT = "a heartbeat"
_STEP = "a training step or an answer (PRECEPTOR_STALL_SECONDS)"
_LOADING = "a student that is being loaded (PRECEPTOR_LOAD_SECONDS)"
_LOADING_AHEAD = "the active student, which is being loaded (PRECEPTOR_LOAD_SECONDS)"
_END = "the end of this process, which was asked for"


@dataclass(slots=True)
class _Held:
    """The task that the worker holds; a beat of the one before cannot reach it."""

    task_id: str
    steps: int = 0
    ticks: int = 0  # steps and chunks of answers
    claim: Claim = Claim.GRANTED
    cancelled: frozenset[str] = frozenset()  # trials that nobody wants any more
    leave: threading.Event = field(default_factory=threading.Event)  # at the next step, without a result

    def hear(self, answer: Answer) -> None:
        """What the last beat was answered."""
        if answer.claim is not Claim.GRANTED:
            self.claim = answer.claim
            self.leave.set()
        if answer.cancelled - self.cancelled:
            log.info("%s: %d trials are cancelled", self.task_id, len(answer.cancelled))
            self.cancelled |= answer.cancelled  # a Redis that forgets does not bring them back


class TrialWorker:
    """The queue's side of a worker: claims, leases, repeated deliveries, giving up."""

    def __init__(
        self,
        app: Celery,
        job: TrialJob,
        cache: BaseCache,
        name: str,
        watchdog: Watchdog,
        settings: WorkerSettings,
        gpu: str = "",
        sight: WorkerSight | None = None,
    ) -> None:
        self._app = app
        self._job = job
        self._cache = cache
        self._leases = LeaseBoard(settings.broker_url)
        self._deployments = DeploymentBoard(settings.broker_url)
        self._name = name
        self._watchdog = watchdog
        self._settings = settings
        self._gpu = gpu
        self._sight = sight or WorkerSight()
        self._held: _Held | None = None
        self._trials = 0
        self._beating = threading.Lock()  # no beat may bring back a lease that is being released
        self._beat_now = threading.Event()
        self._redis_away = False
        self._giving_up = threading.Event()
        self.device_failed = False

    def start_threads(self) -> None:
        """Starts beating and loading ahead; both end with the process, and the process with the first."""
        for target in (self._beat_for_ever, self._load_ahead_for_ever):
            threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True).start()

    def give_up(self, **_: Any) -> None:
        """The process is to end: at the next step the batch is given back."""
        self._watchdog.expect(_END, STOP_SECONDS)
        self._giving_up.set()
        if (held := self._held) is not None:
            held.leave.set()

    @property
    def busy(self) -> bool:
        """Whether it is at a batch."""
        return self._held is not None

    def execute(self, task_id: str, payload: dict[str, Any], message: Message = NO_MESSAGE) -> dict[str, Any]:
        """The Celery task: a batch's payload in, its result's payload out. ``message``: what came beside it.

        Raises Ignore where another worker has the batch, and Reject, with the batch going back to the queue, if the
        worker is to end before Redis has granted it.
        """
        with self._sight.at_work(task_id, message):
            return self._execute(task_id, payload, message)

    def _execute(self, task_id: str, payload: dict[str, Any], message: Message) -> dict[str, Any]:
        batch_id, attempt = split_task_id(task_id)
        held = _Held(task_id)
        self._when_redis_answers(lambda: held.hear(self._leases.beat(self._status(held))))
        if held.claim is not Claim.GRANTED:
            log.info("%s is not begun: %s", task_id, _why(held.claim))
            raise Ignore
        self._held = held
        # Only now: whoever had the lease before stored the result before letting go of it.
        known = self._when_redis_answers(lambda: self._known_result(batch_id, attempt))
        if known is not None and self._job.still_holds(known):
            log.info("batch %s was done already", batch_id)
            return to_payload(known)
        try:
            batch = batch_from_payload(payload)
        except PreceptorError as error:
            log.warning("%s: %s", task_id, error)
            return to_payload(edge.failed(batch_id, error, self._name, attempt))
        began = time.time()
        result = self._run(batch, attempt, held)
        self._sight.ran(result, message, task_id, began)
        self.device_failed |= result.failure.reason == "DEVICE_FAILED"
        return to_payload(result)

    def _run(self, batch: wire.TrialBatch, attempt: int, held: _Held) -> wire.TrialBatchResult:
        from student.worker_job import GivenUp

        def on_step(step: int) -> None:
            held.steps = step
            held.ticks += 1
            self._watchdog.done(_LOADING)
            self._watchdog.expect(_STEP, self._settings.stall_seconds)

        if self._giving_up.is_set():  # heard before there was anything to leave
            held.leave.set()
        started = time.monotonic()
        self._watchdog.expect(_LOADING, self._settings.load_seconds)
        try:
            result = self._job.run(batch, attempt, on_step, held.leave, lambda: held.cancelled)
        except GivenUp:
            if held.claim is not Claim.GRANTED:
                self._sight.given_up()
                log.warning("%s is left after %d steps: %s", held.task_id, held.steps, _why(held.claim))
                raise Ignore from None
            log.info("batch %s is given back after %d steps: the worker is to end", batch.id, held.steps)
            ending = PreceptorError("SHUTTING_DOWN", f"the worker was told to end after {held.steps} steps")
            return edge.failed(batch.id, ending, self._name, attempt)
        finally:
            self._watchdog.done(_LOADING)
            self._watchdog.done(_STEP)
        self._trials += len(result.results)
        log.info("batch %s: %d trials in %.2f s", batch.id, len(result.results), time.monotonic() - started)
        return result

    def finished(self, **_: Any) -> None:
        """The result is stored (or the batch is somebody else's): only now the lease may go."""
        with self._beating:
            held, self._held = self._held, None
            if held is not None:
                try:
                    self._leases.release(held.task_id, self._name)
                except redis.RedisError as error:
                    log.warning("lease of %s runs out by itself: %s", held.task_id, error)
        self._beat_now.set()
        if self.device_failed:
            os.kill(os.getpid(), signal.SIGTERM)

    def _when_redis_answers(self, ask: Callable[[], Found]) -> Found:
        """The answer, however long it takes: what it would be good for has to go through Redis, too. Who begins without
        asking may do what another is at, and can tell nobody.

        Raises Reject if the worker is to end meanwhile.
        """
        while True:
            try:
                return ask()
            except redis.RedisError as error:
                log.warning("waiting for Redis before beginning: %s", error)
            time.sleep(
                ASK_AGAIN_SECONDS
            )  # not Event.wait: SIGTERM's handler sets the event from within this very thread
            if self._giving_up.is_set():
                raise Reject("the worker is to end", requeue=True)

    def _known_result(self, batch_id: str, attempt: int) -> wire.TrialBatchResult | None:
        attempts = [celery_task_id(batch_id, one) for one in range(1, attempt + 1)]
        for task_id, result in fetch_results(self._app, attempts).items():
            # An earlier attempt's failure is why there is a later one.
            if task_id == attempts[-1] or not _has_failure(result):
                return result
        return None

    def _status(self, held: _Held | None) -> WorkerStatus:
        return WorkerStatus(
            name=self._name,
            students=self._cache.commits(),
            task_id=held.task_id if held else "",
            steps_done=held.steps if held else 0,
            ticks=held.ticks if held else 0,
            trials_done=self._trials,
            peak_memory_bytes=_peak_memory_bytes(),
            serves=self._settings.serves,
            gpu=self._gpu,
        )

    def _beat(self) -> None:
        with self._beating:
            held = self._held
            try:
                answer = self._leases.beat(self._status(held))
            except redis.RedisError as error:  # Celery reconnects by itself; so does the next beat
                if not self._redis_away:
                    log.warning("no heartbeat until Redis answers again: %s", error)
                self._redis_away = True
                return
        if self._redis_away:
            log.info("heartbeats are back")
            self._redis_away = False
        if held is not None:
            held.hear(answer)

    def _beat_for_ever(self) -> None:
        try:
            while True:
                self._watchdog.expect(_HEARTBEAT, BEAT_LIMIT_SECONDS)
                self._beat()
                self._beat_now.wait(BEAT_SECONDS)
                self._beat_now.clear()
        except BaseException as error:  # a worker that does not beat is taken for dead: it had better be
            end_process(f"it cannot beat any more: {type(error).__name__}: {error}")

    def _load_ahead_for_ever(self) -> None:
        failed: dict[str, float] = {}
        while True:
            try:
                student = self._deployments.wanted()
                due = student is not None and time.monotonic() > failed.get(student.commit, 0.0)
                missing = student is not None and due and student.commit not in self._cache.commits()
                if student is not None and missing and self._is_there_for(student.name):
                    error = self._load(student)
                    if error is not None:
                        failed[student.commit] = time.monotonic() + FAILURE_SECONDS / 2
                        self._deployments.report_failure(student.commit, error)
                    self._beat_now.set()
            except PreceptorError as error:
                log.debug("cannot see which student is active: %s", error)  # the heartbeat says it aloud
            except Exception:  # no job depends on this thread, and the next look may find something else
                log.exception("cannot see which student is active")
                time.sleep(FAILURE_SECONDS)
            time.sleep(1)

    def _is_there_for(self, student: str) -> bool:
        if self._settings.serves:
            return student in self._settings.serves
        # One that has workers of its own is theirs; there may be no room for it here.
        return not self._deployments.has_own_workers(student)

    def _load(self, student: Any) -> PreceptorError | None:
        from student.worker_job import reason_of

        with self._job.exclusive:
            self._watchdog.expect(_LOADING_AHEAD, self._settings.load_seconds)
            try:
                self._cache.get(student)
            except PreceptorError as error:
                log.warning("cannot load %s: %s", student.name, error)
                return error
            except Exception as error:  # a broken model must not end this thread; the deployment reports it
                log.exception("cannot load %s", student.name)
                reason = reason_of(error)
                if reason.reason == "DEVICE_FAILED":
                    self.device_failed = True
                    os.kill(os.getpid(), signal.SIGTERM)
                return PreceptorError("BAD_STUDENT_SOURCE", str(error)[:500]) if _unforeseen(reason) else reason
            finally:
                self._watchdog.done(_LOADING_AHEAD)
        return None


def _unforeseen(reason: PreceptorError) -> bool:
    return reason.reason == "TRIAL_FAILED"


def _why(claim: Claim) -> str:
    if claim is Claim.HELD:
        return "another worker is at it, and lives"
    return "a later attempt at its batch has begun"


def _has_failure(result: wire.TrialBatchResult) -> bool:
    return result.HasField("failure") or any(one.HasField("failure") for one in result.results)


def _peak_memory_bytes() -> int:
    from student.worker_job import peak_memory_bytes

    return peak_memory_bytes()
