"""Names that are content: the same thing always gets the same id, on any machine, in any run.

Ids are SHA-256 over canonical JSON (sorted keys, no spaces), cut to 128 bits, with a readable prefix.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from preceptor.v1 import types_pb2 as types


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; equal values give equal strings."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def message_json(message: Message) -> Any:
    """A message as plain JSON values, with proto field names and without unset fields."""
    return MessageToDict(message, preserving_proto_field_name=True)


def sha256(text: str) -> str:
    """Lower-case hex SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def content_id(prefix: str, value: Any) -> str:
    """``prefix-`` and 32 hex digits that stand for ``value`` (plain JSON values)."""
    return f"{prefix}-{sha256(canonical_json(value))[:32]}"


def task_id(task: types.Task) -> str:
    """The id of a task: what is learnt and asked, without labels and reference edits."""
    bare = types.Task()
    if task.HasField("passage"):
        bare.passage.CopyFrom(task.passage)
    elif task.HasField("few_shot"):
        bare.few_shot.CopyFrom(task.few_shot)
    return content_id("task", message_json(bare))


def task_title(task: types.Task) -> str:
    """What people call a task: the passage's title, a few-shot task's name; may be empty."""
    return task.few_shot.name if task.HasField("few_shot") else task.passage.title


def student_identity(student: types.PinnedStudent) -> list[str]:
    """What makes two pinned students the same model: the commit and the adapters, not the name or the place."""
    return [student.commit, *(adapter.sha256 for adapter in student.adapters)]


def derived_seed(*parts: str | int) -> int:
    """A 63-bit seed that depends on all parts and nothing else."""
    return int(sha256(canonical_json(list(parts)))[:16], 16) >> 1


def celery_task_id(batch_id: str, attempt: int) -> str:
    """The Celery task id of one attempt (from 1) at a batch."""
    return f"{batch_id}.{attempt}"


def split_task_id(task_id: str) -> tuple[str, int]:
    """Batch id and attempt of a Celery task id."""
    batch_id, _, attempt = task_id.rpartition(".")
    return batch_id, int(attempt)
