"""A config file as the request that creates its run, and as text (``--dry-run``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from preceptor.channel import new_request_id
from preceptor.config import RunConfig, load_config
from preceptor.convert import question_to_proto, task_to_proto
from preceptor.errors import PreceptorError
from preceptor.server import MAX_MESSAGE_BYTES
from preceptor.task_sources import RunTasks, gather_tasks
from preceptor.tasks import title_of
from preceptor.v1.orchestrator_pb2 import CreateRunRequest


def read_run(path: Path, overrides: Sequence[str]) -> tuple[RunConfig, RunTasks]:
    """The config and its tasks. Raises PreceptorError(FILE_NOT_FOUND, BAD_CONFIG, BAD_TASK_FILE)."""
    config = load_config(path, overrides)
    return config, gather_tasks(config)


def create_request(config: RunConfig, tasks: RunTasks, request_id: str = "", *, once: bool = False) -> CreateRunRequest:
    """The request. ``once``: its id is the hash of all it asks for, so that asking again is asking for the same run.

    Raises PreceptorError(INVALID_REQUEST) if it is larger than a message may be.
    """
    request = CreateRunRequest(
        config_json=config.to_json(),
        tasks=[task_to_proto(task) for task in tasks.train],
        heldout_tasks=[task_to_proto(task) for task in tasks.heldout],
        probes=[question_to_proto(probe) for probe in tasks.probes],
        replay_documents=tasks.replay_documents,
        banks=tasks.banks,
    )
    digest = hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()
    request.request_id = request_id or (f"once-{digest}" if once else new_request_id())
    if (size := request.ByteSize()) > MAX_MESSAGE_BYTES:
        raise PreceptorError(
            "INVALID_REQUEST",
            f"the tasks are {size / 2**20:.0f} MiB, a request may have {MAX_MESSAGE_BYTES // 2**20} MiB;"
            " lower tasks.train and tasks.heldout",
            field="tasks",
        )
    return request


def with_place(error: PreceptorError, tasks: RunTasks) -> PreceptorError:
    """The same error with file and line, if it is about a task that was read from a file."""
    if "file" not in error.metadata:
        for task in (*tasks.train, *tasks.heldout):
            if (found := tasks.place_of(task)) and task_to_proto(task).id in error.message:
                file, line = found
                place: dict[str, str | int] = {"line": line} if line else {}
                return PreceptorError(error.reason, error.message, **{**error.metadata, **place, "file": file})
    return error


def dry_run_text(config: RunConfig, tasks: RunTasks) -> str:
    """The resolved config as TOML that reads back as the same config; what is said of the tasks are comments."""
    about = [
        f"# config_sha256: {config.digest()}",
        f"# tasks: {len(tasks.train)} to train on, {len(tasks.heldout)} held out,"
        f" {len(tasks.probes)} retention probes, {len(tasks.replay_documents)} replay documents",
        f"# banks of questions: {tasks.banks}",
        *(f"# note: {note}" for note in tasks.notes),
    ]
    return "\n".join([*about, *_toml(config.model_dump(mode="json", exclude_none=True))])


def dry_run_json(config: RunConfig, tasks: RunTasks) -> dict[str, Any]:
    """The same for programs."""
    return {
        "config": config.model_dump(mode="json"),
        "config_sha256": config.digest(),
        "tasks": {
            "train": [title_of(task) for task in tasks.train],
            "heldout": [title_of(task) for task in tasks.heldout],
            "probes": len(tasks.probes),
            "replay_documents": len(tasks.replay_documents),
        },
        "banks": tasks.banks,
        "notes": list(tasks.notes),
    }


def _toml(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """TOML lines of nested tables: plain values first, as the format wants it."""
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    arrays = {key: value for key, value in values.items() if isinstance(value, list) and value and _all_tables(value)}
    for key, value in values.items():
        if key not in tables and key not in arrays:
            yield f"{key} = {_toml_value(value)}"
    for key, value in tables.items():
        yield from ("", f"[{prefix}{key}]")
        yield from _toml(value, f"{prefix}{key}.")
    for key, entries in arrays.items():
        for entry in entries:
            yield from ("", f"[[{prefix}{key}]]")
            yield from _toml(entry, f"{prefix}{key}.")


def _all_tables(values: list[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(entry) for entry in value)}]"
    # JSON's strings, numbers and booleans are TOML's, but for one character that TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
