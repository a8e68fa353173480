"""The files of a student that lie in a folder or in a bucket, as far as it takes to check and pin them.

Of a bucket little is fetched: the small files, the headers of the weights, and the hash out of the manifest; where
there is no manifest, everything is read once to know it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from preceptor.errors import PreceptorError
from preceptor.hashes import folder_sha256

if TYPE_CHECKING:
    from preceptor.artifacts_s3 import S3Folder


class SourceFiles(Protocol):
    """Files by their names below the source, with ``/``."""

    source: str

    def place(self, name: str) -> str:
        """Where a file lies, for messages."""

    def sizes(self) -> dict[str, int]:
        """Every file and its bytes."""

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes of a file. Raises FileNotFoundError, OSError."""

    def commit(self) -> str:
        """The hash of all of it (``preceptor.hashes.folder_sha256``)."""


class FolderFiles:
    """A folder that workers can read."""

    def __init__(self, folder: Path) -> None:
        self.source = str(folder)
        self._folder = folder

    def place(self, name: str) -> str:
        """See SourceFiles."""
        return str(self._folder / name)

    def sizes(self) -> dict[str, int]:
        """See SourceFiles."""
        found = (path for path in sorted(self._folder.rglob("*")) if path.is_file())
        return {path.relative_to(self._folder).as_posix(): path.stat().st_size for path in found}

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """See SourceFiles."""
        with (self._folder / name).open("rb") as file:
            file.seek(start)
            return file.read() if end is None else file.read(end - start)

    def commit(self) -> str:
        """See SourceFiles."""
        return folder_sha256(self._folder)


class BucketFiles:
    """What lies at ``s3://bucket/prefix``. What the store says passes as it is (``preceptor.artifacts_s3``)."""

    def __init__(self, folder: S3Folder) -> None:
        self.source = folder.url
        self._folder = folder
        self._sizes: dict[str, int] | None = None

    def place(self, name: str) -> str:
        """See SourceFiles."""
        return f"{self.source}/{name}"

    def sizes(self) -> dict[str, int]:
        """See SourceFiles."""
        if self._sizes is None:
            self._sizes = {name: size for name, (size, _) in self._folder.files().items()}
        return self._sizes

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """See SourceFiles."""
        if (size := self.sizes().get(name)) is None:
            raise FileNotFoundError(self.place(name))
        end = size if end is None else min(end, size)
        return self._folder.read(name, start, end) if start < end else b""

    def commit(self) -> str:
        """See SourceFiles. Raises BAD_STUDENT_SOURCE where a file that the manifest names is not there."""
        from preceptor.artifacts_s3 import read_manifest

        text = self._folder.content_manifest()
        if missing := sorted(read_manifest(text).keys() - self.sizes().keys()):
            raise PreceptorError(
                "BAD_STUDENT_SOURCE", "the file is missing; the manifest names it", file=self.place(missing[0])
            )
        return hashlib.sha256(text.encode()).hexdigest()
