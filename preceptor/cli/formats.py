"""``preceptor formats``: how a teacher is asked, and whether templates of your own are right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preceptor.cli.output import json_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from preceptor.v1 import teacher_pb2


@click.group()
def formats() -> None:
    """Lists and shows prompt formats, and checks templates of your own."""


@formats.command("list")
@json_option
def list_formats(as_json: bool) -> None:
    """Lists the prompt formats of the teacher that is up."""
    from preceptor.cli.output import print_json, print_table

    found = _formats()
    if as_json:
        print_json({"formats": [_as_json(form) for form in found]})
        return
    rows = [
        [f.name, f.version, f.kind, f.splitting, "yes" if f.titled else "", f.about or f.instruction] for f in found
    ]
    print_table(["format", "version", "for", "splitting", "titled", "what it asks for"], rows)


@formats.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Shows the whole prompt of the format NAME."""
    from preceptor.cli.output import plain, print_json
    from preceptor.errors import PreceptorError

    found = {form.name: form for form in _formats()}
    if name not in found:
        raise PreceptorError(
            "UNKNOWN_PROMPT_FORMAT", f"no prompt format named {name!r}; there are: {', '.join(found)}", field="NAME"
        )
    form = found[name]
    if as_json:
        print_json(_as_json(form))
        return
    titled = ", each behind the title" if form.titled else ""
    print(plain(f"{form.name}, version {form.version}, for {form.kind} tasks; documents: {form.splitting}{titled}"))
    if form.about:
        print(plain(form.about))
    if form.file:
        print(plain(f"from {form.file}"))
    print("\n" + plain(form.template))


@formats.command()
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def check(folder: Path, as_json: bool) -> None:
    """Reads the templates in FOLDER as a teacher would (PRECEPTOR_TEACHER_TEMPLATES=FOLDER), without one.

    Whether a name is taken by a format that ships is seen by the teacher.
    """
    from preceptor.cli.output import print_json, print_table
    from preceptor.prompt_formats import read_templates, shipped_templates

    found = read_templates(folder, shipped_templates())
    if as_json:
        print_json({"formats": [{"name": f.name, "version": f.version, "file": f.file} for f in found.values()]})
        return
    print_table(
        ["format", "version", "for", "splitting", "titled"],
        [[f.name, f.version, f.kind, f.splitting, "yes" if f.titled else ""] for f in found.values()],
    )


def _formats() -> Sequence[teacher_pb2.PromptFormat]:
    from preceptor.channel import call
    from preceptor.cli.connection import teacher_in_use
    from preceptor.v1 import teacher_pb2

    found: teacher_pb2.ListPromptFormatsResponse = call(
        teacher_in_use().ListPromptFormats, teacher_pb2.ListPromptFormatsRequest()
    )
    return found.formats


def _about(form: teacher_pb2.PromptFormat) -> str:
    """What it is for, in one line."""
    from preceptor.task_problems import cut

    return cut(" ".join((form.about or form.instruction).split()), 100)


def _as_json(form: teacher_pb2.PromptFormat) -> dict[str, Any]:
    from preceptor.cli.output import as_json_value

    value: dict[str, Any] = as_json_value(form)
    return value
