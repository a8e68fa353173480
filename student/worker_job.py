"""One trial batch on a worker: from the message to the result, with nothing of the queue in it.

Promises: a result is always returned. What goes wrong for one trial is in that trial's result, what goes wrong for all
is the batch's failure under a reason of the catalogue; neither is ever an answer. A cancelled trial is left at the next
step, and a batch of cancelled trials ends there; both say CANCELLED. The exception is ``GivenUp``, which means that the
batch is somebody else's.

A batch may take as long as its trials may together, and no longer than a batch may; loading its student does not count.
"""

from __future__ import annotations

import logging
import math
import resource
import sys
import threading
import time
from collections.abc import Callable

import torch

from preceptor.errors import PreceptorError
from preceptor.storage import storage_error
from preceptor.v1 import trial_pb2 as wire
from student import payload
from student.answering import Answering, answer
from student.base_cache import BaseCache
from student.kept import KeptEdits
from student.memory import DEFAULT_CAPS, Caps
from student.trial_runner import is_out_of_memory, run_trials

log = logging.getLogger(__name__)


# How torch's libraries begin what they say of a broken device, where torch has no class for it.
_DEVICE_ERRORS = ("CUDA error", "HIP error", "cuDNN error", "cuDNN Frontend error")


class GivenUp(Exception):
    """The batch is left without a result: somebody else does it."""


class TrialJob:
    """Runs batches, one at a time."""

    def __init__(
        self,
        cache: BaseCache,
        worker: str,
        batch_seconds: float,
        caps: Caps = DEFAULT_CAPS,
        trial_seconds: float = math.inf,
        answer: Answering = answer,
        kept: KeptEdits | None = None,
    ) -> None:
        """``kept``: where what was learnt is put; without it no trial can be kept."""
        self._cache = cache
        self._worker = worker
        self._batch_seconds = batch_seconds
        self._trial_seconds = trial_seconds
        self._caps = caps
        self._answer = answer
        self._kept = kept
        # Loading a model changes torch's default dtype for a moment, so nothing may run meanwhile.
        self.exclusive = threading.Lock()

    def still_holds(self, result: wire.TrialBatchResult) -> bool:
        """Whether what an earlier attempt kept is still there."""
        edits = [one.adapter for one in result.results if one.HasField("adapter")]
        try:
            return self._kept is None or all(map(self._kept.has, edits))
        except PreceptorError as error:
            log.warning("cannot see whether what was kept is still there: %s", error)
            return True

    def run(
        self,
        batch: wire.TrialBatch,
        attempt: int,
        on_step: Callable[[int], None],
        giving_up: threading.Event,
        cancelled: Callable[[], frozenset[str]] = frozenset,
    ) -> wire.TrialBatchResult:
        """The result of the batch. Raises GivenUp soon after ``giving_up`` is set.

        ``on_step`` is called with 0 when the student is in memory, then after each training step and each chunk of
        answers with the number of steps so far. ``cancelled`` is asked as often for the ids of trials that nobody wants
        any more; it must not wait.
        """
        started = time.monotonic()
        seconds = min(self._batch_seconds, self._trial_seconds * max(1, len(batch.trials)))
        end = math.inf
        trial_ids = frozenset(trial.id for trial in batch.trials)

        def check(number: int) -> None:
            if giving_up.is_set():
                raise GivenUp
            if trial_ids and trial_ids <= cancelled():
                raise _Stopped("CANCELLED", f"nobody waits for the batch any more (step {number})")
            if time.monotonic() > end:
                message = f"{len(trial_ids)} trials were stopped after {seconds:g} s, in step {number}"
                raise _Stopped("TRIAL_TIMEOUT", message)

        def step(number: int) -> None:
            check(number)
            on_step(number)

        with self.exclusive:
            try:
                check(0)
                base = self._cache.get(batch.student)
                loaded = time.monotonic()
                end = loaded + seconds
                step(0)
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
                    answer=self._answer,
                    kept=self._kept,
                )
            except GivenUp:
                raise
            except _Stopped as stop:
                log.info("batch %s ends: %s", batch.id, stop)
                return payload.failed(batch.id, PreceptorError(*stop.args), self._worker, attempt)
            except Exception as error:  # whatever it is: it is reported as this batch's failure
                reason = reason_of(error)
                if reason.reason in _WITH_TRACEBACK:
                    log.exception("batch %s failed", batch.id)
                else:
                    log.warning("batch %s failed: %s", batch.id, reason)
                return payload.failed(batch.id, reason, self._worker, attempt)
        result = payload.result_of(batch.id, outcomes, self._worker, attempt)
        result.load_seconds = loaded - started
        result.peak_memory_bytes = peak_memory_bytes()
        return result


class _Stopped(Exception):
    """The batch ends here, with (reason, message) as its result; no PreceptorError, which would fail single trials."""


# What nobody has foreseen, and what only its origin explains.
_WITH_TRACEBACK = frozenset({"TRIAL_FAILED", "DEVICE_FAILED"})


def reason_of(error: Exception) -> PreceptorError:
    """What went wrong with a whole batch, or with the loading of a student, as a reason of the catalogue.

    After DEVICE_FAILED this process can compute nothing any more: a broken context of CUDA never recovers.
    """
    if isinstance(error, PreceptorError):
        return error
    text = f"{type(error).__name__}: {error}"[:500]
    if is_out_of_memory(error):
        return PreceptorError("TRIAL_OUT_OF_MEMORY", text)
    if (of_disk := storage_error(error)) is not None and of_disk.reason == "DISK_FULL":
        return of_disk
    if isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and str(error).startswith(_DEVICE_ERRORS)
    ):
        return PreceptorError("DEVICE_FAILED", text)
    return PreceptorError("TRIAL_FAILED", text)


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
