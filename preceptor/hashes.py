"""Content hashes of files and folders."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Lower-case hex SHA-256 of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def counts(relative: str) -> bool:
    """Whether a file (its path with ``/``) is part of a folder's content: not what is hidden (a name that begins with a
    dot), no caches, and nothing that would lead out of the folder (``..``, ``/etc``), as a key in a bucket may."""
    return not any(part.startswith(".") or part in ("", "__pycache__") for part in relative.split("/"))


def manifest(hashes: Mapping[str, str]) -> str:
    """One line ``sha256  relative/path`` per file, sorted by the parts of the paths."""
    return "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes, key=lambda name: name.split("/")))


def folder_manifest(folder: Path) -> str:
    """The manifest of a folder's content."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return manifest({name: file_sha256(path) for name, path in files.items() if counts(name)})


def folder_sha256(folder: Path) -> str:
    """The hash of a folder's manifest."""
    return hashlib.sha256(folder_manifest(folder).encode()).hexdigest()
