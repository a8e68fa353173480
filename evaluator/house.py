"""Puts an evaluator together from its settings."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from evaluator.attempts import History
from evaluator.batch_store import BatchStore
from evaluator.broker import Broker
from evaluator.database import Database
from evaluator.dispatch import Dispatcher
from evaluator.evaluations import Evaluations
from evaluator.feed import Feed
from evaluator.garbage import EvaluatorGarbage
from evaluator.graders.judge import Judge
from evaluator.graders.rack import Graders
from evaluator.graders.verdicts import VerdictStore
from evaluator.lanes import Lanes
from evaluator.marking import Marking
from evaluator.overview import Overview
from evaluator.settings import EvaluatorSettings
from evaluator.sight import Sight
from evaluator.store import EvaluationStore
from preceptor.artifacts import EDITS, artifact_store
from preceptor.channel import call, connect
from preceptor.telemetry import OFF, Telemetry
from preceptor.v1 import student_pb2, types_pb2
from preceptor.v1.student_pb2_grpc import StudentServiceStub

# CreateEvaluations answers at once; a student service that is down must not hold it longer than this.
STUDENT_DEADLINE_SECONDS = 15.0


class Evaluator:
    """The parts of a running evaluator. Opens the database at once, and starts the dispatcher when told to."""

    def __init__(
        self,
        settings: EvaluatorSettings,
        broker: Broker,
        clock: Callable[[], float] = time.time,
        telemetry: Telemetry = OFF,
    ) -> None:
        self._database = Database(settings.database("evaluator"))
        self._feed = Feed()
        store = EvaluationStore(self._database, clock)
        asked = settings.judge
        self._judge = Judge(asked, VerdictStore(self._database)) if asked else None
        graders = Graders(self._judge)
        overview = Overview(self._database)
        sight = Sight(self._database, telemetry)
        patience = settings.judge_patience_seconds
        self._marking = Marking(store, overview, self._feed, graders, patience, sight=sight)
        edits = partial(artifact_store, f"{settings.artifacts}/{EDITS}", settings.artifact_cache)
        self.garbage = EvaluatorGarbage(self._database, edits, clock)
        batches, history = BatchStore(self._database, clock), History(self._database)
        limits = settings.dispatch_limits
        lanes = Lanes(settings.dedicated)
        self.dispatcher = Dispatcher(
            batches, history, broker, self._marking, limits, wall_clock=clock, lanes=lanes, sight=sight
        )
        sight.at_scrape(overview, lanes, broker.workers, lambda: self._marking.under_way)
        students = connect(settings.student_address, StudentServiceStub)

        def active_student() -> types_pb2.PinnedStudent:
            request = student_pb2.GetStudentRequest()
            found = call(students.GetStudent, request, deadline=STUDENT_DEADLINE_SECONDS)
            pinned: types_pb2.PinnedStudent = found.student.pinned
            return pinned

        self.evaluations = Evaluations(
            self._database,
            store,
            self.dispatcher,
            self._marking,
            broker,
            self._feed,
            active_student,
            settings.batch_trials,
            settings.max_waiting,
            graders,
            lanes,
            sight,
        )

    def drain(self) -> None:
        """Ends watches and the dispatcher; calls under way may still finish."""
        self._feed.close()
        self.dispatcher.stop()
        self._marking.stop()

    def close(self) -> None:
        """Closes judge and database, after the last call. What was not graded is graded after the next start."""
        if self._judge is not None:
            self._judge.close()
        self._marking.close()
        self._database.close()
