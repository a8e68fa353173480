"""Writes files that may be large, as they come, and whole or not at all: a file gets its name when it is complete."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from preceptor.errors import PreceptorError

Write = Callable[[Mapping[str, Any]], None]
# Lines of a row group: enough to compress well, some MB of memory.
_ROWS = 5_000


@contextmanager
def draft(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``path`` if nothing is raised; else nothing is left of it.

    Raises PreceptorError(OUTPUT_NOT_WRITABLE).
    """
    hidden = path.parent / f".{path.name}.{uuid.uuid4().hex}.draft"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with hidden.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(path)
    except OSError as error:
        raise PreceptorError(
            "OUTPUT_NOT_WRITABLE", f"cannot be written: {error.strerror or error}", file=str(path)
        ) from None
    finally:
        with suppress(OSError):  # it has its name now, or never was
            hidden.unlink()


@contextmanager
def json_lines(path: Path) -> Iterator[Write]:
    """Writes one JSON object a line. Raises PreceptorError(OUTPUT_NOT_WRITABLE)."""
    with draft(path) as file:
        yield lambda line: _json(file, line, "\n")


@contextmanager
def json_list(path: Path, key: str = "", last: Callable[[], Mapping[str, Any]] = dict) -> Iterator[Write]:
    """Writes one JSON list of objects; with a ``key`` an object that has the list there and what ``last`` gives when
    the list is complete. Raises PreceptorError(OUTPUT_NOT_WRITABLE)."""
    with draft(path) as file:
        file.write(f'{{"{key}": [\n'.encode() if key else b"[\n")
        count = 0

        def write(line: Mapping[str, Any]) -> None:
            nonlocal count
            file.write(b",\n" if count else b"")
            _json(file, line)
            count += 1

        yield write
        file.write(b"\n]")
        for name, value in last().items() if key else ():
            file.write(f',\n"{name}": '.encode())
            _json(file, value)
        file.write(b"}\n" if key else b"\n")


def _json(file: IO[bytes], value: Any, end: str = "") -> None:
    file.write((json.dumps(value, ensure_ascii=False) + end).encode("utf-8", "backslashreplace"))


@contextmanager
def parquet(path: Path, columns: Mapping[str, str]) -> Iterator[Write]:
    """Writes a Parquet file with these columns and types (as pyarrow names them).

    Raises PreceptorError(EXTRA_MISSING, OUTPUT_NOT_WRITABLE).
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise PreceptorError(
            "EXTRA_MISSING", f".parquet needs the extra `parquet`, which is not installed ({error}); .jsonl needs none"
        ) from None
    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in columns.items()])
    waiting: list[Mapping[str, Any]] = []
    with draft(path) as file, pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(waiting, schema))
            waiting.clear()

        def write(line: Mapping[str, Any]) -> None:
            waiting.append(line)
            if len(waiting) >= _ROWS:
                flush()

        yield write
        flush()
