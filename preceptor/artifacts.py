"""Weights travel as ``Artifact{uri, sha256}``, never as bytes. This is the store of such files and folders.

Only ``file://`` is served today: a folder that all services share. A folder's hash is the SHA-256 of its manifest
(one line ``sha256  relative/path`` per file, sorted), so it is the same wherever the folder lies.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlparse

from preceptor.errors import PreceptorError
from preceptor.v1 import types_pb2 as types


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


class ArtifactStore:
    """Folders of files under one root, each written whole or not at all."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def write_folder(self, name: str, write: Callable[[Path], None]) -> types.Artifact:
        """Calls ``write`` on an empty folder, then publishes the folder as ``name`` (an id; the same name means the
        same content, so an existing one is kept)."""
        final = self._root / name
        if not final.exists():
            draft = self._root / f".draft-{name}-{uuid.uuid4().hex}"
            draft.mkdir(parents=True)
            try:
                write(draft)
                draft.replace(final)
            except OSError:
                if not final.exists():  # else another process published the same content first
                    raise
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        return types.Artifact(uri=final.resolve().as_uri(), sha256=folder_sha256(final))

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
