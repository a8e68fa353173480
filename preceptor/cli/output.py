"""What the command line prints: tables for people, JSON for programs, errors with their next step."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.console import Console

    from preceptor.errors import PreceptorError

_Command = TypeVar("_Command", bound=Callable[..., Any])

# Wide enough for ids and paths where the output goes to a file and rich would assume 80.
FILE_WIDTH = 140


def json_option(command: _Command) -> _Command:
    """Adds ``--json``, given to the command as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(command)


def console(stderr: bool = False) -> Console:
    """A console on stdout (or stderr) as it is now."""
    from rich.console import Console

    file = sys.stderr if stderr else sys.stdout
    return Console(file=file, width=None if file.isatty() else FILE_WIDTH, highlight=False, soft_wrap=not file.isatty())


def plain(value: object) -> str:
    """As text without control characters: what users and services send must not steer the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in str(value))


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]], title: str = "", empty: str = "none") -> None:
    """Prints a table to stdout; numbers stand right. ``empty`` is printed where there are no rows."""
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    if not rows:
        console().print(Text(empty, style="dim"))
        return
    table = Table(
        title=Text(title) if title else None, title_justify="left", header_style="bold", box=None, pad_edge=False
    )
    for index, header in enumerate(headers):
        numbers = all(isinstance(row[index], (int, float)) or row[index] in ("", "-") for row in rows)
        table.add_column(header, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(plain(cell)) for cell in row))
    console().print(table)


def print_json(value: Any) -> None:
    """Prints one JSON document to stdout, indented."""
    print(json.dumps(value, indent=2, ensure_ascii=False), flush=True)


def print_json_line(value: Any) -> None:
    """Prints one line of JSON to stdout, at once."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def as_json_value(message: Message) -> Any:
    """A message as plain JSON values, with proto field names and every field that has a default."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def report_error(error: PreceptorError, as_json: bool) -> None:
    """What, where and the next step, on stderr; with ``as_json`` also as a JSON line on stdout."""
    if as_json:
        print_json_line(
            {
                "error": {
                    "reason": error.reason,
                    "message": error.message,
                    "place": error.metadata,
                    "next_step": error.next_step,
                }
            }
        )
    place = "".join(
        f" ({key} {value})" for key, value in error.metadata.items() if key not in ("file", "line", "field")
    )
    print(f"error: {plain(error)}{plain(place)}\n  next: {error.next_step} ({error.reason})", file=sys.stderr)
