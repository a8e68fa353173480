"""What an experiment works with: runs, self-edits and evaluations of one stack, behind few methods.

All of them can be asked again at no cost: a run's request id is the hash of what it asks for, the teacher knows what it
has written, the evaluator what it has measured. Nothing here knows an experiment.

``work`` runs an experiment in a thread: Ctrl-C raises in the main thread, and gRPC, when an exception reaches it in the
wrong place, leaves its channel in a state in which closing it hangs. So the main thread only shows what it hears, and
on the way out has cancelled what was asked for.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from preceptor.channel import call, connect, new_request_id, stream
from preceptor.cli.follow import fetch_results, raise_if_unsuccessful, snapshots
from preceptor.cli.measuring import EvaluatorAsks, Progress
from preceptor.cli.run_request import create_request
from preceptor.cli.runs import resume_run
from preceptor.errors import PreceptorError
from preceptor.names import sha256
from preceptor.reproduce.experiment import Step
from preceptor.task_sources import gather_tasks
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import orchestrator_pb2 as orchestrator
from preceptor.v1 import student_pb2 as students
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import types_pb2 as types

if TYPE_CHECKING:
    from preceptor.config import RunConfig
    from preceptor.settings import HouseSettings
    from preceptor.stack import Stack

T = TypeVar("T")

# A person waits for Ctrl-C to work.
CANCEL_SECONDS = 3.0
# A folder of a large model is hashed, one of a hub looked up.
REGISTER_SECONDS = 600.0
# A large teacher on a slow machine; a stream as a whole gets so many seconds per task.
GENERATE_SECONDS_PER_TASK = 600.0
# The embedded stack starts a dead teacher again within seconds; a busy small machine may need a minute.
PATIENCE_SECONDS = 90.0
_PASSING = frozenset({"SERVICE_UNREACHABLE", "SHUTTING_DOWN", "SERVICE_BUSY", "RATE_LIMITED", "DEADLINE_EXCEEDED"})
# With these the stack itself is lost, or nobody wants the answer any more: no other arm would fare better.
FATAL = frozenset({"CANCELLED", "SERVICE_UNREACHABLE", "STACK_NOT_UP", "DISK_FULL", "UNAUTHENTICATED", "TLS_FAILED"})


class View(Protocol):
    """Shows what happens."""

    def say(self, message: str) -> None:
        """One line."""

    def step(self, number: int, steps: int, words: str, seconds_left: float | None) -> None:
        """A step begins (number from 1). ``seconds_left``: of all steps from this one on; None: not known yet."""

    def show(self, snapshot: orchestrator.WatchRunResponse) -> None:
        """Where a run stands."""

    def progress(self, progress: Progress) -> None:
        """Where evaluations that are no run's stand."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A part that came to nothing."""

    what: str
    reason: str
    message: str


