"""Has self-edits measured by the evaluator: all alike, or in a race; controls beside them; the best on fresh seeds.

``assess`` only asks; what is asked next follows from results alone, and the evaluator knows what it has measured
before, so the same question asked again is answered at once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from preceptor import racing
from preceptor.channel import call, new_request_id, stream
from preceptor.errors import PreceptorError
from preceptor.protocols import look_protocol
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import types_pb2 as types

if TYPE_CHECKING:
    from preceptor.v1.evaluator_pb2_grpc import EvaluatorServiceStub

# A watch is renewed after so long: a dead stack is noticed, and the workers are counted.
RENEW_SECONDS = 2.0
# The embedded stack starts a dead evaluator again within seconds; a busy small machine may need a minute.
PATIENCE_SECONDS = 90.0
# A person waits for Ctrl-C to work.
CANCEL_SECONDS = 3.0
_PASSING = frozenset(
    {"SERVICE_UNREACHABLE", "SHUTTING_DOWN", "SERVICE_BUSY", "RATE_LIMITED", "DEADLINE_EXCEEDED", "CANCELLED"}
)
FINAL = (pb.EVALUATION_STATE_SUCCEEDED, pb.EVALUATION_STATE_FAILED, pb.EVALUATION_STATE_CANCELLED)


@dataclass(frozen=True, slots=True)
class Progress:
    """What is done, of what has been asked for so far."""

    phase: str
    done: int
    total: int
    workers: int | None  # None: not known yet
    what: str = "evaluations"


class Asks(Protocol):
    """Has self-edits of one task evaluated."""

    def evaluate(
        self, phase: str, self_edits: Sequence[types.SelfEdit], protocol: pb.EvaluationProtocol
    ) -> list[pb.Evaluation]:
        """Their evaluations in their final states, in order. ``phase`` is for people."""


@dataclass(slots=True)
class Measured:
    """A self-edit and what is known of it. Without a race there is no look, and nobody is stopped."""

    name: str
    self_edit: types.SelfEdit
    evaluation: pb.Evaluation | None = None
    look: pb.Evaluation | None = None
    fresh: pb.Evaluation | None = None
    stopped: bool = False

    @property
    def succeeded(self) -> bool:
        """Whether it has a reward."""
        return self.evaluation is not None and self.evaluation.state == racing.SUCCEEDED

    @property
    def failed(self) -> pb.Evaluation | None:
        """What of it came to nothing, if anything did."""
        for one in (self.look, self.evaluation, self.fresh):
            if one is not None and one.state != racing.SUCCEEDED:
                return one
        return None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure: candidates and controls under ``protocol``, whose seeds are the most that anybody gets."""

    protocol: pb.EvaluationProtocol
    candidates: Sequence[Measured]
    controls: Sequence[Measured]
    race: racing.RaceSettings | None = None
    fresh_seeds: Sequence[int] = ()


def assess(plan: Plan, asks: Asks) -> None:
    """Fills in what ``plan`` asks for. The same self-edit written twice is one candidate."""
    unique = list({one.self_edit.SerializeToString(deterministic=True): one for one in plan.candidates[::-1]}.values())
    unique.reverse()
    if plan.race is not None:
        _run_race(plan, plan.race, unique, asks)
        _measure(asks, "controls", plan.controls, plan.protocol)
    else:
        _measure(asks, "measuring", [*unique, *plan.controls], plan.protocol)
    if plan.fresh_seeds:
        for at in racing.best([_as_candidate(one) for one in unique], racing.RaceSettings()):
            fresh = _with_seeds(plan.protocol, plan.fresh_seeds)
            (unique[at].fresh,) = asks.evaluate("fresh seeds", [unique[at].self_edit], fresh)
    for one in plan.candidates:
        twin = next(other for other in unique if other.self_edit == one.self_edit)
        one.evaluation, one.look, one.fresh, one.stopped = twin.evaluation, twin.look, twin.fresh, twin.stopped


def _run_race(plan: Plan, settings: racing.RaceSettings, runners: Sequence[Measured], asks: Asks) -> None:
    look = look_protocol(plan.protocol, settings.look_steps)
    while (step := racing.next_step([_as_candidate(one) for one in runners], settings)) is not None:
        asked = [runners[i] for i in step.candidates]
        if step.look:
            for one, found in zip(asked, asks.evaluate("first look", _edits(asked), look), strict=True):
                one.look = found
        else:
            seeds = plan.protocol.seeds[: step.seeds]
            _measure(asks, f"race, seed {step.seeds}", asked, _with_seeds(plan.protocol, seeds))
    for one, stopped in zip(runners, racing.stopped([_as_candidate(one) for one in runners], settings), strict=True):
        one.stopped = stopped


def _measure(asks: Asks, phase: str, asked: Sequence[Measured], protocol: pb.EvaluationProtocol) -> None:
    if asked:
        for one, found in zip(asked, asks.evaluate(phase, _edits(asked), protocol), strict=True):
            one.evaluation = found


def _as_candidate(one: Measured) -> racing.Candidate:
    return racing.Candidate(look=one.look, evaluation=one.evaluation)


def _edits(some: Sequence[Measured]) -> list[types.SelfEdit]:
    return [one.self_edit for one in some]


def _with_seeds(protocol: pb.EvaluationProtocol, seeds: Sequence[int]) -> pb.EvaluationProtocol:
    changed = pb.EvaluationProtocol()
    changed.CopyFrom(protocol)
    changed.seeds[:] = seeds
    return changed


