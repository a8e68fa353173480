"""The final measurement: what the student learns, on passages the teacher never saw, from each arm's study material.

| arm | study material |
|---|---|
| no_edit | none: the untouched student (the baseline that every evaluation carries) |
| passage_only | the passage itself, one document a line, over and over until the token budget is spent |
| format:NAME | what the untrained teacher writes in that format, as often as the passage; no directive |
| untrained_teacher | one self-edit of the untrained teacher |
| fixed_strategy | the untrained teacher under one prompt format and one directive, chosen on training passages |
| external_teacher | one self-edit of the teacher at PRECEPTOR_EXTERNAL_TEACHER_ADDRESS |
| trained_teacher | one self-edit of the last policy |
| in_context | none, and the passage stands before each question: the ceiling of a student that can read |
| oracle, shuffled_facts | the tasks' own reference edits: right facts as questions, and wrong ones |

A few-shot task has no documents of its own: there is no passage_only, fixed strategies are directives that nobody
writes, and the untouched student is the in-context baseline, since the demonstrations stand in every prompt.

All arms share the student, the training settings, the trial seeds, the sealed questions and all retention probes; the
teachers share the sampling seed. A completion that is malformed, or too costly to train, leaves the student untouched,
so its passage counts with the untouched student's answers, and it is counted. A failed evaluation is no measurement:
its passage is left out of the arm, and it is counted. An external teacher that cannot be reached, or refuses, costs its
own arm and nothing else. The order in which things finish has no influence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from orchestrator.entries import HELDOUT, SELECTION, EditKey, Entry
from orchestrator.evaluator_client import EvaluatorClient, Submission
from orchestrator.ledger import Ledger, LeftOut
from orchestrator.loop import most_common_failure
from orchestrator.plan import RunPlan, under
from orchestrator.progress import Progress
from orchestrator.stop import Stop
from orchestrator.teacher_client import TeacherClient
from orchestrator.timing import RUN, RunClock
from orchestrator.writing import Adapt, Writer, unchanged
from preceptor.arms import EXTERNAL, FIXED, IN_CONTEXT, PASSAGE, TRAINED, UNTRAINED, format_arm
from preceptor.config import FixedStrategy
from preceptor.database import DatabaseError
from preceptor.errors import PreceptorError
from preceptor.protocols import own_text, repeated
from preceptor.v1 import types_pb2 as types

log = logging.getLogger(__name__)


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
        external: TeacherClient | None = None,
    ) -> None:
        """``external``: the teacher of the arm external_teacher; None where the orchestrator knows none."""
        self._plan = plan
        self._evaluator = evaluator_client
        self._ledger = ledger
        self._clock = clock
        self._progress = progress
        self._stop = stop
        self._writer = Writer(teacher_client, ledger)
        self._external = external

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
        busy while the teacher writes; the external teacher, which may let us wait, comes last."""
        self._clock.switch(HELDOUT, "generate")
        self._progress.enter("held-out: given material")
        plan, training = self._plan, self._plan.config.training
        if PASSAGE in plan.arms:
            own = self._given(HELDOUT, plan.heldout_tasks, {PASSAGE: lambda task: own_text(task, training)})
            yield from plan.heldout_submissions("passage", own)
        if IN_CONTEXT in plan.arms:
            nothing = self._given(HELDOUT, plan.heldout_tasks, {IN_CONTEXT: lambda _task: types.SelfEdit()})
            yield from plan.heldout_submissions(IN_CONTEXT, nothing, in_context=True)
        if plan.reference_arms:
            references = {arm: _reference(arm) for arm in plan.reference_arms}
            yield from plan.heldout_submissions("references", self._given(HELDOUT, plan.heldout_tasks, references))
        self._progress.enter("held-out: choosing a fixed strategy")
        yield from self._candidates(base_policy)
        self._progress.enter("held-out: teachers writing")
        yield from self._teachers(base_policy, trained_policy)
        for prompt_format in plan.config.heldout.formats:
            self._progress.enter(f"held-out: format {prompt_format}")
            yield from self._format(base_policy, prompt_format)
        self._progress.enter("held-out: fixed strategy")
        yield from self._fixed(base_policy)
        if EXTERNAL in plan.arms:
            self._progress.enter("held-out: external teacher writing")
            yield from self._from_outside()
        self._clock.switch(HELDOUT, "evaluate")
        self._progress.enter("held-out: evaluating")

    def _given(
        self, stage: str, tasks: Sequence[types.Task], edits: Mapping[str, Callable[[types.Task], types.SelfEdit]]
    ) -> list[list[Entry]]:
        """The ledger lines of arms for which nobody has to write, task by task."""
        known = {entry.key: entry for entry in self._ledger.entries(stage)}
        groups = []
        for position, task in enumerate(tasks):
            entries = [
                Entry(EditKey(stage, arm, position, 0), task.id, policy_id="", completion="", self_edit=edit(task))
                for arm, edit in edits.items()
            ]
            if new := [entry for entry in entries if entry.key not in known]:
                self._ledger.write(new)
            groups.append([known.get(entry.key, entry) for entry in entries])
        return groups

    def _candidates(self, base_policy: str) -> Iterator[Submission]:
        """What the untrained teacher writes in each format, under each candidate's directive."""
        candidates = self._plan.config.heldout.fixed_strategies
        if not self._plan.selection_tasks:
            return
        if self._plan.few_shot:
            directives = {str(number): _directive_alone(strategy) for number, strategy in enumerate(candidates)}
            groups = self._given(SELECTION, self._plan.selection_tasks, directives)
            yield from self._plan.selection_submissions(0, groups)
            return
        by_format: dict[str, dict[int, FixedStrategy]] = {}
        for number, strategy in enumerate(candidates):
            by_format.setdefault(self._format_of(strategy), {})[number] = strategy
        for prompt_format, strategies in by_format.items():
            arms = {str(number): _overridden(strategy) for number, strategy in strategies.items()}
            request = self._plan.selection_generation(base_policy, prompt_format)
            written = self._writer.groups(SELECTION, request, arms)
            yield from self._plan.selection_submissions(min(strategies), written)

    def _format_of(self, strategy: FixedStrategy) -> str:
        return strategy.prompt_format or self._plan.config.teacher.prompt_format

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
        if self._plan.few_shot:
            groups = iter(self._given(HELDOUT, self._plan.heldout_tasks, {FIXED: _directive_alone(strategy)}))
        else:
            request = self._plan.heldout_generation(base_policy, self._format_of(strategy))
            groups = self._writer.groups(HELDOUT, request, {FIXED: _overridden(strategy)})
        yield from self._plan.heldout_submissions("fixed", groups)

    def _format(self, base_policy: str, prompt_format: str) -> Iterator[Submission]:
        """What the untrained teacher writes in this format, under the run's own training settings and, where the run
        has a token budget, over and over until it is spent, as every other material may be."""

        def plain(self_edit: types.SelfEdit) -> types.SelfEdit:
            return repeated(self_edit.documents, self._plan.config.training)

        request = self._plan.heldout_generation(base_policy, prompt_format)
        arm = format_arm(prompt_format)
        yield from self._plan.heldout_submissions(arm, self._writer.groups(HELDOUT, request, {arm: plain}))

    def _from_outside(self) -> Iterator[Submission]:
        """What the external teacher writes. Where it does not, its arm is left out, for the reason that is noted."""
        if EXTERNAL not in self._ledger.left_out():
            yield from self._plan.heldout_submissions(EXTERNAL, self._written_outside())

    def _written_outside(self) -> Iterator[list[Entry]]:
        try:
            if self._external is None:
                raise PreceptorError("EXTERNAL_TEACHER_NOT_SET", "the orchestrator knows no external teacher")
            policy = self._external.base_policy(learns=False)
            request = self._plan.heldout_generation(policy, self._plan.config.teacher.prompt_format)
            yield from Writer(self._external, self._ledger).groups(HELDOUT, request, {EXTERNAL: unchanged})
        except DatabaseError:  # ours, which the run waits for
            raise
        except PreceptorError as error:
            log.warning("the arm %s is left out: %s", EXTERNAL, error)
            self._ledger.leave_out(EXTERNAL, LeftOut(error.reason, error.message))


