"""Child processes as the embedded stack sees them: starting, telling apart, signalling, measuring."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil


@dataclass
class Child:
    """One supervised process."""

    name: str
    command: list[str]
    environment: dict[str, str]
    address: str
    log: Path
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    deaths: deque[float] = field(default_factory=deque)  # when it ended, by time.monotonic()
    logged: int = 0  # bytes that were in the log before it was started

    @property
    def pid(self) -> int:
        """Its process id, 0 before it was started."""
        return self.process.pid if self.process else 0

    def start(self) -> None:
        """Starts it, with output appended to its log."""
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
