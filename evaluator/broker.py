"""The queue as the dispatcher sees it: submit, results, leases. One round trip each, and one exception.

Everything here raises PreceptorError(BROKER_UNREACHABLE) where Redis does not answer within seconds. Nothing is lost by
that: what is to be done stands in SQL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import redis
from kombu.exceptions import OperationalError

from preceptor.errors import PreceptorError
from preceptor.leases import Lease, LeaseBoard, WorkerStatus
from preceptor.queue import fetch_results, make_app, submit
from preceptor.v1 import trial_pb2 as trial

# Without expiry: it is gone only where everything is.
_MARK = "preceptor:queue"


class Broker(Protocol):
    """What the dispatcher needs of a queue. A task id is ``preceptor.queue.celery_task_id(batch, attempt)``."""

    def submit(self, batch: trial.TrialBatch, attempt: int, queue: str, evaluations: Sequence[str] = ()) -> None:
        """Puts an attempt on a queue. Doing it twice is harmless. ``evaluations``: for their traces."""
        ...

    def results(self, task_ids: Sequence[str]) -> dict[str, trial.TrialBatchResult]:
        """The results there are, by task."""
        ...

    def holders(self, task_ids: Sequence[str]) -> dict[str, Lease]:
        """The leases on these tasks, by task."""
        ...

    def begun(self, batch_ids: Sequence[str]) -> dict[str, int]:
        """The latest attempt that anybody has begun at each of these batches that somebody was at."""
        ...

    def depths(self, queues: Sequence[str]) -> dict[str, int]:
        """How many tasks wait for a worker, by queue."""
        ...

    def has_forgotten(self) -> bool:
        """Whether it has lost its data since this was asked last: everything that was on the queue is gone then."""
        ...

    def cancel(self, task_id: str, trial_ids: Sequence[str]) -> None:
        """Nobody wants these trials of the task any more, whether it is on the queue already, with a worker, or to
        be submitted. They may be run all the same. Doing it twice is harmless."""
        ...

    def workers(self) -> list[WorkerStatus]:
        """The workers alive."""
        ...


class RedisBroker:
    """Celery on Redis."""

    def __init__(self, url: str) -> None:
        self._app = make_app(url)
        # Celery's default is to wait 120 s for a Redis that hangs.
        self._app.conf.update(redis_socket_timeout=5.0, redis_socket_connect_timeout=5.0)
        self._leases = LeaseBoard(url)
        self._redis = redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5)

    def submit(self, batch: trial.TrialBatch, attempt: int, queue: str, evaluations: Sequence[str] = ()) -> None:
        """See Broker."""
        with _unreachable():
            submit(self._app, batch, attempt, queue, evaluations)

    def results(self, task_ids: Sequence[str]) -> dict[str, trial.TrialBatchResult]:
        """See Broker."""
        with _unreachable():
            return fetch_results(self._app, list(task_ids))

    def holders(self, task_ids: Sequence[str]) -> dict[str, Lease]:
        """See Broker."""
        with _unreachable():
            return self._leases.holders(list(task_ids))

    def begun(self, batch_ids: Sequence[str]) -> dict[str, int]:
        """See Broker."""
        with _unreachable():
            return self._leases.begun(list(batch_ids))

    def depths(self, queues: Sequence[str]) -> dict[str, int]:
        """See Broker."""
        with _unreachable():
            pipe = self._redis.pipeline(transaction=False)
            for queue in queues:
                pipe.llen(queue)
            return dict(zip(queues, map(int, pipe.execute()), strict=True))

    def has_forgotten(self) -> bool:
        """See Broker."""
        with _unreachable():
            return bool(self._redis.set(_MARK, "here", nx=True))

    def cancel(self, task_id: str, trial_ids: Sequence[str]) -> None:
        """See Broker."""
        with _unreachable():
            self._leases.cancel(task_id, trial_ids)

    def workers(self) -> list[WorkerStatus]:
        """See Broker."""
        with _unreachable():
            return self._leases.workers()

    def close(self) -> None:
        """Closes the connections."""
        self._app.close()
        self._redis.close()


@contextmanager
def _unreachable() -> Iterator[None]:
    try:
        yield
    except (redis.RedisError, OperationalError, OSError) as error:
        raise PreceptorError("BROKER_UNREACHABLE", f"Redis does not answer: {error}") from None