@dataclass
class EvaluatorAsks:
    """Asks over gRPC, on behalf of one command (``owner``). Counts what was known and how often sealed questions were
    opened."""

    stub: EvaluatorServiceStub
    owner: str
    task: types.Task
    student: types.PinnedStudent
    show: Callable[[Progress], None] = lambda _progress: None
    check: Callable[[], None] = lambda: None  # called every few seconds; may raise
    patience: float = PATIENCE_SECONDS
    openings: int = 0
    cached: int = 0
    done: int = 0
    total: int = 0
    workers: int | None = None

    def evaluate(
        self, phase: str, self_edits: Sequence[types.SelfEdit], protocol: pb.EvaluationProtocol
    ) -> list[pb.Evaluation]:
        """As promised by Asks. Raises what the evaluator raises, and what ``check`` does."""
        return self.evaluate_groups(phase, [(self.task, self_edits)], protocol)[0]

    def evaluate_groups(
        self,
        phase: str,
        asked: Sequence[tuple[types.Task, Sequence[types.SelfEdit]]],
        protocol: pb.EvaluationProtocol,
    ) -> list[list[pb.Evaluation]]:
        """The same for the self-edits of several tasks in one request."""
        self.check()
        (task, self_edits), *more = asked
        request = pb.CreateEvaluationsRequest(
            request_id=new_request_id(),
            owner=self.owner,
            task=task,
            self_edits=self_edits,
            more=[pb.TaskSelfEdits(task=other, self_edits=edits) for other, edits in more],
            protocol=protocol,
            student=self.student,
        )
        answer = call(self.stub.CreateEvaluations, request)
        found = {one.id: one for one in answer.evaluations}
        self.openings = max([self.openings, *(opening.owners for opening in answer.openings)])
        self.cached += sum(one.cached for one in found.values())
        self.total += len(found)
        waiting = {one.id for one in found.values() if one.state not in FINAL}
        self.done += len(found) - len(waiting)
        self._show(phase)
        heard = time.monotonic()
        while waiting:
            self.check()
            try:
                watch = pb.WatchEvaluationsRequest(evaluation_ids=sorted(waiting))
                for response in stream(self.stub.WatchEvaluations, watch, deadline=RENEW_SECONDS):
                    heard = time.monotonic()
                    if response.evaluation.id in waiting and response.evaluation.state in FINAL:
                        waiting.remove(response.evaluation.id)
                        found[response.evaluation.id] = response.evaluation
                        self.done += 1
                        self._show(phase)
                self._count_workers()
                heard = time.monotonic()
            except PreceptorError as error:
                if error.reason not in _PASSING or time.monotonic() - heard > self.patience:
                    raise
                if error.reason != "DEADLINE_EXCEEDED":
                    time.sleep(0.2)
                with suppress(PreceptorError):
                    self._count_workers()
                    heard = time.monotonic()
            self._show(phase)
        each = iter(found[one.id] for one in answer.evaluations)
        return [[next(each) for _ in edits] for _, edits in asked]

    def cancel(self) -> None:
        """Nobody wants the answers any more."""
        request = pb.CancelEvaluationsRequest(request_id=new_request_id(), owner=self.owner)
        with suppress(PreceptorError):  # then it is measured for nothing, which is no harm
            call(self.stub.CancelEvaluations, request, deadline=CANCEL_SECONDS)

    def _count_workers(self) -> None:
        self.workers = call(self.stub.GetQueueStatus, pb.GetQueueStatusRequest(), deadline=5).workers_alive

    def _show(self, phase: str) -> None:
        self.show(Progress(phase, self.done, self.total, self.workers))


def assess_interruptibly(plan: Plan, asks: EvaluatorAsks, show: Callable[[Progress], None], timeout: float) -> None:
    """``assess`` in a thread, shown by this one; whatever ends it early, what was asked for is cancelled.

    Ctrl-C raises in the main thread, and gRPC, when an exception reaches it in the wrong place, leaves its channel in a
    state in which closing it hangs: so the main thread never calls it. Raises PreceptorError(DEADLINE_EXCEEDED) after
    ``timeout`` seconds.
    """
    news: queue.SimpleQueue[Progress | Exception | None] = queue.SimpleQueue()
    leaving = threading.Event()
    check = asks.check

    def check_both() -> None:
        if leaving.is_set():
            raise PreceptorError("CANCELLED", "nobody waits any more")
        check()

    def work() -> None:
        try:
            assess(plan, asks)
            news.put(None)
        except Exception as error:  # raised again below
            news.put(error)

    asks.show, asks.check = news.put, check_both
    threading.Thread(target=work, name="assess", daemon=True).start()
    end = time.monotonic() + timeout
    try:
        while True:
            try:
                heard = news.get(timeout=max(end - time.monotonic(), 0.001))
            except queue.Empty:
                workers = "no worker is" if asks.workers == 0 else f"{asks.workers} workers are"
                raise PreceptorError(
                    "DEADLINE_EXCEEDED", f"{asks.done} of {asks.total} evaluations after {timeout:g} s; {workers} alive"
                ) from None
            if heard is None:
                return
            if isinstance(heard, Exception):
                raise heard
            show(heard)
    except BaseException:  # Ctrl-C and SIGTERM too; it goes on its way
        leaving.set()
        canceller = threading.Thread(target=asks.cancel, name="cancel", daemon=True)
        canceller.start()
        canceller.join(CANCEL_SECONDS + 1)
        raise
