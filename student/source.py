"""Where a student comes from: checked, described and pinned to the byte, without loading it (no torch).

A source is a folder that workers can read, or the id of a model on the hub. Pinning turns it into source + commit; the
commit of a folder is the hash of its files, that of a hub model its revision. ``fetch`` gives a worker the files of a
pinned student and refuses to if they are not the pinned ones.

Promise: no pickle is ever opened and no code that comes with a model is ever run.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.artifacts import folder_sha256
from preceptor.errors import PreceptorError
from preceptor.storage import storage_error

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What a worker needs of a hub repository; above all not its pickles and not its code.
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
              "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template*"]  # fmt: skip
# A header beyond this is no header: the format's own limit is 100 MB.
_MAX_HEADER = 100_000_000
_HUB_SECONDS = 20.0
# A context beyond this is no number of tokens but a way to say "no limit", which no model has.
_MAX_CONTEXT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """A checked and pinned source."""

    source: str  # absolute folder, or hub id
    commit: str
    architecture: str
    parameters: int  # as stored: tied weights count once
    context_tokens: int


def is_folder(source: str) -> bool:
    """Whether a source is meant as a folder: it is one, or it could be no hub id."""
    if not _HUB_ID.fullmatch(source):
        return True
    try:
        return Path(source).is_dir()
    except OSError:  # a name too long
        return False


def inspect(source: str, revision: str = "") -> SourceFacts:
    """Checks a source and pins it.

    Raises PreceptorError(BAD_STUDENT_SOURCE, UNSAFE_CHECKPOINT) naming the file, MODEL_UNREACHABLE.
    """
    if not source.strip():
        raise PreceptorError("INVALID_REQUEST", "a student needs a source", field="source")
    if not is_folder(source):
        return _inspect_hub(source, revision)
    if revision:
        raise PreceptorError("INVALID_REQUEST", "a folder has no revisions", field="revision")
    try:
        return _inspect_folder(Path(source).expanduser().resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, nobody's home, a link to itself, a NUL
        raise PreceptorError("BAD_STUDENT_SOURCE", f"the folder cannot be read: {error}", file=source) from None


def fetch(source: str, commit: str) -> Path:
    """The folder with the files of a pinned student, verified.

    Raises PreceptorError(BAD_STUDENT_SOURCE, STUDENT_CHANGED, MODEL_UNREACHABLE, DISK_FULL).
    """
    if is_folder(source):
        folder = Path(source)
        try:
            there = (folder / "config.json").is_file()  # "/" is not walked through to find that it is none
        except (OSError, ValueError):  # a name too long, a NUL
            there = False
        if not there:
            raise _bad(folder, "there is no such folder on this machine, or no config.json in it")
        if (found := folder_sha256(folder)) != commit:
            message = f"the files have hash {found[:12]}, registered was {commit[:12]}"
            raise PreceptorError("STUDENT_CHANGED", message, file=str(folder))
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its HTTP library's, whichever that is

    try:
        return Path(snapshot_download(source, revision=commit, allow_patterns=_HUB_FILES, etag_timeout=_HUB_SECONDS))
    except (HTTPError, OSError, ValueError) as error:
        if (full := storage_error(error)) is not None:  # of the hub's cache
            raise full from error
        raise PreceptorError("MODEL_UNREACHABLE", f"{source} at {commit[:12]} cannot be had: {error}") from error


def _inspect_folder(folder: Path) -> SourceFacts:
    if not folder.is_dir():
        raise _bad(folder, "there is no such folder, and the name is no hub id")
    architecture, context = _read_config(folder / "config.json")  # first: "/" has none, and is not walked through
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _PICKLES:
            raise PreceptorError("UNSAFE_CHECKPOINT", f"{path.name} is a pickle checkpoint", file=str(path))
    _check_tokenizer(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise _bad(folder, "there are no weights (*.safetensors)")
    _check_shards(folder)
    parameters = sum(_parameters(path) for path in weights)
    return SourceFacts(str(folder), folder_sha256(folder), architecture, parameters, context)


def _read_config(path: Path) -> tuple[str, int]:
    config = _read_json(path)
    architectures = config.get("architectures")
    first = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if not first.endswith("ForCausalLM"):
        raise _bad(path, f"architectures is {architectures}; a student is a causal language model (...ForCausalLM)")
    if "auto_map" in config:
        raise PreceptorError("UNSAFE_CHECKPOINT", "the model wants to run code of its own (auto_map)", file=str(path))
    context = config.get("max_position_embeddings")
    if not isinstance(context, int) or not 1 <= context <= _MAX_CONTEXT:
        raise _bad(path, "max_position_embeddings is missing, so the context's length is not known")
    return first, context


def _check_tokenizer(folder: Path) -> None:
    _read_json(folder / "tokenizer.json")
    named = [_read_json(path) for name in ("tokenizer_config.json", "special_tokens_map.json")
             if (path := folder / name).exists()]  # fmt: skip
    if not any(settings.get("eos_token") for settings in named):
        raise _bad(folder / "tokenizer_config.json", "eos_token is missing; study documents are closed by it")


def _check_shards(folder: Path) -> None:
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = _read_json(index).get("weight_map", {})
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise _bad(index, "weight_map is no object that names a file for each weight")
        for shard in sorted(set(shards.values())):
            if not (folder / shard).is_file():
                raise _bad(folder / shard, f"the file is missing; {index.name} names it")


def _parameters(path: Path) -> int:
    """Number of values in a safetensors file, from its header; also checks that the file is whole."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _MAX_HEADER):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        end = max((entry["data_offsets"][1] for entry in tensors), default=0)
        if size != 8 + length + end:
            raise ValueError(f"the file has {size} bytes, its header speaks of {8 + length + end}")
        parameters = sum(math.prod(entry["shape"]) for entry in tensors)
        if not isinstance(parameters, int) or not 0 <= parameters <= 8 * size:
            raise ValueError(f"its header speaks of {parameters} values in {size} bytes")
        return parameters
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad(path, f"is no whole safetensors file: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _bad(path, f"{path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise _bad(path, f"{path.name} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise _bad(path, f"{path.name} holds no JSON object")
    return value


def _inspect_hub(source: str, revision: str) -> SourceFacts:
    # here, because few students come from the hub and importing its client takes as long as all the rest
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of its HTTP library
        EntryNotFoundError,
        GatedRepoError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(source, revision=revision or None, timeout=_HUB_SECONDS)
        commit = str(info.sha)
        files = {sibling.rfilename for sibling in info.siblings or ()}
        if not any(name.endswith(".safetensors") and "/" not in name for name in files):
            reason = "UNSAFE_CHECKPOINT" if any(Path(n).suffix in _PICKLES for n in files) else "BAD_STUDENT_SOURCE"
            raise PreceptorError(reason, f"{source} has no weights in safetensors", file=source)
        if "tokenizer.json" not in files:
            raise PreceptorError("BAD_STUDENT_SOURCE", "tokenizer.json is missing", file=source)
        config = hf_hub_download(source, "config.json", revision=commit, etag_timeout=_HUB_SECONDS)
        architecture, context = _read_config(Path(config))
        parameters = int(info.safetensors.total) if info.safetensors else 0
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, GatedRepoError) as error:
        at = f" at {revision}" if revision else ""
        message = f"there is no folder {source}, and the hub gives no model {source}{at}: {_first_line(error)}"
        raise PreceptorError("BAD_STUDENT_SOURCE", message, file=source) from None
    except (HTTPError, OSError, ValueError) as error:
        message = f"there is no folder {source}, and the hub could not be asked for it: {_first_line(error)}"
        raise PreceptorError("MODEL_UNREACHABLE", message, file=source) from None
    return SourceFacts(source, commit, architecture, parameters, context)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _bad(path: Path, message: str) -> PreceptorError:
    return PreceptorError("BAD_STUDENT_SOURCE", message, file=str(path))
