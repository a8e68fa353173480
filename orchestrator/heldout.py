"""The final measurement: what the student learns, on passages the teacher never saw, from each arm's study material.

| arm | study material |
|---|---|
| no_edit | none: the untouched student (the baseline that every evaluation carries) |
| passage_only | the passage itself, one document a line, over and over until the token budget is spent |
| untrained_teacher | one self-edit of the policy the run started from |
| fixed_strategy | the untrained teacher under one prompt format and one directive, chosen on training passages |
| trained_teacher | one self-edit of the last policy |
| oracle, shuffled_facts | the tasks' own reference edits: right facts as questions, and wrong ones |

All arms share the student, the training settings, the trial seeds, the sealed questions and all retention probes; the
two teachers share the sampling seed. A malformed completion leaves the student untouched, so its passage counts with
the untouched student's answers, and it is counted. A failed evaluation is no measurement: its passage is left out of
the arm, and it is counted. The order in which things finish has no influence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.entries import HELDOUT, SELECTION, EditKey, Entry
from orchestrator.evaluator_client import EvaluatorClient, Submission
from orchestrator.ledger import Ledger
from orchestrator.loop import most_common_failure
from orchestrator.plan import RunPlan, under
from orchestrator.progress import Progress
from orchestrator.stop import Stop
from orchestrator.teacher_client import TeacherClient
from orchestrator.timing import RUN, RunClock
from orchestrator.writing import Adapt, Writer, unchanged
from preceptor.config import FixedStrategy
from preceptor.errors import PreceptorError
from preceptor.protocols import own_text
from preceptor.v1 import types_pb2 as types

UNTRAINED, TRAINED, FIXED, PASSAGE = "untrained_teacher", "trained_teacher", "fixed_strategy", "passage_only"


class HeldoutMeasurement:
    """The final measurement of one run."""

    def __init__(
        self,
        plan: RunPlan,
        teacher_client: TeacherClient,
        evaluator_client: EvaluatorClient,
        ledger: Ledger,
        clock: RunClock,
        progress: Progress,
        stop: Stop,
    ) -> None:
        self._plan = plan
        self._evaluator = evaluator_client
        self._ledger = ledger
        self._clock = clock
        self._progress = progress
        self._stop = stop
        self._writer = Writer(teacher_client, ledger)

    def measure(self, base_policy: str, trained_policy: str) -> None:
        """Fills the ledger's HELDOUT and SELECTION stages.

        Raises PreceptorError (TOO_MANY_FAILURES where not one evaluation succeeded), Stopped.
        """
        if not self._plan.heldout_tasks:
            return
        for reports in self._evaluator.evaluate(self._submissions(base_policy, trained_policy)):
            self._ledger.record(*reports)
        entries = self._ledger.entries(HELDOUT)
        failed = [entry for entry in entries if entry.failed]
        if failed and not any(entry.reward is not None for entry in entries):
            raise PreceptorError(
                "TOO_MANY_FAILURES", f"held-out: all {len(failed)} evaluations failed ({most_common_failure(failed)})"
            )
        self._clock.switch(RUN, "other")

    def _submissions(self, base_policy: str, trained_policy: str) -> Iterator[Submission]:
        """Everything there is to evaluate, as it is written. What needs no teacher goes first, and keeps the workers
        busy while the teacher writes."""
        self._clock.switch(HELDOUT, "generate")
        self._progress.enter("held-out: given material")
        given = list(self._given())
        yield from self._plan.heldout_submissions("passage", [entries[:1] for entries in given])
        if self._plan.reference_arms:
            yield from self._plan.heldout_submissions("references", [entries[1:] for entries in given])
        self._progress.enter("held-out: choosing a fixed strategy")
        yield from self._candidates(base_policy)
        self._progress.enter("held-out: teachers writing")
        yield from self._teachers(base_policy, trained_policy)
        self._progress.enter("held-out: fixed strategy")
        yield from self._fixed(base_policy)
        self._clock.switch(HELDOUT, "evaluate")
        self._progress.enter("held-out: evaluating")

    def _given(self) -> Iterator[list[Entry]]:
        """passage_only and the reference arms: nothing to write."""
        known = {entry.key: entry for entry in self._ledger.entries(HELDOUT)}
        arms = [PASSAGE, *self._plan.reference_arms]
        for position, task in enumerate(self._plan.heldout_tasks):
            entries = []
            for arm in arms:
                key = EditKey(HELDOUT, arm, position, 0)
                edit = own_text(task, self._plan.config.training) if arm == PASSAGE else task.reference_edits[arm]
                entries.append(Entry(key, task.id, policy_id="", completion="", self_edit=edit))
            if new := [entry for entry in entries if entry.key not in known]:
                self._ledger.write(new)
            yield [known.get(entry.key, entry) for entry in entries]

    def _candidates(self, base_policy: str) -> Iterator[Submission]:
        """What the untrained teacher writes in each format, under each candidate's directive."""
        by_format: dict[str, dict[int, FixedStrategy]] = {}
        for number, strategy in enumerate(self._plan.config.heldout.fixed_strategies):
            by_format.setdefault(strategy.prompt_format, {})[number] = strategy
        if not self._plan.selection_tasks:
            return
        for prompt_format, strategies in by_format.items():
            arms = {str(number): _overridden(strategy) for number, strategy in strategies.items()}
            request = self._plan.selection_generation(base_policy, prompt_format)
            groups = self._writer.groups(SELECTION, request, arms)
            yield from self._plan.selection_submissions(min(strategies), groups)

    def _teachers(self, base_policy: str, trained_policy: str) -> Iterator[Submission]:
        """Both teachers' self-edits of a task are trained together."""
        prompt_format = self._plan.config.teacher.prompt_format
        base_request = self._plan.heldout_generation(base_policy, prompt_format)
        if trained_policy == base_policy:
            both: dict[str, Adapt] = {UNTRAINED: unchanged, TRAINED: unchanged}
            groups = self._writer.groups(HELDOUT, base_request, both)
            yield from self._plan.heldout_submissions("teachers", groups)
            return
        untrained = list(self._writer.groups(HELDOUT, base_request, {UNTRAINED: unchanged}))
        request = self._plan.heldout_generation(trained_policy, prompt_format)
        trained = self._writer.groups(HELDOUT, request, {TRAINED: unchanged})
        pairs = zip(untrained, trained, strict=True)
        yield from self._plan.heldout_submissions("teachers", (first + second for first, second in pairs))

    def _fixed(self, base_policy: str) -> Iterator[Submission]:
        """The best candidate, once all of them are measured."""
        if not self._plan.selection_tasks:
            return
        entries = self._ledger.entries(SELECTION)
        while not all(entry.settled for entry in entries):
            self._stop.wait(0.2)  # the thread that receives results writes them down
            entries = self._ledger.entries(SELECTION)
        strategies = self._plan.config.heldout.fixed_strategies
        chosen = best_strategy(selection_rewards(entries, len(strategies)))
        if chosen is None:
            return
        strategy = strategies[chosen]
        request = self._plan.heldout_generation(base_policy, strategy.prompt_format)
        groups = self._writer.groups(HELDOUT, request, {FIXED: _overridden(strategy)})
        yield from self._plan.heldout_submissions("fixed", groups)


def _overridden(strategy: FixedStrategy) -> Adapt:
    def adapt(self_edit: types.SelfEdit) -> types.SelfEdit:
        return under(strategy, self_edit)

    return adapt


def selection_rewards(entries: Sequence[Entry], candidates: int) -> list[float | None]:
    """Mean reward of each candidate on the selection passages; None where none could be measured. A malformed
    completion leaves the student as it was, which is worth exactly nothing; a failed evaluation says nothing and is
    left out."""
    means: list[float | None] = []
    for number in range(candidates):
        values = []
        for entry in entries:
            if entry.key.arm == str(number):
                if entry.malformed:
                    values.append(0.0)
                elif (reward := entry.reward) is not None:
                    values.append(reward.value)
        means.append(sum(values) / len(values) if values else None)
    return means


def best_strategy(rewards: Sequence[float | None]) -> int | None:
    """The candidate with the highest mean reward, the first of equals; None where none could be measured."""
    measured = [(-reward, number) for number, reward in enumerate(rewards) if reward is not None]
    return min(measured)[1] if measured else None
