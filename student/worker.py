"""``python -m student.worker``: takes trial batches from the queue, fine-tunes and asks the pinned student.

How the process comes about: a GPU for itself, then torch, then Celery's consumer with the solo pool (no fork, so a GPU
may be used and no second interpreter holds torch). What becomes of a batch, and what is promised of it, is in
``student.trial_worker``.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

import redis
from celery import signals

from preceptor.errors import PreceptorError
from preceptor.launch import launch
from preceptor.queue import TRIAL_BATCH_TASK, check_broker, make_app, served_queues
from preceptor.telemetry import Telemetry
from student.gpu_lease import Gpu, leased_gpu
from student.settings import WorkerSettings
from student.sight import Message, WorkerSight
from student.trial_worker import TrialWorker
from student.watchdog import ENDED_ITSELF, Watchdog

if TYPE_CHECKING:  # torch comes after the settings are known to be right
    from student.served_answers import ServedAnswers

log = logging.getLogger(__name__)

BROKER_RETRY_SECONDS = 5.0
# Redis redelivers by the workers' clocks, hours after a delivery; a minute is no matter, and more is a mistake.
CLOCK_SECONDS = 60.0


def run(settings: WorkerSettings, telemetry: Telemetry) -> None:
    """Works until SIGTERM. Raises PreceptorError(BROKER_REFUSED, DEVICE_UNUSABLE, GPU_NONE_LEFT)."""
    _end_with_parent(settings.parent_pid)
    # before torch is imported: it asks once which GPUs there are
    with leased_gpu(settings.device, settings.gpu_locks, settings.gpu_share, settings.gpu_wait_seconds) as gpu:
        _wait_for_broker(settings.broker_url)
        _work(settings, telemetry, gpu)


def _work(settings: WorkerSettings, telemetry: Telemetry, gpu: Gpu | None) -> None:
    # before torch is imported: its thread pools are sized once
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(settings.torch_threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers.utils import logging as transformers_logging

    from student.answering import answer
    from student.base_cache import BaseCache
    from student.kept import KeptEdits
    from student.memory import Caps
    from student.worker_job import TrialJob

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(settings.torch_threads)
    device = "cuda" if gpu is not None else settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.gpu_locks is not None and gpu is None and device.startswith("cuda"):
        message = (
            "PRECEPTOR_GPU_LOCKS is set, but which GPUs there are cannot be told: torch sees one and nvidia-smi none "
            "(in a container NVIDIA_DRIVER_CAPABILITIES must have `utility`)"
        )
        raise PreceptorError("DEVICE_UNUSABLE", message, field="PRECEPTOR_GPU_LOCKS")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        message = f"PRECEPTOR_DEVICE={device} cannot be used: {error}"
        raise PreceptorError("DEVICE_UNUSABLE", message, field="PRECEPTOR_DEVICE") from None
    name = f"{socket.gethostname()}:{os.getpid()}"
    cache = BaseCache(settings.loaded_bases, device, settings.artifact_cache)
    app = make_app(settings.broker_url)
    caps = Caps(settings.max_adapters, settings.gradient_checkpointing)
    served = _answer_server(settings)
    kept = KeptEdits(settings.artifacts, settings.artifact_cache)
    job = TrialJob(cache, name, settings.batch_seconds, caps, settings.trial_seconds, served or answer, kept)
    watchdog = Watchdog()
    sight = WorkerSight(telemetry, name, device)
    worker = TrialWorker(app, job, cache, name, watchdog, settings, gpu.uuid if gpu else "", sight)
    sight.at_scrape(lambda: worker.busy, cache.commits)

    @app.task(name=TRIAL_BATCH_TASK, bind=True, Strategy="preceptor.queue:trial_strategy")  # type: ignore[untyped-decorator]
    def run_trial_batch(task: Any, payload: dict[str, Any]) -> dict[str, Any]:
        return worker.execute(task.request.id, payload, Message.of(task.request))

    def keep_our_logging(**_: Any) -> None:
        """Celery configures logging unless somebody listens to this."""

    # Celery means to tell of its version 6, at every lost connection.
    warnings.simplefilter("ignore", PendingDeprecationWarning)
    signals.setup_logging.connect(keep_our_logging)
    signals.worker_shutting_down.connect(worker.give_up, weak=False)
    signals.task_postrun.connect(worker.finished, weak=False)
    logging.getLogger("celery.backends.base").addFilter(_without_traceback)
    watchdog.start()
    worker.start_threads()
    on, queues = f"{gpu.name} ({gpu.uuid})" if gpu else device, served_queues(settings.serves)
    log.info("worker %s takes batches of %s on %s, %d thread(s)", name, ", ".join(queues), on, settings.torch_threads)
    consumer = app.Worker(
        hostname=f"worker@{name}",
        pool="solo",
        concurrency=1,
        queues=list(queues),
        loglevel=settings.log_level,
        # Talk among workers that nobody listens to.
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        redirect_stdouts=False,
        quiet=True,
    )
    consumer.start()
    if served is not None:
        served.close()
    if worker.device_failed:
        log.critical("this process ends itself: its device is broken, and only a new process gets a fresh one")
        os._exit(ENDED_ITSELF)  # no farewell: tidying up asks the device, which may never answer
    if consumer.exitcode:
        sys.exit(consumer.exitcode)


def _answer_server(settings: WorkerSettings) -> ServedAnswers | None:
    """Who answers large question sets, where the settings name somebody."""
    if not settings.answer_server_url:
        return None
    from student.served_answers import ServedAnswers

    folder = settings.answer_server_adapters or settings.home / "answers"
    try:
        served = ServedAnswers(
            settings.answer_server_url,
            folder,
            api_key=settings.answer_server_api_key.get_secret_value(),
            min_questions=settings.answer_server_min_questions,
            only=settings.answer_server_only,
            concurrency=settings.answer_server_concurrency,
            timeout_seconds=settings.answer_server_seconds,
        )
    except OSError as error:
        message = f"PRECEPTOR_ANSWER_SERVER_ADAPTERS={folder} cannot be used: {error.strerror}"
        raise PreceptorError("OUTPUT_NOT_WRITABLE", message, field="PRECEPTOR_ANSWER_SERVER_ADAPTERS") from None

    def clear() -> None:
        try:
            served.clear_leftovers()
        except (PreceptorError, OSError) as error:  # the next batch looks again
            log.warning("answers are given here until the answer server is there: %s", error)

    threading.Thread(target=clear, name="answer-server-leftovers", daemon=True).start()
    return served


def _wait_for_broker(broker_url: str) -> None:
    while True:
        try:
            ahead = check_broker(broker_url)
            break
        except PreceptorError as error:
            if error.reason != "BROKER_UNREACHABLE":
                raise
            log.warning(
                "%s; trying again every %.0f s. Next: %s (%s)",
                error, BROKER_RETRY_SECONDS, error.next_step, error.reason,
            )  # fmt: skip
        time.sleep(BROKER_RETRY_SECONDS)
    if abs(ahead) > CLOCK_SECONDS:
        log.warning(
            "this machine's clock is %.0f s %s that of Redis: jobs may be delivered twice or late. Set both, by NTP.",
            abs(ahead), "ahead of" if ahead > 0 else "behind",
        )  # fmt: skip


def _without_traceback(record: logging.LogRecord) -> bool:
    """Celery shows the whole stack each time that a result cannot be stored yet."""
    if record.exc_info and isinstance(record.exc_info[1], redis.RedisError | OSError):
        record.msg, record.args = f"{record.getMessage()} {record.exc_info[1]}", ()
        record.exc_info = None
    return True


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
