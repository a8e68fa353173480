"""Batches under way, as the dispatcher remembers them between two looks, and what a look says of each. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from evaluator.attempts import Ending
from evaluator.batch_store import BatchRecord
from evaluator.database import BatchState
from preceptor.leases import Lease
from preceptor.names import celery_task_id
from preceptor.queue import TRIAL_QUEUE


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """Numbers of the dispatcher; times in seconds."""

    max_attempts: int = 5  # tries of the same work; for the reason of the number see evaluator.dispatch
    in_flight: int = 256  # batches on a queue at once, however many workers there are
    poll_seconds: float = 0.05  # 20 looks a second, each one round trip
    lease_grace: float = 3.0  # after a lease has expired: one beat and a half; with it a kill is noticed in about 11 s
    orphan_seconds: float = 60.0  # longer than a worker needs from taking a job to its first beat
    # A stuck worker ends itself after 300 s, or 1800 s of loading a model (student.settings); this is for one whose
    # watchdog is stuck, too, so it is longer.
    stall_seconds: float = 2400.0
    history_seconds: float = 30 * 86400.0  # ended attempts are remembered so long


@dataclass(frozen=True, slots=True)
class Look:
    """What is known of the queue and its workers at one moment."""

    now: float  # seconds, monotonic
    leases: dict[str, Lease]  # by task
    fences: dict[str, int]  # the latest attempt that was begun, by batch
    empty: Collection[str]  # the queues on which nothing waits
    queue_was_lost: bool  # with everything on it


@dataclass(slots=True)
class Flight:
    """A batch under way."""

    record: BatchRecord
    last_sign: float  # when its lease was last seen, or when it was last known to be on the queue
    number: int  # in the order of submission
    queue: str = TRIAL_QUEUE
    gone: bool = False  # from the queue, with everything else
    lease: Lease | None = None  # as last seen
    moved: float = 0.0  # when it last changed: with every step and every chunk of answers

    @property
    def task_id(self) -> str:
        """The present attempt. Only its lease is a sign of life: who wakes up at an earlier one is soon fenced off."""
        return celery_task_id(self.record.id, self.record.attempt)

    @property
    def task_ids(self) -> list[str]:
        """All attempts whose result would be taken."""
        record = self.record
        return [celery_task_id(record.id, attempt) for attempt in range(record.since, record.attempt + 1)]

    @property
    def is_running(self) -> bool:
        """Whether a worker was seen at it."""
        return self.record.state is BatchState.RUNNING

    def begins(self, look: Look) -> bool:
        """Whether a worker is seen at it for the first time; also one that dropped it between two looks."""
        if self.is_running or not (
            self.task_id in look.leases or look.fences.get(self.record.id) == self.record.attempt
        ):
            return False
        self.record = replace(self.record, state=BatchState.RUNNING)
        self.last_sign = look.now
        return True

    def why_lost(self, look: Look, limits: DispatchLimits) -> str:
        """Why its worker is not counted on any more; empty where it is, or where there was none."""
        lease = look.leases.get(self.task_id)
        if lease is not None:
            self.last_sign = look.now
            if lease != self.lease:
                self.lease, self.moved = lease, look.now
            elif look.now - self.moved > limits.stall_seconds:
                return f"{lease.worker} holds it and has got no further for {limits.stall_seconds:.0f} s"
        elif self.is_running and look.now - self.last_sign > limits.lease_grace:
            return "its worker's lease is gone"
        return ""

    def is_off_the_queue(self, look: Look, limits: DispatchLimits, newest_begun: int) -> bool:
        """Whether nobody took it and nobody can: ``newest_begun`` is the newest submission that somebody has taken of
        its queue, which is first in, first out."""
        if self.is_running:
            return False
        if look.queue_was_lost:  # a worker that has it says so with its next beat
            self.gone, self.last_sign = True, look.now
        elif not self.gone and self.queue not in look.empty and self.number >= newest_begun:
            self.last_sign = look.now
        return look.now - self.last_sign > (limits.lease_grace if self.gone else limits.orphan_seconds)

    def ending(self, why: str) -> Ending:
        """How the attempt ends if it is given up."""
        lease = self.lease or Lease("")
        return Ending("TRIAL_LOST", why, lease.worker, lease.steps_done)
