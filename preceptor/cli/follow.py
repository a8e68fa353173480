"""Follows a run to its end and writes what came of it.

A watch is renewed every few seconds, so that whoever follows notices a dead stack soon, and survives a service that is
started again. Results are written whole or not at all.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preceptor.channel import call, stream
from preceptor.errors import CATALOGUE, PreceptorError
from preceptor.storage import STORAGE_REASONS
from preceptor.v1 import orchestrator_pb2 as orchestrator

if TYPE_CHECKING:
    from preceptor.cli.live import View
    from preceptor.v1.orchestrator_pb2_grpc import OrchestratorServiceStub

RENEW_SECONDS = 5.0
# The embedded stack starts a dead orchestrator again within seconds; a busy small machine may need a minute.
PATIENCE_SECONDS = 90.0
# Reports embed pictures and every self-edit; rendering them takes a while on a busy machine.
REPORT_SECONDS = 180.0

FINAL_STATES = frozenset(
    {orchestrator.RUN_STATE_SUCCEEDED, orchestrator.RUN_STATE_FAILED, orchestrator.RUN_STATE_CANCELLED}
)
_PASSING = frozenset(
    {"SERVICE_UNREACHABLE", "SHUTTING_DOWN", "SERVICE_BUSY", "RATE_LIMITED", "DEADLINE_EXCEEDED", "CANCELLED"}
    | STORAGE_REASONS
)


def snapshots(
    stub: OrchestratorServiceStub,
    run_id: str,
    check: Callable[[], None] = lambda: None,
    patience: float = PATIENCE_SECONDS,
) -> Iterator[orchestrator.WatchRunResponse]:
    """Snapshots of the run, the last one with a final state.

    ``check`` is called at least every few seconds and may raise. Raises what WatchRun raises; while the orchestrator
    does not answer, only after ``patience`` seconds.
    """
    heard = time.monotonic()
    while True:
        check()
        try:
            for snapshot in stream(stub.WatchRun, orchestrator.WatchRunRequest(run_id=run_id), deadline=RENEW_SECONDS):
                heard = time.monotonic()
                yield snapshot
                if snapshot.run.state in FINAL_STATES:
                    return
        except PreceptorError as error:
            if error.reason not in _PASSING:
                raise
        if time.monotonic() - heard > patience:
            # Silent or gone? This answers, or raises SERVICE_UNREACHABLE.
            answer = call(stub.GetRun, orchestrator.GetRunRequest(run_id=run_id), deadline=10)
            heard = time.monotonic()
            yield orchestrator.WatchRunResponse(run=answer.run, progress=answer.progress)
            if answer.run.state in FINAL_STATES:
                return
        time.sleep(0.2)


def follow(
    stub: OrchestratorServiceStub, run_id: str, view: View, check: Callable[[], None] = lambda: None
) -> orchestrator.Run:
    """Shows the run until it ends; returns it in its final state. Raises as ``snapshots`` does.

    A thread does the watching: Ctrl-C raises in the main thread, and gRPC, when an exception reaches it in the wrong
    place, leaves its channel in a state in which closing it hangs.
    """
    heard: queue.SimpleQueue[orchestrator.WatchRunResponse | Exception] = queue.SimpleQueue()
    leaving = threading.Event()

    def check_both() -> None:
        if leaving.is_set():
            raise PreceptorError("CANCELLED", "nobody follows any more")
        check()

    def watch() -> None:
        try:
            for snapshot in snapshots(stub, run_id, check_both):
                heard.put(snapshot)
        except Exception as error:  # raised again below
            heard.put(error)

    threading.Thread(target=watch, name="watch-run", daemon=True).start()
    try:
        while True:
            news = heard.get()
            if isinstance(news, Exception):
                raise news
            view.show(news)
            if news.run.state in FINAL_STATES:
                return news.run
    finally:
        leaving.set()


def all_runs(stub: OrchestratorServiceStub) -> Iterator[orchestrator.Run]:
    """Every run, the newest first."""
    token = ""
    while True:
        page = call(stub.ListRuns, orchestrator.ListRunsRequest(page_token=token))
        yield from page.runs
        if not (token := page.next_page_token):
            return


def raise_if_unsuccessful(run: orchestrator.Run) -> None:
    """Raises the PreceptorError that a run ended with, unless it succeeded."""
    if run.state == orchestrator.RUN_STATE_SUCCEEDED:
        return
    if run.state == orchestrator.RUN_STATE_CANCELLED:
        raise PreceptorError("CANCELLED", f"run {run.id} was cancelled")
    reason = run.failure.reason if run.failure.reason in CATALOGUE else "RUN_FAILED"
    raise PreceptorError(reason, f"run {run.id} failed: {run.failure.message or 'no reason was recorded'}")


@dataclass(frozen=True, slots=True)
class Results:
    """What a run came to, and where it was written."""

    summary: dict[str, Any]
    summary_path: Path
    report_path: Path


def fetch_results(
    stub: OrchestratorServiceStub,
    run_id: str,
    out: Path,
    measure: Callable[[dict[str, Any]], dict[str, Any]] = lambda _summary: {},
) -> Results:
    """Writes ``summary.json`` and ``report.html`` into ``out``. ``measure`` gives keys of the summary that only the
    caller can know. Raises PreceptorError(OUTPUT_NOT_WRITABLE) and what GetRunReport raises."""
    answer = call(stub.GetRunReport, orchestrator.GetRunReportRequest(run_id=run_id), deadline=REPORT_SECONDS)
    summary: dict[str, Any] = json.loads(answer.summary_json)
    summary |= measure(summary)
    paths = write_files(
        out,
        {
            "summary.json": json.dumps(summary, indent=2, ensure_ascii=False) + "\n",
            "report.html": answer.report_html,
        },
    )
    return Results(summary, *paths)


@contextmanager
def output_folder(out: Path) -> Iterator[None]:
    """Makes sure before any work is done that results can be written; leaves no empty folder behind.

    Raises PreceptorError(OUTPUT_NOT_WRITABLE).
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PreceptorError(
            "OUTPUT_NOT_WRITABLE", f"results cannot be written there: {error.strerror}", file=str(out)
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # it is not empty: the results are there
            out.rmdir()


def write_files(folder: Path, texts: dict[str, str]) -> list[Path]:
    """Writes all the files, or none: each is complete on disk before any gets its name.

    Raises PreceptorError(OUTPUT_NOT_WRITABLE).
    """
    drafts: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            draft = folder / f".{name}.{uuid.uuid4().hex}.draft"
            drafts[folder / name] = draft
            with draft.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for final, draft in drafts.items():
            draft.replace(final)
    except OSError as error:
        raise PreceptorError(
            "OUTPUT_NOT_WRITABLE", f"results cannot be written there: {error.strerror}", file=str(folder)
        ) from None
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
    return list(drafts)
