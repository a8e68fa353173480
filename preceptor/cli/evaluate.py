"""``preceptor evaluate``: the reward of any self-edits, by hand."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from preceptor.cli.output import json_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from preceptor.cli.measuring import EvaluatorAsks, Plan
    from preceptor.cli.subject import Subject
    from preceptor.config import RunConfig
    from preceptor.self_edit_files import ReadSelfEdit
    from preceptor.settings import HouseSettings
    from preceptor.stack import Stack
    from preceptor.tasks import Bank

LEAST_SEEDS = 3  # one seed has no error, two have a poor one


@click.command()
@click.argument("more", nargs=-1, metavar="[FILE]...")
@click.option("--student", default="", metavar="NAME", help="A registered student [default: the active one].")
@click.option("--task", metavar="FILE", help="Passages with questions: .json, .jsonl or a folder.")
@click.option("--world", metavar="almanac[:N]", help="Instead of a file: training passage N of the world that ships.")
@click.option("--passage", default="", metavar="TITLE or NUMBER", help="Which, where the task has several.")
@click.option("--self-edit", "files", multiple=True, metavar="FILE", help="Text, .json or .jsonl; -: standard input.")
@click.option("--config", type=click.Path(path_type=Path), help="Settings of training, answers and reward.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. training.epochs=4.")
@click.option(
    "--seeds", type=click.IntRange(1, 64), help="Fine-tunes of each [default: 3, or more if the config says]."
)
@click.option("--bank", type=click.Choice(["reward", "gate", "sealed"]), default="reward", show_default=True)
@click.option("--grader", help="exact, lexical, grid, judge or cascade [default: the config's].")
@click.option("--race", is_flag=True, help="Spend seeds where the choice is not clear (reward.race of the config).")
@click.option("--no-controls", is_flag=True, help="Only the given self-edits: no raw passage, no shuffled facts.")
@click.option("--questions", is_flag=True, help="Show what each question came to.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the report there, as JSON.")
@click.option("--connect", is_flag=True, help="Use the stack that is up; start none.")
@click.option(
    "--workers", type=click.IntRange(min=1), help="Workers of a stack that is started [default: one per core]."
)
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=3600.0, show_default=True, help="Seconds to measure."
)
@json_option
@click.pass_context
def evaluate(
    context: click.Context,
    more: tuple[str, ...],
    student: str,
    task: str | None,
    world: str | None,
    passage: str,
    files: tuple[str, ...],
    config: Path | None,
    overrides: tuple[str, ...],
    seeds: int | None,
    bank: str,
    grader: str | None,
    race: bool,
    no_controls: bool,
    questions: bool,
    out: Path | None,
    connect: bool,
    workers: int | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Measures what self-edits are worth: the student is fine-tuned on each and asked what it knows of the passage.

    A self-edit is text, one document a line (a first line may say `directive: lr=3e-3 epochs=8`), or JSON
    {"documents": [...], "directive": {...}}. Works with the stack that is up, else starts one for the time it takes.
    Ends with 2 if any evaluation failed.

    preceptor evaluate --world almanac:1 --self-edit mine.txt yours.txt
    """
    from preceptor.cli.evaluate_view import open_progress, print_failures, print_report
    from preceptor.cli.follow import output_folder, write_files
    from preceptor.cli.measuring import assess_interruptibly
    from preceptor.cli.output import print_json
    from preceptor.cli.session import any_stack
    from preceptor.cli.subject import read_config, read_subject
    from preceptor.cli.verdict import report_of
    from preceptor.self_edit_files import read_self_edits
    from preceptor.tasks import Bank

    if not (files or more):
        raise click.UsageError("give at least one --self-edit FILE")
    if task and world:
        raise click.UsageError("give --task or --world, not both")
    if not (task or world or config):
        raise click.UsageError("give --task FILE or --world almanac:N (or --config, whose tasks are taken)")
    if connect and workers:
        raise click.UsageError("--workers starts workers of an own stack; it does not go with --connect")
    if world and ":" in world and passage:
        raise click.UsageError(f"--world {world} names its passage; leave out --passage")
    if grader:
        overrides = (*overrides, f"reward.grader={json.dumps(grader)}")
    settings = read_config(config, overrides, task, world)
    given = read_self_edits([*files, *more])
    subject = read_subject(settings, passage or (world or "").partition(":")[2], Bank(bank))
    plan = make_plan(settings, subject, given.self_edits, Bank(bank), seeds, race, controls=not no_controls)
    with output_folder(out.parent) if out else nullcontext():
        with open_progress() as view, any_stack("evaluator", workers or 0, connect, view.say) as (addresses, stack):
            asks = ask_evaluator(addresses, stack, student, subject)
            began = time.monotonic()
            assess_interruptibly(plan, asks, view.show, timeout)
            seconds = round(time.monotonic() - began, 3)
        report = report_of(plan, asks, subject, settings, Bank(bank), questions)
        report |= {"notes": [*subject.notes, *given.notes], "seconds": seconds}
        if out is not None:
            write_files(out.parent, {out.name: json.dumps(report, indent=2, ensure_ascii=False) + "\n"})
    if as_json:
        print_json(report)
    else:
        print_report(report)
    if print_failures(report):
        context.exit(2)


