"""``preceptor tasks``: what would be read from people's own files, and what is wrong with them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preceptor.cli.output import json_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from preceptor.few_shot.arc_files import ArcFile, ReadFewShot
    from preceptor.task_files import ReadPassage, TaskFile
    from preceptor.task_problems import Problem
    from preceptor.tasks import FewShotTask


@click.group()
def tasks() -> None:
    """Looks at files of tasks."""


@tasks.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--solutions", help="Outputs of the queries in FILE, as Kaggle gives ARC's.")
@json_option
@click.pass_context
def check(context: click.Context, file: Path, solutions: str | None, as_json: bool) -> None:
    """Reads FILE (.json, .jsonl or a folder) and lists its passages or few-shot tasks and all its problems.

    Ends with 2 if there is any problem.
    """
    from preceptor.cli.output import plain, print_json
    from preceptor.errors import CATALOGUE
    from preceptor.few_shot.sources import holds_few_shot, read_few_shot
    from preceptor.task_files import read_task_file

    if solutions or holds_few_shot(file):
        read = read_few_shot(file, solutions)
        problems: Sequence[Problem] = [*read.problems, *(one for one in read.left_out if one not in read.problems)]
        print_json(_few_shot_json(read, problems)) if as_json else _show_few_shot(read, problems)
    else:
        found = read_task_file(file)
        problems = found.problems
        print_json(_as_json(found)) if as_json else _show(found)
    for problem in problems:
        print(f"error: {plain(problem)}", file=sys.stderr)
    if problems:
        print(
            f"  next: correct these places; {CATALOGUE['BAD_TASK_FILE'].next_step.partition(';')[2].strip()}",
            file=sys.stderr,
        )
        context.exit(2)


@tasks.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. tasks.train=8.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the files.")
@json_option
def arc(config: Path, overrides: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Writes the few-shot tasks of CONFIG as Kaggle has ARC's: challenges and solutions, trained and held out."""
    from preceptor.cli.follow import write_files
    from preceptor.cli.output import print_json
    from preceptor.cli.run_request import read_run
    from preceptor.few_shot.arc_files import challenges_json, solutions_json
    from preceptor.few_shot.sources import few_shot_only

    _, found = read_run(config, overrides)
    texts = {}
    for part, all_tasks in (("train", found.train), ("heldout", found.heldout)):
        if wanted := few_shot_only(all_tasks):
            texts[f"{part}_challenges.json"] = json.dumps(challenges_json(wanted))
            texts[f"{part}_solutions.json"] = json.dumps(solutions_json(wanted))
    written = write_files(out, texts)
    if as_json:
        print_json({"train": len(found.train), "heldout": len(found.heldout), "files": [str(path) for path in written]})
        return
    print(f"{len(found.train)} tasks to train on, {len(found.heldout)} held out")
    for path in written:
        print(path)


def _show(found: TaskFile) -> None:
    from preceptor.cli.output import plain, print_table

    rows = [_row(read) for read in found.passages]
    print_table(["passage", "place", "words", "questions", "banks"], rows, empty="no passage could be read")
    questions = sum(len(read.passage.questions) for read in found.passages)
    print(f"{len(rows)} passages, {questions} questions, {len(found.problems)} problems")
    if not all(read.named_banks for read in found.passages):
        print("note: a run's seed divides the questions that name no bank; of held-out passages all are sealed")
    for note in found.notes:
        print(f"note: {plain(note)}")


def _show_few_shot(found: ArcFile, problems: Sequence[Problem]) -> None:
    from preceptor.cli.output import plain, print_table

    rows = [_few_shot_row(read) for read in found.tasks]
    print_table(
        ["task", "place", "demonstrations", "queries", "largest grid", "answer tokens"],
        rows,
        empty="no task could be read",
    )
    queries = sum(len(read.task.queries) for read in found.tasks)
    print(f"{len(rows)} few-shot tasks, {queries} queries, {len(problems)} problems")
    if found.tasks:
        most = max(_answer_tokens(read.task) for read in found.tasks)
        print(f"note: answers.max_new_tokens must be {most} or more for all of them")
    for note in found.notes:
        print(f"note: {plain(note)}")


def _few_shot_row(read: ReadFewShot) -> list[object]:
    task, place = read.task, _place(read.file, read.line)
    return [task.name, place, len(task.demonstrations), len(task.queries), _largest(task), _answer_tokens(task)]


def _largest(task: FewShotTask) -> str:
    """Rows and columns that hold all of its grids."""
    grids = [grid for pair in (*task.demonstrations, *task.queries) for grid in (pair.input, pair.output)]
    return f"{max(map(len, grids))} x {max(len(grid[0]) for grid in grids)}"


def _answer_tokens(task: FewShotTask) -> int:
    """What its longest answer takes."""
    from preceptor.question_faults import grid_tokens

    return max(grid_tokens(query.output) for query in task.queries)


def _row(read: ReadPassage) -> list[object]:
    passage = read.passage
    return [
        passage.title,
        _place(read.file, read.line),
        len(passage.text.split()),
        len(passage.questions),
        _banks(read),
    ]


def _place(file: str, line: int) -> str:
    return f"{file}:{line}" if line else file


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
        "problems": _problems(found.problems),
        "notes": list(found.notes),
    }


def _few_shot_json(found: ArcFile, problems: Sequence[Problem]) -> dict[str, Any]:
    return {
        "path": found.path,
        "few_shot": [
            {
                "name": read.task.name,
                "file": read.file,
                "line": read.line,
                "demonstrations": len(read.task.demonstrations),
                "queries": len(read.task.queries),
                "answer_tokens": _answer_tokens(read.task),
            }
            for read in found.tasks
        ],
        "problems": _problems(problems),
        "notes": list(found.notes),
    }


def _problems(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    return [{"file": p.file, "line": p.line, "field": p.field, "message": p.message} for p in problems]
