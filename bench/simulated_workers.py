"""Workers that train nothing: real Celery consumers, one process each; a trial is a sleep and is answered by a rule.

    python -m bench.simulated_workers BROKER_URL [--workers N] [--seconds S] [--plain]

Queue, leases and beats are as those of ``student.trial_worker``: solo pool, one batch at a time, the lease claimed
before and released when the result is stored, a look whether the batch was done already. A trial takes ``--seconds`` (a
baseline too). One process imports and the workers are forks of it, so that many fit on a small machine.

A loss means nothing here: ``first_loss`` and ``final_loss`` carry when the trial began and ended, in unix seconds.

``--plain``: instead, the workers answer an empty Celery task of another queue, without anything of Preceptor's.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import redis
from celery import Celery, signals
from celery.exceptions import Ignore

from preceptor.leases import BEAT_SECONDS, Claim, LeaseBoard, WorkerStatus
from preceptor.names import celery_task_id, split_task_id
from preceptor.queue import TRIAL_BATCH_TASK, TRIAL_QUEUE, batch_from_payload, fetch_results, make_app, to_payload
from tests.scripted_trials import answer_batch

PLAIN_TASK, PLAIN_QUEUE = "bench.nothing", "bench-nothing"


class SimulatedWorker:
    """The task's body and the beat of one worker. ``seconds``: of one trial."""

    def __init__(self, app: Celery, broker_url: str, seconds: float) -> None:
        self._app, self._seconds = app, seconds
        self._board = LeaseBoard(broker_url)
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._task_id = ""
        self._trials = 0
        self._beating = threading.Lock()  # no beat may bring back a lease that is being released
        self._beat_now = threading.Event()

    def run(self, task_id: str, payload: dict[str, Any]) -> dict[str, Any]:
        """The Celery task."""
        if self._beat(task_id) is not Claim.GRANTED:
            raise Ignore
        self._task_id = task_id
        batch_id, attempt = split_task_id(task_id)
        attempts = [celery_task_id(batch_id, one) for one in range(1, attempt + 1)]
        for known in fetch_results(self._app, attempts).values():  # as a worker does: it may have been done
            return to_payload(known)
        batch = batch_from_payload(payload)
        begun = time.time()
        time.sleep(self._seconds * len(batch.trials))
        result = answer_batch(batch, self._name)
        for item in result.results:
            item.first_loss, item.final_loss = begun, time.time()
        self._trials += len(result.results)
        return to_payload(result)

    def stored(self, **_: Any) -> None:
        """The result is in Redis: the lease may go."""
        with self._beating, suppress(redis.RedisError):  # it would run out by itself
            task_id, self._task_id = self._task_id, ""
            if task_id:
                self._board.release(task_id, self._name)
        self._beat_now.set()

    def beat_for_ever(self) -> None:
        """Thread: says that this worker lives, through whatever happens to Redis."""
        while True:
            with self._beating, suppress(redis.RedisError):  # the next one may get through
                self._beat(self._task_id)
            self._beat_now.wait(BEAT_SECONDS)
            self._beat_now.clear()

    def _beat(self, task_id: str) -> Claim:
        status = WorkerStatus(self._name, task_id=task_id, trials_done=self._trials, peak_memory_bytes=1)
        return self._board.beat(status).claim


def consume(broker_url: str, seconds: float, plain: bool) -> None:
    """One worker, until SIGTERM."""
    app = make_app(broker_url)
    if plain:

        @app.task(name=PLAIN_TASK)  # type: ignore[untyped-decorator]
        def nothing() -> None:
            """Nothing."""
    else:
        worker = SimulatedWorker(app, broker_url, seconds)

        @app.task(name=TRIAL_BATCH_TASK, bind=True)  # type: ignore[untyped-decorator]
        def run_trial_batch(task: Any, payload: dict[str, Any]) -> dict[str, Any]:
            return worker.run(task.request.id, payload)

        signals.task_postrun.connect(worker.stored, weak=False)
        threading.Thread(target=worker.beat_for_ever, daemon=True).start()
    app.Worker(
        hostname=f"simulated@{os.getpid()}",
        pool="solo",
        concurrency=1,
        queues=[PLAIN_QUEUE if plain else TRIAL_QUEUE],
        loglevel="WARNING",
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        redirect_stdouts=False,
        quiet=True,
    ).start()


def main() -> None:
    """Forks the workers and ends them all when it is told to end, or when its parent is gone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("broker_url")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--plain", action="store_true")
    given = parser.parse_args()
    # Forked later, a child would have to import all of it again.
    for module in ("celery.apps.worker", "celery.worker.consumer", "celery.concurrency.solo", "kombu.transport.redis"):
        importlib.import_module(module)

    parent, children = os.getppid(), []
    for _ in range(given.workers):
        child = os.fork()
        if child == 0:
            consume(given.broker_url, given.seconds, given.plain)
            os._exit(0)
        children.append(child)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    while not ending.wait(0.5) and os.getppid() == parent:
        pass
    for child in children:
        os.kill(child, signal.SIGKILL)  # a dead one too is there until it is waited for
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
