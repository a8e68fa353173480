"""The queues of batches: one for each dedicated student, one for all others; and what the dispatcher knows of each.

Every lane has its own room, its own order and its own workers. So one that nobody serves holds a few batches on its
queue, keeps the rest in SQL and is in nobody's way.

Which students are dedicated is a setting, and may be another after a restart: a batch goes to the queue that its
student has now. One that is on the queue that it had before is taken there, if anybody still serves it; otherwise it is
missed on its new queue, and submitted to that (``evaluator.dispatch``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from preceptor.leases import WorkerStatus
from preceptor.queue import queue_of, served_queues

# One that it works on and one that it finds when it is done; the dispatcher looks many times in between.
BATCHES_PER_WORKER = 2
# With few workers, or none yet: somebody who starts finds work at once.
FEWEST_BATCHES = 4


@dataclass(slots=True)
class Lane:
    """A queue. ``student`` is empty for the one of all students that have none of their own."""

    queue: str
    student: str = ""
    most: int = FEWEST_BATCHES  # batches on the queue at once
    newest_begun: int = 0  # the number of the newest submission that somebody has taken
    work_may_wait: bool = True  # spares SQL a look in every turn; only ever set by others, cleared before a look


class Lanes:
    """All lanes of an evaluator. Safe to use from several threads."""

    def __init__(self, dedicated: Collection[str] = ()) -> None:
        """``dedicated``: names of the students that have a queue of their own."""
        self.dedicated = tuple(sorted(set(dedicated)))
        own = [Lane(queue_of(one, self.dedicated), one) for one in self.dedicated]
        self._lanes = {lane.queue: lane for lane in (Lane(queue_of("")), *own)}

    def __iter__(self) -> Iterator[Lane]:
        """The one of all others first."""
        return iter(self._lanes.values())

    def of(self, student: str) -> Lane:
        """Where a student's batches go."""
        return self._lanes[queue_of(student, self.dedicated)]

    @property
    def queues(self) -> list[str]:
        """Their names."""
        return list(self._lanes)

    def work_may_wait(self) -> bool:
        """Whether there may be batches in SQL for any of them."""
        return any(lane.work_may_wait for lane in self._lanes.values())

    def expect_work(self) -> None:
        """There may be new batches."""
        for lane in self._lanes.values():
            lane.work_may_wait = True

    def make_room(self, workers: Collection[WorkerStatus], most: int) -> None:
        """Each queue holds two batches for each worker that serves it, ``most`` at most."""
        serving = serving_workers(workers)
        for lane in self._lanes.values():
            lane.most = min(max(BATCHES_PER_WORKER * serving[lane.queue], FEWEST_BATCHES), most)


def serving_workers(workers: Collection[WorkerStatus]) -> Counter[str]:
    """How many of these workers take batches from each queue."""
    return Counter(queue for worker in workers for queue in served_queues(worker.serves))
