"""``python -m student.worker``: takes trial batches from the queue, fine-tunes and asks the pinned student.

One process, one batch at a time (Celery's solo pool: no fork, so a GPU may be used and no second interpreter holds
torch). Threads: Celery's consumer runs the batches; one beats, so that the others know that this worker lives and
what it holds; one loads the active student while nothing else is to do.

Promises
- A batch is acknowledged only when its result is stored. One that was done already, by whichever attempt, is not done
  again.
- SIGTERM ends the worker within a training step; its batch goes back to the queue. SIGKILL is noticed by the evaluator
  when the lease is not renewed.
- Trials that were cancelled are left at the first step after the next beat; a batch of which nothing is left ends.
- A batch that fails is a result that says so; the worker lives on.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis
from celery import Celery, signals
from celery.exceptions import Reject
from google.protobuf.json_format import ParseError

from preceptor.errors import PreceptorError
from preceptor.launch import launch
from preceptor.leases import BEAT_SECONDS, LeaseBoard, WorkerStatus
from preceptor.names import celery_task_id, split_task_id
from preceptor.queue import TRIAL_BATCH_TASK, TRIAL_QUEUE, batch_from_payload, fetch_result, make_app, to_payload
from preceptor.v1 import trial_pb2 as wire
from student import payload as edge
from student.deployment import FAILURE_SECONDS, DeploymentBoard
from student.settings import WorkerSettings

if TYPE_CHECKING:  # torch comes after the settings are known to be right
    from student.base_cache import BaseCache
    from student.worker_job import TrialJob

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Held:
    """The task that the worker holds; a beat of the one before cannot reach it."""

    task_id: str
    steps: int = 0
    cancelled: frozenset[str] = frozenset()  # trials that nobody wants any more


class TrialWorker:
    """The queue's side of a worker: leases, repeated deliveries, giving up."""

    def __init__(self, app: Celery, job: TrialJob, cache: BaseCache, broker_url: str, name: str) -> None:
        self._app = app
        self._job = job
        self._cache = cache
        self._leases = LeaseBoard(broker_url)
        self._deployments = DeploymentBoard(broker_url)
        self._name = name
        self._held: _Held | None = None
        self._trials = 0
        self._beat_now = threading.Event()
        self.giving_up = threading.Event()

    def start_threads(self) -> None:
        """Starts beating and loading ahead; both end with the process."""
        for target in (self._beat_for_ever, self._load_ahead_for_ever):
            threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True).start()

    def execute(self, task_id: str, payload: dict[str, Any]) -> dict[str, Any]:
        """The Celery task: a batch's payload in, its result's payload out.

        Raises Reject, with the batch going back to the queue, if the worker is to end.
        """
        batch_id, attempt = split_task_id(task_id)
        if (known := self._known_result(batch_id, attempt)) is not None:
            log.info("batch %s was done already", batch_id)
            return to_payload(known)
        held = self._held = _Held(task_id)
        self._beat()
        try:
            batch = batch_from_payload(payload)
        except ParseError as error:
            unreadable = PreceptorError("INVALID_REQUEST", f"this worker cannot read the batch: {error}")
            return to_payload(edge.failed(batch_id, unreadable, self._name, attempt))
        from student.worker_job import GivenUp

        def on_step(step: int) -> None:
            held.steps = step

        started = time.monotonic()
        try:
            result = self._job.run(batch, attempt, on_step, self.giving_up, lambda: held.cancelled)
        except GivenUp:
            log.info("batch %s goes back to the queue: the worker is to end", batch_id)
            raise Reject("the worker is to end", requeue=True) from None
        self._trials += len(result.results)
        log.info("batch %s: %d trials in %.2f s", batch_id, len(result.results), time.monotonic() - started)
        return to_payload(result)

    def finished(self, **_: Any) -> None:
        """The result is stored (or the batch is back on the queue): only now the lease may go."""
        held, self._held = self._held, None
        if held is not None:
            try:
                self._leases.release(held.task_id, self._name)
            except redis.RedisError as error:
                log.warning("lease of %s runs out by itself: %s", held.task_id, error)
        self._beat_now.set()

    def _known_result(self, batch_id: str, attempt: int) -> wire.TrialBatchResult | None:
        try:
            for one in range(1, attempt + 1):
                result = fetch_result(self._app, celery_task_id(batch_id, one))
                # An earlier attempt's failure is why there is a later one.
                if result is not None and (one == attempt or not _has_failure(result)):
                    return result
        except redis.RedisError as error:  # doing it twice is a waste, not a mistake
            log.warning("cannot ask whether %s was done: %s", batch_id, error)
        return None

    def _beat(self) -> None:
        held = self._held
        status = WorkerStatus(
            name=self._name,
            students=self._cache.commits(),
            task_id=held.task_id if held else "",
            steps_done=held.steps if held else 0,
            trials_done=self._trials,
            peak_memory_bytes=_peak_memory_bytes(),
        )
        try:
            cancelled = self._leases.beat(status).cancelled
        except redis.RedisError as error:  # Celery reconnects by itself; so does the next beat
            log.warning("no heartbeat: %s", error)
            return
        if held is not None and cancelled - held.cancelled:
            log.info("%s: %d trials are cancelled", held.task_id, len(cancelled))
            held.cancelled |= cancelled  # a Redis that forgets does not bring them back

    def _beat_for_ever(self) -> None:
        while True:
            self._beat()
            self._beat_now.wait(BEAT_SECONDS)
            self._beat_now.clear()

    def _load_ahead_for_ever(self) -> None:
        failed: dict[str, float] = {}
        while True:
            try:
                student = self._deployments.wanted()
                due = student is not None and time.monotonic() > failed.get(student.commit, 0.0)
                if student is not None and due and student.commit not in self._cache.commits():
                    error = self._load(student)
                    if error is not None:
                        failed[student.commit] = time.monotonic() + FAILURE_SECONDS / 2
                        self._deployments.report_failure(student.commit, error)
                    self._beat_now.set()
            except PreceptorError as error:
                log.warning("cannot see which student is active: %s", error)
            time.sleep(1)

    def _load(self, student: Any) -> PreceptorError | None:
        try:
            with self._job.exclusive:
                self._cache.get(student)
        except PreceptorError as error:
            log.warning("cannot load %s: %s", student.name, error)
            return error
        except Exception as error:  # a broken model must not end this thread; the deployment reports it
            log.exception("cannot load %s", student.name)
            return PreceptorError("BAD_STUDENT_SOURCE", f"{type(error).__name__}: {error}"[:500])
        return None


