"""What a trial has learnt, as an artifact: an adapter in PEFT's format, or after a full fine-tune a whole student.

Promises
- An edit is published whole or not at all, and its name stands for its content: a batch that is trained twice to the
  same values leaves one artifact, and one that came out otherwise leaves two, so nobody's hash is ever broken.
- Beside the weights lies ``preceptor_edit.json``: the student that was trained and the edits that it stood on. An edit
  is merged into the weights of that student alone.
- All weights of a full fine-tune are a folder that transformers, vLLM and the student service take as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from preceptor.artifact_cache import ArtifactCache
from preceptor.artifacts import EDITS, ArtifactStore, artifact_store, local_folder, verified_folder
from preceptor.errors import PreceptorError
from preceptor.names import canonical_json
from preceptor.v1 import types_pb2 as types
from student.base import LoadedBase
from student.lora_bank import LoraBank
from student.peft_format import CONFIG_FILE, export_adapter

PROVENANCE_FILE = "preceptor_edit.json"
_NAME_DIGITS = 32

Kind = Literal["adapter", "weights"]


class KeptEdits:
    """Where a worker puts what was learnt. Nothing of a bucket is touched before there is something to keep."""

    def __init__(self, url: str, cache: ArtifactCache) -> None:
        """``url``: PRECEPTOR_ARTIFACTS_URL or its default; ``cache``: copies of what lies in a bucket."""
        self._url, self._cache = url, cache

    @cached_property
    def _store(self) -> ArtifactStore:
        return artifact_store(f"{self._url}/{EDITS}", self._cache)

    def adapter(self, base: LoadedBase, bank: LoraBank, slot: int) -> types.Artifact:
        """Publishes an adapter of ``bank``, a bank over ``base``.

        Raises PreceptorError: DISK_FULL, ARTIFACT_STORE_REFUSED, ARTIFACT_STORE_UNREACHABLE, EXTRA_MISSING (a bucket).
        """
        factors = bank.factors(slot)
        tensors = [(f"{name}.{half}", one) for name, (a, b) in factors.items() for half, one in (("A", a), ("B", b))]
        about = {"rank": bank.ranks[slot], "alpha": bank.alphas[slot], "source": base.source}
        return self._publish(base, "adapter", about, tensors, lambda folder: export_adapter(base, bank, slot, folder))

    def weights(self, base: LoadedBase) -> types.Artifact:
        """Publishes all weights of ``base``, a student after a full fine-tune; raises likewise."""
        return self._publish(
            base, "weights", {}, base.model.state_dict().items(), lambda folder: save_student(base, folder)
        )

    def has(self, artifact: types.Artifact) -> bool:
        """Whether there still is something where this was published; it is verified by whoever reads it.

        Raises PreceptorError: ARTIFACT_STORE_REFUSED, ARTIFACT_STORE_UNREACHABLE, EXTRA_MISSING (a bucket).
        """
        if artifact.uri.startswith("s3://"):
            from preceptor.artifacts_s3 import S3Folder

            return S3Folder(artifact.uri).manifest() is not None
        return local_folder(artifact.uri).is_dir()

    def _publish(
        self,
        base: LoadedBase,
        kind: Kind,
        about: dict[str, Any],
        tensors: Iterable[tuple[str, Tensor]],
        write: Callable[[Path], None],
    ) -> types.Artifact:
        def write_all(folder: Path) -> None:
            write(folder)
            write_provenance(base, kind, folder)

        digest = hashlib.sha256(f"{_provenance(base, kind)}{canonical_json(about)}".encode())
        for name, tensor in tensors:
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
            # bytes of any type, for which numpy may have no name
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        try:
            return self._store.write_folder(f"{kind}-{digest.hexdigest()[:_NAME_DIGITS]}", write_all)
        except (OSError, PreceptorError) as error:
            # a disk that cannot be written, whichever way it says so; another worker may be able to
            if isinstance(error, PreceptorError) and error.reason != "DATABASE_UNREACHABLE":
                raise
            message = f"what was learnt cannot be written to {self._url}/{EDITS}: {error}"
            raise PreceptorError("ARTIFACT_STORE_REFUSED", message) from error


def save_student(base: LoadedBase, folder: Path) -> None:
    """Writes model and tokenizer as a student's folder: configuration, safetensors, tokenizer."""
    base.model.save_pretrained(folder, safe_serialization=True)
    base.tokenizer.save_pretrained(folder)


def write_provenance(base: LoadedBase, kind: Kind, folder: Path) -> None:
    """Says beside an edit which student was trained, and on which edits it stood."""
    (folder / PROVENANCE_FILE).write_text(_provenance(base, kind) + "\n", encoding="utf-8")


def _provenance(base: LoadedBase, kind: Kind) -> str:
    return canonical_json({"kind": kind, "commit": base.commit, "adapters": list(base.adapters)})


def fetch_edits(student: types.PinnedStudent, copies: ArtifactCache | None) -> tuple[Path | None, list[Path]]:
    """The folder of all weights that the last full fine-tune among the student's edits left (None: there is none, it
    begins with the base), and those of the adapters to be merged into them, in order. Every file is verified.

    Raises PreceptorError: ARTIFACT_NOT_FOUND, ARTIFACT_CORRUPT, ADAPTER_MISMATCH (made for another student, or no edit
    at all), and what a store says that cannot be read.
    """
    adapters: list[Path] = []
    for artifact in reversed(student.adapters):
        folder = _fetch(artifact, copies)
        if _kind(folder, student) == "weights":  # what stands before them is in them
            return folder, adapters[::-1]
        adapters.append(folder)
    return None, adapters[::-1]


def _fetch(artifact: types.Artifact, copies: ArtifactCache | None) -> Path:
    if not artifact.uri.startswith("s3://"):
        return verified_folder(artifact)
    if copies is None:
        raise PreceptorError("ARTIFACT_NOT_FOUND", "this process has no place for copies of what lies in a bucket")
    from preceptor import artifacts_s3

    return artifacts_s3.fetch(artifact, copies)


def _kind(folder: Path, student: types.PinnedStudent) -> Kind:
    """What kind of edit lies there. One that people made themselves says nothing of its student; whether it fits is
    seen from its layers, and all weights would fit anything."""
    file = folder / PROVENANCE_FILE
    is_adapter = (folder / CONFIG_FILE).is_file()
    if not file.is_file():
        if is_adapter:
            return "adapter"
        message = f"it is no adapter ({CONFIG_FILE}) and no edit that a trial kept ({PROVENANCE_FILE})"
        raise PreceptorError("ADAPTER_MISMATCH", message, file=str(folder))
    try:
        provenance = json.loads(file.read_text(encoding="utf-8"))
        commit = str(provenance["commit"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PreceptorError("ADAPTER_MISMATCH", f"cannot be read: {error}", file=str(file)) from None
    if commit != student.commit:
        message = f"the edit was made for the student {commit[:12]}, not for {student.name} ({student.commit[:12]})"
        raise PreceptorError("ADAPTER_MISMATCH", message, file=str(folder))
    return "adapter" if is_adapter else "weights"
