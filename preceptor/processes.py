"""Child processes as the embedded stack sees them: starting, starting again, telling apart, signalling, measuring."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# Deaths close together. One that never came up is given up after so many: it will not by being started again.
DEATHS, DEATHS_WINDOW_SECONDS = 5, 60.0
# One that has worked before is started again at once; when it dies again and again, with pauses up to this long.
PAUSE_SECONDS = 30.0
# It has worked before, so what keeps it down now (a full disk, a lost mount) may pass; nobody waits longer for that.
PATIENCE_SECONDS = 600.0


@dataclass
class Deaths:
    """The deaths of one child, and whether it is worth starting again. Times by time.monotonic()."""

    recent: deque[float] = field(default_factory=deque)
    served: bool = False  # one of its processes has answered
    last_answer: float = 0.0  # about when the last of those ended

    def pause_after(self, now: float, answered: bool) -> float | None:
        """It has died, and had answered or not: seconds until it is to be started again. None: it is given up."""
        self.recent.append(now)
        while now - self.recent[0] >= DEATHS_WINDOW_SECONDS:
            self.recent.popleft()
        if answered:
            self.served, self.last_answer = True, now
        if not self.served:
            return None if len(self.recent) > DEATHS else 0.0
        if now - self.last_answer >= PATIENCE_SECONDS:
            return None
        # The first three deaths within a minute cost no pause.
        return min(2.0 ** (len(self.recent) - 4), PAUSE_SECONDS) if len(self.recent) > 3 else 0.0


@dataclass
class Child:
    """One supervised process."""

    name: str
    command: list[str]
    environment: dict[str, str]
    address: str
    log: Path
    prepare: Callable[[], None] = lambda: None  # before each start
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    deaths: Deaths = field(default_factory=Deaths)
    due: float | None = None  # it has ended and is to be started again then, by time.monotonic()
    logged: int = 0  # bytes that were in the log before it was started

    @property
    def pid(self) -> int:
        """Its process id, 0 before it was started."""
        return self.process.pid if self.process else 0

    def start(self) -> None:
        """Starts it, with output appended to its log. Raises OSError where it cannot be begun at all."""
        self.prepare()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.logged = log.tell()
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def last_words(self, lines: int = 3) -> list[str]:
        """The last lines that this very process has logged, and none of those before it."""
        if not self.log.exists():
            return []
        with self.log.open("rb") as log:
            log.seek(self.logged)
            return log.read().decode(errors="replace").strip().splitlines()[-lines:]

    def ended(self) -> bool:
        """Whether it was started and is no longer there."""
        return self.process is not None and self.process.poll() is not None

    def terminate(self) -> None:
        """Asks it to end."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill_group(self) -> None:
        """Ends it and whatever it started: it leads a process group of its own."""
        if self.pid:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


def identity(pid: int) -> dict[str, float]:
    """A pid and when it began: a pid alone may have been given to another process since."""
    try:
        return {"pid": pid, "started": psutil.Process(pid).create_time()}
    except psutil.NoSuchProcess:
        return {"pid": pid, "started": 0.0}


def is_alive(identity: dict[str, float]) -> bool:
    """Whether that very process still runs."""
    try:
        process = psutil.Process(int(identity["pid"]))
        return abs(process.create_time() - identity["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def find_processes(wanted: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """The living processes that are wanted; those that one may not look at are not."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone meanwhile, or another user's
            if wanted(process) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def memory_of(pids: list[int]) -> int:
    """Bytes of these processes and their children together (PSS where the system tells it, so that shared pages
    count once; else RSS)."""
    total = 0
    for pid in pids:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            for one in [process] if pid == os.getpid() else [process, *process.children(recursive=True)]:
                with suppress(psutil.Error):
                    info = one.memory_full_info()
                    total += getattr(info, "pss", 0) or info.rss
    return total


def holder_of(port: int) -> str:
    """Who listens on a port, as the end of a sentence; empty where it cannot be told."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                if connection.pid:
                    return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
                return " by another process"
    return ""
