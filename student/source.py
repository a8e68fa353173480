"""Where a student comes from: checked, described and pinned to the byte, without loading it (no torch).

A source is a folder that workers can read (a path or ``file://``), ``s3://bucket/prefix``, or the id of a model on the
hub. Pinning turns it into source + commit; the commit of a folder or prefix is the hash of its files, that of a hub
model its revision. ``fetch`` gives a worker the files of a pinned student, and refuses to if they are other ones.

Promise: no pickle is ever opened and no code that comes with a model is ever run.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.artifact_cache import ArtifactCache
from preceptor.artifacts import local_folder
from preceptor.errors import PreceptorError
from preceptor.hashes import folder_sha256
from preceptor.storage import storage_error
from preceptor.v1 import types_pb2 as types
from student.source_files import BucketFiles, FolderFiles, SourceFiles

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What a worker needs of a hub repository; above all not its pickles and not its code.
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
              "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template*"]  # fmt: skip
_S3 = "s3://"
# A header beyond this is no header: the format's own limit is 100 MB. No tokenizer has more either.
_MAX_HEADER = 100_000_000
_HUB_SECONDS = 20.0
# A context beyond this is no number of tokens but a way to say "no limit", which no model has.
_MAX_CONTEXT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """A checked and pinned source."""

    source: str  # absolute folder, s3://... or hub id
    commit: str
    architecture: str
    parameters: int  # as stored: tied weights count once
    context_tokens: int


def is_folder(source: str) -> bool:
    """Whether a source is meant as a folder of this machine: it is one, or it could be nothing else."""
    if source.startswith(_S3):
        return False
    if not _HUB_ID.fullmatch(source):
        return True
    try:
        return Path(source).is_dir()
    except OSError:  # a name too long
        return False


def inspect(source: str, revision: str = "") -> SourceFacts:
    """Checks a source and pins it.

    Raises PreceptorError(BAD_STUDENT_SOURCE, UNSAFE_CHECKPOINT) naming the file, MODEL_UNREACHABLE (the hub),
    ARTIFACT_STORE_UNREACHABLE, ARTIFACT_STORE_REFUSED, EXTRA_MISSING (a bucket).
    """
    if not source.strip():
        raise PreceptorError("INVALID_REQUEST", "a student needs a source", field="source")
    if source.startswith(_S3):
        _no_revision(revision, "a bucket's prefix")
        return _inspect_bucket(source)
    if not is_folder(source):
        return _inspect_hub(source, revision)
    _no_revision(revision, "a folder")
    try:
        folder = local_folder(source).expanduser().resolve()
        if not folder.is_dir():
            raise _bad(str(folder), "there is no such folder, and the name is no hub id")
        return _inspect_files(FolderFiles(folder))
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, nobody's home, a link to itself, a NUL
        raise PreceptorError("BAD_STUDENT_SOURCE", f"the folder cannot be read: {error}", file=source) from None


def fetch(source: str, commit: str, copies: ArtifactCache | None = None) -> Path:
    """The folder with the files of a pinned student, verified. ``copies``: where what lies in a bucket is copied to.

    Raises PreceptorError(BAD_STUDENT_SOURCE, STUDENT_CHANGED, DISK_FULL), MODEL_UNREACHABLE (the hub),
    ARTIFACT_STORE_UNREACHABLE, ARTIFACT_STORE_REFUSED, EXTRA_MISSING (a bucket).
    """
    if source.startswith(_S3):
        return _fetch_from_bucket(source, commit, copies)
    if is_folder(source):
        folder = Path(source)
        try:
            there = (folder / "config.json").is_file()  # "/" is not walked through to find that it is none
        except (OSError, ValueError):  # a name too long, a NUL
            there = False
        if not there:
            raise _bad(str(folder), "there is no such folder on this machine, or no config.json in it")
        if (found := folder_sha256(folder)) != commit:
            message = f"the files have hash {found[:12]}, registered was {commit[:12]}"
            raise PreceptorError("STUDENT_CHANGED", message, file=str(folder))
        return folder
    from huggingface_hub import snapshot_download

    with _hub_said(source, commit):
        return Path(snapshot_download(source, revision=commit, allow_patterns=_HUB_FILES, etag_timeout=_HUB_SECONDS))


def _fetch_from_bucket(source: str, commit: str, copies: ArtifactCache | None) -> Path:
    if copies is None:
        raise _bad(source, "this process has no place for copies of what lies in a bucket")
    from preceptor import artifacts_s3

    try:
        return artifacts_s3.fetch(types.Artifact(uri=source, sha256=commit), copies)
    except PreceptorError as error:
        if error.reason == "ARTIFACT_NOT_FOUND":
            raise _bad(source, "nothing lies there any more") from None
        if error.reason == "ARTIFACT_CORRUPT":
            file = error.metadata.get("file", source)
            raise PreceptorError("STUDENT_CHANGED", f"{error.message} (it was registered)", file=file) from None
        raise


def _inspect_bucket(source: str) -> SourceFacts:
    from preceptor.artifacts_s3 import S3Folder

    try:
        return _inspect_files(BucketFiles(S3Folder(source)))
    except PreceptorError as error:
        if error.reason in ("ARTIFACT_NOT_FOUND", "ARTIFACT_CORRUPT", "INVALID_REQUEST"):
            file = error.metadata.get("file", source)
            raise PreceptorError("BAD_STUDENT_SOURCE", error.message, file=file) from None
        raise


def _no_revision(revision: str, of: str) -> None:
    if revision:
        raise PreceptorError("INVALID_REQUEST", f"{of} has no revisions", field="revision")


def _inspect_files(files: SourceFiles) -> SourceFacts:
    architecture, context = _read_config(files, "config.json")  # first: "/" has none, and is not walked through
    sizes = files.sizes()
    for name in sorted(sizes):
        if Path(name).suffix.lower() in _PICKLES:
            raise PreceptorError(
                "UNSAFE_CHECKPOINT", f"{Path(name).name} is a pickle checkpoint", file=files.place(name)
            )
    _check_tokenizer(files, sizes)
    weights = sorted(name for name in sizes if "/" not in name and name.endswith(".safetensors"))
    if not weights:
        raise _bad(files.source, "there are no weights (*.safetensors)")
    _check_shards(files, sizes)
    parameters = sum(_parameters(files, name, sizes[name]) for name in weights)
    return SourceFacts(files.source, files.commit(), architecture, parameters, context)


def _read_config(files: SourceFiles, name: str) -> tuple[str, int]:
    config, place = _read_json(files, name), files.place(name)
    architectures = config.get("architectures")
    first = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if not first.endswith("ForCausalLM"):
        raise _bad(place, f"architectures is {architectures}; a student is a causal language model (...ForCausalLM)")
    if "auto_map" in config:
        raise PreceptorError("UNSAFE_CHECKPOINT", "the model wants to run code of its own (auto_map)", file=place)
    context = config.get("max_position_embeddings")
    if not isinstance(context, int) or not 1 <= context <= _MAX_CONTEXT:
        raise _bad(place, "max_position_embeddings is missing, so the context's length is not known")
    return first, context


def _check_tokenizer(files: SourceFiles, sizes: Mapping[str, int]) -> None:
    _read_json(files, "tokenizer.json")
    named = [_read_json(files, name) for name in ("tokenizer_config.json", "special_tokens_map.json") if name in sizes]
    if not any(settings.get("eos_token") for settings in named):
        raise _bad(files.place("tokenizer_config.json"), "eos_token is missing; study documents are closed by it")


def _check_shards(files: SourceFiles, sizes: Mapping[str, int]) -> None:
    for index in sorted(name for name in sizes if "/" not in name and name.endswith(".safetensors.index.json")):
        shards = _read_json(files, index).get("weight_map", {})
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise _bad(files.place(index), "weight_map is no object that names a file for each weight")
        for shard in sorted(set(shards.values())):
            if shard not in sizes:
                raise _bad(files.place(shard), f"the file is missing; {index} names it")


def _parameters(files: SourceFiles, name: str, size: int) -> int:
    """Number of values in a safetensors file, from its header; also checks that the file is whole."""
    try:
        (length,) = struct.unpack("<Q", files.read(name, 0, min(8, size)))
        if length > min(size, _MAX_HEADER):
            raise ValueError("the header is longer than the file")
        header = json.loads(files.read(name, 8, 8 + length))
        tensors = [entry for tensor, entry in header.items() if tensor != "__metadata__"]
        end = max((entry["data_offsets"][1] for entry in tensors), default=0)
        if size != 8 + length + end:
            raise ValueError(f"the file has {size} bytes, its header speaks of {8 + length + end}")
        parameters = sum(math.prod(entry["shape"]) for entry in tensors)
        if not isinstance(parameters, int) or not 0 <= parameters <= 8 * size:
            raise ValueError(f"its header speaks of {parameters} values in {size} bytes")
        return parameters
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad(files.place(name), f"is no whole safetensors file: {error}") from None


def _read_json(files: SourceFiles, name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.read(name, 0, _MAX_HEADER).decode())
    except FileNotFoundError:
        raise _bad(files.place(name), f"{name} is missing") from None
    except (OSError, ValueError) as error:
        raise _bad(files.place(name), f"{name} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise _bad(files.place(name), f"{name} holds no JSON object")
    return value


def _inspect_hub(source: str, revision: str) -> SourceFacts:
    # here, because few students come from the hub and importing its client takes as long as all the rest
    from huggingface_hub import HfApi, hf_hub_download

    with _hub_said(source, revision):
        info = HfApi().model_info(source, revision=revision or None, timeout=_HUB_SECONDS)
        commit = str(info.sha)
        files = {sibling.rfilename for sibling in info.siblings or ()}
        if not any(name.endswith(".safetensors") and "/" not in name for name in files):
            reason = "UNSAFE_CHECKPOINT" if any(Path(n).suffix in _PICKLES for n in files) else "BAD_STUDENT_SOURCE"
            raise PreceptorError(reason, f"{source} has no weights in safetensors", file=source)
        if "tokenizer.json" not in files:
            raise PreceptorError("BAD_STUDENT_SOURCE", "tokenizer.json is missing", file=source)
        config = hf_hub_download(source, "config.json", revision=commit, etag_timeout=_HUB_SECONDS)
        architecture, context = _read_config(FolderFiles(Path(config).parent), "config.json")
        parameters = int(info.safetensors.total) if info.safetensors else 0
    return SourceFacts(source, commit, architecture, parameters, context)


@contextmanager
def _hub_said(source: str, revision: str) -> Iterator[None]:
    """What the hub's client raises, in the catalogue's words: BAD_STUDENT_SOURCE for what the hub does not have or not
    give, MODEL_UNREACHABLE where it cannot be asked, DISK_FULL of its cache."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of its HTTP library
        EntryNotFoundError,
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"{source} at {revision[:12]}" if revision else source
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        if (known := storage_error(error)) is not None:
            raise known from error
        # not in the cache, and the hub away: also an EntryNotFoundError
        refused = (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, GatedRepoError)
        if isinstance(error, refused) and not isinstance(error, LocalEntryNotFoundError):
            message = f"there is no folder {source}, and the hub gives no model {at}: {_first_line(error)}"
            raise PreceptorError("BAD_STUDENT_SOURCE", message, file=source) from None
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT}: {_first_line(error)}"
        message = f"there is no folder {source}, and the hub could not be asked for {at} ({why})"
        raise PreceptorError("MODEL_UNREACHABLE", message, file=source) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _bad(place: str, message: str) -> PreceptorError:
    return PreceptorError("BAD_STUDENT_SOURCE", message, file=place)
