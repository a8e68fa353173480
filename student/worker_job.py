"""One trial batch on a worker: from the message to the result, with nothing of the queue in it.

Promises: a result is always returned. What goes wrong for one trial is in that trial's result, what goes wrong for all
is the batch's failure under a reason of the catalogue; neither is ever an answer. A cancelled trial is left at the next
step, and a batch of cancelled trials ends there; both say CANCELLED. The exception is ``GivenUp``, which means that the
batch is to be done by somebody else.
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
from student.memory import DEFAULT_CAPS, Caps
from student.trial_runner import run_trials

log = logging.getLogger(__name__)


class GivenUp(Exception):
    """The worker is to end; the batch goes back to the queue."""


class TrialJob:
    """Runs batches, one at a time."""

    def __init__(self, cache: BaseCache, worker: str, batch_seconds: float, caps: Caps = DEFAULT_CAPS) -> None:
        self._cache = cache
        self._worker = worker
        self._batch_seconds = batch_seconds
        self._caps = caps
        # Loading a model changes torch's default dtype for a moment, so nothing may run meanwhile.
        self.exclusive = threading.Lock()

    def run(
        self,
        batch: wire.TrialBatch,
        attempt: int,
        on_step: Callable[[int], None],
        giving_up: threading.Event,
        cancelled: Callable[[], frozenset[str]] = frozenset,
    ) -> wire.TrialBatchResult:
        """The result of the batch. Raises GivenUp soon after ``giving_up`` is set.

        ``cancelled`` is asked at every step for the ids of trials that nobody wants any more; it must not wait.
        """
        started = time.monotonic()
        end = started + self._batch_seconds
        trial_ids = frozenset(trial.id for trial in batch.trials)

        def check(number: int) -> None:
            if giving_up.is_set():
                raise GivenUp
            if trial_ids and trial_ids <= cancelled():
                raise _Stopped("CANCELLED", f"nobody waits for the batch any more (step {number})")
            if time.monotonic() > end:
                message = f"the batch was stopped after {self._batch_seconds:.0f} s, in step {number}"
                raise _Stopped("TRIAL_TIMEOUT", message)

        def step(number: int) -> None:
            check(number)
            on_step(number)

        with self.exclusive:
            try:
                check(0)
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
                    caps=self._caps,
                    cancelled=cancelled,
                )
            except GivenUp:
                raise
            except _Stopped as stop:
                log.info("batch %s ends: %s", batch.id, stop)
                return payload.failed(batch.id, PreceptorError(*stop.args), self._worker, attempt)
            except PreceptorError as error:
                log.warning("batch %s failed: %s", batch.id, error)
                return payload.failed(batch.id, error, self._worker, attempt)
            except Exception as error:  # whatever it is: it is reported as this batch's failure and the worker lives on
                log.exception("batch %s failed", batch.id)
                unexpected = PreceptorError("TRIAL_FAILED", f"{type(error).__name__}: {error}"[:500])
                return payload.failed(batch.id, unexpected, self._worker, attempt)
        result = payload.result_of(batch.id, outcomes, self._worker, attempt)
        result.load_seconds = loaded - started
        result.peak_memory_bytes = peak_memory_bytes()
        return result


class _Stopped(Exception):
    """The batch ends here, with (reason, message) as its result; no PreceptorError, which would fail single trials."""


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
