"""``preceptor runs``: runs on a stack that is up."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preceptor.cli.output import json_option

if TYPE_CHECKING:
    from preceptor.v1 import orchestrator_pb2


@click.group()
def runs() -> None:
    """Creates, lists, follows, cancels and resumes runs."""


@runs.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. rounds.count=1.")
@click.option("--request-id", default="", metavar="ID", help="The same id gives the same run, not a second one.")
@json_option
def create(config: Path, overrides: tuple[str, ...], request_id: str, as_json: bool) -> None:
    """Creates a run of CONFIG and returns at once."""
    from preceptor.channel import call
    from preceptor.cli.connection import orchestrator_in_use
    from preceptor.cli.output import plain, print_json
    from preceptor.cli.run_request import create_request, read_run

    settings, tasks = read_run(config, overrides)
    run = call(orchestrator_in_use().CreateRun, create_request(settings, tasks, request_id)).run
    if as_json:
        print_json(_as_json(run))
        return
    for note in tasks.notes:
        print(f"note: {plain(note)}")
    print(f"run {run.id} is {_state(run)}\nfollow it with: preceptor runs watch {run.id}")


@runs.command("list")
@json_option
def list_runs(as_json: bool) -> None:
    """Lists all runs, the newest first."""
    from preceptor.cli.connection import orchestrator_in_use
    from preceptor.cli.follow import all_runs
    from preceptor.cli.output import print_json, print_table

    found = list(all_runs(orchestrator_in_use()))
    if as_json:
        print_json({"runs": [_as_json(run) for run in found]})
        return
    print_table(
        ["run", "name", "state", "student", "created", "why"],
        [[run.id, run.name, _state(run), run.student.name, _time(run), run.failure.message] for run in found],
        empty="no runs yet; `preceptor runs create CONFIG`",
    )


@runs.command()
@click.argument("run_id", metavar="RUN")
@json_option
def show(run_id: str, as_json: bool) -> None:
    """Shows RUN and where it stands."""
    from preceptor.channel import call
    from preceptor.cli.connection import orchestrator_in_use
    from preceptor.cli.live import evaluations_line
    from preceptor.cli.output import as_json_value, plain, print_json, print_table
    from preceptor.v1 import orchestrator_pb2

    answer = call(orchestrator_in_use().GetRun, orchestrator_pb2.GetRunRequest(run_id=run_id))
    run, progress = answer.run, answer.progress
    if as_json:
        progress_json = {**as_json_value(progress), "state": _state(run)}
        print_json({**_as_json(run), "progress": progress_json})
        return
    lines = [
        f"{run.id}: {_state(run)}{f', {progress.phase}' if progress.phase else ''}",
        f"  name: {run.name}",
        f"  student: {run.student.name} ({run.student.commit[:12]})",
        f"  config: {run.config_sha256}",
        f"  created: {_time(run)}",
        f"  {evaluations_line(progress)}",
    ]
    if run.HasField("failure"):
        lines.append(f"  failed: {run.failure.message} ({run.failure.reason})")
    print(plain("\n".join(lines)))
    print_table(
        ["round", "reward", "± stderr", "self-edits"],
        [[reward.round, f"{reward.mean:+.3f}", f"{reward.stderr:.3f}", reward.count] for reward in progress.rewards],
        empty="no rewards yet",
    )


@runs.command()
@click.argument("run_id", metavar="RUN")
@json_option
def watch(run_id: str, as_json: bool) -> None:
    """Follows RUN to its end. Ctrl-C stops the watching, not the run."""
    from preceptor.cli.connection import orchestrator_in_use
    from preceptor.cli.follow import follow, raise_if_unsuccessful
    from preceptor.cli.live import open_view
    from preceptor.cli.output import print_json_line

    with open_view(as_json) as view:
        run = follow(orchestrator_in_use(), run_id, view)
    raise_if_unsuccessful(run)
    if as_json:
        print_json_line({"event": "finished", "run": run.id, "state": _state(run)})
    else:
        print(f"run {run.id} succeeded; its results: preceptor runs report {run.id} --out DIR")


@runs.command()
@click.argument("run_id", metavar="RUN")
@json_option
def cancel(run_id: str, as_json: bool) -> None:
    """Cancels RUN. It can be resumed."""
    from preceptor.channel import call, new_request_id
    from preceptor.cli.connection import orchestrator_in_use
    from preceptor.cli.output import print_json
    from preceptor.v1 import orchestrator_pb2

    request = orchestrator_pb2.CancelRunRequest(request_id=new_request_id(), run_id=run_id)
    run = call(orchestrator_in_use().CancelRun, request).run
    if as_json:
        print_json(_as_json(run))
    else:
        print(f"run {run.id} is {_state(run)}; it goes on with: preceptor runs resume {run.id}")


@runs.command()
@click.argument("run_id", metavar="RUN")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results [default: runs/RUN].")
@click.option("--detach", is_flag=True, help="Return at once; needs a stack that is up.")
@click.option("--workers", type=click.IntRange(min=1), help="Workers of the stack, if this command starts it.")
@json_option
def resume(run_id: str, out: Path | None, detach: bool, workers: int | None, as_json: bool) -> None:
    """Goes on with RUN where it stopped, follows it to its end and writes its results.

    Uses the stack that is up, else starts the embedded one for as long as it takes.
    """
    from preceptor.cli.connection import orchestrator_in_use
    from preceptor.cli.follow import output_folder
    from preceptor.cli.live import open_view
    from preceptor.cli.output import print_json, print_json_line
    from preceptor.cli.session import any_session, resumable
    from preceptor.cli.summary import print_results

    if detach:
        run = resume_run(orchestrator_in_use(), run_id)
        if as_json:
            print_json(_as_json(run))
        else:
            print(f"run {run.id} is {_state(run)}; follow it with: preceptor runs watch {run.id}")
        return
    folder = out or Path("runs") / run_id
    with (
        output_folder(folder),
        resumable(folder) as begun,
        open_view(as_json) as view,
        any_session(workers or 0, view) as session,
    ):
        run = resume_run(session.orchestrator, run_id)
        begun.append((run_id, session))
        view.say(f"run {run.id} is {_state(run)}")
        results = session.follow_to_results(run_id, folder, view, created_after=None)
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


@runs.command()
@click.argument("run_id", metavar="RUN")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results [default: runs/RUN].")
@json_option
def report(run_id: str, out: Path | None, as_json: bool) -> None:
    """Writes summary.json and report.html of RUN, which must have succeeded."""
    from preceptor.cli.connection import orchestrator_in_use
    from preceptor.cli.follow import fetch_results, output_folder
    from preceptor.cli.output import print_json
    from preceptor.cli.summary import print_results

    stub, folder = orchestrator_in_use(), out or Path("runs") / run_id
    with output_folder(folder):
        results = fetch_results(stub, run_id, folder)
    if as_json:
        print_json(
            {
                "summary": results.summary,
                "summary_path": str(results.summary_path),
                "report_path": str(results.report_path),
            }
        )
    else:
        print_results(results)


def resume_run(stub: Any, run_id: str) -> orchestrator_pb2.Run:
    """Makes sure the run goes on: a run that goes on already, or has succeeded, is left as it is."""
    from preceptor.channel import call, new_request_id
    from preceptor.v1 import orchestrator_pb2

    run: orchestrator_pb2.Run = call(stub.GetRun, orchestrator_pb2.GetRunRequest(run_id=run_id)).run
    if run.state in (orchestrator_pb2.RUN_STATE_FAILED, orchestrator_pb2.RUN_STATE_CANCELLED):
        request = orchestrator_pb2.ResumeRunRequest(request_id=new_request_id(), run_id=run_id)
        run = call(stub.ResumeRun, request).run
    return run


def _as_json(run: orchestrator_pb2.Run) -> dict[str, Any]:
    import json

    from preceptor.cli.output import as_json_value

    value: dict[str, Any] = as_json_value(run)
    config = value.pop("config_json")
    return {**value, "state": _state(run), "config": json.loads(config) if config else None}


def _state(run: orchestrator_pb2.Run) -> str:
    from preceptor.v1.orchestrator_pb2 import RunState

    return str(RunState.Name(run.state)).removeprefix("RUN_STATE_")


def _time(run: orchestrator_pb2.Run) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.create_time.seconds))
