"""``preceptor run CONFIG``: one experiment from its config file to its report."""

from __future__ import annotations

import time
from pathlib import Path

import click

from preceptor.cli.output import json_option


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. rounds.count=1.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results [default: runs/NAME-SEED-TIME].")
@click.option("--connect", is_flag=True, help="Use the stack that is up instead of starting one.")
@click.option("--dry-run", is_flag=True, help="Print the resolved config and the tasks; start nothing.")
@click.option("--workers", type=click.IntRange(min=1), help="Fine-tuning workers [default: one per core, at most 8].")
@click.option("--request-id", default="", metavar="ID", help="The same id gives the same run, not a second one.")
@click.option("--once", is_flag=True, help="Go on with the run of this very config that is there, if there is one.")
@json_option
def run(
    config: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    connect: bool,
    dry_run: bool,
    workers: int | None,
    request_id: str,
    once: bool,
    as_json: bool,
) -> None:
    """Trains a teacher as CONFIG says, measures it, and writes summary.json and report.html.

    Starts the embedded stack, runs, and takes it down again. Ctrl-C does too; the run can be resumed.
    """
    from preceptor.channel import call
    from preceptor.cli.follow import output_folder
    from preceptor.cli.live import open_view
    from preceptor.cli.output import plain, print_json, print_json_line
    from preceptor.cli.run_request import create_request, dry_run_json, dry_run_text, read_run, with_place
    from preceptor.cli.runs import resume_run
    from preceptor.cli.session import connected_session, embedded_session, resumable, seconds_since_start
    from preceptor.cli.summary import print_results
    from preceptor.errors import PreceptorError
    from preceptor.stack import WORLDS

    if once and request_id:
        raise click.UsageError("--once makes the request id by itself; it does not go with --request-id")
    if connect and workers:
        raise click.UsageError("--workers starts workers of an own stack; it does not go with --connect")
    settings, tasks = read_run(config, overrides)
    if dry_run:
        if as_json:
            print_json(dry_run_json(settings, tasks))
        else:
            print(plain(dry_run_text(settings, tasks)))
        return
    request = create_request(settings, tasks, request_id, once=once)
    folder = out or Path("runs") / f"{settings.name}-{settings.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        with output_folder(folder), resumable(folder) as begun, open_view(as_json) as view:
            for note in tasks.notes:
                view.say(f"note: {note}")
            world = settings.tasks.world
            own = embedded_session(workers or 0, view, world or WORLDS[0])
            with connected_session(world) if connect else own as session:
                run_id = call(session.orchestrator.CreateRun, request).run.id
                if once:
                    resume_run(session.orchestrator, run_id)
                begun.append((run_id, session))
                created_after = seconds_since_start()
                view.say(f"run {run_id}: {len(tasks.train)} tasks to train on, {len(tasks.heldout)} held out")
                for other in session.other_runs(run_id):
                    view.say(f"note: run {other} goes on too; end it with: preceptor runs cancel {other}")
                results = session.follow_to_results(run_id, folder, view, created_after)
    except PreceptorError as error:
        raise with_place(error, tasks) from error
    if as_json:
        print_json_line(
            {
                "event": "finished",
                "run": run_id,
                "state": "SUCCEEDED",
                "summary": results.summary,
                "summary_path": str(results.summary_path),
                "report_path": str(results.report_path),
            }
        )
    else:
        print_results(results)
