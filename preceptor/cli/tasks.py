"""``preceptor tasks``: what would be read from people's own files, and what is wrong with them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preceptor.cli.output import json_option

if TYPE_CHECKING:
    from preceptor.task_files import ReadPassage, TaskFile


@click.group()
def tasks() -> None:
    """Looks at files of tasks."""


@tasks.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
@click.pass_context
def check(context: click.Context, file: Path, as_json: bool) -> None:
    """Reads FILE (.json, .jsonl or a folder) and lists its passages and all its problems.

    Ends with 2 if there is any problem.
    """
    from preceptor.cli.output import plain, print_json, print_table
    from preceptor.errors import CATALOGUE
    from preceptor.task_files import read_task_file

    found = read_task_file(file)
    if as_json:
        print_json(_as_json(found))
    else:
        rows = [_row(read) for read in found.passages]
        print_table(["passage", "place", "words", "questions", "banks"], rows, empty="no passage could be read")
        questions = sum(len(read.passage.questions) for read in found.passages)
        print(f"{len(rows)} passages, {questions} questions, {len(found.problems)} problems")
        if not all(read.named_banks for read in found.passages):
            print("note: a run's seed divides the questions that name no bank; of held-out passages all are sealed")
        for note in found.notes:
            print(f"note: {plain(note)}")
    for problem in found.problems:
        print(f"error: {plain(problem)}", file=sys.stderr)
    if found.problems:
        print(
            f"  next: correct these places; {CATALOGUE['BAD_TASK_FILE'].next_step.partition(';')[2].strip()}",
            file=sys.stderr,
        )
        context.exit(2)


def _row(read: ReadPassage) -> list[object]:
    place = f"{read.file}:{read.line}" if read.line else read.file
    passage = read.passage
    return [passage.title, place, len(passage.text.split()), len(passage.questions), _banks(read)]


def _banks(read: ReadPassage) -> str:
    """How many questions are in each bank, and of what a run would divide by its seed, how many there would be."""
    counts = _bank_sizes(read)
    words = ", ".join(f"{count} {bank}" for bank, count in counts.items() if count)
    return words if read.named_banks else f"{words} (to be divided)"


def _bank_sizes(read: ReadPassage) -> dict[str, int]:
    from preceptor.task_sources import bank_sizes
    from preceptor.tasks import Bank

    if not read.named_banks:
        return {bank.value: size for bank, size in bank_sizes(len(read.passage.questions)).items()}
    return {bank.value: len(read.passage.questions_of(bank)) for bank in Bank}


def _as_json(found: TaskFile) -> dict[str, Any]:
    return {
        "path": found.path,
        "passages": [
            {
                "title": read.passage.title,
                "file": read.file,
                "line": read.line,
                "words": len(read.passage.text.split()),
                "questions": len(read.passage.questions),
                "named_banks": read.named_banks,
                "banks": _bank_sizes(read),
            }
            for read in found.passages
        ],
        "problems": [{"file": p.file, "line": p.line, "field": p.field, "message": p.message} for p in found.problems],
        "notes": list(found.notes),
    }
