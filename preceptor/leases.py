"""Who is alive, who works on what and how far, and what of it nobody wants any more: short-lived keys in Redis.

A worker claims a task before it begins and renews the claim every ``BEAT_SECONDS``; a key that is not renewed is gone
after ``LEASE_SECONDS``. The evaluator gives a task to another worker when its lease was seen and is gone without a
result. Two rules keep the same work from being done twice:

* A task (one attempt at a batch) has one holder: a message that is delivered again while its first receiver is alive is
  not begun.
* Attempts are fenced: as soon as somebody has begun attempt n of a batch, no earlier attempt may begin, and whoever is
  still at one (a machine that was paused, a network that was cut) is told so with its next beat and leaves it.

The answer to a beat also names the trials of the task that were cancelled. A task id stands for one attempt, and what
was cancelled of an attempt stays cancelled: who wants the trial again gets it from another attempt or another batch.

All of it may be lost with Redis: beats bring it back, and at worst a batch is trained twice, with the same result.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from preceptor.names import split_task_id

BEAT_SECONDS = 2.0
# Three missed beats and a bit: a paused machine is not a dead one, and a kill is noticed well within 15 s.
LEASE_SECONDS = 8
# A cancelled task and a fence are forgotten after the same time as a result (preceptor.queue, result_expires).
REMEMBERED_SECONDS = 24 * 3600

_LEASE = "preceptor:lease:"
_FENCE = "preceptor:fence:"
_CANCELLED = "preceptor:cancelled:"
_WORKER = "preceptor:worker:"
_WORKERS = "preceptor:workers"  # the names of all that were alive a moment ago; a SCAN would go through every result

# Claim and renewal are the same question. KEYS: lease, fence. ARGV: worker, attempt, progress, seconds of each key.
_CLAIM = """
if tonumber(redis.call('GET', KEYS[2]) or '0') > tonumber(ARGV[2]) then return 'SUPERSEDED' end
local holder = redis.call('GET', KEYS[1])
if holder and string.match(holder, '^%S+') ~= ARGV[1] then return 'HELD' end
redis.call('SET', KEYS[1], ARGV[1] .. ' ' .. ARGV[3], 'EX', ARGV[4])
redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[5])
return 'GRANTED'
"""
# KEYS: lease. ARGV: worker.
_RELEASE = """
local holder = redis.call('GET', KEYS[1])
if holder and string.match(holder, '^%S+') == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


class Claim(StrEnum):
    """Whether a worker may work on a task."""

    GRANTED = "GRANTED"
    HELD = "HELD"  # by another worker that is alive
    SUPERSEDED = "SUPERSEDED"  # a later attempt has begun


@dataclass(frozen=True, slots=True)
class Lease:
    """Who holds a task, and how many steps of it are done."""

    worker: str
    steps_done: int = 0
    ticks: int = 0  # signs of progress: steps, and chunks of answers; while a model is loaded there are none


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker hears when it beats: may it go on with its task, and without which trials."""

    claim: Claim = Claim.GRANTED
    cancelled: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker says of itself."""

    name: str  # host:pid, without spaces
    students: tuple[str, ...] = ()  # commits of the bases in its memory
    task_id: str = ""  # the Celery task it works on
    steps_done: int = 0  # optimiser steps of that task
    trials_done: int = 0  # since it started
    peak_memory_bytes: int = 0
    ticks: int = 0  # signs of progress of its task: its steps, and chunks of answers
    serves: tuple[str, ...] = ()  # names of the students that it is there for; none: all without a queue of their own
    gpu: str = ""  # UUID of the GPU that it holds for itself


