"""An evaluator without processes, whose clock and queue a test holds."""

from __future__ import annotations

from pathlib import Path

from evaluator.attempts import History
from evaluator.batch_store import BatchStore
from evaluator.database import Database
from evaluator.dispatch import Dispatcher
from evaluator.evaluations import Evaluations
from evaluator.feed import Feed
from evaluator.flights import DispatchLimits
from evaluator.graders.judge import Judge, JudgeSettings
from evaluator.graders.rack import Graders
from evaluator.graders.verdicts import VerdictStore
from evaluator.lanes import Lanes
from evaluator.marking import Marking
from evaluator.overview import Overview
from evaluator.sight import Sight
from evaluator.store import EvaluationStore
from preceptor.telemetry import OFF, Telemetry
from preceptor.v1 import evaluator_pb2 as pb
from tests.evaluation_requests import STUDENT, group
from tests.fake_broker import FakeBroker

LIMITS = DispatchLimits(max_attempts=2, in_flight=4, lease_grace=4.0, orphan_seconds=60.0, stall_seconds=120.0)
QUEUED, RUNNING = pb.EVALUATION_STATE_QUEUED, pb.EVALUATION_STATE_RUNNING
SUCCEEDED, FAILED, CANCELLED = (
    pb.EVALUATION_STATE_SUCCEEDED,
    pb.EVALUATION_STATE_FAILED,
    pb.EVALUATION_STATE_CANCELLED,
)


class House:
    """An evaluator whose dispatcher is stepped by hand. ``where``: a file for SQLite, or a database's URL."""

    def __init__(
        self,
        where: Path | str,
        broker: FakeBroker,
        judge: JudgeSettings | None = None,
        patience: float = 60.0,
        limits: DispatchLimits = LIMITS,
        max_waiting: int = 1000,
        database: type[Database] = Database,
        dedicated: tuple[str, ...] = (),
        telemetry: Telemetry = OFF,
    ) -> None:
        self.url = where if isinstance(where, str) else f"sqlite:///{where}"
        self.broker, self.now = broker, 0.0
        self.limits, self.max_waiting, self.database_type = limits, max_waiting, database
        self.judge_settings, self.patience, self.dedicated = judge, patience, dedicated
        self.telemetry = telemetry
        self.open()

    def open(self) -> None:
        self.database = self.database_type(self.url)
        self.feed = Feed()
        store = EvaluationStore(self.database, self.time)
        self.batches, self.history = BatchStore(self.database, self.time), History(self.database)
        asked = self.judge_settings
        self.judge = Judge(asked, VerdictStore(self.database)) if asked else None
        graders = Graders(self.judge)
        sight = Sight(self.database, self.telemetry)
        overview = Overview(self.database)
        self.marking = Marking(store, overview, self.feed, graders, self.patience, pause=0.02, sight=sight)
        lanes = Lanes(self.dedicated)
        self.dispatcher = Dispatcher(
            self.batches,
            self.history,
            self.broker,
            self.marking,
            self.limits,
            lambda: self.now,
            self.time,
            lanes,
            sight,
        )
        sight.at_scrape(overview, lanes, self.broker.workers, lambda: self.marking.under_way)
        self.evaluations = Evaluations(
            self.database,
            store,
            self.dispatcher,
            self.marking,
            self.broker,
            self.feed,
            lambda: STUDENT,
            batch_trials=8,
            max_waiting=self.max_waiting,
            graders=graders,
            lanes=lanes,
            sight=sight,
        )

    def time(self) -> float:
        return 1e9 + self.now

    def close(self) -> None:
        self.marking.stop()
        if self.judge is not None:
            self.judge.close()
        self.marking.close()
        self.database.close()

    def restart(self) -> None:
        """As after SIGKILL: only what is in SQL and in the broker is left."""
        self.close()
        self.open()

    def step(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.dispatcher.step()

    def pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            self.step(1)

    def create(self, *documents: str, **options: object) -> list[pb.Evaluation]:
        return self.evaluations.create(group(*documents, **options))  # type: ignore[arg-type]

    def cancel(self, owner: str = "run-1", request_id: str = "c1") -> int:
        return self.evaluations.cancel(pb.CancelEvaluationsRequest(request_id=request_id, owner=owner))

    def told(self) -> set[str]:
        """The documents of the trials that workers were told to leave."""
        known = {item.id: "".join(item.documents) for batch in self.broker.batches for item in batch.trials}
        return {known[one] for left in self.broker.cancelled.values() for one in left}

    def states(self, made: list[pb.Evaluation]) -> list[int]:
        return [self.evaluations.get(item.id).state for item in made]
