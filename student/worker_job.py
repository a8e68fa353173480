"""One trial batch on a worker: from the message to the result, with nothing of the queue in it.

Promises: a result is always returned. What goes wrong for one trial is in that trial's result, what goes wrong for all
is the batch's failure under a reason of the catalogue; neither is ever an answer. The exception is ``GivenUp``, which
means that the batch is to be done by somebody else.
"""

from __future__ import annotations

import logging
import resource
import sys
import threading
import time
from collections.abc import Callable

from preceptor.errors import PreceptorError
from preceptor.v1 import trial_pb2 as wire
from student import payload
from student.base_cache import BaseCache
from student.trial_runner import run_trials

log = logging.getLogger(__name__)


class GivenUp(Exception):
    """The worker is to end; the batch goes back to the queue."""


class TrialJob:
    """Runs batches, one at a time."""

    def __init__(self, cache: BaseCache, worker: str, batch_seconds: float) -> None:
        self._cache = cache
        self._worker = worker
        self._batch_seconds = batch_seconds
        # Loading a model changes torch's default dtype for a moment, so nothing may run meanwhile.
        self.exclusive = threading.Lock()

    def run(
        self, batch: wire.TrialBatch, attempt: int, on_step: Callable[[int], None], giving_up: threading.Event
    ) -> wire.TrialBatchResult:
        """The result of the batch. Raises GivenUp soon after ``giving_up`` is set."""
        started = time.monotonic()
        end = started + self._batch_seconds

        def step(number: int) -> None:
            if giving_up.is_set():
                raise GivenUp
            if time.monotonic() > end:
                message = f"after {self._batch_seconds:.0f} s, in step {number}"
                raise _TimedOut(message)
            on_step(number)

        with self.exclusive:
            try:
                base = self._cache.get(batch.student)
                loaded = time.monotonic()
                trials, questions = payload.trials_of(batch)
                outcomes = run_trials(
                    base,
                    trials,
                    questions,
                    probes=payload.probes_of(batch),
                    replay_documents=batch.replay_documents,
                    answering=payload.answering_of(batch.answers),
                    on_step=step,
                )
            except GivenUp:
                raise
            except PreceptorError as error:
                log.warning("batch %s failed: %s", batch.id, error)
                return payload.failed(batch.id, error, self._worker, attempt)
            except _TimedOut as error:
                timeout = PreceptorError("TRIAL_TIMEOUT", f"the batch was stopped {error}")
                return payload.failed(batch.id, timeout, self._worker, attempt)
            except Exception as error:  # whatever it is: it is reported as this batch's failure and the worker lives on
                log.exception("batch %s failed", batch.id)
                unexpected = PreceptorError("TRIAL_FAILED", f"{type(error).__name__}: {error}"[:500])
                return payload.failed(batch.id, unexpected, self._worker, attempt)
        result = payload.result_of(batch.id, outcomes, self._worker, attempt)
        result.load_seconds = loaded - started
        result.peak_memory_bytes = peak_memory_bytes()
        return result


class _TimedOut(Exception):
    """The batch's time is over."""


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