class LeaseBoard:
    """The keys of one Redis. Every method is one round trip (``workers`` two) and raises redis.RedisError where Redis
    does not answer within seconds. Safe to use from several threads."""

    def __init__(self, broker_url: str) -> None:
        # Once more for a connection that went with the last Redis; redis-py's default is ten times, a minute in all.
        self._redis = redis.Redis.from_url(
            broker_url,
            socket_timeout=5,
            socket_connect_timeout=5,
            decode_responses=True,
            encoding_errors="replace",
            retry=Retry(NoBackoff(), 1),
        )

    def beat(self, status: WorkerStatus) -> Answer:
        """Renews the worker's presence, and claims or renews the lease on its task."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.set(_WORKER + status.name, json.dumps(asdict(status)), ex=LEASE_SECONDS)
        pipe.sadd(_WORKERS, status.name)
        if not status.task_id:
            pipe.execute()
            return Answer()
        batch_id, attempt = split_task_id(status.task_id)
        keys = (_LEASE + status.task_id, _FENCE + batch_id)
        progress = f"{status.steps_done} {status.ticks}"
        pipe.eval(
            _CLAIM, len(keys), *keys, status.name, str(attempt), progress, str(LEASE_SECONDS), str(REMEMBERED_SECONDS)
        )
        pipe.smembers(_CANCELLED + status.task_id)
        *_, claim, cancelled = pipe.execute()
        return Answer(Claim(claim), frozenset(cancelled))

    def cancel(self, task_id: str, trial_ids: Sequence[str]) -> None:
        """Nobody wants these trials of the task any more; whoever holds it hears of it with its next beat."""
        pipe = self._redis.pipeline()
        pipe.sadd(_CANCELLED + task_id, *trial_ids)
        pipe.expire(_CANCELLED + task_id, REMEMBERED_SECONDS)
        pipe.execute()

    def release(self, task_id: str, worker: str) -> None:
        """Gives the worker's lease on a task back; another's is left alone."""
        self._redis.eval(_RELEASE, 1, _LEASE + task_id, worker)

    def holders(self, task_ids: Sequence[str]) -> dict[str, Lease]:
        """The leases on the given tasks, by task."""
        if not task_ids:
            return {}
        values = self._redis.mget([_LEASE + task_id for task_id in task_ids])
        return {task: lease for task, value in zip(task_ids, values, strict=True) if (lease := _lease(value))}

    def begun(self, batch_ids: Sequence[str]) -> dict[str, int]:
        """The latest attempt at each of these batches that somebody has begun; it outlives its worker and its lease."""
        values = self._redis.mget([_FENCE + batch_id for batch_id in batch_ids]) if batch_ids else []
        fences = zip(batch_ids, map(str, values), strict=True)
        return {batch_id: int(value) for batch_id, value in fences if value.isdecimal() and len(value) < 10}

    def workers(self) -> list[WorkerStatus]:
        """All workers alive, by name."""
        names = sorted(map(str, self._redis.smembers(_WORKERS)))
        values = self._redis.mget([_WORKER + name for name in names]) if names else []
        if gone := [name for name, value in zip(names, values, strict=True) if value is None]:
            self._redis.srem(_WORKERS, *gone)  # one that is there after all is back with its next beat
        return [status for value in values if (status := _status(value))]


# What stands in Redis may be anybody's: a value that is no lease or status of ours is passed over.


def _lease(value: object) -> Lease | None:
    worker, *progress = str(value or "").split(" ")
    # More digits than a step count has are nobody's, and thousands of them are more than int() reads.
    if not worker or not all(one.isdecimal() and len(one) < 10 for one in progress):
        return None
    return Lease(worker, *map(int, progress[:2]))


def _status(value: object) -> WorkerStatus | None:
    known = {field.name for field in fields(WorkerStatus)}  # a newer worker may say more
    try:
        said = {name: what for name, what in json.loads(str(value or "")).items() if name in known}
        # An older worker does not say whom it serves.
        lists = {"students": said["students"], "serves": said.get("serves", ())}
        status = WorkerStatus(**{**said, **{name: tuple(map(str, names)) for name, names in lists.items()}})
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    texts = all(isinstance(one, str) for one in (status.name, status.task_id, status.gpu))
    counts = (status.steps_done, status.trials_done, status.peak_memory_bytes)
    return status if texts and all(type(count) is int and 0 <= count < 2**32 * 2**20 for count in counts) else None
