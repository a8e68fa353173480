"""Copies, on this machine's disk, of artifacts that lie in a bucket.

Promises: what is handed out is verified; a damaged copy is fetched again; of processes that want the same artifact at
the same time one fetches it; what a killed process left is removed by the next; the least recently used copies leave
when the bound is reached (but for those used in the last minutes: somebody may be reading them).
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from preceptor.errors import PreceptorError
from preceptor.hashes import folder_sha256
from preceptor.storage import storage_error

log = logging.getLogger(__name__)

_HASH = re.compile(r"[0-9a-f]{64}")
_DRAFT, _UPLOAD = ".draft-", ".upload-"
# A model is read into memory in less.
IN_USE_SECONDS = 600.0
# Nobody writes to a draft for so long without a word.
_ABANDONED_SECONDS = 86400.0
# Another process may fetch a large model for so long; each of its calls has a deadline of its own.
_OTHERS_SECONDS = 3600.0

Fill = Callable[[Path, Callable[[int], None]], None]


class _Waited(OSError):
    """Somebody else has had it for too long."""


class ArtifactCache:
    """Folders by their hash, of ``max_bytes`` together. Any number of processes may share it."""

    def __init__(self, folder: Path, max_bytes: int = 100 * 10**9, in_use_seconds: float = IN_USE_SECONDS) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._in_use_seconds = in_use_seconds

    def get(self, sha256: str, fill: Fill) -> Path:
        """The folder with this hash. Where it is not here, ``fill`` writes it: it is given an empty folder and a
        function to be told, before it begins, how many bytes that will be.

        Raises ARTIFACT_CORRUPT where what was filled in has another hash, DISK_FULL, DATABASE_UNREACHABLE, and what
        ``fill`` raises.
        """
        entry = self._entry(sha256)
        try:
            with self._only_one(sha256):
                if entry.is_dir():
                    os.utime(entry)  # first: from here on nobody removes it
                    if folder_sha256(entry) == sha256:
                        return entry
                    log.warning("the copy at %s is damaged; it is fetched again", entry)
                    shutil.rmtree(entry)
                draft = self._folder / f"{_DRAFT}{sha256}"
                shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed: we have its lock
                try:
                    draft.mkdir()
                    fill(draft, self._make_room)
                    if (found := folder_sha256(draft)) != sha256:
                        raise PreceptorError("ARTIFACT_CORRUPT", f"has hash {found[:12]}, expected {sha256[:12]}")
                    draft.replace(entry)
                finally:
                    shutil.rmtree(draft, ignore_errors=True)
                return entry
        except _Waited as error:
            raise PreceptorError("ARTIFACT_STORE_UNREACHABLE", str(error)) from None
        except OSError as error:
            if (known := storage_error(error, entry)) is not None:
                raise known from error
            raise

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """An empty folder to prepare something in; it is gone afterwards, unless ``add`` took it."""
        folder = self._folder / f"{_UPLOAD}{uuid.uuid4().hex}"
        try:
            folder.mkdir(parents=True)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def add(self, draft: Path, sha256: str) -> None:
        """Takes a draft that has this hash; only to save fetching it."""
        entry = self._entry(sha256)
        with self._only_one(sha256):
            self._make_room(sum(path.stat().st_size for path in draft.rglob("*") if path.is_file()))
            with suppress(OSError):  # it is here already
                draft.replace(entry)

    def _entry(self, sha256: str) -> Path:
        if not _HASH.fullmatch(sha256):
            raise PreceptorError("ARTIFACT_NOT_FOUND", f"{sha256[:80]!r} is no SHA-256")
        return self._folder / sha256

    def _make_room(self, needed: int) -> None:
        """Removes the least recently used copies until ``needed`` bytes more are within the bound, and what killed
        processes left."""
        now = time.time()
        entries = []
        for path in self._folder.iterdir():
            with suppress(OSError):  # another process removes it
                if _HASH.fullmatch(path.name):
                    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                    entries.append((path.stat().st_mtime, size, path))
                elif path.name.startswith(_DRAFT):
                    with self._only_one(path.name.removeprefix(_DRAFT), wait_seconds=0):
                        shutil.rmtree(path)
                elif path.name.startswith(_UPLOAD) and now - path.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(path)
        total = needed + sum(size for _, size, _ in entries)
        for used, size, path in sorted(entries):
            if total <= self._max_bytes or now - used < self._in_use_seconds:
                break
            with suppress(OSError), self._only_one(path.name, wait_seconds=0):
                if path.stat().st_mtime > used:
                    continue  # somebody wants it after all
                log.info("removing the copy at %s, last used %.0f hours ago", path, (now - used) / 3600)
                path.replace(gone := self._folder / f"{_DRAFT}{path.name}")
                shutil.rmtree(gone)
                total -= size

    @contextmanager
    def _only_one(self, sha256: str, wait_seconds: float = _OTHERS_SECONDS) -> Iterator[None]:
        # The system lets go of a lock when its process ends, however that ends.
        self._folder.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + wait_seconds
        with (self._folder / f".lock-{sha256}").open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= end:
                        raise _Waited("another process has been fetching it for too long") from None
                    time.sleep(0.05)
            yield
