"""``preceptor gc``: what the services may let go, and having it removed.

A client of the services like any other: what may go is theirs to know. What runs that are not over have made stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from preceptor.cli.output import json_option

if TYPE_CHECKING:
    from preceptor.settings import HouseSettings
    from preceptor.v1 import types_pb2

# Thousands of adapters in a bucket take a request each.
DEADLINE_SECONDS = 600.0


@click.command()
@click.option("--dry-run", is_flag=True, help="Only show what would go.")
@click.option(
    "--keep-days",
    type=click.IntRange(0, 36_500),
    default=30,
    show_default=True,
    help="What was made or used within so many days stays.",
)
@click.option(
    "--edits",
    is_flag=True,
    help="Also edits that fine-tunes kept, with their evaluations. What stands on one and is not known here is lost.",
)
@json_option
def gc(dry_run: bool, keep_days: int, edits: bool, as_json: bool) -> None:
    """Removes adapters of old policies, leftovers, and old histories.

    Nothing that a run could still need is lost: an adapter that is asked for again is trained again, self-edits are
    written again, a judge is asked again. Evaluations, runs and reports stay, and so do kept edits without --edits.
    """
    from preceptor.channel import call, connect
    from preceptor.cli.connection import stack_in_use
    from preceptor.cli.output import as_json_value, plain, print_json, print_table
    from preceptor.v1 import evaluator_pb2, teacher_pb2
    from preceptor.v1.evaluator_pb2_grpc import EvaluatorServiceStub
    from preceptor.v1.teacher_pb2_grpc import TeacherServiceStub

    settings = stack_in_use()
    teacher = connect(settings.teacher_address, TeacherServiceStub)
    evaluator = connect(settings.evaluator_address, EvaluatorServiceStub)
    of_teacher = teacher_pb2.TeacherServiceCollectGarbageRequest(
        dry_run=dry_run, keep_days=keep_days, keep_owners=_unfinished_runs(settings)
    )
    of_evaluator = evaluator_pb2.EvaluatorServiceCollectGarbageRequest(
        dry_run=dry_run, keep_days=keep_days, edits=edits
    )
    found = [
        ("teacher", call(teacher.CollectGarbage, of_teacher, deadline=DEADLINE_SECONDS).garbage),
        ("evaluator", call(evaluator.CollectGarbage, of_evaluator, deadline=DEADLINE_SECONDS).garbage),
    ]
    total = sum(item.bytes for _, items in found for item in items)
    if as_json:
        garbage = [{"service": service, **_as_json(as_json_value(item))} for service, items in found for item in items]
        print_json({"dry_run": dry_run, "bytes": total, "garbage": garbage})
        return
    print_table(
        ["service", "kind", "name", "count", "size", "age", "why"],
        [row for service, items in found for row in _rows(service, items)],
        empty="nothing to collect",
    )
    if any(items for _, items in found):
        print(plain(f"{_size(total)} {'would go (--dry-run)' if dry_run else 'removed'}"))


def _unfinished_runs(settings: HouseSettings) -> list[str]:
    """Ids of the runs that go on, or may be resumed."""
    from preceptor.channel import call
    from preceptor.cli.connection import orchestrator_of
    from preceptor.v1 import orchestrator_pb2

    over = {orchestrator_pb2.RUN_STATE_SUCCEEDED, orchestrator_pb2.RUN_STATE_CANCELLED}
    stub, token, found = orchestrator_of(settings), "", list[str]()
    while True:
        page = call(stub.ListRuns, orchestrator_pb2.ListRunsRequest(page_size=1000, page_token=token))
        found += [run.id for run in page.runs if run.state not in over]
        if not (token := page.next_page_token):
            return found


def _rows(service: str, items: Iterable[types_pb2.Garbage]) -> list[list[object]]:
    return [
        [
            service,
            item.kind,
            item.name,
            item.count,
            _size(item.bytes),
            f"{item.age_seconds / 86400:.0f} days",
            item.reason,
        ]
        for item in items
    ]


def _as_json(item: dict[str, Any]) -> dict[str, Any]:
    # 64-bit numbers are strings in proto JSON; here they are counts that fit.
    return {**item, "count": int(item["count"]), "bytes": int(item["bytes"])}


def _size(size: int) -> str:
    if not size:
        return "-"
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size = size / 1000  # type: ignore[assignment]
    return f"{size:.1f} GB"
