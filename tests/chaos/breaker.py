"""Deals the blows of a schedule to an arena, and measures how long it takes until what was hit works again."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path

import redis

from preceptor.leases import LeaseBoard, WorkerStatus
from preceptor.names import split_task_id
from preceptor.processes import is_alive
from tests.chaos.arena import Arena
from tests.chaos.schedule import KILLING, OWNER, PROCESSES, Blow, Kind

# Somebody must be in the middle of a batch for a calm blow; and it must not last for ever.
BATCH_SECONDS = 90.0
RECOVERY_SECONDS = 150.0
# The blows are spread over this share of the run, so that the last one hits something, too.
SPREAD = 0.85


class Breaker(threading.Thread):
    """A thread that deals the blows, spread over the run.

    A blow is due when its share of the run is done, at most ``longest`` seconds after the one before, and at least
    ``shortest`` after it. ``share`` is to be kept up to date by whoever follows the run.
    """

    def __init__(
        self,
        arena: Arena,
        blows: Sequence[Blow],
        say: Callable[[str], None],
        *,
        shortest: float,
        longest: float,
    ) -> None:
        super().__init__(name="breaker", daemon=True)
        self._arena, self._blows, self._say = arena, blows, say
        self._shortest, self._longest = shortest, longest
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._boards: dict[str, LeaseBoard] = {}
        self._watchers: list[threading.Thread] = []
        self.share = 0.0
        self.over = threading.Event()  # the run has ended
        self.kills = 0  # SIGKILLs that were sent
        self.dealt: Counter[str] = Counter()  # by kind and victim
        self.calm: dict[str, float] = {}  # seconds until the trials of a worker ran elsewhere, and nothing else was hit
        self.moved: list[float] = []  # the same for all others whose worker was killed in the middle of a batch
        self.back: dict[str, list[float]] = {}  # seconds until what was killed or stopped for ever served again
        self.problems: list[str] = []

    def run(self) -> None:
        last = time.monotonic()
        for number, blow in enumerate(self._blows):
            while not self._is_due(number, time.monotonic() - last):
                if self.over.wait(0.05):
                    return
            try:
                self._deal(blow)
            except Exception as error:  # said, counted as a problem, and the next blow comes
                if self.over.is_set():
                    return
                self.problems.append(f"{blow} could not be dealt: {type(error).__name__}: {error}")
                self._say(self.problems[-1])
            last = time.monotonic()

    def finish(self) -> None:
        """The run is over: no further blows; whoever waits for a recovery stops waiting."""
        self.over.set()
        self.join(60)
        for watcher in self._watchers:
            watcher.join(5)

    def _is_due(self, number: int, since: float) -> bool:
        return since >= self._shortest and (
            self.share >= SPREAD * (number + 0.5) / len(self._blows) or since >= self._longest
        )

    def _deal(self, blow: Blow) -> None:
        status = self._worker_in_a_batch(blow) if blow.calm else None
        victim = self._name_of(status) if status else blow.victim
        pid = self._pid_of(victim)
        done = f"{self.share:4.0%}"
        self._say(
            f"[{time.monotonic() - self._began:6.1f} s {done}] {Blow(blow.kind, victim, blow.seconds)}"
            + (f" (pid {pid})" if pid else "")
        )
        with self._lock:
            self.dealt[f"{blow.kind} {victim}"] += 1
        if blow.kind in KILLING and victim.startswith("worker") and status is None:
            status = self._status_of(pid)
        if status is not None and status.task_id:
            trials = self._trials_under_way(status.task_id)
            watcher = self._watch(lambda: self._until_elsewhere(trials, status.name, blow))
        else:
            watcher = None
        self._strike(blow, victim, pid)
        if blow.calm and watcher is not None:
            watcher.join(RECOVERY_SECONDS)

    def _pid_of(self, victim: str) -> int:
        """The victim's process, once there is one: it may have been killed a moment ago. 0: it is no process."""
        if victim == OWNER:
            return self._arena.owner_pid
        if victim not in (*PROCESSES, *self._arena.worker_names):
            return 0
        end = time.monotonic() + RECOVERY_SECONDS
        while not self.over.wait(0.05) and time.monotonic() < end:
            child = self._arena.children().get(victim)
            if child is not None and is_alive(child):
                return int(child["pid"])
        raise AssertionError("it was not started again")

    def _strike(self, blow: Blow, victim: str, pid: int) -> None:
        match blow.kind:
            case Kind.KILL if victim == OWNER:
                self.kills += 1
                self._arena.kill_owner()
            case Kind.KILL:
                self._kill(victim, pid)
            case Kind.STOP:
                os.kill(pid, signal.SIGSTOP)
                if blow.seconds:
                    self._later(blow.seconds, lambda: _continue(pid))
                else:
                    self._watch(lambda: self._until_back(victim, pid, "stopped"))
            case Kind.FLUSH:
                self._flush()
            case Kind.WIPE | Kind.TEAR | Kind.GARBLE:
                os.kill(pid, signal.SIGSTOP)  # so that nothing is written any more
                _spoil(self._arena.home / "redis", blow.kind)
                self._kill(victim, pid)
            case Kind.DROP:
                self._arena.proxies[victim].drop()
            case Kind.STALL:
                self._arena.proxies[victim].stall(blow.seconds)
            case Kind.REFUSE:
                self._arena.proxies[victim].refuse(blow.seconds)
            case Kind.DELAY:
                self._arena.proxies[victim].delay(0.1)
                self._later(blow.seconds, lambda: self._arena.proxies[victim].delay(0.0))
            case Kind.DISK:
                ballast = self._arena.home / "ballast"
                _fill(ballast)
                self._later(blow.seconds, lambda: ballast.unlink(missing_ok=True))

    def _flush(self) -> None:
        end = time.monotonic() + RECOVERY_SECONDS
        while True:
            client = redis.Redis.from_url(self._arena.broker_url(), socket_timeout=5)
            with closing(client):
                try:
                    client.flushall()
                    return
                except redis.RedisError:  # an earlier blow: it is away, or its disk is full
                    if self.over.wait(0.2) or time.monotonic() > end:
                        raise

    def _kill(self, victim: str, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.kills += 1
        self._watch(lambda: self._until_back(victim, pid, "killed"))

    # Who recovers, and when

    def _until_back(self, victim: str, pid: int, what: str) -> None:
        began = time.monotonic()
        while not self.over.wait(0.2) and time.monotonic() - began < RECOVERY_SECONDS:
            child = self._arena.children().get(victim)
            if child is None or child["pid"] == pid:
                continue
            if victim == "redis":
                back = self._ping()
            elif victim.startswith("worker"):
                back = self._status_of(int(child["pid"])) is not None
            else:
                back = self._arena.serves(victim)
            if back:
                with self._lock:
                    self.back.setdefault(f"{what} {victim}", []).append(round(time.monotonic() - began, 1))
                return
        if not self.over.is_set():
            self.problems.append(f"{victim} was not back within {RECOVERY_SECONDS:.0f} s")

    def _until_elsewhere(self, trials: Sequence[str], worker: str, blow: Blow) -> None:
        """Waits until each of the trials is done or in the hands of another worker."""
        began = time.monotonic()
        while time.monotonic() - began < RECOVERY_SECONDS:
            taken = {split_task_id(one.task_id)[0] for one in self._workers() if one.task_id and one.name != worker}
            if all(batch in taken for batch in self._batches_of(trials)):
                seconds = round(time.monotonic() - began, 1)
                with self._lock:
                    if blow.calm:
                        self.calm[f"worker_{blow.kind}"] = seconds
                        self._say(f"  its {len(trials)} trials run elsewhere after {seconds} s")
                    elif blow.kind is Kind.KILL:
                        self.moved.append(seconds)
                return
            if self.over.wait(0.1):
                return
        self.problems.append(f"the trials of {worker} did not run elsewhere within {RECOVERY_SECONDS:.0f} s")

    def _worker_in_a_batch(self, blow: Blow) -> WorkerStatus | None:
        """Whoever trains something just now; None if nobody does for a long time."""
        end = time.monotonic() + BATCH_SECONDS
        while time.monotonic() < end and not self.over.wait(0.02):
            for status in self._workers():
                if status.task_id and self._trials_under_way(status.task_id) and self._name_of(status):
                    return status
        self.problems.append(f"{blow}: no worker was in the middle of a batch")
        return None

    def _workers(self) -> list[WorkerStatus]:
        try:
            url = self._arena.broker_url()
            if url not in self._boards:  # another owner has another Redis
                self._boards[url] = LeaseBoard(url)
            return self._boards[url].workers()
        except (redis.RedisError, KeyError):
            return []

    def _status_of(self, pid: int) -> WorkerStatus | None:
        return next((one for one in self._workers() if one.name.endswith(f":{pid}")), None)

    def _name_of(self, status: WorkerStatus) -> str:
        pid = int(status.name.rpartition(":")[2])
        return next((name for name, child in self._arena.children().items() if child["pid"] == pid), "")

    def _trials_under_way(self, task_id: str) -> list[str]:
        batch = split_task_id(task_id)[0]
        return [row[0] for row in self._ask("SELECT id FROM trials WHERE batch_id = ? AND state = 'PENDING'", batch)]

    def _batches_of(self, trials: Sequence[str]) -> set[str]:
        """The batches of those of the trials that are not done."""
        marks = ",".join("?" * len(trials))
        query = f"SELECT DISTINCT batch_id FROM trials WHERE state = 'PENDING' AND id IN ({marks})"
        return {row[0] for row in self._ask(query, *trials)}

    def _ask(self, query: str, *values: str) -> list[tuple[str]]:
        with closing(sqlite3.connect(self._arena.home / "evaluator.db", timeout=30)) as database:
            return database.execute(query, values).fetchall()

    def _ping(self) -> bool:
        with suppress(redis.RedisError, KeyError):
            client = redis.Redis.from_url(self._arena.broker_url(), socket_timeout=2)
            with closing(client):
                return bool(client.ping())
        return False

    def _watch(self, body: Callable[[], None]) -> threading.Thread:
        watcher = threading.Thread(target=body, daemon=True)
        watcher.start()
        self._watchers.append(watcher)
        return watcher

    def _later(self, seconds: float, act: Callable[[], object]) -> None:
        def wait() -> None:
            self.over.wait(seconds)  # what was broken is mended at the end, too
            act()

        self._watch(wait)


def _continue(pid: int) -> None:
    with suppress(ProcessLookupError):  # it was killed meanwhile
        os.kill(pid, signal.SIGCONT)


def _spoil(folder: Path, kind: Kind) -> None:
    """Does to Redis's folder what the blow says."""
    files = [path for path in folder.rglob("appendonly*") if path.is_file() and path.stat().st_size]
    if kind is Kind.WIPE:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif files:
        newest = max(files, key=lambda path: path.stat().st_mtime)
        size = newest.stat().st_size
        if kind is Kind.TEAR:
            os.truncate(newest, max(size - 7, 0))
        else:
            with newest.open("r+b") as file:
                file.seek(size // 2)
                file.write(b"\0" * 64)


def _fill(path: Path) -> None:
    """Takes all the space that there is."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 2**20)
    with path.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 512)
