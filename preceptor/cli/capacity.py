"""``preceptor capacity``: how many GPUs a day's work needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preceptor.cli.output import json_option

if TYPE_CHECKING:
    from preceptor.capacity import Need, Surroundings, Work


@click.command()
@click.option("--passages", type=int, required=True, help="Passages a day.")
@click.option("--edits", type=int, required=True, help="Self-edits of a passage.")
@click.option("--seeds", type=int, required=True, help="Fine-tunes of a self-edit.")
@click.option("--seconds-per-trial", type=float, help="Measured: one GPU's time for one trial.")
@click.option(
    "--bench",
    type=click.Path(path_type=Path),
    help="Measured: what `python -m bench.inner_loop --json FILE` wrote on your GPU.",
)
@click.option("--student-billions", type=float, default=7.0, show_default=True, help="For estimates: its parameters.")
@click.option("--trained-tokens", type=float, help="For estimates: in one trial, epochs counted.  [default: 3,600]")
@click.option("--answered-tokens", type=float, help="For estimates: its prompts and answers.  [default: 2,400]")
@click.option("--peak-share", type=float, help="For estimates: share of the GPU's rate on paper.  [default: 0.25]")
@click.option(
    "--work-share",
    type=float,
    default=1.0,
    show_default=True,
    help="Share of the trials that is really made, for runs that race (docs/how-to-scale.md).",
)
@click.option("--busy-share", type=float, help="Share of the day in which the GPUs train.  [default: 0.8]")
@click.option("--self-edit-tokens", type=float, help="Tokens that the teacher writes for one.  [default: 360]")
@json_option
def capacity(
    passages: int,
    edits: int,
    seeds: int,
    seconds_per_trial: float | None,
    bench: Path | None,
    student_billions: float,
    work_share: float,
    as_json: bool,
    **rest: float | None,
) -> None:
    """GPUs needed for N passages x K edits x S seeds a day, and what stands around them.

    With --seconds-per-trial or --bench from a measurement; else estimated by counting operations, for a few GPUs.
    """
    from preceptor.capacity import Need, Work, estimates, gpus_needed, read_bench, surroundings

    if bench is not None and seconds_per_trial is not None:
        raise click.UsageError("give one of --bench and --seconds-per-trial")
    given = {name: value for name, value in rest.items() if value is not None}
    of_work = {name: given.pop(name) for name in ("busy_share", "self_edit_tokens") if name in given}
    work = Work(passages, edits, seeds, work_share, **of_work)
    if bench is None and seconds_per_trial is None:
        needs = estimates(work, student_billions * 1e9, **given)
    else:
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise click.UsageError(f"{names} is for estimates, and something measured is given")
        what = "as given"
        if bench is not None:
            what, seconds_per_trial = read_bench(bench)
        seconds = seconds_per_trial or 0.0
        needs = [Need(what, seconds, gpus_needed(work, seconds), measured=True)]
    around = surroundings(work, max((need.gpus or 0 for need in needs), default=0))
    if as_json:
        from preceptor.cli.output import print_json

        print_json(_as_json(work, needs, around))
    else:
        _show(work, needs, around)


def _show(work: Work, needs: list[Need], around: Surroundings) -> None:
    from preceptor.capacity import BATCHES_IN_FLIGHT
    from preceptor.cli.output import print_table

    print(
        f"{work.passages:,} passages x {work.self_edits} self-edits x {work.seeds} seed{'s' if work.seeds > 1 else ''}"
        f"{f' x {work.work_share:.0%} by racing' if work.work_share < 1 else ''} = {work.trials:,.0f} trials a day,"
        f" GPUs busy for {work.busy_share:.0%} of it"
    )
    print_table(
        ["GPU", "seconds per trial", "GPUs", ""],
        [
            [need.gpu, f"{need.seconds_per_trial:.3g}", need.gpus, "measured" if need.measured else "estimate"]
            if need.seconds_per_trial is not None and need.gpus is not None
            else [need.gpu, "-", "-", "the student is too large for it"]
            for need in needs
        ],
    )
    print(
        f"services: {around.trials_per_second:.3g} trials/s through one evaluator"
        f" ({around.of_measured_rate:.1%} of what has been measured), {around.cores:.2g} cores"
    )
    print(f"teacher:  {around.teacher_tokens_per_second:,.0f} tokens/s on average")
    print(
        f"state:    {_size(around.database_bytes_per_day)} a day in the databases, {_size(around.redis_bytes)} in Redis"
    )
    if around.of_measured_rate > 1:
        print("note: more than one evaluator has been tried with. Divide the runs between several installations.")
    if around.batches_in_flight > BATCHES_IN_FLIGHT:
        print(f"note: set PRECEPTOR_BATCHES_IN_FLIGHT={around.batches_in_flight} for the evaluator.")
    if not all(need.measured for need in needs):
        print("note: estimates count operations at an assumed share of the GPU's rate; measure yours with --bench.")


def _size(size: float) -> str:
    for unit, least in (("GB", 1e9), ("MB", 1e6)):
        if size >= least:
            return f"{size / least:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def _as_json(work: Work, needs: list[Need], around: Surroundings) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "work": {**asdict(work), "trials": work.trials},
        "gpus": [asdict(need) for need in needs],
        "around": asdict(around),
    }
