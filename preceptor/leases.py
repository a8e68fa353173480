"""Who is alive, who works on what, and what of it nobody wants any more: short-lived keys in Redis.

A worker announces itself and the task it holds every ``BEAT_SECONDS``; a key that is not renewed is gone after
``LEASE_SECONDS``. The evaluator gives a task to another worker when its lease was seen and is gone without a result.

The answer to a beat is the trials of the task that were cancelled. A task id stands for one attempt, and what was
cancelled of an attempt stays cancelled: who wants the trial again gets it from another attempt or another batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import redis

BEAT_SECONDS = 2.0
# Three missed beats and a bit: a paused machine is not a dead one, and a kill is noticed well within 15 s.
LEASE_SECONDS = 8
# A cancelled task is forgotten by the queue after the same time (preceptor.queue, result_expires).
CANCELLED_SECONDS = 24 * 3600

_LEASE = "preceptor:lease:"
_CANCELLED = "preceptor:cancelled:"
_WORKER = "preceptor:worker:"


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker says of itself."""

    name: str  # host:pid
    students: tuple[str, ...] = ()  # commits of the bases in its memory
    task_id: str = ""  # the Celery task it works on
    steps_done: int = 0  # optimiser steps of that task
    trials_done: int = 0  # since it started
    peak_memory_bytes: int = 0


class LeaseBoard:
    """The keys of one Redis."""

    def __init__(self, broker_url: str) -> None:
        self._redis = redis.Redis.from_url(
            broker_url, socket_timeout=5, socket_connect_timeout=5, decode_responses=True
        )

    def beat(self, status: WorkerStatus) -> frozenset[str]:
        """Renews the worker's presence and the lease on its task; returns the ids of the task's cancelled trials."""
        pipe = self._redis.pipeline()
        pipe.set(_WORKER + status.name, json.dumps(asdict(status)), ex=LEASE_SECONDS)
        if not status.task_id:
            pipe.execute()
            return frozenset()
        pipe.set(_LEASE + status.task_id, status.name, ex=LEASE_SECONDS)
        pipe.smembers(_CANCELLED + status.task_id)
        return frozenset(pipe.execute()[-1])

    def cancel(self, task_id: str, trial_ids: Sequence[str]) -> None:
        """Nobody wants these trials of the task any more; whoever holds it hears of it with its next beat."""
        pipe = self._redis.pipeline()
        pipe.sadd(_CANCELLED + task_id, *trial_ids)
        pipe.expire(_CANCELLED + task_id, CANCELLED_SECONDS)
        pipe.execute()

    def release(self, task_id: str) -> None:
        """Gives the lease on a task back."""
        self._redis.delete(_LEASE + task_id)

    def holders(self, task_ids: list[str]) -> dict[str, str]:
        """The workers that hold leases on the given tasks, by task."""
        if not task_ids:
            return {}
        values = self._redis.mget([_LEASE + task_id for task_id in task_ids])
        return {task: str(value) for task, value in zip(task_ids, values, strict=True) if value is not None}

    def workers(self) -> list[WorkerStatus]:
        """All workers alive, by name."""
        keys = sorted(self._redis.scan_iter(match=_WORKER + "*", count=1000))
        found = []
        for value in self._redis.mget(keys) if keys else []:
            if value is not None:
                fields = json.loads(value)
                found.append(WorkerStatus(**{**fields, "students": tuple(fields["students"])}))
        return found