def _has_failure(result: wire.TrialBatchResult) -> bool:
    return result.HasField("failure") or any(one.HasField("failure") for one in result.results)


def _peak_memory_bytes() -> int:
    from student.worker_job import peak_memory_bytes

    return peak_memory_bytes()


def run(settings: WorkerSettings) -> None:
    """Works until SIGTERM. Raises PreceptorError(DEVICE_UNUSABLE)."""
    # before torch is imported: its thread pools are sized once
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(settings.torch_threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers.utils import logging as transformers_logging

    from student.base_cache import BaseCache
    from student.memory import Caps
    from student.worker_job import TrialJob

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(settings.torch_threads)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        message = f"PRECEPTOR_DEVICE={device} cannot be used: {error}"
        raise PreceptorError("DEVICE_UNUSABLE", message, field="PRECEPTOR_DEVICE") from None
    name = f"{socket.gethostname()}:{os.getpid()}"
    cache = BaseCache(settings.loaded_bases, device)
    app = make_app(settings.broker_url)
    caps = Caps(settings.max_adapters, settings.gradient_checkpointing)
    job = TrialJob(cache, name, settings.batch_seconds, caps)
    worker = TrialWorker(app, job, cache, settings.broker_url, name)

    @app.task(name=TRIAL_BATCH_TASK, bind=True)  # type: ignore[untyped-decorator]
    def run_trial_batch(task: Any, payload: dict[str, Any]) -> dict[str, Any]:
        return worker.execute(task.request.id, payload)

    def keep_our_logging(**_: Any) -> None:
        """Celery configures logging unless somebody listens to this."""

    def give_up(**_: Any) -> None:
        worker.giving_up.set()

    signals.setup_logging.connect(keep_our_logging)
    signals.worker_shutting_down.connect(give_up)
    signals.task_postrun.connect(worker.finished, weak=False)
    worker.start_threads()
    _end_with_parent(settings.parent_pid)
    log.info("worker %s takes batches on %s, %d thread(s)", name, device, settings.torch_threads)
    consumer = app.Worker(
        hostname=f"worker@{name}",
        pool="solo",
        concurrency=1,
        queues=[TRIAL_QUEUE],
        loglevel=settings.log_level,
        # Talk among workers that nobody listens to.
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        redirect_stdouts=False,
        quiet=True,
    )
    consumer.start()
    if consumer.exitcode:
        sys.exit(consumer.exitcode)


def _end_with_parent(parent_pid: int) -> None:
    if not parent_pid:
        return

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


if __name__ == "__main__":
    sys.exit(launch("worker", WorkerSettings, run))
