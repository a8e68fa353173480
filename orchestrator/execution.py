"""One execution of a run, from where its ledger ends to its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import Engine

from orchestrator.entries import Entry, canary_stage, round_stage
from orchestrator.evaluator_client import EvaluatorClient
from orchestrator.heldout import HeldoutMeasurement
from orchestrator.ledger import Ledger
from orchestrator.loop import Loop
from orchestrator.plan import RunPlan
from orchestrator.progress import Progress
from orchestrator.question_writing import QuestionWriting
from orchestrator.report import ReportRenderer
from orchestrator.results import collect
from orchestrator.run_store import RUNNING, SUCCEEDED, RunRecord, RunStore
from orchestrator.sight import RunSight
from orchestrator.stop import Stop
from orchestrator.summary import build_summary, to_json
from orchestrator.teacher_client import TeacherClient
from orchestrator.timing import RUN, RunClock
from preceptor.telemetry import OFF, Telemetry
from preceptor.v1 import evaluator_pb2_grpc, student_pb2_grpc, teacher_pb2_grpc


@dataclass(frozen=True, slots=True)
class Services:
    """The services that a run uses; and, asked now, how many seconds the evaluator's clock is ahead of ours."""

    teacher: teacher_pb2_grpc.TeacherServiceStub
    student: student_pb2_grpc.StudentServiceStub
    evaluator: evaluator_pb2_grpc.EvaluatorServiceStub
    evaluator_ahead: Callable[[], float] = lambda: 0.0
    external_teacher: teacher_pb2_grpc.TeacherServiceStub | None = None  # of the arm external_teacher


class Execution:
    """A run while this process works on it."""

    def __init__(
        self,
        engine: Engine,
        record: RunRecord,
        services: Services,
        renderer: ReportRenderer,
        patience_seconds: float,
        telemetry: Telemetry = OFF,
    ) -> None:
        self._sight = RunSight(telemetry, record.id)
        self.stop = Stop()
        self._record = record
        self._store = RunStore(engine)
        self._renderer = renderer
        self._plan = RunPlan.of(record)
        self._clock = RunClock(engine, record.id)
        self.progress = Progress(self._plan.config.rounds.count, self._plan.planned_self_edits, self._clock.elapsed)
        if record.first_reward_seconds is not None:
            self.progress.first_reward(record.first_reward_seconds)
        # Evaluations carry the evaluator's time, so the ledger compares them with when the run began by that clock.
        began = record.created + (self._store.evaluator_clock(record.id) or 0.0)
        self._ledger = Ledger(engine, record.id, began, self._changed)
        hindered = self.progress.hindered
        self._teacher = TeacherClient(services.teacher, patience_seconds, self.stop, hindered)
        self._external = (
            TeacherClient(
                services.external_teacher, patience_seconds, self.stop, hindered, "external teacher", needed=False
            )
            if services.external_teacher is not None
            else None
        )
        self._evaluator = EvaluatorClient(
            services.evaluator, patience_seconds, self.stop, self._ledger.opened, hindered
        )

    def run(self) -> None:
        """Does what is left of the run. Raises PreceptorError, Stopped."""
        try:
            with self._sight.run():
                self._run()
        finally:
            self.stop.set()  # ends the threads of an evaluation that was given up
            self._clock.flush()

    def _run(self) -> None:
        self.progress.enter("starting")
        self._ask_again_after_resume()
        self.progress.show(self._ledger.entries())
        base = self._base_policy()
        self._plan = QuestionWriting(self._plan, self._teacher, self._ledger, self.progress).plan(base)
        parts = (self._plan, self._teacher, self._evaluator, self._ledger, self._clock, self.progress)
        start = self._plan.config.teacher.policy or base
        if start != base:
            self._teacher.check_start(start, base)
        trained = Loop(*parts, self._sight).run(start)
        HeldoutMeasurement(*parts, self.stop, self._external).measure(base, trained)
        if trained not in (base, start):  # what was not learnt here is not this run's to activate
            self._teacher.activate(trained, f"{self._record.id}.activate")
        self._report()

    def _ask_again_after_resume(self) -> None:
        """A run that was resumed on request tries failed evaluations again, outside the rounds that are done."""
        if self._record.resumes:
            rounds = [round_stage(number) for number in self._ledger.finished_rounds()]
            looks = [canary_stage(look.round) for look in self._ledger.labels.looks()]
            self._ledger.ask_again([*rounds, *looks])

    def _base_policy(self) -> str:
        if self._record.base_policy:
            return self._record.base_policy
        config = self._plan.config
        base = self._teacher.base_policy(learns=config.update.algorithm != "none" and config.rounds.count > 0)
        self._store.set_base_policy(self._record.id, base)
        return base

    def _report(self) -> None:
        self.progress.enter("writing the report")
        self._clock.switch(RUN, "other")
        record = self._store.get(self._record.id)
        results = collect(record, self._plan, self._ledger, self._clock.totals())
        summary = build_summary(results)
        html = self._renderer.render(results, summary)
        self.stop.check()
        self._store.move(record.id, SUCCEEDED, only_from=(RUNNING,), summary_json=to_json(summary), report_html=html)

    def _changed(self, entries: Sequence[Entry]) -> None:
        if self.progress.first_reward_seconds is None and any(entry.reward is not None for entry in entries):
            seconds = self._clock.elapsed()
            self._store.set_first_reward(self._record.id, seconds)
            self.progress.first_reward(seconds)
        self._clock.tick()
        self.progress.show(entries)
