"""``preceptor up``: the embedded stack in the foreground."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from preceptor.cli.output import json_option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from preceptor.stack import Stack

CHECK_SECONDS = 0.5


@click.command()
@click.option("--workers", type=click.IntRange(min=1), help="Fine-tuning workers [default: one per core, at most 8].")
@click.option(
    "--port",
    type=click.IntRange(0, 65531),
    default=0,
    help="The orchestrator's port; the other services take the next ones [default: free ones].",
)
@click.option(
    "--world",
    type=click.Choice(["almanac", "mosaic"]),
    default="almanac",
    show_default=True,
    help="Whose tiny teacher writes, where PRECEPTOR_TEACHER_SOURCE names no other.",
)
@json_option
def up(workers: int | None, port: int, world: str, as_json: bool) -> None:
    """Starts the embedded stack and keeps it up until Ctrl-C.

    Other commands, in another shell and the same folder (or with the same PRECEPTOR_HOME), find it by themselves.
    """
    from preceptor.cli.connection import house_settings
    from preceptor.cli.output import plain, print_json_line
    from preceptor.stack import Stack

    def say(message: str) -> None:
        if as_json:
            print_json_line({"event": "message", "message": message})
        else:
            print(plain(message), flush=True)

    with Stack(house_settings(), workers=workers or 0, port=port, on_event=say, world=world) as stack:
        if as_json:
            print_json_line({"event": "up", "home": str(stack.addresses.home), "processes": _processes(stack)})
        else:
            print(f"up in {stack.addresses.home}; Ctrl-C ends it", flush=True)
        with _table_on_terminal(stack, as_json):
            while stack.failed is None:
                time.sleep(CHECK_SECONDS)
        raise stack.failed


def _processes(stack: Stack) -> list[dict[str, Any]]:
    return [
        {"name": child.name, "address": child.address, "pid": child.pid, "restarts": child.restarts}
        for child in stack.processes()
    ]


def _table_on_terminal(stack: Stack, as_json: bool) -> Any:
    """A live table of the processes, where there is a terminal to draw it on."""
    if as_json or not sys.stdout.isatty():
        return nullcontext()
    from rich.live import Live

    return Live(get_renderable=lambda: _table(stack), refresh_per_second=1)


def _table(stack: Stack) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("process", "address", "pid", "restarts"):
        table.add_column(header, justify="right" if header in ("pid", "restarts") else "left")
    for entry in _processes(stack):
        table.add_row(entry["name"], entry["address"], str(entry["pid"]), str(entry["restarts"]))
    return table
