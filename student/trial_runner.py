"""Runs a batch of trials of one student: tokenise, train, answer, keep what is to be kept, hand back outcomes.

Adapters are trained together, full fine-tunes one after the other behind them.

Promises: one outcome per trial, in the order given. A trial that cannot be run (a document too long, targets that the
student lacks, a divergence, no memory even alone) fails with its reason and its neighbours do not notice. The same
batch on the same machine gives the same bits.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from preceptor.errors import PreceptorError
from preceptor.tasks import Question
from preceptor.v1 import types_pb2 as types
from student.answering import Answering, Prompt, answer, encode_questions
from student.base import Encoded, LoadedBase
from student.full import NoAdapters, check_trainable, plan_full_memory, train_full
from student.kept import KeptEdits
from student.lora_bank import LoraBank, adapter_values
from student.memory import DEFAULT_CAPS, Caps, free_bytes, plan_memory
from student.plan import TrainingPlan, lesson, make_plan
from student.trainer import StepLimits, TrainingResult, train_bank
from student.trial import DEFAULT_ANSWERING, Answer, AnsweringSettings, Trial, TrialOutcome

log = logging.getLogger(__name__)


def run_trials(
    base: LoadedBase,
    trials: Sequence[Trial],
    questions: Sequence[Sequence[Question]],
    *,
    probes: Sequence[Question] = (),
    replay_documents: Sequence[str] = (),
    answering: AnsweringSettings = DEFAULT_ANSWERING,
    on_step: Callable[[int], None] | None = None,
    cancelled: Callable[[], Collection[str]] = tuple,
    caps: Caps = DEFAULT_CAPS,
    answer: Answering = answer,
    kept: KeptEdits | None = None,
) -> list[TrialOutcome]:
    """Trains and examines ``trials``; ``questions[k]`` are those of trial k, ``probes`` are asked of every trial.

    Sampled answers are drawn with the trial's seed; of probes there are none, and no certainty.
    ``on_step`` is called after each training step and after each chunk of answers with the number of steps so far; an
    exception from it stops the batch and passes through, which is how a worker gives a batch up. ``cancelled`` is
    asked before each step for the ids of trials that nobody wants any more: their adapters leave, and they end as
    CANCELLED. ``answer`` asks the trained adapters; an error that it raises is the batch's. ``kept`` takes what sound
    trials have learnt where their settings say so; a trial without a step has learnt nothing.
    Raises PreceptorError(SEQUENCE_TOO_LONG) for a probe that the student's context cannot hold.
    """
    if len({trial.trial_id for trial in trials}) < len(trials):
        raise ValueError("two trials of a batch have the same id")
    greedy = replace(answering, samples=0, certainty=False)
    batch = _Batch(base, answering, encode_questions(base, probes, greedy), on_step, cancelled, caps, answer, kept)
    replay = list(zip(replay_documents, base.encode(replay_documents), strict=True))
    members: list[_Member] = []
    for trial, asked in zip(trials, questions, strict=True):
        try:
            if trial.settings.keep and kept is None:
                raise PreceptorError("INVALID_REQUEST", "this worker has no place to keep what is learnt", field="keep")
            prompts = encode_questions(base, asked, answering, trial.seed)
            members.append(_Member(trial, _plan(base, trial, replay), prompts))
        except PreceptorError as error:
            batch.fail(trial, error)
    adapters = [member for member in members if not member.trial.settings.full]
    # One bank has one set of target layers.
    for targets in dict.fromkeys(member.trial.settings.target_modules for member in adapters):
        batch.run([member for member in adapters if member.trial.settings.target_modules == targets])
    for member in members:
        if member.trial.settings.full:
            batch.run_full(member)
    return [batch.outcomes[trial.trial_id] for trial in trials]


def _plan(base: LoadedBase, trial: Trial, replay: Sequence[tuple[str, Encoded]]) -> TrainingPlan:
    settings = trial.settings
    if settings.full:
        check_trainable(base)
    else:
        adapter_values(base.model, settings.target_modules, settings.rank)  # raises if the student cannot carry it
    own = list(zip(trial.documents, base.encode(trial.documents), strict=True))
    old = replay if settings.replay_share > 0 and own else ()
    lessons, replayed = (
        [lesson(text, item.ids, item.starts, settings, base.eos_id, base.context) for text, item in pairs]
        for pairs in (own, old)
    )
    return make_plan(lessons, replayed, settings, trial.seed)


@dataclass(frozen=True, slots=True)
class _Member:
    """A trial that can be run."""

    trial: Trial
    plan: TrainingPlan
    asked: list[Prompt]


@dataclass(slots=True)
class _Batch:
    """What the trials share, and the outcomes so far by trial id."""

    base: LoadedBase
    answering: AnsweringSettings
    probes: list[Prompt]
    on_step: Callable[[int], None] | None
    cancelled: Callable[[], Collection[str]]
    caps: Caps
    answer: Answering
    kept: KeptEdits | None
    outcomes: dict[str, TrialOutcome] = field(default_factory=dict)

    def fail(self, trial: Trial, error: PreceptorError) -> None:
        self.outcomes[trial.trial_id] = TrialOutcome(trial.trial_id, failure=(error.reason, error.message))

    def run(self, members: Sequence[_Member]) -> None:
        """Runs the members in as few banks as memory allows."""
        settings = [member.trial.settings for member in members]
        values = adapter_values(self.base.model, settings[0].target_modules, max(one.rank for one in settings))
        try:
            memory = plan_memory(
                self.base, values, [member.plan for member in members], free_bytes(self.base.device), self.caps
            )
        except PreceptorError as error:
            if len(members) > 1:  # perhaps only one of them is too large
                self._run_halves(members)
            else:
                self.fail(members[0].trial, error)
            return
        if memory.bank < len(members):
            log.warning("memory holds %d adapters at a time, not %d", memory.bank, len(members))
        for start in range(0, len(members), memory.bank):
            self._run_or_halve(members[start : start + memory.bank], memory.limits)

    def run_full(self, member: _Member) -> None:
        """Runs a full fine-tune, alone."""
        try:
            limits = plan_full_memory(self.base, member.plan, free_bytes(self.base.device), self.caps)
        except PreceptorError as error:
            self.fail(member.trial, error)
            return
        self._run_or_halve([member], limits)

    def _run_or_halve(self, members: Sequence[_Member], limits: StepLimits) -> None:
        try:
            if members[0].trial.settings.full:
                self._run_whole(members[0], limits)
            else:
                self._run_together(members, limits)
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(members) == 1:
                what = (
                    "the full fine-tune does not fit" if members[0].trial.settings.full else "not even one adapter fits"
                )
                self.fail(members[0].trial, PreceptorError("TRIAL_OUT_OF_MEMORY", f"{what}: {error}"[:500]))
                return
            log.warning("%d adapters did not fit into memory after all: going on with half as many", len(members))
        # outside the handler, so that the failed attempt's tensors are gone
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
        self._run_halves(members)

    def _run_halves(self, members: Sequence[_Member]) -> None:
        half = len(members) // 2
        self.run(members[:half])
        self.run(members[half:])

    def _run_together(self, members: Sequence[_Member], limits: StepLimits) -> None:
        settings = [member.trial.settings for member in members]
        bank = LoraBank(
            self.base.model,
            settings[0].target_modules,
            [one.rank for one in settings],
            [one.alpha for one in settings],
            [member.trial.seed for member in members],
        )
        with bank.attached():
            begun = time.perf_counter()
            ids = {member.trial.trial_id: adapter for adapter, member in enumerate(members)}
            results = train_bank(
                self.base,
                bank,
                [member.plan for member in members],
                limits,
                on_step=self.on_step,
                cancelled=lambda: [ids[one] for one in self.cancelled() if one in ids],
            )
            trained = time.perf_counter()
            sound = [seat for seat, result in enumerate(results) if not (result.diverged or result.cancelled)]
            rows = [members[seat].asked + self.probes for seat in sound]
            tick = self._tick(max(len(result.losses) for result in results))
            answers = self.answer(self.base, bank, sound, rows, self.answering, on_chunk=tick)
            answered = time.perf_counter()
        all_tokens = sum(result.tokens for result in results) or 1
        given = dict(zip(sound, answers, strict=True))
        all_answers = sum(map(len, answers)) or 1
        for seat, (member, result) in enumerate(zip(members, results, strict=True)):
            outcome = _trained(member.trial, result, (trained - begun) * result.tokens / all_tokens)
            if seat in given:
                share = (answered - trained) * len(given[seat]) / all_answers
                outcome = _answered(outcome, given[seat], len(member.asked), share)
            write = partial(KeptEdits.adapter, base=self.base, bank=bank, slot=seat)
            self.outcomes[member.trial.trial_id] = self._keep(member.trial, outcome, write, tick)

    def _run_whole(self, member: _Member, limits: StepLimits) -> None:
        trial, plan = member.trial, member.plan
        begun = time.perf_counter()
        student, result = self.base, TrainingResult()
        if plan.steps:
            student, result = train_full(
                self.base, plan, limits, on_step=self.on_step, cancelled=lambda: trial.trial_id in self.cancelled()
            )
        trained = time.perf_counter()
        outcome = _trained(trial, result, trained - begun)
        tick = self._tick(len(result.losses))
        if outcome.failure is None:
            rows = [member.asked + self.probes]
            # not by a server, which has the student as it was
            (answers,) = answer(student, NoAdapters(), [0], rows, self.answering, on_chunk=tick)
            outcome = _answered(outcome, answers, len(member.asked), time.perf_counter() - trained)
        self.outcomes[trial.trial_id] = self._keep(trial, outcome, partial(KeptEdits.weights, base=student), tick)

    def _tick(self, steps: int) -> Callable[[], None] | None:
        tick = self.on_step
        return (lambda: tick(steps)) if tick else None

    def _keep(
        self,
        trial: Trial,
        outcome: TrialOutcome,
        write: Callable[[KeptEdits], types.Artifact],
        tick: Callable[[], None] | None,
    ) -> TrialOutcome:
        """The outcome with what was learnt, where it is to be kept; a store that does not take it fails the trial."""
        if self.kept is None or not trial.settings.keep or outcome.failure or not outcome.steps:
            return outcome
        try:
            artifact = write(self.kept)
        except PreceptorError as error:
            return replace(outcome, answers=(), probe_answers=(), failure=(error.reason, error.message))
        if tick is not None:
            tick()
        return replace(outcome, adapter=(artifact.uri, artifact.sha256))


def _trained(trial: Trial, result: TrainingResult, seconds: float) -> TrialOutcome:
    failure = None
    if result.cancelled:
        failure = ("CANCELLED", f"nobody wanted it any more after step {len(result.losses)}")
    elif result.diverged:
        failure = ("TRIAL_DIVERGED", f"the loss became {result.losses[-1]:g} in step {len(result.losses)}")
    return TrialOutcome(
        trial.trial_id,
        losses=tuple(result.losses),
        trained_tokens=result.tokens,
        train_seconds=seconds,
        failure=failure,
    )


def _answered(outcome: TrialOutcome, answers: Sequence[Answer], own: int, seconds: float) -> TrialOutcome:
    """The outcome with its answers: ``own`` to the trial's questions, then those to the probes."""
    if not all(math.isfinite(one.gold_logprob + one.certainty) for one in answers):
        # its last step broke it, so that no loss could tell
        return replace(outcome, failure=("TRIAL_DIVERGED", "its answers' log-probabilities are no numbers"))
    return replace(outcome, answers=tuple(answers[:own]), probe_answers=tuple(answers[own:]), answer_seconds=seconds)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at a time would have fitted."""
    # On the CPU torch raises a bare RuntimeError, known by its text only; so do the libraries below it on a GPU.
    texts = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )
