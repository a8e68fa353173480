"""A real Celery worker whose student is a rule (tests.scripted_trials): everything of the queue, nothing of torch.

    python -m tests.integration.scripted_worker BROKER_URL LOG_FILE [--slow SECONDS] [--die-first]

It claims and beats as a worker does and appends the id of every trial it begins to the log. ``--slow``: a batch takes
that long. ``--die-first``: it dies by SIGKILL in the middle of its first batch that trains anything.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis
from celery import Celery, signals
from celery.exceptions import Ignore

from preceptor.leases import Answer, Claim, LeaseBoard, WorkerStatus
from preceptor.queue import TRIAL_BATCH_TASK, TRIAL_QUEUE, batch_from_payload, make_app, to_payload
from tests.scripted_trials import answer_batch


class ScriptedWorker:
    """The task's body and the beat."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.board = LeaseBoard(options.broker_url)
        self.task_id = ""

    def run(self, task_id: str, payload: dict[str, Any]) -> dict[str, Any]:
        batch = batch_from_payload(payload)
        self.task_id = task_id
        if self.beat().claim is not Claim.GRANTED:
            self.task_id = ""
            raise Ignore
        with Path(self.options.log).open("a") as log:
            for item in batch.trials:
                log.write(f"{item.id}\n")
        if self.options.die_first and any(item.documents for item in batch.trials):
            time.sleep(1.5)  # long enough for the lease to be seen
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.options.slow)
        return to_payload(answer_batch(batch, self.name))

    def beat(self) -> Answer:
        return self.board.beat(WorkerStatus(self.name, task_id=self.task_id, peak_memory_bytes=1000))

    def beat_for_ever(self) -> None:
        while True:
            with suppress(redis.RedisError):  # away; so it beats again when it is back
                self.beat()
            time.sleep(0.5)

    def stored(self, **_: Any) -> None:
        task_id, self.task_id = self.task_id, ""
        if task_id:
            self.board.release(task_id, self.name)


def make_worker_app(worker: ScriptedWorker) -> Celery:
    app = make_app(worker.options.broker_url)

    @app.task(name=TRIAL_BATCH_TASK, bind=True, Strategy="preceptor.queue:trial_strategy")  # type: ignore[untyped-decorator]
    def run_trial_batch(self: Any, payload: dict[str, Any]) -> dict[str, Any]:
        return worker.run(self.request.id, payload)

    signals.task_postrun.connect(worker.stored, weak=False)
    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("broker_url")
    parser.add_argument("log")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--die-first", action="store_true")
    worker = ScriptedWorker(parser.parse_args())
    app = make_worker_app(worker)
    threading.Thread(target=worker.beat_for_ever, daemon=True).start()
    app.worker_main(
        ["worker", "-Q", TRIAL_QUEUE, "--pool=solo", "--without-gossip", "--without-mingle", "--loglevel=WARNING"]
    )


if __name__ == "__main__":
    main()
