"""Artifacts in a bucket of an S3-compatible store, through fsspec's ``s3fs`` (the extra ``s3``).

An artifact is the objects under one prefix and, published last, ``.preceptor-manifest`` among them, whose SHA-256 is
the artifact's: without it there is no artifact, whatever else lies there. Every file is verified against it on its way
into the cache. (A bucket knows no renaming; writing one object is all or nothing.) A folder that was copied into a
bucket by other means (``aws s3 cp --recursive``) has no manifest and the same hash; it can be read, at the price of
reading all of it to know its hash.

Endpoint and keys are those of AWS's own variables and files (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...). Every call has
a deadline and is tried again some times; what remains is ARTIFACT_STORE_UNREACHABLE or ARTIFACT_STORE_REFUSED.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preceptor.artifact_cache import ArtifactCache
from preceptor.artifacts import ArtifactStore, Stored, verified_folder
from preceptor.errors import PreceptorError
from preceptor.hashes import counts, folder_manifest, manifest
from preceptor.storage import storage_error
from preceptor.v1 import types_pb2 as types

log = logging.getLogger(__name__)

MANIFEST = ".preceptor-manifest"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")

# A server that is there accepts within milliseconds and says something within seconds; a packet may be lost.
_CONNECT_SECONDS, _READ_SECONDS = 5, 30
# Of one request, by botocore (refused connections, time-outs, 5xx, throttling), and again by s3fs where an answer
# breaks off in its middle.
_TRIES, _TRIES_AGAIN = 3, 2
# What is read by one request; what breaks off is read again. Some of them at a time, for a single connection seldom
# fills a network.
_CHUNK_BYTES = 16 * 2**20
_AT_ONCE = 4
# What has no manifest after so long never gets one: its writer was killed.
_ABANDONED_SECONDS = 3600.0

_MISSING_CODES = {"NoSuchKey", "404"}
_AWAY_CODES = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted"}


class S3Folder:
    """What lies under one prefix of a bucket, file by file."""

    def __init__(self, url: str, system: Any = None) -> None:
        """``system``: fsspec's, where there is one already: it holds the connections."""
        bucket, _, prefix = url.removeprefix("s3://").rstrip("/").partition("/")
        if not url.startswith("s3://") or not bucket or "@" in bucket:
            raise PreceptorError("INVALID_REQUEST", f"{url!r} is no s3://bucket/prefix")
        self.url = url.rstrip("/")
        self.bucket = bucket
        self._root = f"{bucket}/{prefix}".rstrip("/")
        self._fs = system or _file_system()

    def below(self, name: str) -> S3Folder:
        """A folder of this one."""
        return S3Folder(f"{self.url}/{name}", self._fs)

    def files(self) -> dict[str, tuple[int, float]]:
        """Size and age in seconds of every object below, by its relative path. Empty where there is none."""
        with _translated(self.url):
            found = self._fs.find(self._root, detail=True)
        now, start = time.time(), f"{self._root}/"
        return {
            path.removeprefix(start): (int(entry["size"]), max(0.0, now - entry["LastModified"].timestamp()))
            for path, entry in found.items()
            if path.startswith(start) and entry["type"] == "file"
        }

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes of a file. Raises ARTIFACT_NOT_FOUND."""
        with _translated(f"{self.url}/{name}"):
            # one request, also for the whole: with several, s3fs would ask for the size first
            limits = {"start": start, "end": end} if end is not None else {"max_concurrency": 1}
            data: bytes = self._fs.cat_file(f"{self._root}/{name}", **limits)
            return data

    def manifest(self) -> str | None:
        """The manifest, where there is one."""
        try:
            return self.read(MANIFEST).decode(errors="replace")
        except PreceptorError as error:
            if error.reason == "ARTIFACT_NOT_FOUND":
                return None
            raise

    def sha256(self, name: str, size: int, write: Callable[[bytes], object] = lambda _data: None) -> str:
        """The hash of a file of this size, read in chunks, which ``write`` is given in order."""
        digest = hashlib.sha256()
        starts = iter(range(0, size, _CHUNK_BYTES))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            under_way: deque[Future[bytes]] = deque()
            try:
                while True:
                    while len(under_way) < _AT_ONCE and (start := next(starts, None)) is not None:
                        end = min(start + _CHUNK_BYTES, size)
                        under_way.append(pool.submit(self.read, name, start, end))
                    if not under_way:
                        return digest.hexdigest()
                    data = under_way.popleft().result()
                    digest.update(data)
                    write(data)
            finally:
                for future in under_way:
                    future.cancel()

    def verify(self) -> str:
        """The hash of what lies here, every file read. Raises ARTIFACT_NOT_FOUND, and ARTIFACT_CORRUPT where a file is
        not what the manifest says."""
        expected, sizes = self._content(self.manifest())
        return _hash(manifest({name: self._verified(name, sizes[name], expected[name]) for name in expected}))

    def content_manifest(self) -> str:
        """The manifest, or where there is none what it would be: then every file is read."""
        if (written := self.manifest()) is not None:
            return written
        files = {name: size for name, (size, _) in self.files().items() if counts(name)}
        return manifest({name: self.sha256(name, size) for name, size in files.items()})

    def download(self, to: Path, sha256: str, room: Callable[[int], None]) -> None:
        """Fetches the content that has this hash, each file verified where there is a manifest.

        Raises ARTIFACT_NOT_FOUND, ARTIFACT_CORRUPT.
        """
        written = self.manifest()
        if written is not None and (found := _hash(written)) != sha256:
            raise PreceptorError(
                "ARTIFACT_CORRUPT", f"the manifest has hash {found[:12]}, expected {sha256[:12]}", file=self.url
            )
        expected, sizes = self._content(written)
        room(sum(sizes[name] for name in expected))
        for name in expected:
            path = to / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                self._verified(name, sizes[name], expected[name], file.write)

    def upload(self, folder: Path) -> types.Artifact:
        """Publishes a folder's content here: the manifest comes last. What lay here before and differs gives way."""
        text = folder_manifest(folder)
        if self.manifest() not in (None, text):
            self.remove([MANIFEST])  # it is no artifact while its files are being replaced
        before = self.files()
        hashes = read_manifest(text)
        for name in hashes:
            with _translated(f"{self.url}/{name}"):
                self._fs.put_file(str(folder / name), f"{self._root}/{name}")
        with _translated(self.url):
            self._fs.pipe_file(f"{self._root}/{MANIFEST}", text.encode())
        self.remove([name for name in before if counts(name) and name not in hashes])
        return types.Artifact(uri=self.url, sha256=_hash(text))

    def remove(self, names: list[str]) -> None:
        """Removes these files; what is gone already is no error."""
        with _translated(self.url):
            for start in range(0, len(names), 1000):  # what one request may name
                named = [{"Key": self._key(name)} for name in names[start : start + 1000]]
                answer = self._fs.call_s3("delete_objects", Bucket=self.bucket, Delete={"Objects": named})
                for refused in answer.get("Errors", ()):
                    raise PermissionError(f"{refused.get('Key')}: {refused.get('Code')}")

    def remove_all(self) -> None:
        """Removes everything below, the manifest first: killed meanwhile, what is left is no artifact."""
        names = sorted(self.files(), key=lambda name: name != MANIFEST)
        if names and names[0] == MANIFEST:
            self.remove(names[:1])
            names = names[1:]
        self.remove(names)

    def abort_uploads(self, older_than_seconds: float) -> None:
        """Ends uploads in parts that a killed process left: they are not seen, and are paid for."""
        with _translated(self.url):
            answer = self._fs.call_s3("list_multipart_uploads", Bucket=self.bucket, Prefix=self._key(""))
            for upload in answer.get("Uploads", ()):
                if time.time() - upload["Initiated"].timestamp() > older_than_seconds:
                    which = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                    self._fs.call_s3("abort_multipart_upload", Bucket=self.bucket, **which)

    def _content(self, written: str | None) -> tuple[dict[str, str], dict[str, int]]:
        """The files that count, each with its hash by the manifest (empty where there is none); the sizes of all."""
        sizes = {name: size for name, (size, _) in self.files().items()}
        expected = read_manifest(written) if written is not None else {name: "" for name in sizes if counts(name)}
        if not expected:
            raise PreceptorError("ARTIFACT_NOT_FOUND", "nothing lies there", file=self.url)
        if missing := sorted(expected.keys() - sizes.keys()):
            raise PreceptorError("ARTIFACT_CORRUPT", "the file is missing", file=f"{self.url}/{missing[0]}")
        return expected, sizes

    def _verified(
        self, name: str, size: int, expected: str, write: Callable[[bytes], object] = lambda _data: None
    ) -> str:
        found = self.sha256(name, size, write)
        if expected and found != expected:
            message = f"the file has hash {found[:12]}, expected {expected[:12]}"
            raise PreceptorError("ARTIFACT_CORRUPT", message, file=f"{self.url}/{name}")
        return found

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}".partition("/")[2]


