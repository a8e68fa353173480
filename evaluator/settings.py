"""Where and how this evaluator runs: environment variables ``PRECEPTOR_...``."""

from __future__ import annotations

from pydantic import Field

from evaluator.dispatch import DispatchLimits
from preceptor.settings import ServiceSettings


class EvaluatorSettings(ServiceSettings):
    """Settings of the evaluator. Times in seconds; the reasons for the defaults are in ``evaluator.dispatch``."""

    # Watches hold a thread each; a run opens a few.
    max_threads: int = 64
    trial_attempts: int = Field(3, ge=1, le=100, description="submissions of the same trials before they FAIL")
    lease_grace_seconds: float = Field(
        3.0, ge=0, description="after a worker's lease expired, before it counts as lost"
    )
    orphan_seconds: float = Field(60.0, gt=0, description="with an empty queue, before a batch nobody took is resent")
    result_poll_seconds: float = Field(0.05, gt=0, le=60)
    batches_in_flight: int = Field(256, ge=1, description="batches on the queue at once; the rest waits in SQL")
    # Twice what fills a step (docs/log.md: 8 on a CPU, about 15 on a GPU), so that leavers are followed by others, and
    # small enough that several workers share a request.
    batch_trials: int = Field(32, ge=1, description="trials that one worker trains together, at most")

    @property
    def dispatch_limits(self) -> DispatchLimits:
        """The dispatcher's numbers."""
        return DispatchLimits(
            max_attempts=self.trial_attempts,
            in_flight=self.batches_in_flight,
            poll_seconds=self.result_poll_seconds,
            lease_grace=self.lease_grace_seconds,
            orphan_seconds=self.orphan_seconds,
        )
