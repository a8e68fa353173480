"""A queue in memory for tests that hold the clock: workers take what waits, and may die, be slow or forget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from preceptor.errors import PreceptorError
from preceptor.leases import Lease, WorkerStatus
from preceptor.names import celery_task_id, split_task_id
from preceptor.queue import TRIAL_QUEUE
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types
from tests.scripted_trials import answer_batch

CANCELLED = types.Failure(reason="CANCELLED", message="nobody wants it any more")


class FakeBroker:
    """Keeps what the real one keeps in Redis. ``down``: it does not answer."""

    def __init__(self) -> None:
        self.waiting: dict[str, trial.TrialBatch] = {}
        self.queues: dict[str, str] = {}  # of every task that was ever submitted
        self.asked_for: dict[str, list[str]] = {}  # for which evaluations they were, as their messages say
        self.taken: dict[str, trial.TrialBatch] = {}
        self.leased: set[str] = set()
        self.steps: dict[str, int] = {}  # that the holder of a task tells of
        self.alive = 1  # workers
        self.serves: tuple[str, ...] = ()  # students that they are there for
        self.fences: dict[str, int] = {}  # the latest attempt at a batch that was begun
        self.done: dict[str, trial.TrialBatchResult] = {}
        self.submitted: list[str] = []
        self.batches: list[trial.TrialBatch] = []  # of those
        self.cancelled: dict[str, set[str]] = {}  # trials by task
        self.trained: list[str] = []  # trial ids, once for each training
        self.marked = False
        self.down = False

    def submit(
        self, batch: trial.TrialBatch, attempt: int, queue: str = TRIAL_QUEUE, evaluations: Sequence[str] = ()
    ) -> None:
        self._answer()
        task_id = celery_task_id(batch.id, attempt)
        self.waiting[task_id] = batch
        self.queues[task_id] = queue
        self.asked_for[task_id] = list(evaluations)
        self.submitted.append(task_id)
        self.batches.append(batch)

    def results(self, task_ids: Sequence[str]) -> dict[str, trial.TrialBatchResult]:
        self._answer()
        return {task_id: self.done[task_id] for task_id in task_ids if task_id in self.done}

    def holders(self, task_ids: Sequence[str]) -> dict[str, Lease]:
        self._answer()
        return {task_id: Lease("fake:1", self.steps.get(task_id, 0)) for task_id in task_ids if task_id in self.leased}

    def begun(self, batch_ids: Sequence[str]) -> dict[str, int]:
        self._answer()
        return {batch: self.fences[batch] for batch in batch_ids if batch in self.fences}

    def depths(self, queues: Sequence[str]) -> dict[str, int]:
        self._answer()
        return {queue: len(self.on(queue)) for queue in queues}

    def on(self, queue: str) -> list[str]:
        """The tasks that wait on a queue."""
        return [task_id for task_id in self.waiting if self.queues[task_id] == queue]

    def has_forgotten(self) -> bool:
        self._answer()
        known, self.marked = self.marked, True
        return not known

    def cancel(self, task_id: str, trial_ids: Sequence[str]) -> None:
        self._answer()
        self.cancelled.setdefault(task_id, set()).update(trial_ids)

    def workers(self) -> list[WorkerStatus]:
        self._answer()
        at = min(self.leased, default="")
        return [
            WorkerStatus(f"fake:{number}", task_id=at if number == 1 else "", peak_memory_bytes=500, serves=self.serves)
            for number in range(1, self.alive + 1)
        ]

    def take(self, queue: str = "") -> list[str]:
        """A worker takes all that waits (of one queue) and holds the leases."""
        tasks = self.on(queue) if queue else list(self.waiting)
        self.taken |= {task_id: self.waiting.pop(task_id) for task_id in tasks}
        self.leased |= set(tasks)
        self.fences |= dict(map(split_task_id, tasks))
        return tasks

    def finish(self, rule: Callable[[trial.TrialBatch], trial.TrialBatchResult] = answer_batch) -> None:
        """The worker answers what it has taken, but for what it was told to leave."""
        for task_id, batch in self.taken.items():
            left = self.cancelled.get(task_id, set())
            result = rule(batch)
            for item in result.results:
                if item.trial_id in left:
                    item.CopyFrom(trial.TrialResult(trial_id=item.trial_id, failure=CANCELLED))
            self.done[task_id] = result
            self.trained.extend(item.id for item in batch.trials if item.id not in left)
        self.die()

    def die(self) -> None:
        """The worker is gone and its leases have expired."""
        self.leased -= set(self.taken)
        self.taken = {}

    def work(self, rule: Callable[[trial.TrialBatch], trial.TrialBatchResult] = answer_batch) -> None:
        """Takes and answers all that waits."""
        self.take()
        self.finish(rule)

    def flush(self) -> None:
        """Redis loses its data."""
        self.marked = False
        self.waiting, self.done, self.leased, self.cancelled, self.fences = {}, {}, set(), {}, {}

    def _answer(self) -> None:
        if self.down:
            raise PreceptorError("BROKER_UNREACHABLE", "Redis does not answer: scripted")
