"""``preceptor adapt``: a student learns passages for good."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preceptor.cli.output import json_option

if TYPE_CHECKING:
    from preceptor.adapt.adaptation import Adaptation, Wish
    from preceptor.settings import HouseSettings


@click.command()
@click.argument("tasks", required=False, type=click.Path(path_type=Path), metavar="[TASKS]")
@click.option("--world", metavar="almanac[:COUNT]", help="Instead of TASKS: passages of the world that ships [8].")
@click.option("--student", default="", metavar="NAME", help="A registered student [default: the active one].")
@click.option("--policy", default="", metavar="ID", help="Who writes the self-edits [default: the active policy].")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results [default: adapted/STUDENT-TIME].")
@click.option("--merged", is_flag=True, help="Write the student with the adapter merged, too (out/merged).")
@click.option("--replay", metavar="FILE", type=click.Path(path_type=Path), help="Old material, one document a line.")
@click.option(
    "--probes", metavar="FILE", type=click.Path(path_type=Path), help="JSONL of what the student knew before."
)
@click.option(
    "--config", type=click.Path(path_type=Path), help="Settings, e.g. those of the run that trained the policy."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config.")
@click.option("--joint", multiple=True, metavar="KEY=VALUE", help="A key of [training], for the joint update alone.")
@click.option("--self-edits", type=click.IntRange(1, 1024), help="Written for each passage [default: the config's].")
@click.option(
    "--min-z",
    type=click.FloatRange(0, 100),
    default=1.0,
    show_default=True,
    help="Keep what is so many of its standard errors better than nothing.",
)
@click.option("--connect", is_flag=True, help="Use the stack that is up; start none.")
@click.option(
    "--workers", type=click.IntRange(min=1), help="Workers of a stack that is started [default: one per core]."
)
@click.option("--timeout", type=click.FloatRange(min=0.1), default=86400.0, show_default=True, help="Seconds, at most.")
@click.option("--dry-run", is_flag=True, help="Print the settings and what would be learnt; start nothing.")
@json_option
def adapt(
    tasks: Path | None,
    world: str | None,
    student: str,
    policy: str,
    out: Path | None,
    merged: bool,
    replay: Path | None,
    probes: Path | None,
    config: Path | None,
    overrides: tuple[str, ...],
    joint: tuple[str, ...],
    self_edits: int | None,
    min_z: float,
    connect: bool,
    workers: int | None,
    timeout: float,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Teaches a student every passage of TASKS, once and for good.

    The policy writes self-edits, they are raced on the passages' reward questions, and the best of each passage is kept
    if it clearly helps. One update on all that is kept, with replay of old material, gives an adapter (out/adapter, as
    PEFT has it). Shows what sealed questions say before and after, and what was forgotten; out/lineage.json says where
    every part of it comes from. Asked again after an interruption it goes on where it stopped.

    preceptor adapt --world almanac:8 --config configs/almanac.toml --merged
    """
    from preceptor.adapt.adaptation import adapt as run
    from preceptor.cli.adapt_view import LabProgress, print_dry_run, print_results
    from preceptor.cli.evaluate_view import open_progress
    from preceptor.cli.follow import output_folder
    from preceptor.cli.output import print_json
    from preceptor.cli.session import any_stack
    from preceptor.errors import PreceptorError
    from preceptor.reproduce.lab import Lab, work

    if tasks and world:
        raise click.UsageError("give TASKS or --world, not both")
    if not (tasks or world or config):
        raise click.UsageError("give TASKS or --world almanac:8 (or --config, whose tasks are taken)")
    if connect and workers:
        raise click.UsageError("--workers starts workers of an own stack; it does not go with --connect")
    for key, path in (("replay_path", replay), ("probes_path", probes)):
        if path is not None:
            overrides = (*overrides, f"tasks.{key}={json.dumps(str(path))}")
    if self_edits is not None:
        overrides = (*overrides, f"rounds.self_edits={self_edits}")
    wish = make_wish(config, overrides, tasks, world, joint, student, policy, min_z)
    if dry_run:
        print_dry_run(wish, as_json)
        return
    folder = out or Path("adapted") / f"{student or 'student'}-{time.strftime('%Y%m%d-%H%M%S')}"
    began = time.monotonic()
    with output_folder(folder):
        check_folder(folder, wish.id)
        with open_progress() as view:
            for note in wish.subject.notes:
                view.say(f"note: {note}")
            with any_stack("evaluator", workers or 0, connect, view.say) as (addresses, stack):
                lab = Lab(addresses, steps=(), stack=stack)
                try:
                    found = work(lab, lambda lab: run(lab, wish), LabProgress(view), timeout)
                except (KeyboardInterrupt, SystemExit):
                    view.say("interrupted; what is known stays known: the same command goes on where it stopped")
                    raise
                report = keep(found, wish, folder, addresses, merged, began, view.say)
    if as_json:
        print_json(report)
    else:
        print_results(report, folder)
    if found.joint is None:
        raise PreceptorError(
            "NOTHING_HELPED",
            f"of {len(found.passages)} passages none has a self-edit that clearly helps the student",
            file=str(folder / "lineage.json"),
        )


