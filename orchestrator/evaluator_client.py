"""The evaluator as the loop sees it: self-edits go in as they are written, evaluations come out as they are done.

A flow is open while something is written, asked for or under way. Nobody in it waits for anybody: a thread feeds what
the caller's iterable gives (which may itself wait for the teacher), another watches what is under way, and the caller's
own thread receives, and may submit more on what it has received. Promises: every key of every submission is reported
with a final evaluation exactly once; what a thread raises is raised to the caller; when the caller leaves, the threads
end at their next step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass

from orchestrator.entries import EditKey, Kind
from orchestrator.remote import Hindered, Remote
from orchestrator.stop import Stop, Stopped
from preceptor.errors import PreceptorError
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import evaluator_pb2_grpc

# A watch is opened again after so long; evaluations have time limits of their own.
WATCH_SECONDS = 600.0
# Whoever waits in a flow looks so often whether the run was asked to end.
LOOK_SECONDS = 0.5

FINAL = (
    evaluator.EVALUATION_STATE_SUCCEEDED,
    evaluator.EVALUATION_STATE_FAILED,
    evaluator.EVALUATION_STATE_CANCELLED,
)

Opened = Callable[[Sequence[evaluator.SealedOpening]], None]


@dataclass(frozen=True, slots=True)
class Submission:
    """Groups for the evaluator, whose self-edits these are, in the order of the request, and what is measured."""

    keys: tuple[EditKey, ...]
    request: evaluator.CreateEvaluationsRequest
    kind: Kind = Kind.FULL


@dataclass(frozen=True, slots=True)
class Reported:
    """What became known of one evaluation: of its creation, or of its end."""

    keys: tuple[EditKey, ...]
    evaluation: evaluator.Evaluation
    kind: Kind = Kind.FULL

    @property
    def final(self) -> bool:
        """Whether nothing more will be reported of it."""
        return self.evaluation.state in FINAL


class EvaluatorClient:
    """Calls the evaluator with patience on behalf of one run."""

    def __init__(
        self,
        stub: evaluator_pb2_grpc.EvaluatorServiceStub,
        patience_seconds: float,
        stop: Stop,
        opened: Opened = lambda _openings: None,
        hindered: Hindered = lambda _name, _words: None,
    ) -> None:
        """``opened`` is told how often sealed questions were used, by the thread that asked for them."""
        self._stub = stub
        self._patience = patience_seconds
        self._stop = stop
        self._opened = opened
        self._hindered = hindered

    @contextmanager
    def flow(self) -> Iterator[Flow]:
        """A flow for as long as the context is open."""

        def remote() -> Remote:
            return Remote("evaluator service", self._patience, self._stop, self._hindered)

        flow = Flow(self._stub, remote, self._stop, self._opened)
        threading.Thread(target=copy_context().run, args=(flow.watch,), name="watch", daemon=True).start()
        try:
            yield flow
        finally:
            flow.leave()

    def evaluate(self, submissions: Iterable[Submission]) -> Iterator[list[Reported]]:
        """Submits all of them and yields what becomes known (see ``Flow.reports``).

        Raises what the iterable raises, PreceptorError from the evaluator, Stopped.
        """
        with self.flow() as flow:
            flow.feed(submissions)
            yield from flow.reports()


class Flow:
    """Evaluations under way, shared by the threads of one caller."""

    def __init__(
        self,
        stub: evaluator_pb2_grpc.EvaluatorServiceStub,
        remote: Callable[[], Remote],
        stop: Stop,
        opened: Opened,
    ) -> None:
        self._stub = stub
        self._remote = remote
        self._stop = stop
        self._opened = opened
        self._changed = threading.Condition()
        self._feeds = 0  # iterables that may give more
        self._waiting: dict[str, list[Submission]] = {}  # by evaluation, for whom: parts of submissions; not final yet
        self._unwatched = False  # something was added that the open watch does not know
        self._left = False
        self._news: list[Reported] = []
        self._error: Exception | None = None  # what a thread raised, first of all

    def feed(self, submissions: Iterable[Submission]) -> None:
        """Submits what the iterable gives, as it comes, in a thread of its own."""
        with self._changed:
            self._feeds += 1
        feed = copy_context().run  # it is about the same run and round
        threading.Thread(target=feed, args=(self._feed, submissions), name="submit", daemon=True).start()

    def submit(self, submission: Submission) -> None:
        """Creates the evaluations now. To be called by whoever receives the reports, between two of them, so that the
        flow cannot end meanwhile. Raises PreceptorError, Stopped."""
        answer = self._remote().call(self._stub.CreateEvaluations, submission.request)
        if len(answer.evaluations) != len(submission.keys):
            raise PreceptorError(
                "INTERNAL", f"{len(submission.keys)} self-edits were sent, {len(answer.evaluations)} evaluations came"
            )
        if answer.openings:
            self._opened(answer.openings)
        keys_of: dict[str, list[EditKey]] = {}  # a self-edit that was written twice has one evaluation
        for key, evaluation in zip(submission.keys, answer.evaluations, strict=True):
            keys_of.setdefault(evaluation.id, []).append(key)
        with self._changed:
            for evaluation in {evaluation.id: evaluation for evaluation in answer.evaluations}.values():
                keys = tuple(keys_of[evaluation.id])
                self._news.append(Reported(keys, evaluation, submission.kind))
                if evaluation.state not in FINAL:
                    part = Submission(keys, submission.request, submission.kind)
                    self._waiting.setdefault(evaluation.id, []).append(part)
                    self._unwatched = True
            self._changed.notify_all()

    def reports(self) -> Iterator[list[Reported]]:
        """Each evaluation when it is created and when it reaches a final state, until every iterable has ended and all
        is final; what has become known since the caller last asked comes together. Raises what the threads raised."""
        while news := self._next():
            yield news

    def leave(self) -> None:
        """Nobody receives any more: the threads are to end at their next step."""
        with self._changed:
            self._left = True
            self._changed.notify_all()

    def watch(self) -> None:
        """Thread: watches all that is under way until the caller leaves."""
        try:
            while self._something_to_watch():
                for response in self._remote().follow(
                    self._stub.WatchEvaluations, self._watch_request, deadline=WATCH_SECONDS
                ):
                    evaluation = response.evaluation
                    with self._changed:
                        for part in self._waiting.pop(evaluation.id, ()):
                            self._news.append(Reported(part.keys, evaluation, part.kind))
                        self._changed.notify_all()
                        more = self._unwatched or self._left
                    if more:
                        break  # look at what came meanwhile, too
        except Exception as error:  # raised to the caller
            self._tell(error)

    def _next(self) -> list[Reported]:
        """What has become known; nothing when nothing more will. After that, raises what a thread raised."""
        with self._changed:
            while not self._news and self._error is None and (self._feeds or self._waiting):
                self._wait()
            news, self._news = self._news, []
            if not news and self._error is not None:
                raise self._error
            return news

    def _feed(self, submissions: Iterable[Submission]) -> None:
        """Thread: one submission after the other."""
        try:
            for submission in submissions:
                if self._left:
                    return
                self.submit(submission)
        except Exception as error:  # raised to the caller
            self._tell(error)
        finally:
            with self._changed:
                self._feeds -= 1
                self._changed.notify_all()

    def _tell(self, error: Exception) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _wait(self) -> None:
        """Waits for a change, a moment at most. Raises Stopped."""
        self._changed.wait(LOOK_SECONDS)
        if self._stop.is_set():
            raise Stopped

    def _something_to_watch(self) -> bool:
        """Waits until there is; False when nobody receives."""
        with self._changed:
            while not self._left and not self._waiting:
                self._wait()
            return not self._left

    def _watch_request(self) -> evaluator.WatchEvaluationsRequest | None:
        with self._changed:
            self._unwatched = False
            ids = [] if self._left else list(self._waiting)
        return evaluator.WatchEvaluationsRequest(evaluation_ids=ids) if ids else None
