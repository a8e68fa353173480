"""Promises about who still answers: the silent are noticed, the slow and those whom nobody asked are not."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from preceptor import pulse
from preceptor.leases import LeaseBoard, WorkerStatus
from preceptor.processes import Child
from preceptor.pulse import START_SECONDS, Pulse, PulseWatch
from preceptor.redis_server import EmbeddedRedis


def test_silence_is_time_spent_asking_in_vain_and_ends_with_an_answer() -> None:
    heard = Pulse()
    heard.note(7, False, 3.0)
    heard.note(7, False, 5.0)
    assert (heard.answered, heard.silence) == (False, 8.0)
    heard.note(7, True, 1.0)
    assert (heard.answered, heard.silence) == (True, 0.0)
    heard.note(8, False, 2.0)  # another process under the same name has its own silence
    assert (heard.answered, heard.silence) == (False, 2.0)


def test_who_hangs_while_it_starts_is_given_the_time_that_its_starts_take() -> None:
    heard = Pulse()
    assert heard.patience(25.0) == START_SECONDS
    for seconds in (1.0, 5.0):
        heard.note(7, False, seconds)
    heard.note(7, True, 1.0)
    assert heard.patience(25.0) == 25.0
    heard.note(8, False, 1.0)  # killed and started again
    assert heard.patience(25.0) == 25.0 + 4 * 6.0
    heard.note(8, True, 1.0)
    heard.note(9, False, 1.0)
    assert heard.patience(25.0) == 25.0 + 4 * 6.0  # the slowest counts


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of every time, but for the beats, which Redis keeps for whole seconds."""
    for name in ("SILENCE_SECONDS", "ASK_SECONDS", "FIRST_ASK_SECONDS", "LOOK_SECONDS"):
        monkeypatch.setattr(pulse, name, getattr(pulse, name) / 10)
    monkeypatch.setattr("preceptor.leases.LEASE_SECONDS", 1)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[Child, str]]:
    port = _free_port()
    server = EmbeddedRedis(tmp_path / "redis", port)
    child = Child("redis", server.command, dict(os.environ), f"127.0.0.1:{port}", tmp_path / "log", server.prepare)
    child.start()
    yield child, server.url
    child.kill_group()
    assert child.process
    child.process.wait(5)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Child]:
    child = Child("worker-1", ["sleep", "60"], dict(os.environ), "", tmp_path / "worker.log")
    child.start()
    yield child
    child.kill_group()
    assert child.process
    child.process.wait(5)


def test_a_stopped_redis_hangs_and_says_nothing_about_the_workers(
    quick: None, redis: tuple[Child, str], worker: Child
) -> None:
    server, url = redis
    watch = PulseWatch(url, server, [], [worker])
    watch.start()
    try:
        _wait(lambda: watch.answered(server), 10)
        LeaseBoard(url).beat(WorkerStatus(f"here:{worker.pid}"))
        _wait(lambda: watch.answered(worker), 10)
        assert not watch.hangs(server)
        os.kill(server.pid, signal.SIGSTOP)
        stopped = time.monotonic()
        _wait(lambda: watch.hangs(server), 10)
        assert time.monotonic() - stopped >= pulse.SILENCE_SECONDS - pulse.ASK_SECONDS
        assert watch.silence(worker) < 1.5  # only what was seen before Redis was stopped
        os.kill(server.pid, signal.SIGCONT)
        _wait(lambda: not watch.hangs(server), 10)
    finally:
        watch.stop()


def test_a_worker_that_beats_no_more_hangs_and_one_that_has_not_begun_gets_its_time(
    quick: None, redis: tuple[Child, str], worker: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, url = redis
    monkeypatch.setattr(pulse, "START_SECONDS", START_SECONDS)
    watch = PulseWatch(url, server, [], [worker])
    watch.start()
    try:
        _wait(lambda: watch.answered(server), 10)
        _wait(lambda: watch.silence(worker) > 2 * pulse.SILENCE_SECONDS, 30)
        assert not watch.hangs(worker)
        LeaseBoard(url).beat(WorkerStatus(f"here:{worker.pid}"))
        _wait(lambda: watch.answered(worker), 10)
        assert not watch.hangs(worker)
        _wait(lambda: watch.hangs(worker), 30)
    finally:
        watch.stop()


def _wait(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
