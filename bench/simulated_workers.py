"""Workers that train nothing: real Celery consumers, one process each; a trial is a sleep and is answered by a rule.

    python -m bench.simulated_workers BROKER_URL [--workers N] [--seconds S] [--plain]

Queue, leases and beats are as those of ``student.worker``: solo pool, one batch at a time, the lease claimed before
and released when the result is stored, a look whether the batch was done already. A trial takes ``--seconds`` (a
baseline too). One process imports and the workers are forks of it, so that many fit on a small machine.

A loss means nothing here: ``first_loss`` and ``final_loss`` carry when the trial began and ended, in unix seconds.

``--plain``: instead, the workers answer an empty Celery task of another queue, without anything of Preceptor's.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import redis
from celery import Celery, signals

from preceptor.leases import BEAT_SECONDS, Claim, LeaseBoard, WorkerStatus
from preceptor.queue import TRIAL_BATCH_TASK, TRIAL_QUEUE, batch_from_payload, fetch_result, make_app, to_payload
from preceptor.v1 import trial_pb2 as trial
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
        self._beat_now = threading.Event()

    def run(self, task_id: str, payload: dict[str, Any]) -> dict[str, Any]:
        """The Celery task."""
        fetch_result(self._app, task_id)  # as a worker does: it may have been done
        batch = batch_from_payload(payload)
        self._task_id = task_id
        if self._beat() is not Claim.GRANTED:
            self._task_id = ""
            failed = trial.TrialBatchResult(batch_id=batch.id, worker=self._name)
            failed.failure.reason, failed.failure.message = "CANCELLED", "another worker has it"
            return to_payload(failed)
        begun = time.time()
        time.sleep(self._seconds * len(batch.trials))
        result = answer_batch(batch, self._name)
        for item in result.results:
            item.first_loss, item.final_loss = begun, time.time()
        self._trials += len(result.results)
        return to_payload(result)

    def stored(self, **_: Any) -> None:
        """The result is in Redis: the lease may go."""
        task_id, self._task_id = self._task_id, ""
        if task_id:
            self._board.release(task_id, self._name)
        self._beat_now.set()

    def beat_for_ever(self) -> None:
        """Thread: says that this worker lives, through whatever happens to Redis."""
        while True:
            with suppress(redis.RedisError):  # so does the next one
                self._beat()
            self._beat_now.wait(BEAT_SECONDS)
            self._beat_now.clear()

    def _beat(self) -> Claim:
        status = WorkerStatus(self._name, task_id=self._task_id, trials_done=self._trials, peak_memory_bytes=1)
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
    import celery.apps.worker
    import kombu.transport.redis  # noqa: F401

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