def make_plan(
    config: RunConfig,
    subject: Subject,
    given: Sequence[ReadSelfEdit],
    bank: Bank,
    seeds: int | None,
    race: bool,
    controls: bool,
) -> Plan:
    """What to measure. Seeds depend on the config's seed alone, so that the same is asked again under the same ids."""
    from preceptor.cli.measuring import Measured, Plan
    from preceptor.cli.verdict import RAW_PASSAGE, SHUFFLED_FACTS
    from preceptor.config import RaceConfig
    from preceptor.convert import bank_to_proto, question_to_proto, self_edit_to_proto
    from preceptor.names import derived_seed
    from preceptor.protocols import as_trained, chosen_probes, evaluation_protocol, own_text
    from preceptor.racing import RaceSettings

    raced = (config.reward.race or RaceConfig()).model_dump()
    count = seeds or (raced["max_seeds"] if race else max(LEAST_SEEDS, config.reward.seeds))
    protocol = evaluation_protocol(
        config,
        bank=bank_to_proto(bank),
        probes=chosen_probes(config, [question_to_proto(probe) for probe in subject.probes]),
        replay_documents=subject.replay_documents,
        seeds=[derived_seed(config.seed, "evaluate", i) for i in range(count)],
    )
    beside = []
    if controls:
        beside.append(Measured(RAW_PASSAGE, own_text(subject.task(), config.training)))
        if shuffled := subject.passage.reference_edits.get("shuffled_facts"):
            beside.append(Measured(SHUFFLED_FACTS, as_trained(self_edit_to_proto(shuffled), config.training)))
    return Plan(
        protocol=protocol,
        candidates=[
            Measured(read.name, as_trained(self_edit_to_proto(read.self_edit), config.training)) for read in given
        ],
        controls=beside,
        race=RaceSettings(**{**raced, "max_seeds": count}) if race else None,
        fresh_seeds=[derived_seed(config.seed, "evaluate-fresh", i) for i in range(config.reward.fresh_seeds)],
    )


def ask_evaluator(addresses: HouseSettings, stack: Stack | None, student: str, subject: Subject) -> EvaluatorAsks:
    """The evaluator, with the student pinned. Raises PreceptorError(STUDENT_NOT_FOUND, NO_ACTIVE_STUDENT)."""
    from preceptor.channel import call, connect, new_request_id
    from preceptor.cli.measuring import EvaluatorAsks
    from preceptor.v1.evaluator_pb2_grpc import EvaluatorServiceStub
    from preceptor.v1.student_pb2 import GetStudentRequest
    from preceptor.v1.student_pb2_grpc import StudentServiceStub

    def check() -> None:
        if stack is not None and stack.failed:
            raise stack.failed

    students = connect(addresses.student_address, StudentServiceStub)
    return EvaluatorAsks(
        stub=connect(addresses.evaluator_address, EvaluatorServiceStub),
        owner=f"evaluate-{new_request_id()}",
        task=subject.task(),
        student=call(students.GetStudent, GetStudentRequest(name=student)).student.pinned,
        check=check,
    )
