"""``preceptor export``: what runs have written, as files for pretraining elsewhere and for SEAL's scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from preceptor.cli.output import json_option


@click.group()
def export() -> None:
    """Writes the study documents of runs, and SEAL's file layouts."""


@export.command()
@click.argument("run_ids", nargs=-1, required=True, metavar="RUN...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="FILE.jsonl or FILE.parquet.")
@click.option("--best", type=click.IntRange(min=1), help="Only the best N self-edits of each task and round.")
@click.option("--min-reward", type=float, help="Only self-edits that earned at least so much.")
@json_option
def corpus(run_ids: tuple[str, ...], out: Path, best: int | None, min_reward: float | None, as_json: bool) -> None:
    """Writes the documents of all rewarded self-edits of RUN..., one a line, with task, policy, student and reward."""
    from preceptor.cli.connection import orchestrator_in_use
    from preceptor.cli.output import print_json
    from preceptor.export.corpus import SUFFIXES, write_corpus
    from preceptor.export.runs import Selection, find_run

    if out.suffix not in SUFFIXES:
        raise click.UsageError(f"--out must end in {' or '.join(SUFFIXES)}: {out}")
    _need_number(min_reward)
    stub = orchestrator_in_use()
    runs = [find_run(stub, run_id) for run_id in dict.fromkeys(run_ids)]
    with _progress(sum(run.planned for run in runs), as_json) as tell:
        counts = write_corpus(stub, runs, Selection(best, min_reward), out, tell)
    said = {name: value for name, value in asdict(counts).items() if name not in ("documents", "characters")}
    if as_json:
        print_json({"path": str(out), "runs": [run.id for run in runs], **asdict(counts)})
        return
    print(f"{counts.documents:,} documents, {counts.characters:,} characters: {out}")
    print(", ".join(f"{value:,} {_words(name)}" for name, value in said.items() if value) or "no self-edits")


@export.command()
@click.argument("run_id", metavar="RUN")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the three files.")
@click.option(
    "--best", type=click.IntRange(min=1), default=1, show_default=True, help="Self-edits of a task for sft.jsonl."
)
@click.option("--min-reward", type=float, help="For sft.jsonl, too.")
@json_option
def seal(run_id: str, out: Path, best: int, min_reward: float | None, as_json: bool) -> None:
    """Writes RUN in SEAL's layouts: self_edits.json, sft.jsonl and results.json."""
    from preceptor.channel import call
    from preceptor.cli.connection import evaluator_in_use, orchestrator_in_use, teacher_in_use
    from preceptor.cli.output import print_json
    from preceptor.errors import PreceptorError
    from preceptor.export.runs import Selection, find_run
    from preceptor.export.seal import FILES, write_seal
    from preceptor.prompt_formats import PromptFormat
    from preceptor.v1 import teacher_pb2

    _need_number(min_reward)
    stub = orchestrator_in_use()
    run = find_run(stub, run_id)
    known = call(teacher_in_use().ListPromptFormats, teacher_pb2.ListPromptFormatsRequest()).formats
    template = next((form.template for form in known if form.name == run.prompt_format), None)
    if template is None:
        raise PreceptorError(
            "UNKNOWN_PROMPT_FORMAT", f"run {run.id} asked with {run.prompt_format!r}, which is no more"
        )
    render = PromptFormat(run.prompt_format, 0, "", template=template).render
    with _progress(run.planned, as_json) as tell:
        counts = write_seal(stub, evaluator_in_use(), run, render, Selection(best, min_reward), out, tell)
    if as_json:
        print_json({"files": [str(out / name) for name in FILES], "run": run.id, **asdict(counts)})
        return
    print(", ".join(f"{value:,} {_words(name)}" for name, value in asdict(counts).items() if value) or "no self-edits")
    print("\n".join(str(out / name) for name in FILES))


def _need_number(value: float | None) -> None:
    if value is not None and value != value:
        raise click.UsageError("--min-reward must be a number")


def _words(name: str) -> str:
    return name.replace("_", " ").replace("self edits", "self-edits")


@contextmanager
def _progress(total: int, as_json: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where somebody looks at it. It is told how many self-edits have been seen."""
    if as_json or not sys.stderr.isatty():
        yield lambda _seen: None
        return
    from rich.progress import Progress

    from preceptor.cli.output import console

    with Progress(console=console(stderr=True), transient=True) as bar:
        task: Any = bar.add_task("self-edits", total=total or None)
        yield lambda seen: bar.update(task, completed=seen)
