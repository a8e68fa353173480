"""What an adaptation leaves as folders: the adapter as PEFT reads it, and the student with all its edits merged.

The merge needs torch, which nothing here has: it is a child process (``python -m student.merge``). A folder is whole
when it has its name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from preceptor.artifacts import artifact_store, folder_sha256
from preceptor.errors import CATALOGUE, PreceptorError
from preceptor.settings import HouseSettings
from preceptor.storage import storage_error
from preceptor.v1 import types_pb2 as types

ADAPTER, MERGED = "adapter", "merged"
# What a folder with an adapter in PEFT's format has; one with all weights has none.
ADAPTER_CONFIG = "adapter_config.json"
# What lies beside every edit, and in a merged student (``student.kept``, which needs torch).
EDIT_FILE = "preceptor_edit.json"
# A large model is read, summed and written in less.
MERGE_SECONDS = 3600.0


def fetch(artifact: types.Artifact, settings: HouseSettings) -> Path:
    """A verified folder of this machine with the artifact's files. Raises ARTIFACT_NOT_FOUND, ARTIFACT_CORRUPT."""
    return artifact_store(f"{settings.artifacts}/edits", settings.artifact_cache).local_path(artifact)


def put(folder: Path, target: Path) -> None:
    """Copies ``folder`` to ``target``, which it replaces whole. Raises PreceptorError (a disk's)."""
    draft = _draft(target)
    try:
        shutil.copytree(folder, draft)
        _publish(draft, target)
    except OSError as error:
        raise storage_error(error, target) or error from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def merge(
    student: types.PinnedStudent,
    adapters: Sequence[Path],
    target: Path,
    command: Sequence[str] = (sys.executable, "-m", "student.merge"),
) -> str:
    """Writes the student with ``adapters`` merged in order to ``target``, which it replaces whole; the folder's hash.

    Raises PreceptorError as the merge says it.
    """
    draft = _draft(target)
    arguments = ["--source", student.source, "--commit", student.commit, "--out", str(draft)]
    for adapter in adapters:
        arguments += ["--adapter", str(adapter)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    try:
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, timeout=MERGE_SECONDS
        )
        if done.returncode:
            raise _said(done.stderr)
        _publish(draft, target)
        return folder_sha256(target)
    except subprocess.TimeoutExpired:
        raise PreceptorError("DEADLINE_EXCEEDED", f"the merge took more than {MERGE_SECONDS:g} s") from None
    except OSError as error:
        raise storage_error(error, target) or error from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _said(stderr: str) -> PreceptorError:
    """The error that a merge ends with: ``REASON: message`` in its last line."""
    last = ([line.strip() for line in stderr.splitlines() if line.strip()] or ["it said nothing"])[-1]
    reason, colon, words = last.partition(": ")
    if colon and reason in CATALOGUE:
        return PreceptorError(reason, f"the merge failed: {words}")
    return PreceptorError("INTERNAL", f"the merge failed: {last}"[:1000])


def _draft(target: Path) -> Path:
    return target.with_name(f".{target.name}-{uuid.uuid4().hex}")


def _publish(draft: Path, target: Path) -> None:
    """Gives a finished folder its name; what has it goes."""
    if target.exists():
        old = _draft(target)
        target.replace(old)
        draft.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        draft.replace(target)