def make_wish(
    config: Path | None,
    overrides: tuple[str, ...],
    tasks: Path | None,
    world: str | None,
    joint: tuple[str, ...],
    student: str,
    policy: str,
    min_z: float,
) -> Wish:
    """What is asked for, read and checked without a stack. Raises PreceptorError (BAD_CONFIG, BAD_TASK_FILE, ...)."""
    from preceptor.adapt.adaptation import Wish
    from preceptor.adapt.joint import joint_config
    from preceptor.adapt.subject import read_config, read_subject

    settings = read_config(config, overrides, tasks, world)
    subject = read_subject(settings)
    return Wish(
        subject=subject,
        config=settings,
        joint=joint_config(settings, joint, bool(subject.replay_documents)),
        student=student or settings.student.name,
        policy=policy or settings.teacher.policy,
        min_z=min_z,
    )


def check_folder(folder: Path, asked: str) -> None:
    """Raises PreceptorError(OUTPUT_NOT_WRITABLE) where the results of something else lie, or folders that are no edits
    and have the names of ours: they would give way."""
    from preceptor.adapt import lineage, weights
    from preceptor.errors import PreceptorError

    record = lineage.read(folder)
    if record is not None and record["asked"] != asked and record["outcome"] == lineage.ADAPTED:
        raise PreceptorError("OUTPUT_NOT_WRITABLE", "another adaptation lies there", file=str(folder))
    for name in (weights.ADAPTER, weights.MERGED):
        if (folder / name).exists() and not (folder / name / weights.EDIT_FILE).is_file():
            raise PreceptorError("OUTPUT_NOT_WRITABLE", "it is no edit, and would give way", file=str(folder / name))


def keep(
    found: Adaptation,
    wish: Wish,
    folder: Path,
    addresses: HouseSettings,
    merged: bool,
    began: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Writes the adapter, the merged student and, last, the record, which it returns with what lies where."""
    from preceptor.adapt import lineage, weights
    from preceptor.adapt.table import before_and_after, passage_shares
    from preceptor.cli.follow import write_files

    config, rows, shares, hashes = wish.config, [], [], {}
    if found.joint is not None:
        resamples = config.heldout.bootstrap_resamples
        rows = before_and_after(found.joint, found.union, found.kept, seed=config.seed, resamples=resamples)
        shares = passage_shares(found.joint, found.union)
        edits = [weights.fetch(one, addresses) for one in (*found.student.adapters, found.joint.trials[0].adapter)]
        weights.put(edits[-1], folder / weights.ADAPTER)
        if merged:
            say("merging")
            hashes["merged_sha256"] = weights.merge(found.student, edits, folder / weights.MERGED)
    record = lineage.record(
        asked=wish.id,
        student=found.student,
        policy=found.policy,
        prompt_format=config.teacher.prompt_format,
        passages=found.passages,
        places=wish.subject.places,
        config=config.model_dump(mode="json"),
        joint=found.joint,
        joint_training=wish.joint.training.model_dump(mode="json"),
        results=[row.as_json() for row in rows],
        shares=shares,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.monotonic() - began,
        notes=[*wish.subject.notes, *found.notes],
    )
    record |= hashes
    write_files(folder, {lineage.FILE: json.dumps(record, indent=2, ensure_ascii=False) + "\n"})
    return record
