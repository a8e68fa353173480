"""``preceptor reproduce WHAT``: one of the paper's experiments, all arms, one table."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preceptor.cli.output import json_option

if TYPE_CHECKING:
    from preceptor.reproduce.cost import Cost
    from preceptor.reproduce.experiment import Options, Step
    from preceptor.reproduce.lab import View
    from preceptor.settings import HouseSettings
    from preceptor.stack import Stack

# Any of these says that there is an external teacher.
_EXTERNAL = ("PRECEPTOR_EXTERNAL_TEACHER_ADDRESS", "PRECEPTOR_EXTERNAL_TEACHER_SERVER_URL")
_WORLDS = {"fewshot": "mosaic"}


@click.command()
@click.argument("what", type=click.Choice(["knowledge", "fewshot", "batch", "transfer", "continual"]))
@click.option(
    "--students",
    multiple=True,
    metavar="NAME[=SOURCE]",
    help="Students, registered if a source is given [default: the experiment's own].",
)
@click.option("--seeds", type=click.IntRange(1, 20), default=3, show_default=True, help="Repetitions of everything.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results [default: reproduced/WHAT].")
@click.option("--config", type=click.Path(path_type=Path), help="Instead of the experiment's own config of a run.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the run's config.")
@click.option("--full", is_flag=True, help="Real models and your files instead of a shipped world.")
@click.option("--tasks", "task_file", type=click.Path(path_type=Path), help="--full: passages (SQuAD) or ARC's tasks.")
@click.option("--solutions", type=click.Path(path_type=Path), help="--full: ARC's solutions, where they are apart.")
@click.option("--student-billions", type=float, default=7.0, show_default=True, help="--full: for the estimate.")
@click.option("--teacher-billions", type=float, help="--full: for the estimate [default: as the student].")
@click.option("--gpu", default="H100", show_default=True, help="--full: for the estimate.")
@click.option("--price", type=click.FloatRange(min=0), help="Dollars of a worker's (GPU's) hour; without it no cost.")
@click.option("--yes", is_flag=True, help="--full: start without asking whether the cost is right.")
@click.option("--connect", is_flag=True, help="Use the stack that is up instead of starting one.")
@click.option("--dry-run", is_flag=True, help="Print the steps and what they would cost; start nothing.")
@click.option("--workers", type=click.IntRange(min=1), help="Fine-tuning workers [default: one per core, at most 8].")
@json_option
@click.pass_context
def reproduce(
    context: click.Context,
    what: str,
    students: tuple[str, ...],
    seeds: int,
    out: Path | None,
    config: Path | None,
    overrides: tuple[str, ...],
    full: bool,
    task_file: Path | None,
    solutions: Path | None,
    student_billions: float,
    teacher_billions: float | None,
    gpu: str,
    price: float | None,
    yes: bool,
    connect: bool,
    dry_run: bool,
    workers: int | None,
    as_json: bool,
) -> None:
    """Runs all arms of an experiment for several seeds and prints one table, with what may be claimed.

    On the worlds that ship it takes minutes. Ctrl-C and the same command again goes on where it stopped: what is known
    is not done again. --out gets results.json, table.md, report.html and the pictures. Ends with 2 if a part failed.
    """
    from preceptor.cli.follow import output_folder, write_files
    from preceptor.cli.output import print_json, print_json_line
    from preceptor.cli.reproduce_view import open_reproduce_view
    from preceptor.reproduce.experiment import Findings, Options, experiment
    from preceptor.reproduce.lab import Lab, work
    from preceptor.reproduce.report import files_of, results_of

    if connect and workers:
        raise click.UsageError("--workers starts workers of an own stack; it does not go with --connect")
    named = dict(one.partition("=")[::2] for given in students for one in given.split(",") if one)
    options = Options(
        students=tuple(named),
        seeds=seeds,
        full=full,
        tasks=task_file,
        solutions=solutions,
        config=config,
        overrides=overrides,
        external_teacher=any(os.environ.get(name) for name in _EXTERNAL),
    )
    module = experiment(what)
    steps = module.steps(options)
    cost = expected_cost(steps, options, student_billions, teacher_billions, gpu, price)
    if dry_run:
        if as_json:
            print_json(dry_run_json(what, steps, cost))
        else:
            print_steps(steps, cost)
        return
    if cost is not None and not as_json:
        print_steps(steps, cost)
    if cost is not None and not yes:
        if as_json or not sys.stdin.isatty():
            raise click.UsageError("--full costs what --dry-run says; give --yes to start without being asked")
        click.confirm("Start?", abort=True)
    folder = out or Path("reproduced") / what
    began = time.monotonic()
    with output_folder(folder), open_reproduce_view(as_json) as view:
        world = None if full else _WORLDS.get(what, "almanac")
        with open_stack(connect, workers or 0, view, world) as (addresses, stack):
            lab = Lab(addresses, steps, out=folder, stack=stack)

            def measure(lab: Lab) -> Findings:
                for name, source in named.items():
                    if source:
                        lab.register(name, source)
                return module.measure(lab, options)

            try:
                findings = work(lab, measure, view)
            except (KeyboardInterrupt, SystemExit):
                view.say(f"interrupted; the same command goes on where it stopped: {_command()}")
                raise
            machine = {"cores": os.cpu_count(), "workers": workers_of(addresses), "load": os.getloadavg()[2]}
        machine["cpu_seconds"] = None if connect else cpu_seconds()  # of processes that have ended
        seconds = time.monotonic() - began
        evaluations = (lab.evaluations, lab.known)
        results = results_of(what, _command(), findings, lab.failures, price, seconds, machine, evaluations)
        files = files_of(results, findings.pictures)
        write_files(folder, files)
    if as_json:
        print_json_line({"event": "finished", "results": results, "folder": str(folder)})
    else:
        print_results(results)
        print(f"results: {folder / 'results.json'}\nreport:  {folder / 'report.html'}")
    if results["failures"]:
        context.exit(2)


@contextmanager
def open_stack(
    connect: bool, workers: int, view: View, world: str | None
) -> Iterator[tuple[HouseSettings, Stack | None]]:
    """The stack that is up, or one of its own with the teacher of ``world`` (None: as the home's last).

    Raises PreceptorError(STACK_NOT_UP, WRONG_TEACHER), and what Stack raises.
    """
    from preceptor.cli.connection import house_settings, stack_in_use
    from preceptor.cli.session import check_teacher

    if connect:
        addresses = stack_in_use()
        if world:
            check_teacher(addresses, world)
        yield addresses, None
        return
    from preceptor.stack import Stack

    with Stack(house_settings(), workers=workers, on_event=view.say, world=world) as stack:
        yield stack.addresses, stack


def expected_cost(
    steps: Sequence[Step],
    options: Options,
    student_billions: float,
    teacher_billions: float | None,
    gpu: str,
    price: float | None,
) -> Cost | None:
    """Of real models, an estimate; None for a shipped world, which costs minutes. Raises PreceptorError."""
    if not options.full:
        return None
    from preceptor.reproduce.cost import estimate, gpu_named

    teacher = student_billions if teacher_billions is None else teacher_billions
    return estimate(steps, student_billions * 1e9, teacher * 1e9, gpu_named(gpu), price)


def print_steps(steps: Sequence[Step], cost: Cost | None) -> None:
    """What will be done."""
    from preceptor.cli.live import duration
    from preceptor.cli.output import print_table

    print_table(
        ["step", "what", "fine-tunes, at most"],
        [[number, step.words, step.trials or "-"] for number, step in enumerate(steps, 1)],
    )
    if cost is not None:
        low, high = cost.published_hours
        print(
            f"ESTIMATE, nothing of it measured: {cost.trials:,} fine-tunes.\n"
            f"  operations counted, at an assumed share of its rate: {cost.gpu_hours:,.1f} hours of one {cost.gpu}"
            f" (students {duration(cost.student_seconds)}, teacher {duration(cost.teacher_seconds)})"
            f"{_at_price(cost, cost.gpu_hours)}\n"
            f"  every fine-tune as slow as the paper's, 30 to 45 s: {low:,.0f} to {high:,.0f} hours"
            f"{_at_price(cost, high, 'at most ')}\n"
            "  measure yours: python -m bench.inner_loop --json FILE, then preceptor capacity --bench FILE"
        )


def _at_price(cost: Cost, hours: float, words: str = "") -> str:
    dollars = cost.dollars(hours)
    return "" if dollars is None else f", {words}${dollars:,.0f} at ${cost.price_per_hour:g} an hour"


def dry_run_json(what: str, steps: Sequence[Step], cost: Cost | None) -> dict[str, Any]:
    """The same for programs."""
    from dataclasses import asdict

    estimate = None
    if cost is not None:
        hours = {"gpu_hours": cost.gpu_hours, "published_hours": cost.published_hours}
        estimate = {**asdict(cost), **hours, "dollars": cost.dollars(cost.gpu_hours), "measured": False}
    return {"experiment": what, "steps": [asdict(step) for step in steps], "estimate": estimate}


def print_results(results: dict[str, Any]) -> None:
    """The tables in a terminal."""
    from preceptor.cli.output import console, plain, print_table
    from preceptor.reproduce.report import ARM_HEADERS, DIFFERENCE_HEADERS, arm_cells, cell, difference_cells

    for section in results["sections"]:
        print_table(ARM_HEADERS, [arm_cells(arm) for arm in section["arms"]], title=section["title"])
        if section["differences"]:
            print_table(DIFFERENCE_HEADERS, [difference_cells(of) for of in section["differences"]])
    for table in results["tables"]:
        print_table(table["headers"], [[cell(value) for value in row] for row in table["rows"]], title=table["title"])
    for of in results["failures"]:
        console(stderr=True).print(plain(f"failed: {of['what']}: {of['message']} ({of['reason']})"), markup=False)
    for note in results["notes"]:
        console().print(plain(f"note: {note}"), markup=False)


def workers_of(addresses: HouseSettings) -> int | None:
    """Workers that are alive now; None where nobody says."""
    from contextlib import suppress

    from preceptor.channel import call, connect
    from preceptor.errors import PreceptorError
    from preceptor.v1.evaluator_pb2 import GetQueueStatusRequest
    from preceptor.v1.evaluator_pb2_grpc import EvaluatorServiceStub

    with suppress(PreceptorError):
        stub = connect(addresses.evaluator_address, EvaluatorServiceStub)
        return int(call(stub.GetQueueStatus, GetQueueStatusRequest(), deadline=5).workers_alive)
    return None


def cpu_seconds() -> float:
    """Processors' time of this process and of its children that have ended, theirs included: on idle cores it would
    take no less than this, divided by the cores."""
    import resource

    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return round(sum(of.ru_utime + of.ru_stime for of in used), 1)


def _command() -> str:
    return shlex.join(["preceptor", *sys.argv[1:]])