@dataclass
class Lab:
    """One stack for the time of one experiment. ``out``: where each run leaves its own summary and report."""

    addresses: HouseSettings
    steps: Sequence[Step]
    out: Path | None = None
    stack: Stack | None = None
    tell: Callable[[Callable[[View], None]], None] = lambda _news: None  # hears what the view is to be told
    leaving: threading.Event = field(default_factory=threading.Event)
    failures: list[Failed] = field(default_factory=list)
    owner: str = field(default_factory=lambda: f"reproduce-{new_request_id()}")

    evaluations: int = 0  # asked for, by runs too
    known: int = 0  # of them those that had been measured before
    _counting: threading.Lock = field(default_factory=threading.Lock)
    _number: int = 0
    _began: float = field(default_factory=time.monotonic)
    _run: str = ""  # that goes on now
    _asked: bool = False  # for evaluations, which may go on

    # ---- what is shown

    def say(self, message: str) -> None:
        """One line for people."""
        self.tell(lambda view: view.say(message))

    def step(self) -> None:
        """The next of the steps begins."""
        self.check()
        done, number = self.steps[: self._number], self._number + 1
        words = self.steps[self._number].words if self._number < len(self.steps) else "finishing"
        spent, weights = time.monotonic() - self._began, [_weight(step) for step in self.steps]
        left = spent / sum(weights[: len(done)]) * sum(weights[len(done) :]) if done else None
        self._number = number
        self.tell(lambda view: view.step(number, len(self.steps), words, left))

    # ---- what fails

    def attempt(self, what: str, do: Callable[[], T]) -> T | None:
        """``do()``; where it fails that is counted and said, and None is given, so that the rest goes on.

        Raises PreceptorError where the rest could not go on: the stack is lost, or the command is leaving.
        """
        try:
            return do()
        except PreceptorError as error:
            self.check()
            if error.reason in FATAL:
                raise
            self.failures.append(Failed(what, error.reason, str(error)))
            self.say(f"{what} failed: {error} ({error.reason}); the rest goes on")
            return None

    def check(self) -> None:
        """Raises PreceptorError: CANCELLED where the command is leaving, and what an embedded stack has failed with."""
        if self.leaving.is_set():
            raise PreceptorError("CANCELLED", "nobody waits any more")
        if self.stack is not None and self.stack.failed:
            raise self.stack.failed

    # ---- what is done

    def run(self, config: RunConfig) -> dict[str, Any]:
        """The summary of a run of this very config: of the one that is there, if there is one. Its summary and report
        go to ``out``/NAME-SEED-STUDENT.

        Raises PreceptorError where the run did not succeed, and for a config or tasks that are wrong.
        """
        tasks = gather_tasks(config)
        stub = self._orchestrator
        run_id = call(stub.CreateRun, create_request(config, tasks, once=True)).run.id
        self._run = run_id
        run = resume_run(stub, run_id)
        there = run.state == orchestrator.RUN_STATE_SUCCEEDED
        for snapshot in snapshots(stub, run_id, self.check):
            self.tell(lambda view, shown=snapshot: view.show(shown))  # type: ignore[misc]
            run = snapshot.run
        self._run = ""
        raise_if_unsuccessful(run)
        if self.out is None:
            answer = call(stub.GetRunReport, orchestrator.GetRunReportRequest(run_id=run_id), deadline=180)
            summary: dict[str, Any] = json.loads(answer.summary_json)
        else:
            name = "-".join(part for part in (config.name, str(config.seed), config.student.name) if part)
            summary = fetch_results(stub, run_id, self.out / "runs" / name).summary
        asked, known = evaluations_of(summary)
        self._count(asked, asked if there else known)
        # What its teacher took to learn, when it did: the run may have found it trained.
        start, *learnt = summary["policies"]
        took = sum(self.policy(policy).seconds for policy in set(learnt) - {start})
        return {**summary, "update_seconds": took}

    def student(self, name: str = "") -> students.Student:
        """A registered student; the active one without a name. Raises PreceptorError(STUDENT_NOT_FOUND, ...)."""
        found: students.Student = call(self._students.GetStudent, students.GetStudentRequest(name=name)).student
        return found

    def policy(self, policy_id: str = "") -> teacher.Policy:
        """A policy; the active one without an id. Raises PreceptorError(POLICY_NOT_FOUND)."""
        asked = teacher.GetPolicyRequest(policy_id=policy_id)
        found: teacher.Policy = call(self._teacher.GetPolicy, asked).policy
        return found

    def register(self, name: str, source: str) -> None:
        """Registers a student; where this very source has the name already, nothing changes.

        Raises PreceptorError(STUDENT_NAME_TAKEN), and what is wrong with the source.
        """
        # The same id for the same request: asked again, it is answered as it was.
        request_id = f"reproduce-{sha256(f'{name} {source}')[:32]}"
        request = students.RegisterStudentRequest(request_id=request_id, name=name, source=source)
        call(self._students.RegisterStudent, request, deadline=REGISTER_SECONDS)

    def base_policy(self) -> str:
        """The untouched teacher: the root of the active policy."""
        policy = self.policy()
        while policy.parent_id:
            policy = self.policy(policy.parent_id)
        return policy.id

    def write(self, request: teacher.GenerateSelfEditsRequest) -> list[teacher.GenerateSelfEditsResponse]:
        """The groups that the teacher writes, in the order of the request's tasks. Raises PreceptorError."""
        deadline, heard = GENERATE_SECONDS_PER_TASK * max(1, len(request.tasks)), time.monotonic()
        while True:
            self.check()
            try:
                groups = []
                for group in stream(self._teacher.GenerateSelfEdits, request, deadline=deadline):
                    self.check()
                    heard = time.monotonic()
                    groups.append(group)
                return groups
            except PreceptorError as error:
                if error.reason not in _PASSING or time.monotonic() - heard > PATIENCE_SECONDS:
                    raise
                time.sleep(0.5)  # what was written is known and comes at once

    def evaluate(
        self,
        words: str,
        asked: Sequence[tuple[types.Task, Sequence[types.SelfEdit]]],
        protocol: evaluator.EvaluationProtocol,
        student: types.PinnedStudent,
    ) -> list[list[evaluator.Evaluation]]:
        """The evaluations of each task's self-edits in their final states (failed ones too), in order.

        All are asked for in one request, so they are trained together where that is worth it; several threads may ask
        at once. Raises PreceptorError.
        """
        asks = EvaluatorAsks(
            stub=self._evaluator,
            owner=self.owner,
            task=types.Task(),
            student=student,
            show=lambda progress: self.tell(lambda view: view.progress(progress)),
            check=self.check,
        )
        self._asked = True
        groups = asks.evaluate_groups(words, asked, protocol)
        self._count(asks.total, asks.cached)
        return groups

    def _count(self, asked: int, known: int) -> None:
        with self._counting:
            self.evaluations += asked
            self.known += known

    # ---- Ctrl-C

    def cancel(self) -> None:
        """Nobody wants what is going on any more: evaluations end, and so does the run of a stack that is about to go
        down (else the next stack would go on with it unasked)."""
        if self._asked:
            wish = evaluator.CancelEvaluationsRequest(request_id=new_request_id(), owner=self.owner)
            with suppress(PreceptorError):  # then it is measured for nothing, which is no harm
                call(self._evaluator.CancelEvaluations, wish, deadline=CANCEL_SECONDS)
        if self._run and self.stack is not None:
            request = orchestrator.CancelRunRequest(request_id=new_request_id(), run_id=self._run)
            with suppress(PreceptorError):  # then it does go on by itself, which is no harm
                call(self._orchestrator.CancelRun, request, deadline=CANCEL_SECONDS)

    # ---- services

    @cached_property
    def _orchestrator(self) -> Any:
        from preceptor.v1.orchestrator_pb2_grpc import OrchestratorServiceStub

        return connect(self.addresses.orchestrator_address, OrchestratorServiceStub)

    @cached_property
    def _evaluator(self) -> Any:
        from preceptor.v1.evaluator_pb2_grpc import EvaluatorServiceStub

        return connect(self.addresses.evaluator_address, EvaluatorServiceStub)

    @cached_property
    def _teacher(self) -> Any:
        from preceptor.v1.teacher_pb2_grpc import TeacherServiceStub

        return connect(self.addresses.teacher_address, TeacherServiceStub)

    @cached_property
    def _students(self) -> Any:
        from preceptor.v1.student_pb2_grpc import StudentServiceStub

        return connect(self.addresses.student_address, StudentServiceStub)


