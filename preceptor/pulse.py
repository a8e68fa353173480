"""Which of the stack's children still answer: a process that lives and does not answer is worse than a dead one.

Services are asked for their health, Redis for a PING, workers are looked up among those that beat. Each has a thread
of its own that asks, so one that hangs delays no other and never the supervisor.

Silence is not the time since the last answer but the time that was spent asking in vain. Whoever was not asked has not
been silent, and a round in which the asking itself came late (a machine that slept, an owner that was stopped or
starved) says nothing about anybody. Several questions in a row must be left unanswered.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from preceptor.channel import is_serving
from preceptor.errors import PreceptorError
from preceptor.processes import Child

if TYPE_CHECKING:  # a client without the extras has no redis
    from preceptor.leases import LeaseBoard

# Until the first answer. Importing torch on a busy small machine, or from a disk far away, takes minutes; and who has
# never answered keeps nobody waiting who was not waiting before.
START_SECONDS = 300.0
# A start may take so many times as long as the slowest that came to an end: the machine may be busier than it was then.
SLOWER_START = 4.0
# Five questions without an answer. Somebody who is only slow needs to answer one of them within its five seconds.
SILENCE_SECONDS = 25.0
ASK_SECONDS = 5.0
# Until the first answer: it says from when on silence is short.
FIRST_ASK_SECONDS = 1.0
# A worker's beat is read every two seconds, as often as it is given.
LOOK_SECONDS = 2.0
# A question that took so much longer than it may: who asks was not running either.
LATE_SECONDS = 2.0


@dataclass(slots=True)
class Pulse:
    """What is known of the answers of one child: of the process that it is now, and how long the ones before took."""

    pid: int = 0
    answered: bool = False  # at least once
    silence: float = 0.0  # seconds of asking in vain since the last answer
    slowest_start: float | None = None  # seconds of asking in vain until a first answer came

    def note(self, pid: int, answered: bool, seconds: float) -> None:
        """A question to this process was answered, or was not within so many seconds."""
        if pid != self.pid:
            self.pid, self.answered, self.silence = pid, False, 0.0
        if answered and not self.answered:
            self.answered, self.slowest_start = True, max(self.slowest_start or 0.0, self.silence)
        self.silence = 0.0 if answered else self.silence + seconds

    def patience(self, limit: float) -> float:
        """Seconds of silence that mean that it hangs: ``limit`` once it has answered, and before that some more, or
        much more where none has ever answered."""
        if self.answered:
            return limit
        return START_SECONDS if self.slowest_start is None else limit + SLOWER_START * self.slowest_start


class PulseWatch:
    """Asks until it is stopped. ``hangs`` and ``answered`` are about the process that a child is now."""

    def __init__(self, broker_url: str, redis: Child, services: Sequence[Child], workers: Sequence[Child]) -> None:
        from preceptor.leases import LEASE_SECONDS, LeaseBoard

        self._pulses = {child.name: Pulse() for child in (redis, *services, *workers)}
        # A beat is seen for a while after it was given, which is part of a worker's silence.
        self._limits = dict.fromkeys(self._pulses, SILENCE_SECONDS)
        self._limits.update((child.name, SILENCE_SECONDS - LEASE_SECONDS) for child in workers)
        self._stopping = threading.Event()
        board = LeaseBoard(broker_url)
        askers: list[tuple[Sequence[Child], Callable[[], Collection[int] | None], float]] = [
            ([redis], _one(redis, lambda: redis_answers(redis.address, ASK_SECONDS)), ASK_SECONDS),
            *(([child], _one(child, _health_of(child)), ASK_SECONDS) for child in services),
            (workers, lambda: _beating(board), LOOK_SECONDS),
        ]
        self._threads = [
            threading.Thread(target=self._ask_for_ever, args=asker, name=f"pulse-{asker[0][0].name}", daemon=True)
            for asker in askers
            if asker[0]
        ]

    def start(self) -> None:
        """Begins to ask."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Asks no more; a question that is under way ends by itself."""
        self._stopping.set()

    def answered(self, child: Child) -> bool:
        """Whether the process that the child is now has answered."""
        pulse = self._pulses[child.name]
        return pulse.pid == child.pid and pulse.answered

    def silence(self, child: Child) -> float:
        """For how many seconds the process that the child is now was asked in vain."""
        pulse = self._pulses[child.name]
        return pulse.silence if pulse.pid == child.pid else 0.0

    def hangs(self, child: Child) -> bool:
        """Whether the process that the child is now has been silent for too long."""
        pulse = self._pulses[child.name]
        return pulse.pid == child.pid and pulse.silence >= pulse.patience(self._limits[child.name])

    def _ask_for_ever(self, children: Sequence[Child], ask: Callable[[], Collection[int] | None], every: float) -> None:
        pause = 0.0
        while not self._stopping.is_set():
            began = time.monotonic()
            self._stopping.wait(pause)
            pids = {child.name: child.pid for child in children}
            asked = time.monotonic()
            answers = ask()
            ended = time.monotonic()
            late = asked - began > pause + LATE_SECONDS or ended - asked > ASK_SECONDS + LATE_SECONDS
            for name, pid in pids.items():
                answered = answers is not None and pid in answers
                if answered or (answers is not None and not late):
                    self._pulses[name].note(pid, answered, ended - began)
            every_now = every if all(self.answered(child) for child in children) else min(every, FIRST_ASK_SECONDS)
            pause = max(every_now - (ended - asked), 0.2)


def redis_answers(address: str, deadline: float) -> bool:
    """Whether a Redis answers at ``host:port``, and if only that it still reads its file or wants a password."""
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=deadline) as connection:
        connection.sendall(b"PING\r\n")
        return bool(connection.recv(64))
    return False


def _one(child: Child, answers: Callable[[], bool]) -> Callable[[], Collection[int]]:
    def ask() -> Collection[int]:
        pid = child.pid
        return (pid,) if answers() else ()

    return ask


def _health_of(child: Child) -> Callable[[], bool]:
    def healthy() -> bool:
        try:
            return is_serving(child.address, deadline=ASK_SECONDS, pid=child.pid)
        except PreceptorError:  # it is there; a certificate that has expired is not mended by a kill
            return True

    return healthy


def _beating(board: LeaseBoard) -> Collection[int] | None:
    """The pids of the workers that beat; None where Redis does not say."""
    import redis

    try:
        return {int(status.name.rpartition(":")[2]) for status in board.workers()}
    except (redis.RedisError, ValueError):  # not answered, or not in words that a worker of this version would use
        return None