class S3Store(ArtifactStore):
    """Artifacts under ``s3://bucket/prefix/NAME``. ``cache`` holds what is read."""

    def __init__(self, url: str, cache: ArtifactCache) -> None:
        self._root = S3Folder(url)
        self._cache = cache

    def write_folder(self, name: str, write: Callable[[Path], None]) -> types.Artifact:
        """See ArtifactStore."""
        try:
            with self._cache.draft() as draft:
                write(draft)
                artifact = self._root.below(name).upload(draft)
                self._cache.add(draft, artifact.sha256)
                return artifact
        except Exception as error:
            if (known := storage_error(error)) is not None:
                raise known from error
            raise

    def local_path(self, artifact: types.Artifact) -> Path:
        """See ArtifactStore. Also what was written to a disk, before there was a bucket."""
        if not artifact.uri.startswith("s3://"):
            return verified_folder(artifact)
        return fetch(artifact, self._cache)

    def list(self) -> list[Stored]:
        """See ArtifactStore."""
        found: defaultdict[str, list[tuple[str, int, float]]] = defaultdict(list)
        for path, (size, age) in self._root.files().items():
            name, _, rest = path.partition("/")
            found[name].append((rest, size, age))
        return [
            Stored(
                name,
                bytes=sum(size for _, size, _ in files),
                age_seconds=min(age for _, _, age in files),
                whole=any(rest == MANIFEST for rest, _, _ in files),
            )
            for name, files in sorted(found.items())
        ]

    def remove(self, name: str) -> None:
        """See ArtifactStore."""
        self._root.below(name).remove_all()

    def remove_leftovers(self) -> None:
        """See ArtifactStore. Only what is older than an hour: another house may write to the same bucket."""
        for stored in self.list():
            if not stored.whole and stored.age_seconds > _ABANDONED_SECONDS:
                self.remove(stored.name)
        self._root.abort_uploads(_ABANDONED_SECONDS)


