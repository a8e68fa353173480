"""Weights travel as ``Artifact{uri, sha256}``, never as bytes. This is the store of such folders.

A folder's hash is the SHA-256 of its manifest (one line ``sha256  relative/path`` per file, sorted), so it is the same
wherever the folder lies: on a disk that all services share (``FolderStore``), or in a bucket of an S3-compatible
store (``preceptor.artifacts_s3``, imported only where it is used).
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from preceptor.artifact_cache import ArtifactCache
from preceptor.errors import PreceptorError
from preceptor.hashes import file_sha256 as file_sha256
from preceptor.hashes import folder_sha256 as folder_sha256
from preceptor.storage import storage_error
from preceptor.v1 import types_pb2 as types

# Where, below PRECEPTOR_ARTIFACTS_URL, trials' edits lie; policies have a place of their own.
EDITS = "edits"
# How the names begin of what is being written, and of what was damaged or is not wanted and is being removed.
_LEFTOVERS = (".draft-", ".damaged-")


@dataclass(frozen=True, slots=True)
class Stored:
    """What a store holds under a name."""

    name: str
    bytes: int
    age_seconds: float  # since it was written, or last written to
    whole: bool  # no: left by a writer that was killed, or removed by half


class ArtifactStore(ABC):
    """Folders of files, each under a name of its own and published whole or not at all.

    Everything raises PreceptorError. DISK_FULL, DATABASE_UNREACHABLE (a disk cannot be written) and
    ARTIFACT_STORE_UNREACHABLE, ARTIFACT_STORE_REFUSED (a bucket) are mended from outside: whoever works on something
    durable waits and tries again (``preceptor.storage.STORAGE_REASONS``).
    """

    @abstractmethod
    def write_folder(self, name: str, write: Callable[[Path], None]) -> types.Artifact:
        """Calls ``write`` on an empty folder, then publishes the folder as ``name``. It is on the disk or in the
        bucket, not only on its way there, before it has its name.

        A name stands for one content: a folder of this name is kept if it is the same, and gives way if it is not, for
        then it is damaged.
        """

    @abstractmethod
    def local_path(self, artifact: types.Artifact) -> Path:
        """A folder of this machine with the artifact's files, verified. Raises ARTIFACT_NOT_FOUND, ARTIFACT_CORRUPT."""

    @abstractmethod
    def list(self) -> list[Stored]:
        """All there is, leftovers too."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes what ``list`` names, its name first: killed meanwhile, it is a leftover. Nothing, if it is gone."""

    @abstractmethod
    def remove_leftovers(self) -> None:
        """Removes what a process left that was killed while it wrote. To be called while nobody writes."""


def artifact_store(url: str, cache: ArtifactCache) -> ArtifactStore:
    """The store at a URL: a folder's path, ``file://`` or ``s3://bucket/prefix``. Raises INVALID_REQUEST."""
    if url.startswith("s3://"):
        from preceptor.artifacts_s3 import S3Store

        return S3Store(url, cache)
    return FolderStore(local_folder(url))


def local_folder(url: str) -> Path:
    """The folder that a path or a ``file://`` URL names. Raises INVALID_REQUEST where it is another kind of URL."""
    if "://" not in url:
        return Path(url).expanduser()
    parts = urlparse(url)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise PreceptorError("INVALID_REQUEST", f"{url!r} is no folder, file:// or s3://bucket/prefix")
    return Path(unquote(parts.path))


