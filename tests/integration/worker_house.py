"""Real workers on a real Redis, for tests of what they promise to whoever puts batches on the queue."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import redis

from preceptor.artifacts import folder_sha256
from preceptor.leases import LeaseBoard, WorkerStatus
from preceptor.queue import fetch_result, make_app, submit
from preceptor.redis_server import EmbeddedRedis
from preceptor.v1 import trial_pb2 as wire
from preceptor.v1 import types_pb2 as types

# A machine that is busy with other things imports torch slowly.
START_SECONDS = 120.0
Found = TypeVar("Found")

FACTS = ("Ada is in Rome.", "Tom is a smith.", "Question: Where is Ada?\nAnswer: Rome")
# Steps. Some seconds of training, so several beats; and minutes on any machine: what ends within seconds was ended.
LONG, ENDLESS = 4096, 100_000


def wait_for(what: Callable[[], Found | None], seconds: float) -> Found:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


class Queue:
    """The other side of the queue."""

    def __init__(self, url: str, student: Path) -> None:
        self.url = url
        self.app = make_app(url)
        self.leases = LeaseBoard(url)
        self.student = types.PinnedStudent(name="tiny", source=str(student), commit=folder_sha256(student))

    def batch(self, name: str, epochs: int = 4) -> wire.TrialBatch:
        settings = wire.TrainingSettings(epochs=epochs, learning_rate=1e-2, batch_size=2)
        questions = wire.QuestionSet(questions=[types.Question(text="Where is Ada?", answer="Rome")])
        return wire.TrialBatch(
            id=name,
            student=self.student,
            trials=[
                wire.Trial(id="baseline"),
                wire.Trial(id="edit", documents=FACTS, settings=settings, seed=7),
                wire.Trial(id="too long", documents=["word " * 100], settings=settings),
            ],
            question_sets=[questions],
            probes=[types.Question(text="Who is Tom?", answer="a smith")],
            protocol_version=1,
        )

    def training(self, name: str, steps: int) -> wire.TrialBatch:
        """A batch of one trial of so many steps."""
        batch = self.batch(name, epochs=1024)
        del batch.trials[2], batch.trials[0]
        batch.trials[0].documents[:] = [FACTS[0]] * (steps // 1024)
        batch.trials[0].settings.batch_size = 1
        return batch

    def run(self, batch: wire.TrialBatch, attempt: int = 1) -> wire.TrialBatchResult:
        return self.result(submit(self.app, batch, attempt))

    def result(self, task_id: str, seconds: float = 60) -> wire.TrialBatchResult:
        return wait_for(lambda: fetch_result(self.app, task_id), seconds)

    def worker(self) -> WorkerStatus | None:
        return next(iter(self.leases.workers()), None)

    def workers(self, count: int) -> list[WorkerStatus]:
        """So many workers, once they are there."""
        return wait_for(lambda: found if len(found := self.leases.workers()) == count else None, START_SECONDS)

    def at_work(self, task_id: str) -> WorkerStatus:
        """The worker that trains this, once it does."""
        return wait_for(
            lambda: next((one for one in self.leases.workers() if one.task_id == task_id and one.steps_done > 0), None),
            START_SECONDS,
        )

    def idle(self) -> WorkerStatus:
        """Some worker that has nothing to do."""
        return wait_for(lambda: next((one for one in self.leases.workers() if not one.task_id), None), 20)


class RedisServer:
    """A Redis of its own that can be ended and started again with its data."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._server = EmbeddedRedis(folder, self.port)
        self._process: subprocess.Popen[bytes] | None = None
        self.url = self._server.url

    def start(self) -> None:
        self._server.prepare()
        self._process = subprocess.Popen(self._server.command)
        with redis.Redis.from_url(self.url) as client:

            def answers() -> bool:
                try:
                    return bool(client.ping())
                except redis.ConnectionError:
                    return False

            wait_for(answers, 20)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, decode_responses=True)


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    server = RedisServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextmanager
def worker_process(
    url: str, log: Path, *arguments: str, module: str = "student.worker", **settings: str
) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PRECEPTOR_BROKER_URL": url, **settings}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], env=environment, stdout=output, stderr=output
        )
    try:
        yield process
    except BaseException:
        print(log.read_text()[-5000:])
        raise
    finally:
        process.send_signal(signal.SIGCONT)  # one that is stopped does not even die
        process.kill()
        process.wait(10)
