"""``preceptor evaluations``: what waits, what FAILED and why, and having it tried again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from preceptor.cli.output import json_option

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from preceptor.v1 import evaluator_pb2
    from preceptor.v1.evaluator_pb2_grpc import EvaluatorServiceStub

# Failures in memory at once, however many there are.
PAGE = 200
# Named in one request at most (preceptor.limits.MAX_RETRIED).
RETRIED_AT_ONCE = 1000
# Putting 100,000 failures back takes the evaluator some ten seconds.
RETRY_DEADLINE_SECONDS = 600.0
MESSAGE_CHARACTERS = 100
DOCUMENT_CHARACTERS = 300


@click.group()
def evaluations() -> None:
    """Shows the queue and what FAILED, and tries it again."""


@evaluations.command()
@click.option("--owner", default="", metavar="RUN", help="Only those that this run asked for.")
@click.option("--reason", default="", help="Only those that failed with this reason, e.g. TRIAL_LOST.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="Rows of the table.")
@json_option
def failed(owner: str, reason: str, limit: int, as_json: bool) -> None:
    """Lists evaluations that FAILED, the oldest first, and what can be done about it. --json prints all of them."""
    from preceptor.cli.connection import evaluator_in_use
    from preceptor.cli.output import plain, print_table

    stub = evaluator_in_use()
    found = _failed(stub, owner, reason)
    if as_json:
        _print_stream("failed", (_failure_json(evaluation) for evaluation in found))
        return
    reasons: Counter[str] = Counter()
    rows = []
    for evaluation in islice(found, limit):
        failure = evaluation.failure
        reasons[failure.reason] += 1
        rows.append(
            [
                *(evaluation.id, evaluation.task_id, failure.reason, failure.attempts, _last_worker(stub, evaluation)),
                *(_time(evaluation.finish_time), _short(failure.message, MESSAGE_CHARACTERS)),
            ]
        )
    reasons.update(evaluation.failure.reason for evaluation in found)
    empty = "none has failed" if not (owner or reason) else "none of these has failed"
    print_table(["evaluation", "task", "reason", "attempts", "worker", "when", "message"], rows, empty=empty)
    if (more := reasons.total() - len(rows)) > 0:
        print(f"... and {more} more; --json prints all")
    for name, number in reasons.most_common():
        print(plain(f"{name} ({number}): {_next_step(name)}"))
    if reasons:
        print("try them again with: preceptor evaluations retry ID... or --all")


@evaluations.command()
@click.argument("evaluation_id", metavar="ID")
@json_option
def show(evaluation_id: str, as_json: bool) -> None:
    """Shows everything known about an evaluation: where it stands, and every attempt at it."""
    from preceptor.channel import call
    from preceptor.cli.connection import evaluator_in_use
    from preceptor.cli.output import as_json_value, plain, print_json, print_table
    from preceptor.tracing import evaluation_place
    from preceptor.v1 import evaluator_pb2 as pb

    stub = evaluator_in_use()
    evaluation = call(stub.GetEvaluation, pb.GetEvaluationRequest(evaluation_id=evaluation_id)).evaluation
    attempts = call(stub.ListAttempts, pb.ListAttemptsRequest(evaluation_id=evaluation_id)).attempts
    if as_json:
        trace = evaluation_place(evaluation.id).trace_id
        shown = {**as_json_value(evaluation), "state": _state(evaluation), "trace_id": trace}
        print_json({"evaluation": shown, "attempts": [as_json_value(attempt) for attempt in attempts]})
        return
    documents = evaluation.self_edit.documents
    beginning = " ".join(_short("\n".join(documents), DOCUMENT_CHARACTERS).split())
    lines = [
        f"{evaluation.id}: {_state(evaluation)}",
        f"  task: {evaluation.task_id}",
        f"  student: {evaluation.student.name} ({evaluation.student.commit[:12]})",
        f"  self-edit ({len(documents)} documents): {beginning}",
        f"  asked for: {_time(evaluation.create_time)}, final: {_time(evaluation.finish_time) or '-'}",
        f"  trace: {evaluation_place(evaluation.id).trace_id}",
    ]
    if evaluation.HasField("reward"):
        lines.append(f"  reward: {evaluation.reward.value:+.4f} ± {evaluation.reward.stderr:.4f}")
    if evaluation.HasField("failure"):
        failure = evaluation.failure
        lines += [
            f"  failed: {failure.message} ({failure.reason}, {failure.attempts} tries)",
            f"  next: {_next_step(failure.reason)}",
        ]
    print(plain("\n".join(lines)))
    print_table(
        ["batch", "attempt", "trials", "worker", "submitted", "begun", "ended", "steps", "why it ended"],
        [
            [
                *(attempt.batch_id, attempt.number, attempt.trials, attempt.worker or "-"),
                *(_time(attempt.submit_time), _time(attempt.begin_time) or "-", _time(attempt.end_time) or "-"),
                *(attempt.steps_done, _why(attempt)),
            ]
            for attempt in attempts
        ],
        empty="no attempt is known: it waits, its results were known, or its history is forgotten",
    )


@evaluations.command()
@click.argument("evaluation_ids", nargs=-1, metavar="ID...")
@click.option("--all", "everything", is_flag=True, help="All that FAILED, or those that the options name.")
@click.option("--owner", default="", metavar="RUN", help="With --all: only those that this run asked for.")
@click.option("--reason", default="", help="Only those that failed with this reason.")
@json_option
def retry(evaluation_ids: tuple[str, ...], everything: bool, owner: str, reason: str, as_json: bool) -> None:
    """Puts evaluations that FAILED back to work, under their ids; trials that went well are not trained again."""
    from preceptor.channel import call, new_request_id
    from preceptor.cli.connection import evaluator_in_use
    from preceptor.cli.output import print_json
    from preceptor.v1 import evaluator_pb2 as pb

    if bool(evaluation_ids) == everything:
        raise click.UsageError("give the ids of evaluations, or --all")
    if owner and not everything:
        raise click.UsageError("--owner goes with --all")
    stub, retried = evaluator_in_use(), 0
    for start in range(0, max(len(evaluation_ids), 1), RETRIED_AT_ONCE):
        request = pb.RetryEvaluationsRequest(
            request_id=new_request_id(),
            evaluation_ids=evaluation_ids[start : start + RETRIED_AT_ONCE],
            owner=owner,
            reason=reason,
        )
        retried += call(stub.RetryEvaluations, request, deadline=RETRY_DEADLINE_SECONDS).retried
    if as_json:
        print_json({"retried": retried})
        return
    print(f"{retried} evaluations are back at work; `preceptor evaluations queue` shows the queue")
    if (others := len(set(evaluation_ids)) - retried) > 0:
        print(f"{others} of those named did not fail, or not so, or so long ago that only a new request evaluates them")


@evaluations.command()
@json_option
def queue(as_json: bool) -> None:
    """Shows what waits, and which worker is at what."""
    from preceptor.channel import call
    from preceptor.cli.connection import evaluator_in_use
    from preceptor.cli.output import as_json_value, plain, print_json, print_table
    from preceptor.v1 import evaluator_pb2 as pb

    status = call(evaluator_in_use().GetQueueStatus, pb.GetQueueStatusRequest())
    if as_json:
        print_json(as_json_value(status))
        return
    print(
        f"evaluations: {status.evaluations_waiting} not final, {status.evaluations_failed} failed\n"
        f"batches: {status.queued_batches} waiting, {status.running_batches} running"
    )
    if len(status.queues) > 1:
        print_table(
            ["queue", "waiting", "on the queue", "running", "workers"],
            [
                [one.name, one.waiting_batches, one.submitted_batches, one.running_batches, one.workers_alive]
                for one in status.queues
            ],
        )
    for line in unserved(status):
        print(plain(line))
    print_table(
        ["worker", "takes", "batch", "attempt", "steps", "trials done", "peak MiB"],
        [
            [
                *(worker.name, ", ".join(worker.students) or "any", worker.batch_id or "idle", worker.attempt or "-"),
                *(worker.steps_done if worker.batch_id else "-", worker.trials_done, worker.peak_memory_bytes >> 20),
            ]
            for worker in status.workers
        ],
        empty="no worker is alive: nothing is done until one is started",
    )


def unserved(status: evaluator_pb2.GetQueueStatusResponse) -> list[str]:
    """What waits for a worker that there is none of, and the workers that nothing can come to; a line each."""
    known = {queue.student for queue in status.queues}
    lines = [
        f"worker {worker.name} waits for student {student}, which the evaluator's PRECEPTOR_DEDICATED_STUDENTS lacks"
        for worker in status.workers
        for student in worker.students
        if student not in known
    ]
    for queue in status.queues:
        number = queue.waiting_batches + queue.submitted_batches
        if number and not queue.workers_alive:
            who = (
                f"student {queue.student} waits for a worker with PRECEPTOR_STUDENTS={queue.student}"
                if queue.student
                else "students without a queue of their own wait for a worker with no PRECEPTOR_STUDENTS"
            )
            lines.append(f"{who} ({number} batch{'es' if number > 1 else ''})")
    return lines


def _failed(stub: EvaluatorServiceStub, owner: str, reason: str) -> Iterator[evaluator_pb2.Evaluation]:
    from preceptor.channel import call
    from preceptor.v1 import evaluator_pb2 as pb

    token = ""
    while True:
        request = pb.ListEvaluationsRequest(
            owner=owner, state=pb.EVALUATION_STATE_FAILED, page_size=PAGE, page_token=token
        )
        page = call(stub.ListEvaluations, request)
        for evaluation in page.evaluations:
            if reason in ("", evaluation.failure.reason):
                yield evaluation
        if not (token := page.next_page_token):
            return


def _last_worker(stub: EvaluatorServiceStub, evaluation: evaluator_pb2.Evaluation) -> str:
    from preceptor.channel import call
    from preceptor.v1 import evaluator_pb2 as pb

    attempts = call(stub.ListAttempts, pb.ListAttemptsRequest(evaluation_id=evaluation.id)).attempts
    workers = [attempt.worker for attempt in attempts if attempt.HasField("failure") and attempt.worker]
    return workers[-1] if workers else "-"


def _print_stream(name: str, items: Iterator[Any]) -> None:
    """One JSON document, of which one item is in memory at a time."""
    print(f'{{"{name}": [', end="")
    for number, item in enumerate(items):
        print(f"{',' if number else ''}\n  {json.dumps(item, ensure_ascii=False)}", end="")
    print("\n]}", flush=True)


def _failure_json(evaluation: evaluator_pb2.Evaluation) -> dict[str, Any]:
    failure = evaluation.failure
    return {
        "id": evaluation.id,
        "task_id": evaluation.task_id,
        "reason": failure.reason,
        "message": failure.message,
        "attempts": failure.attempts,
        "finish_time": evaluation.finish_time.ToJsonString(),
        "next_step": _next_step(failure.reason),
    }


def _why(attempt: evaluator_pb2.Attempt) -> str:
    if attempt.HasField("failure"):
        return f"{attempt.failure.reason}: {_short(attempt.failure.message, MESSAGE_CHARACTERS)}"
    return "done" if attempt.HasField("end_time") else "under way"


def _next_step(reason: str) -> str:
    from preceptor.errors import CATALOGUE

    return CATALOGUE[reason if reason in CATALOGUE else "INTERNAL"].next_step


def _state(evaluation: evaluator_pb2.Evaluation) -> str:
    from preceptor.v1 import evaluator_pb2 as pb

    return str(pb.EvaluationState.Name(evaluation.state)).removeprefix("EVALUATION_STATE_")


def _time(time: Timestamp) -> str:
    return time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S") if time.seconds else ""


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