def _reference(arm: str) -> Callable[[types.Task], types.SelfEdit]:
    return lambda task: task.reference_edits[arm]


def _directive_alone(strategy: FixedStrategy) -> Callable[[types.Task], types.SelfEdit]:
    return lambda _task: under(strategy, types.SelfEdit())


def _overridden(strategy: FixedStrategy) -> Adapt:
    def adapt(self_edit: types.SelfEdit) -> types.SelfEdit:
        return under(strategy, self_edit)

    return adapt


def selection_rewards(entries: Sequence[Entry], candidates: int) -> list[float | None]:
    """Mean reward of each candidate on the selection passages; None where none could be measured. What is malformed
    or too costly leaves the student as it was, which is worth exactly nothing; a failed evaluation says nothing and is
    left out."""
    means: list[float | None] = []
    for number in range(candidates):
        values = []
        for entry in entries:
            if entry.key.arm == str(number):
                if entry.unusable:
                    values.append(0.0)
                elif (reward := entry.reward) is not None:
                    values.append(reward.value)
        means.append(sum(values) / len(values) if values else None)
    return means


def best_strategy(rewards: Sequence[float | None]) -> int | None:
    """The candidate with the highest mean reward, the first of equals; None where none could be measured."""
    measured = [(-reward, number) for number, reward in enumerate(rewards) if reward is not None]
    return min(measured)[1] if measured else None