class FolderStore(ArtifactStore):
    """A folder of a disk, shared by all services that are to read from it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def write_folder(self, name: str, write: Callable[[Path], None]) -> types.Artifact:
        """See ArtifactStore."""
        final = self._root / name
        draft, damaged = (self._root / f"{kind}{name}-{uuid.uuid4().hex}" for kind in _LEFTOVERS)
        try:
            draft.mkdir(parents=True)
            write(draft)
            _sync(draft)
            sha256 = folder_sha256(draft)
            if final.exists() and folder_sha256(final) != sha256:
                final.replace(damaged)
            if not final.exists():
                try:
                    draft.replace(final)
                except OSError:  # another process was quicker: a name stands for one content
                    if not final.exists() or folder_sha256(final) != sha256:
                        raise
                _sync_folder(self._root)
        except Exception as error:
            if (known := storage_error(error, final)) is not None:
                raise known from error
            raise
        finally:
            for folder in (draft, damaged):
                shutil.rmtree(folder, ignore_errors=True)
        return types.Artifact(uri=final.resolve().as_uri(), sha256=sha256)

    def list(self) -> list[Stored]:
        """See ArtifactStore."""
        if not self._root.is_dir():
            return []
        now = time.time()
        found = []
        for folder in sorted(self._root.iterdir()):
            files = [path.stat() for path in folder.rglob("*") if path.is_file()]
            changed = max([folder.stat().st_mtime, *(file.st_mtime for file in files)])
            size = sum(file.st_size for file in files)
            found.append(Stored(folder.name, size, max(0.0, now - changed), not folder.name.startswith(_LEFTOVERS)))
        return found

    def remove(self, name: str) -> None:
        """See ArtifactStore."""
        folder = self._root / name
        if not name.startswith(_LEFTOVERS):
            gone = self._root / f"{_LEFTOVERS[1]}{name}-{uuid.uuid4().hex}"
            try:
                folder.replace(gone)
            except FileNotFoundError:
                return
            except OSError as error:
                raise storage_error(error, folder) or error from error
            folder = gone
        shutil.rmtree(folder, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """See ArtifactStore."""
        for kind in _LEFTOVERS:
            for folder in self._root.glob(f"{kind}*"):
                shutil.rmtree(folder, ignore_errors=True)

    def local_path(self, artifact: types.Artifact) -> Path:
        """See ArtifactStore. Here it is the folder itself."""
        return verified_folder(artifact)


class UsedStore(ArtifactStore):
    """A store that knows what this process has used, so that nothing is removed from under whoever is reading it."""

    def __init__(self, inner: ArtifactStore) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self._used: dict[str, float] = {}  # by uri; by time.monotonic

    def write_folder(self, name: str, write: Callable[[Path], None]) -> types.Artifact:
        """See ArtifactStore."""
        artifact = self._inner.write_folder(name, write)
        self._note(artifact.uri)
        return artifact

    def local_path(self, artifact: types.Artifact) -> Path:
        """See ArtifactStore."""
        self._note(artifact.uri)  # before it is looked for: from here on it stays, or is found to be gone
        return self._inner.local_path(artifact)

    def list(self) -> list[Stored]:
        """See ArtifactStore."""
        return self._inner.list()

    def remove(self, name: str) -> None:
        """See ArtifactStore."""
        self._inner.remove(name)

    def is_used(self, name: str, within_seconds: float) -> bool:
        """Whether it was used within so many seconds."""
        with self._lock:
            return self._is_used(name, within_seconds)

    def remove_unless_used(self, name: str, within_seconds: float) -> bool:
        """Removes it, unless it was used within so many seconds; whether it did."""
        with self._lock:
            if self._is_used(name, within_seconds):
                return False
            self._inner.remove(name)
            return True

    def remove_leftovers(self) -> None:
        """See ArtifactStore."""
        self._inner.remove_leftovers()

    def _is_used(self, name: str, within_seconds: float) -> bool:
        now = time.monotonic()
        return any(uri.endswith(f"/{name}") and now - used < within_seconds for uri, used in self._used.items())

    def _note(self, uri: str) -> None:
        with self._lock:
            self._used[uri] = time.monotonic()


def verified_folder(artifact: types.Artifact) -> Path:
    """Where an artifact on a disk (``file://``) lies, verified. Raises ARTIFACT_NOT_FOUND, ARTIFACT_CORRUPT."""
    if urlparse(artifact.uri).scheme != "file":
        raise PreceptorError(
            "ARTIFACT_NOT_FOUND", f"{artifact.uri!r} is not on a disk, and PRECEPTOR_ARTIFACTS_URL names no bucket"
        )
    path = local_folder(artifact.uri)
    if not path.exists():
        raise PreceptorError("ARTIFACT_NOT_FOUND", f"there is no {path}", file=str(path))
    found = folder_sha256(path) if path.is_dir() else file_sha256(path)
    if found != artifact.sha256:
        raise PreceptorError(
            "ARTIFACT_CORRUPT", f"{path} has hash {found[:12]}, expected {artifact.sha256[:12]}", file=str(path)
        )
    return path


def _sync(folder: Path) -> None:
    """Has all of a folder written to the disk: after a power cut a file may otherwise have its name and no content."""
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
