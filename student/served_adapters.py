"""Adapters that lie in a folder where an inference server finds them, for as long as their process needs them.

Promises
- Each process has a folder of its own under the root, and a lock (flock) on the file beside it while it lives. What a
  dead one left, whichever way it died, is found by whoever looks next (``leftovers``).
- A name is the hash of an adapter's files and its owner: no name ever stands for two contents, so that no server can
  answer with a stale one, and no process unloads what another is using.
- Files whose adapter may still be asked for stay: a server that has put an adapter out of its memory reads it again,
  and vLLM dies where it cannot. Those of an abandoned batch go a while after.

The root is a folder that this machine's workers and the server see under the same path.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from preceptor.hashes import folder_sha256

# Far longer than a server takes to drop the requests of a connection that is gone.
ABANDONED_SECONDS = 30.0
_HASH_DIGITS = 24


class AdapterFolder:
    """One process's adapters under ``root``. Raises OSError where the folder cannot be made or written."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._owner = uuid.uuid4().hex[:8]
        self._abandoned: list[tuple[float, Path]] = []  # when they may go
        self._closed = False
        self._root.mkdir(parents=True, exist_ok=True)
        # Locked before it has its name: under that, nobody finds it free.
        draft = self._root / f".{self._owner}"
        self._lock = os.open(draft, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        draft.rename(self._root / f"{self._owner}.lock")
        self._own.mkdir()

    @property
    def _own(self) -> Path:
        return self._root / self._owner

    def put(self, write: Callable[[Path], None]) -> tuple[str, Path]:
        """Has ``write`` fill an empty folder; gives the adapter's name and where it lies."""
        draft = self._own / f".{uuid.uuid4().hex}"
        try:
            draft.mkdir(parents=True)
            write(draft)
            name = f"{folder_sha256(draft)[:_HASH_DIGITS]}-{self._owner}"
            folder = self._own / name
            if folder.exists():  # two trials of a batch with the same values, or one that comes again
                self._abandoned = [one for one in self._abandoned if one[1] != folder]
            else:
                draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return name, folder

    def remove(self, names: Iterable[str]) -> None:
        """Removes adapters that no server has any more and nobody waits for."""
        for name in names:
            shutil.rmtree(self._own / name, ignore_errors=True)

    def abandon(self, names: Iterable[str]) -> None:
        """The same for adapters of which a server may still be at a request; they go later."""
        now = time.monotonic()
        for due, folder in self._abandoned:
            if due < now:
                shutil.rmtree(folder, ignore_errors=True)
        self._abandoned = [one for one in self._abandoned if one[0] >= now]
        self._abandoned += [(now + ABANDONED_SECONDS, self._own / name) for name in names]

    @contextmanager
    def leftovers(self) -> Iterator[list[str]]:
        """The names of dead processes' adapters, of which a server may have some loaded. Their files are gone
        afterwards, unless an exception says that it is too early."""
        dead = list(self._dead())
        try:
            yield [folder.name for _, owned in dead for folder in owned.glob("[!.]*-*")]
            for lock, owned in dead:
                shutil.rmtree(owned, ignore_errors=True)
                if lock is not None:
                    self._root.joinpath(f"{owned.name}.lock").unlink(missing_ok=True)
        finally:
            for lock, _ in dead:
                if lock is not None:
                    os.close(lock)

    def _dead(self) -> Iterator[tuple[int | None, Path]]:
        """Folders whose owner does not live, with the lock on them that is ours now."""
        for file in self._root.glob("[!.]*.lock"):
            if file.stem == self._owner:
                continue  # on some systems one process may lock a file twice
            try:
                lock = os.open(file, os.O_RDWR | os.O_CLOEXEC)
            except OSError:  # somebody else has just cleared it away
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
            else:
                yield lock, file.with_suffix("")
        for owned in self._root.glob("[!.]*"):
            if owned.is_dir() and not owned.with_suffix(".lock").exists():
                yield None, owned

    def close(self) -> None:
        """Removes what is left of this process. What is abandoned is left to whoever looks next."""
        if self._closed:
            return
        self._closed = True
        if not self._abandoned:
            shutil.rmtree(self._own, ignore_errors=True)
            with suppress(OSError):
                self._root.joinpath(f"{self._owner}.lock").unlink(missing_ok=True)
        os.close(self._lock)
