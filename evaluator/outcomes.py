"""What follows from a batch's result: what of it is final, and what is tried again, how. Pure.

* Reasons that may be gone at the next try (``TRANSIENT``) are tried again while there are tries; all others are
  properties of the work, and final at once.
* What did not fit together, in memory or in a batch's time, is cut in halves, as often as it takes: a trial alone has
  the usual number of tries. So a batch costs at most log2 of its size submissions more.
* Where it may help to wait (``PASSING``), the next try waits, twice as long each time.
* A worker that was told to end gives its batch back. That is nobody's fault and costs no try.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from evaluator.attempts import Ending
from preceptor.errors import CATALOGUE
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types

TRANSIENT = frozenset(
    {
        "ARTIFACT_NOT_FOUND",
        "ARTIFACT_STORE_REFUSED",  # its key may have run out, or be another one than the others'
        "ARTIFACT_STORE_UNREACHABLE",
        "CANCELLED",  # the trial is wanted, so it was another attempt that was told to leave it
        "DEVICE_FAILED",  # the worker ends itself and comes back with a fresh device
        "DISK_FULL",
        "MODEL_UNREACHABLE",
        "SHUTTING_DOWN",
        "TRIAL_FAILED",
        "TRIAL_OUT_OF_MEMORY",  # another worker may have more
        "TRIAL_TIMEOUT",
        "VERSION_SKEW",  # another worker may be newer
    }
)
PASSING = frozenset(
    {"ARTIFACT_STORE_REFUSED", "ARTIFACT_STORE_UNREACHABLE", "DISK_FULL", "MODEL_UNREACHABLE", "VERSION_SKEW"}
)
# Five tries then span 75 s: a hub that was restarted, a disk that is being cleared, a worker that is being replaced.
FIRST_REST_SECONDS = 5.0
MAX_REST_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be done after a result."""

    final: tuple[trial.TrialResult, ...]
    passing: bool  # whether there are failures that may be gone at the next try
    again: tuple[str, ...]  # trials to run again
    halve: bool  # in two batches
    whole: bool  # all that was wanted runs again, in the same batch
    counts: bool  # whether the submission was a try
    rest: float  # seconds before the next one
    ending: Ending


def verdict(wanted: Collection[str], result: trial.TrialBatchResult, tries: int, max_tries: int) -> Verdict:
    """About the result of a batch, of which these trials are wanted, after ``tries`` tries."""
    outcomes = outcomes_of(wanted, result, tries)
    failures = [item.failure for item in outcomes if item.HasField("failure")]
    ending = Ending(worker=result.worker, steps=max((item.steps for item in result.results), default=0))
    if failures:
        ending = replace(ending, reason=failures[0].reason, message=failures[0].message)
    passing = [item.trial_id for item in outcomes if item.failure.reason in TRANSIENT]
    given_back = result.failure.reason == "SHUTTING_DOWN"
    too_much = len(passing) > 1 and (
        any(failure.reason == "TRIAL_OUT_OF_MEMORY" for failure in failures)
        or all(item.failure.reason == "TRIAL_TIMEOUT" for item in outcomes)
    )
    again = passing if too_much or given_back or tries < max_tries else []
    waits = any(failure.reason in PASSING for failure in failures)
    return Verdict(
        final=tuple(item for item in outcomes if item.trial_id not in again),
        passing=bool(passing),
        again=tuple(again),
        halve=too_much,
        whole=len(again) == len(outcomes) and not too_much,
        counts=not given_back,
        rest=min(FIRST_REST_SECONDS * 2 ** max(tries - 1, 0), MAX_REST_SECONDS) if again and waits else 0.0,
        ending=ending,
    )


def outcomes_of(wanted: Collection[str], result: trial.TrialBatchResult, tries: int) -> list[trial.TrialResult]:
    """One result for each of these trials; failures carry how often they were tried."""
    outcomes = [] if result.HasField("failure") else [one for one in result.results if one.trial_id in wanted]
    failure = types.Failure(reason="TRIAL_FAILED", message="the worker's result lacks this trial")
    if result.HasField("failure"):
        failure = result.failure
    missing = set(wanted).difference(one.trial_id for one in outcomes)
    outcomes += [trial.TrialResult(trial_id=one, failure=failure) for one in sorted(missing)]
    for outcome in outcomes:
        if outcome.HasField("failure"):
            outcome.failure.attempts = max(tries, 1)
            if outcome.failure.reason not in CATALOGUE:  # a newer worker's, or nobody's
                said = f"{outcome.failure.reason!r}: {outcome.failure.message}"
                outcome.failure.message = f"the worker gives a reason that is not known here: {said}"[:500]
                outcome.failure.reason = "TRIAL_FAILED"
    return outcomes


def lost(trial_id: str, message: str, tries: int) -> trial.TrialResult:
    """The result of a trial that is given up because its workers were lost."""
    return trial.TrialResult(
        trial_id=trial_id, failure=types.Failure(reason="TRIAL_LOST", message=message, attempts=tries)
    )
