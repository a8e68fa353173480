"""The canary: labelled tasks that nobody trains on, which watch whether the reward still means something.

A reward without labels can rise while the student learns less and less. So some labelled training tasks are set aside;
after each round (and before the first, as round 0) the current policy writes a few self-edits for each of them, which
are measured with the labelled reward questions and plain weights: gain and retention loss, whatever the run's reward
is. A task's reward is their mean. All rounds share the sampling seed and the trial seeds.

The rule: the run stops when the canary tasks' rewards are clearly below those of the best round so far, that is when
the mean of the paired differences (over tasks that both rounds measured, ``LEAST_CANARY`` at least) is more than
``CLEAR`` of its own standard errors below zero. It then goes on with the best round's policy to the final measurement.
A malformed completion leaves the student as it was and counts as 0; a failed evaluation says nothing and is left out.

What the rule can do: with eight tasks, one comparison of equal policies stops the run wrongly in about 4% of cases. The
best so far is the best of several, so its lead is partly luck, and the share grows with the rounds (see
docs/label_free.md). A wrong stop costs the rounds that are left, never a policy: the best one is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from orchestrator.entries import Entry, canary_stage
from orchestrator.evaluator_client import EvaluatorClient, Submission
from orchestrator.label_store import CanaryLook
from orchestrator.ledger import Ledger
from orchestrator.plan import RunPlan
from orchestrator.progress import Progress
from orchestrator.teacher_client import TeacherClient
from orchestrator.timing import RunClock
from orchestrator.writing import Writer, unchanged
from preceptor.config import LEAST_CANARY

# Standard errors that make a fall clear.
CLEAR = 2.0


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over tasks; ``stderr`` is None with fewer than two."""

    value: float | None
    stderr: float | None
    count: int


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of independent values and its standard error."""
    if not values:
        return Mean(None, None, 0)
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(fmean(values), error, len(values))


def difference(new: Mapping[int, float], old: Mapping[int, float]) -> Mean:
    """New minus old, paired over the tasks that both have."""
    return mean_of([new[task] - old[task] for task in sorted(new.keys() & old.keys())])


def clearly_fell(change: Mean) -> bool:
    """Whether a mean of paired differences is clearly below zero."""
    if change.count < LEAST_CANARY or change.value is None or change.stderr is None:
        return False
    return change.value < -CLEAR * change.stderr


class Canary:
    """The canary tasks of one run. Without any, every look says nothing at once."""

    def __init__(
        self,
        plan: RunPlan,
        teacher_client: TeacherClient,
        evaluator_client: EvaluatorClient,
        ledger: Ledger,
        clock: RunClock,
        progress: Progress,
    ) -> None:
        self._plan = plan
        self._evaluator = evaluator_client
        self._ledger = ledger
        self._clock = clock
        self._progress = progress
        self._writer = Writer(teacher_client, ledger)

    def look(self, number: int, policy_id: str) -> str | None:
        """What the canary says of the policy after this round, noted in the ledger: None to go on; where the policy has
        clearly fallen, the best policy so far.

        A look that was noted is not taken again. Raises PreceptorError from the services, Stopped.
        """
        if not (self._plan.canary_tasks and self._plan.config.rounds.count):
            return None
        looks = {look.round: look for look in self._ledger.labels.looks()}
        if number not in looks:
            self._measure(number, policy_id)
            looks[number] = self._judge(number, policy_id, looks)
            self._ledger.labels.keep_look(looks[number])
        last = looks[number]
        return looks[last.best_round].policy_id if last.stopped else None

    def _measure(self, number: int, policy_id: str) -> None:
        self._clock.switch(canary_stage(number), "evaluate")
        self._progress.enter(f"canary after round {number}" if number else "canary before round 1")
        for reports in self._evaluator.evaluate(self._submissions(number, policy_id)):
            self._ledger.record(*reports)

    def _submissions(self, number: int, policy_id: str) -> Iterator[Submission]:
        request = self._plan.canary_generation(policy_id)
        groups = self._writer.groups(canary_stage(number), request, {"": unchanged})
        yield from self._plan.canary_submissions(groups)

    def _judge(self, number: int, policy_id: str, before: Mapping[int, CanaryLook]) -> CanaryLook:
        new = rewards(self._ledger.entries(canary_stage(number)))
        mean, change, best = mean_of(list(new.values())), Mean(None, None, 0), number
        measured = [look for look in before.values() if look.round < number and look.mean is not None]
        if measured:
            former = max(measured, key=lambda look: look.round).best_round
            change = difference(new, rewards(self._ledger.entries(canary_stage(former))))
            if change.value is None or change.value <= 0:
                best = former
        return CanaryLook(
            round=number,
            policy_id=policy_id,
            mean=mean.value,
            stderr=mean.stderr,
            count=mean.count,
            best_round=best,
            difference=change.value,
            difference_stderr=change.stderr,
            stopped=clearly_fell(change),
        )


def rewards(entries: Sequence[Entry]) -> dict[int, float]:
    """What each canary task's self-edits earned on average, by the task's position; what failed is left out."""
    found: dict[int, list[float]] = {}
    for entry in entries:
        if entry.unusable:
            found.setdefault(entry.key.task, []).append(0.0)
        elif entry.reward is not None:
            found.setdefault(entry.key.task, []).append(entry.reward.value)
    return {task: fmean(values) for task, values in found.items()}
