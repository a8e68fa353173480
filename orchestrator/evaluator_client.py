"""The evaluator as the loop sees it: groups go in as they are written, evaluations come out as they are done.

Three threads, so that nobody waits for anybody: one takes groups from the caller's iterable (which may itself wait
for the teacher) and creates their evaluations, one watches what is under way, and the caller's own thread receives.
Promises: every key of every group is reported with a final evaluation exactly once; what either thread raises is
raised to the caller; when the caller stops receiving, both threads end.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from orchestrator.entries import EditKey
from orchestrator.remote import Remote
from orchestrator.stop import Stop, Stopped
from preceptor.errors import PreceptorError
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import evaluator_pb2_grpc

# A watch is opened again after so long; evaluations have time limits of their own.
WATCH_SECONDS = 600.0

FINAL = (
    evaluator.EVALUATION_STATE_SUCCEEDED,
    evaluator.EVALUATION_STATE_FAILED,
    evaluator.EVALUATION_STATE_CANCELLED,
)


@dataclass(frozen=True, slots=True)
class Submission:
    """Groups for the evaluator, and whose self-edits these are, in the order of the request."""

    keys: tuple[EditKey, ...]
    request: evaluator.CreateEvaluationsRequest


@dataclass(frozen=True, slots=True)
class Reported:
    """What became known of one evaluation: of its creation, or of its end."""

    keys: tuple[EditKey, ...]
    evaluation: evaluator.Evaluation


class EvaluatorClient:
    """Calls the evaluator with patience on behalf of one run."""

    def __init__(self, stub: evaluator_pb2_grpc.EvaluatorServiceStub, patience_seconds: float, stop: Stop) -> None:
        self._stub = stub
        self._patience = patience_seconds
        self._stop = stop

    def evaluate(self, submissions: Iterable[Submission]) -> Iterator[Reported]:
        """Submits the groups and yields each evaluation when it is created and when it reaches a final state.

        Raises what the iterable raises, PreceptorError from the evaluator, Stopped.
        """
        flow = _Flow(self._stub, lambda: Remote("evaluator service", self._patience, self._stop), self._stop)
        threads = [
            threading.Thread(target=flow.submit, args=(submissions,), name="submit", daemon=True),
            threading.Thread(target=flow.watch, name="watch", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            yield from flow.reports()
        finally:
            flow.abandon()


class _Flow:
    """The state shared by the threads of one ``evaluate``."""

    def __init__(self, stub: evaluator_pb2_grpc.EvaluatorServiceStub, remote: Callable[[], Remote], stop: Stop) -> None:
        self._stub = stub
        self._remote = remote
        self._stop = stop
        self._changed = threading.Condition()
        self._waiting: dict[str, tuple[EditKey, ...]] = {}  # evaluation id -> whose it is; not final yet
        self._unwatched = False  # something was added that the open watch does not know
        self._all_submitted = False
        self._abandoned = False
        self._reports: queue.SimpleQueue[Reported | Exception | None] = queue.SimpleQueue()

    def reports(self) -> Iterator[Reported]:
        """What the threads report, until all is final; raises what they raised."""
        while (report := self._reports.get()) is not None:
            if isinstance(report, Exception):
                raise report
            yield report

    def abandon(self) -> None:
        """Nobody receives any more: the threads are to end at their next step."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def submit(self, submissions: Iterable[Submission]) -> None:
        """Thread: creates the evaluations of one submission after the other."""
        try:
            for submission in submissions:
                if self._abandoned:
                    return
                self._create(submission)
            with self._changed:
                self._all_submitted = True
                self._changed.notify_all()
        except Exception as error:  # raised to the caller of evaluate()
            self._reports.put(error)

    def _create(self, submission: Submission) -> None:
        answer = self._remote().call(self._stub.CreateEvaluations, submission.request)
        if len(answer.evaluations) != len(submission.keys):
            raise PreceptorError(
                "INTERNAL", f"{len(submission.keys)} self-edits were sent, {len(answer.evaluations)} evaluations came"
            )
        keys_of: dict[str, list[EditKey]] = {}  # a self-edit that was written twice has one evaluation
        for key, evaluation in zip(submission.keys, answer.evaluations, strict=True):
            keys_of.setdefault(evaluation.id, []).append(key)
        for evaluation in {evaluation.id: evaluation for evaluation in answer.evaluations}.values():
            keys = tuple(keys_of[evaluation.id])
            self._reports.put(Reported(keys, evaluation))
            if evaluation.state not in FINAL:
                with self._changed:
                    self._waiting[evaluation.id] = self._waiting.get(evaluation.id, ()) + keys
                    self._unwatched = True
                    self._changed.notify_all()

    def watch(self) -> None:
        """Thread: watches all that is under way until everything submitted is final."""
        try:
            while self._something_to_watch():
                for response in self._remote().follow(
                    self._stub.WatchEvaluations, self._watch_request, deadline=WATCH_SECONDS
                ):
                    with self._changed:
                        keys = self._waiting.pop(response.evaluation.id, ())
                        more = self._unwatched
                    if keys:
                        self._reports.put(Reported(keys, response.evaluation))
                    if more or self._abandoned:
                        break  # look at the groups that came meanwhile, too
            self._reports.put(None)
        except Exception as error:  # raised to the caller of evaluate()
            self._reports.put(error)

    def _something_to_watch(self) -> bool:
        """Waits until there is; False when everything is final or nobody receives."""
        with self._changed:
            while not self._abandoned:
                if self._waiting:
                    return True
                if self._all_submitted:
                    return False
                self._changed.wait(0.5)
                if self._stop.is_set():
                    raise Stopped
            return False

    def _watch_request(self) -> evaluator.WatchEvaluationsRequest | None:
        with self._changed:
            self._unwatched = False
            ids = list(self._waiting)
        return evaluator.WatchEvaluationsRequest(evaluation_ids=ids) if ids else None
