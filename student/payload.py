"""The Celery payload at the worker's edge: proto in, trials; outcomes, proto out. No torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import cast, get_args

from preceptor.convert import mask_from_proto, questions_from_proto
from preceptor.errors import PreceptorError
from preceptor.limits import (
    MAX_ADAPTERS,
    MAX_ALPHA,
    MAX_BATCH_SIZE,
    MAX_EPOCHS,
    MAX_NEW_TOKENS,
    MAX_PROMPT_CHARACTERS,
    MAX_RANK,
    MAX_REPLAY_SHARE,
    MAX_SAMPLES,
    MAX_TARGET_MODULES,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
)
from preceptor.queue import PROTOCOL_VERSION
from preceptor.tasks import Question, Schedule
from preceptor.v1 import trial_pb2 as wire
from preceptor.v1 import types_pb2 as types
from student.trial import Answer, AnsweringSettings, TrainingSettings, Trial, TrialOutcome

# The most that a worker takes, whoever asks: what is beyond would fill its memory before it could fail.
_MOST: dict[str, float] = {
    "rank": MAX_RANK,
    "alpha": MAX_ALPHA * MAX_RANK,  # a directive's rank keeps alpha / rank
    "learning_rate": 1.0,
    "epochs": MAX_EPOCHS,
    "batch_size": MAX_BATCH_SIZE,
    "gradient_accumulation": MAX_BATCH_SIZE,
    "warmup_share": 1.0,
    "weight_decay": sys.float_info.max,
    "max_grad_norm": sys.float_info.max,
    "replay_share": MAX_REPLAY_SHARE,
}


def trials_of(batch: wire.TrialBatch) -> tuple[list[Trial], list[list[Question]]]:
    """The batch's trials and, for each, its questions.

    Raises PreceptorError(INVALID_REQUEST) naming what a worker of this version cannot do.
    """
    if batch.protocol_version not in (0, PROTOCOL_VERSION):
        raise _invalid("protocol_version", f"is {batch.protocol_version}, this worker understands {PROTOCOL_VERSION}")
    if len(batch.student.adapters) > MAX_ADAPTERS:
        raise _invalid("student.adapters", f"must be at most {MAX_ADAPTERS}")
    if len({trial.id for trial in batch.trials}) < len(batch.trials):
        raise _invalid("trials", "hold an id twice")
    sets = [
        questions_from_proto(one.questions, f"question_sets[{number}].questions", MAX_PROMPT_CHARACTERS)
        for number, one in enumerate(batch.question_sets)
    ]
    trials, questions = [], []
    for trial in batch.trials:
        if trial.question_set >= len(sets):
            raise _invalid("question_set", f"of {trial.id} is {trial.question_set}, there are {len(sets)}")
        trials.append(Trial(trial.id, tuple(trial.documents), trial.seed, settings_of(trial.settings)))
        questions.append(sets[trial.question_set])
    return trials, questions


def settings_of(message: wire.TrainingSettings) -> TrainingSettings:
    """Training settings; a zero that makes no sense is the default. Raises PreceptorError(INVALID_REQUEST)."""
    default = TrainingSettings()
    schedule = message.schedule or default.schedule
    if schedule not in (known := get_args(Schedule)):
        raise _invalid("schedule", f"is {schedule!r}, known are {', '.join(known)}")
    if message.loss_mask not in types.LossMask.values():
        raise _invalid("loss_mask", f"is {message.loss_mask}, which this worker does not know")
    if len(message.target_modules) > MAX_TARGET_MODULES or not all(message.target_modules):
        raise _invalid("target_modules", f"must be at most {MAX_TARGET_MODULES} names, none empty")
    for name, most in _MOST.items():
        value = getattr(message, name)
        if not 0 <= value <= most:  # nor is what is no number
            raise _invalid(name, f"is {value}, it must be 0..{most:g}")
    return TrainingSettings(
        rank=message.rank or default.rank,
        alpha=message.alpha or default.alpha,
        target_modules=tuple(message.target_modules) or default.target_modules,
        learning_rate=message.learning_rate or default.learning_rate,
        epochs=message.epochs or default.epochs,
        batch_size=message.batch_size or default.batch_size,
        gradient_accumulation=message.gradient_accumulation or default.gradient_accumulation,
        max_steps=message.max_steps,
        warmup_share=message.warmup_share,
        schedule=cast(Schedule, schedule),
        weight_decay=message.weight_decay,
        max_grad_norm=message.max_grad_norm or default.max_grad_norm,
        replay_share=message.replay_share,
        loss_mask=mask_from_proto(message.loss_mask) or default.loss_mask,
        loss_marker=message.loss_marker or default.loss_marker,
        max_train_tokens=message.max_train_tokens,
        max_document_tokens=message.max_document_tokens,
        pad_to=message.pad_to,
        full=message.full,
        keep=message.keep,
    )


def answering_of(message: wire.AnswerSettings) -> AnsweringSettings:
    """How questions are asked, with defaults where nothing is said. Raises PreceptorError(INVALID_REQUEST)."""
    default = AnsweringSettings()
    temperature = message.temperature or default.temperature
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        bounds = f"{MIN_TEMPERATURE:g}..{MAX_TEMPERATURE:g}"
        raise _invalid("answers.temperature", f"is {temperature}, it must be a number above 0, {bounds}")
    for name, most in (("max_new_tokens", MAX_NEW_TOKENS), ("samples", MAX_SAMPLES)):
        if (value := getattr(message, name)) > most:
            raise _invalid(f"answers.{name}", f"is {value}, it must be at most {most}")
    return AnsweringSettings(
        prompt_template=message.prompt or default.prompt_template,
        max_new_tokens=message.max_new_tokens or default.max_new_tokens,
        generate=not message.logprobs_only,
        samples=message.samples,
        temperature=temperature,
        certainty=message.certainty,
    )


def probes_of(batch: wire.TrialBatch) -> list[Question]:
    """The retention probes; none are asked where only log-probabilities are measured."""
    if batch.answers.logprobs_only:
        return []
    return questions_from_proto(batch.probes, "probes", MAX_PROMPT_CHARACTERS)


def result_of(batch_id: str, outcomes: Sequence[TrialOutcome], worker: str, attempt: int) -> wire.TrialBatchResult:
    """Outcomes as the message that goes back."""
    result = wire.TrialBatchResult(batch_id=batch_id, worker=worker)
    for outcome in outcomes:
        one = result.results.add(
            trial_id=outcome.trial_id,
            answers=[_answer(answer) for answer in outcome.answers],
            probe_answers=[_answer(answer) for answer in outcome.probe_answers],
            steps=outcome.steps,
            trained_tokens=outcome.trained_tokens,
            seconds=outcome.train_seconds + outcome.answer_seconds,
        )
        if outcome.losses:
            one.first_loss, one.final_loss = outcome.losses[0], outcome.losses[-1]
        if outcome.adapter is not None:
            one.adapter.uri, one.adapter.sha256 = outcome.adapter
        if outcome.failure is not None:
            one.failure.reason, one.failure.message = outcome.failure
            one.failure.attempts = attempt
        result.train_seconds += outcome.train_seconds
        result.answer_seconds += outcome.answer_seconds
    return result


def failed(batch_id: str, error: PreceptorError, worker: str, attempt: int) -> wire.TrialBatchResult:
    """The result of a batch that failed as a whole."""
    failure = types.Failure(reason=error.reason, message=str(error)[:2000], attempts=attempt)
    return wire.TrialBatchResult(batch_id=batch_id, worker=worker, failure=failure)


def _answer(answer: Answer) -> wire.Answer:
    return wire.Answer(
        text=answer.text,
        gold_logprob=answer.gold_logprob,
        gold_tokens=answer.gold_tokens,
        certainty=answer.certainty,
        samples=answer.samples,
    )


def _invalid(field: str, message: str) -> PreceptorError:
    return PreceptorError("INVALID_REQUEST", f"{field} {message}", field=field)