def fetch(artifact: types.Artifact, cache: ArtifactCache) -> Path:
    """A copy of an artifact at ``s3://...`` on this machine, verified.

    Raises ARTIFACT_NOT_FOUND, ARTIFACT_CORRUPT, ARTIFACT_STORE_UNREACHABLE, ARTIFACT_STORE_REFUSED, DISK_FULL.
    """
    try:
        return cache.get(
            artifact.sha256, lambda draft, room: S3Folder(artifact.uri).download(draft, artifact.sha256, room)
        )
    except PreceptorError as error:
        if error.reason == "ARTIFACT_CORRUPT" and "file" not in error.metadata:
            raise PreceptorError("ARTIFACT_CORRUPT", error.message, file=artifact.uri) from None
        raise


def read_manifest(text: str) -> dict[str, str]:
    """The hash of each file that a manifest names. Raises ARTIFACT_CORRUPT."""
    hashes = {}
    for line in text.removesuffix("\n").split("\n"):
        found = _LINE.fullmatch(line)
        if found is None or not counts(found[2]):
            raise PreceptorError("ARTIFACT_CORRUPT", f"the manifest has a line that is none: {line[:80]!r}")
        hashes[found[2]] = found[1]
    return hashes


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _file_system() -> Any:
    try:
        import s3fs
    except ImportError as error:
        raise PreceptorError("EXTRA_MISSING", f"s3:// needs the extra `s3`, which is not installed ({error})") from None
    system = s3fs.S3FileSystem(
        endpoint_url=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None,
        config_kwargs={
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
            "retries": {"mode": "standard", "total_max_attempts": _TRIES},
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    system.retries = _TRIES_AGAIN
    return system


@contextmanager
def _translated(url: str) -> Iterator[None]:
    try:
        yield
    except PreceptorError:
        raise
    except Exception as error:
        raise _in_our_words(error, url) from error


def _in_our_words(error: Exception, url: str) -> Exception:
    """What went wrong with a bucket, in the catalogue's words; the error itself where it has nothing to do with one."""
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    from botocore.exceptions import ConnectionError as NoConnection

    cause = error if isinstance(error, ClientError) else error.__cause__
    if isinstance(cause, ClientError):
        code = str(cause.response.get("Error", {}).get("Code", ""))
        status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        said = f"{code}: {cause.response.get('Error', {}).get('Message', '')}"[:300]
        if code in _MISSING_CODES:
            return PreceptorError("ARTIFACT_NOT_FOUND", "nothing lies there", file=url)
        if code == "InvalidRange":
            return PreceptorError("ARTIFACT_CORRUPT", "the file was changed while it was read", file=url)
        if code in _AWAY_CODES or status in (408, 429) or status >= 500:
            return PreceptorError("ARTIFACT_STORE_UNREACHABLE", f"the store cannot serve it now ({said})", file=url)
        return PreceptorError("ARTIFACT_STORE_REFUSED", f"the store refuses it ({said})", file=url)
    if isinstance(error, PermissionError):
        return PreceptorError("ARTIFACT_STORE_REFUSED", f"the store refuses it ({_line(error)})", file=url)
    if isinstance(error, FileNotFoundError):
        return PreceptorError("ARTIFACT_NOT_FOUND", "nothing lies there", file=url)
    if (known := storage_error(error)) is not None:  # of a file that was to be sent
        return known
    if isinstance(error, HTTPClientError | NoConnection | TimeoutError | ConnectionError) or _is_of_network(error):
        return PreceptorError("ARTIFACT_STORE_UNREACHABLE", f"the store does not answer: {_line(error)}", file=url)
    if isinstance(error, BotoCoreError | ValueError):  # no keys, no region, no such profile, a name that is none
        return PreceptorError("ARTIFACT_STORE_REFUSED", _line(error), file=url)
    return error


def _is_of_network(error: Exception) -> bool:
    import aiohttp
    from fsspec.exceptions import FSTimeoutError

    return isinstance(error, aiohttp.ClientError | FSTimeoutError)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
