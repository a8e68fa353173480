"""What a disk says when it cannot go on, in the words of the catalogue; and waiting until there is room again."""

from __future__ import annotations

import errno
import logging
import os
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from preceptor.errors import PreceptorError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# What waiting mends: room is made, another program lets go of the file, a disk is mounted again, a bucket can be
# reached and written again (a key that was wrong needs a restart, which finds what waited).
STORAGE_REASONS = frozenset(
    {"DISK_FULL", "DATABASE_UNREACHABLE", "ARTIFACT_STORE_UNREACHABLE", "ARTIFACT_STORE_REFUSED"}
)
# Whoever waits for room looks so often.
ROOM_SECONDS = 2.0
# SQLite reports some failures to grow a file as a plain I/O error; with less than this left, room is what is missing.
NO_ROOM_BYTES = 256 * 1024

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EIO}
# Libraries in Rust (safetensors, tokenizers) pass the system's number on in their message only.
_RUST = re.compile(r"\(os error (\d+)\)")


def storage_error(error: BaseException, place: Path | None = None) -> PreceptorError | None:
    """What this says about a disk: DISK_FULL or DATABASE_UNREACHABLE with the file named; None if it is about
    something else. ``place``: the file or folder that was written, where the error itself does not say."""
    if isinstance(error, PreceptorError):
        return error if error.reason in STORAGE_REASONS else None
    if isinstance(error, sqlite3.Error):
        return _of_sqlite(error, place)
    number = error.errno if isinstance(error, OSError) else _number_in(error)
    if isinstance(error, OSError) and isinstance(error.filename, str):
        place = Path(error.filename)
    if number in _FULL:
        return disk_full(place)
    if number in _REFUSED:
        return _refused(os.strerror(number), place)
    return None


def disk_full(place: Path | None) -> PreceptorError:
    """DISK_FULL, naming the file and the disk that it is on."""
    if place is None:
        return PreceptorError("DISK_FULL", "there is no room left on the disk")
    return PreceptorError("DISK_FULL", f"no room left on the disk of {mount_of(place)}", file=str(place))


def mount_of(path: Path) -> Path:
    """Where the file system begins that a path is on, or will be on."""
    path = path.absolute()
    while not path.is_mount() and path != path.parent:
        path = path.parent
    return path


def free_bytes(path: Path) -> tuple[int, int]:
    """Bytes that may still be written where the path is, or will be, and the size of that file system."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def when_there_is_room(
    action: Callable[[], Result],
    pause: Callable[[float], object],
    waits: Callable[[PreceptorError], None] = lambda _error: None,
) -> Result:
    """What ``action`` returns; where a disk refuses it, it is done again every few seconds.

    ``waits`` is told each time, then ``pause`` waits so many seconds, and ends the waiting by raising something.
    Raises all else that the action raises.
    """
    said = ""
    while True:
        try:
            return action()
        except Exception as error:
            reason = storage_error(error)
            if reason is None:
                raise
        if str(reason) != said:  # once: the log may be on the same disk
            said = str(reason)
            log.warning("waiting for storage: %s", said)
        waits(reason)
        pause(ROOM_SECONDS)


def _of_sqlite(error: sqlite3.Error, place: Path | None) -> PreceptorError | None:
    name = getattr(error, "sqlite_errorname", None) or ""
    if name == "SQLITE_FULL" or (name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN")) and _is_full(place)):
        return disk_full(place)
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return _refused("another program has held it for too long", place)
    if name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return _refused(str(error), place)
    return None


def _is_full(place: Path | None) -> bool:
    try:
        return place is not None and free_bytes(place)[0] < NO_ROOM_BYTES
    except OSError:
        return False


def _refused(why: str, place: Path | None) -> PreceptorError:
    if place is None:
        return PreceptorError("DATABASE_UNREACHABLE", f"cannot be written: {why}")
    return PreceptorError("DATABASE_UNREACHABLE", f"cannot be written: {why}", file=str(place))


def _number_in(error: BaseException) -> int | None:
    found = _RUST.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None
