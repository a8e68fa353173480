"""What "deployed" means: a worker says that it holds the student in memory.

The service publishes the active student in Redis; every idle worker reads it and loads it ahead of the first job, and
names the commits it holds in its heartbeat (``preceptor.leases``). A worker that cannot load it says so here. All of
it may be lost with Redis: the service publishes again, workers report again, and jobs do not depend on any of it,
since each carries its pinned student.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import redis
from google.protobuf.json_format import MessageToDict, ParseDict

from preceptor.errors import PreceptorError
from preceptor.leases import LeaseBoard, WorkerStatus
from preceptor.v1 import types_pb2 as types

_WANTED = "preceptor:student:wanted"
_FAILURE = "preceptor:student:failure:"
# A worker tries again (and reports again) when it finds the student still wanted after this time.
FAILURE_SECONDS = 30


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """Where a pinned student stands. READY wins over FAILED: one worker that has it is enough to work."""

    state: Literal["LOADING", "READY", "FAILED"]
    workers_ready: int
    workers_alive: int
    failure: PreceptorError | None = None


class DeploymentBoard:
    """The keys of one Redis."""

    def __init__(self, broker_url: str) -> None:
        self._redis = redis.Redis.from_url(
            broker_url, socket_timeout=5, socket_connect_timeout=5, decode_responses=True, encoding_errors="replace"
        )
        self._leases = LeaseBoard(broker_url)

    def publish(self, student: types.PinnedStudent) -> None:
        """Says which student workers should hold. Raises PreceptorError(BROKER_UNREACHABLE, BROKER_REFUSED)."""
        try:
            self._redis.set(_WANTED, json.dumps(MessageToDict(student, preserving_proto_field_name=True)))
        except redis.RedisError as error:
            raise _unreachable(error) from None

    def wanted(self) -> types.PinnedStudent | None:
        """The student that workers should hold. Raises PreceptorError(BROKER_UNREACHABLE, BROKER_REFUSED)."""
        try:
            value = self._redis.get(_WANTED)
        except redis.RedisError as error:
            raise _unreachable(error) from None
        try:
            return None if value is None else ParseDict(json.loads(str(value)), types.PinnedStudent())
        except Exception:  # what stands in Redis may be anybody's; the service publishes the student again
            return None

    def report_failure(self, commit: str, error: PreceptorError) -> None:
        """A worker could not load the student. Raises PreceptorError(BROKER_UNREACHABLE, BROKER_REFUSED)."""
        try:
            self._redis.set(_FAILURE + commit, json.dumps([error.reason, str(error)]), ex=FAILURE_SECONDS)
        except redis.RedisError as problem:
            raise _unreachable(problem) from None

    def clear_failure(self, commit: str) -> None:
        """Forgets failures, so that a new activation is not answered with an old one."""
        try:
            self._redis.delete(_FAILURE + commit)
        except redis.RedisError as error:
            raise _unreachable(error) from None

    def has_own_workers(self, name: str) -> bool:
        """Whether workers are alive that are there for the student of this name. Raises PreceptorError(
        BROKER_UNREACHABLE, BROKER_REFUSED)."""
        try:
            return any(name in one.serves for one in self._leases.workers())
        except redis.RedisError as error:
            raise _unreachable(error) from None

    def status(self, commit: str, name: str = "") -> DeploymentStatus:
        """How many workers hold the student, of those that load the one of this name (empty: of all).

        Raises PreceptorError(BROKER_UNREACHABLE, BROKER_REFUSED).
        """
        try:
            workers = _there_for(name, self._leases.workers())
            failure = self._redis.get(_FAILURE + commit)
        except redis.RedisError as error:
            raise _unreachable(error) from None
        ready = sum(commit in worker.students for worker in workers)
        if ready:
            return DeploymentStatus("READY", ready, len(workers))
        if failure is not None:
            return DeploymentStatus("FAILED", 0, len(workers), _reported(str(failure)))
        return DeploymentStatus("LOADING", 0, len(workers))


def _there_for(name: str, workers: Sequence[WorkerStatus]) -> list[WorkerStatus]:
    """Those of these workers that load the student of this name: its own, where there are any, else those that are
    there for all; for an empty name all."""
    own = [one for one in workers if name in one.serves]
    return own or [one for one in workers if not (name and one.serves)]


def _reported(failure: str) -> PreceptorError:
    """What a worker has reported, if it is that; a newer worker may have a reason of its own."""
    try:
        reason, message = json.loads(failure)
        return PreceptorError(reason, str(message))
    except (ValueError, TypeError, RecursionError):
        return PreceptorError("BAD_STUDENT_SOURCE", f"a worker could not load it, and says: {failure[:500]}")


def _unreachable(error: redis.RedisError) -> PreceptorError:
    if isinstance(error, (redis.AuthenticationError, redis.exceptions.NoPermissionError)):  # asking again cannot help
        return PreceptorError("BROKER_REFUSED", f"Redis refuses: {error}")
    return PreceptorError("BROKER_UNREACHABLE", f"Redis does not answer: {error}")
