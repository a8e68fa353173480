"""Weights travel as ``Artifact{uri, sha256}``, never as bytes. This is the store of such files and folders.

Only ``file://`` is served today: a folder that all services share. A folder's hash is the SHA-256 of its manifest
(one line ``sha256  relative/path`` per file, sorted), so it is the same wherever the folder lies.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlparse

from preceptor.errors import PreceptorError
from preceptor.storage import storage_error
from preceptor.v1 import types_pb2 as types

# How the names begin of what is being written, and of what was damaged and is being replaced.
_LEFTOVERS = (".draft-", ".damaged-")


def file_sha256(path: Path) -> str:
    """Lower-case hex SHA-256 of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """The hash of a folder's manifest. Hidden files (names that begin with a dot) and caches do not count."""
    lines = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        parts = path.relative_to(folder).parts
        if not any(part.startswith(".") or part == "__pycache__" for part in parts):
            lines.append(f"{file_sha256(path)}  {'/'.join(parts)}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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


class ArtifactStore:
    """Folders of files under one root, each written whole or not at all."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def write_folder(self, name: str, write: Callable[[Path], None]) -> types.Artifact:
        """Calls ``write`` on an empty folder, then publishes the folder as ``name``. It is on the disk, not only on its
        way there, before it has its name.

        A name stands for one content: a folder of this name is kept if it is the same, and gives way if it is not, for
        then it is damaged. Raises DISK_FULL, DATABASE_UNREACHABLE (the disk cannot be written).
        """
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
                draft.replace(final)
                _sync_folder(self._root)
        except Exception as error:
            if (known := storage_error(error, final)) is not None:
                raise known from error
            raise
        finally:
            for folder in (draft, damaged):
                shutil.rmtree(folder, ignore_errors=True)
        return types.Artifact(uri=final.resolve().as_uri(), sha256=sha256)

    def remove_leftovers(self) -> None:
        """Removes what a process left that was killed while it wrote. To be called while nobody writes."""
        for kind in _LEFTOVERS:
            for folder in self._root.glob(f"{kind}*"):
                shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def local_path(artifact: types.Artifact) -> Path:
        """Where the artifact lies, verified. Raises ARTIFACT_NOT_FOUND, ARTIFACT_CORRUPT."""
        parts = urlparse(artifact.uri)
        if parts.scheme != "file":
            raise PreceptorError("ARTIFACT_NOT_FOUND", f"no store for {artifact.uri!r}; only file:// is served")
        path = Path(unquote(parts.path))
        if not path.exists():
            raise PreceptorError("ARTIFACT_NOT_FOUND", f"there is no {path}", file=str(path))
        found = folder_sha256(path) if path.is_dir() else file_sha256(path)
        if found != artifact.sha256:
            raise PreceptorError(
                "ARTIFACT_CORRUPT", f"{path} has hash {found[:12]}, expected {artifact.sha256[:12]}", file=str(path)
            )
        return path