def evaluations_of(summary: Mapping[str, Any]) -> tuple[int, int]:
    """Evaluations of a run, and how many of them were known before."""
    counts = [
        part["evaluations"] for part in (*summary["rounds"], summary.get("heldout") or {}) if "evaluations" in part
    ]
    return sum(of["succeeded"] + of["failed"] for of in counts), sum(of["cached"] for of in counts)


def _weight(step: Step) -> float:
    return step.trained_tokens or step.written_tokens or float(step.trials or 1)


@dataclass(frozen=True, slots=True)
class _Done(Generic[T]):
    result: T


def work(lab: Lab, do: Callable[[Lab], T], view: View, timeout: float | None = None) -> T:
    """``do(lab)`` in a thread, shown by this one; whatever ends it early, what was asked for is cancelled.

    Raises PreceptorError(DEADLINE_EXCEEDED) after ``timeout`` seconds.
    """
    news: queue.SimpleQueue[Callable[[View], None] | _Done[T] | BaseException] = queue.SimpleQueue()
    lab.tell = news.put

    def run() -> None:
        try:
            news.put(_Done(do(lab)))
        except BaseException as error:  # raised again below
            news.put(error)

    threading.Thread(target=run, name="lab", daemon=True).start()
    end = math.inf if timeout is None else time.monotonic() + timeout
    try:
        while True:
            try:
                heard = news.get(timeout=None if timeout is None else max(end - time.monotonic(), 0.001))
            except queue.Empty:
                raise PreceptorError("DEADLINE_EXCEEDED", f"not done after {timeout:g} s") from None
            if isinstance(heard, _Done):
                return heard.result
            if isinstance(heard, BaseException):
                raise heard
            heard(view)
    except BaseException:  # Ctrl-C and SIGTERM too; it goes on its way
        lab.leaving.set()
        canceller = threading.Thread(target=lab.cancel, name="cancel", daemon=True)
        canceller.start()
        canceller.join(CANCEL_SECONDS + 1)
        raise
