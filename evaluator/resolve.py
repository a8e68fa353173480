"""The only place where the contract's defaults become numbers, and where a directive meets the run's settings.

What leaves here has every field set: a worker never has to guess, and an evaluation's identity does not change when a
default does (it changes because the resolved number does).
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import get_args

from evaluator.reward import Weights
from preceptor.errors import PreceptorError
from preceptor.few_shot.text import MARKER
from preceptor.limits import (
    MAX_ALPHA,
    MAX_BATCH_SIZE,
    MAX_EPOCHS,
    MAX_NAME_CHARACTERS,
    MAX_NEW_TOKENS,
    MAX_QUESTION_CHARACTERS,
    MAX_RANK,
    MAX_REPLAY_SHARE,
    MAX_TARGET_MODULES,
    MAX_WEIGHT,
)
from preceptor.tasks import TARGETS, Schedule
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types

_RANK, _ALPHA = 8, 16.0


def resolve_training(
    given: trial.TrainingSettings, directive: types.Directive, place: str, *, few_shot: bool = False
) -> trial.TrainingSettings:
    """The settings of one trial: ``given``, defaults where it says nothing, the directive over both.

    A directive's rank keeps alpha / rank, so that the rank alone does not change the size of a step. Where all weights
    are trained, what is said of adapters means nothing and is the default's: the same work has one identity. ``place``
    names the self-edit in errors. ``few_shot``: it is for documents that are made of a few-shot task, which have a
    marker of their own, all of them. Raises PreceptorError(INVALID_REQUEST) for a value out of range.
    """
    settings = trial.TrainingSettings(
        rank=given.rank or _RANK,
        alpha=given.alpha or _ALPHA,
        target_modules=sorted(set(given.target_modules) or TARGETS["all"]),
        learning_rate=given.learning_rate or 3e-3,
        epochs=given.epochs or 8,
        batch_size=given.batch_size or 8,
        warmup_share=given.warmup_share if given.HasField("warmup_share") else 0.1,
        schedule=given.schedule or "linear",
        weight_decay=given.weight_decay,
        max_grad_norm=given.max_grad_norm or 1.0,
        replay_share=given.replay_share,
        loss_mask=given.loss_mask or types.LOSS_MASK_ALL,
        loss_marker=MARKER if few_shot else given.loss_marker or "Answer:",
        max_train_tokens=given.max_train_tokens,
        max_document_tokens=given.max_document_tokens,
        gradient_accumulation=given.gradient_accumulation or 1,
        max_steps=given.max_steps,
        pad_to=given.pad_to,
        full=given.full,
        keep=given.keep,
    )
    _check_training(settings, "protocol.training")
    if directive.fine_tuning:
        known = directive.fine_tuning in types.FineTuning.values()
        _check(known, f"{place}.directive.fine_tuning", "is not a known way", directive.fine_tuning)
        settings.full = directive.fine_tuning == types.FINE_TUNING_FULL
    if directive.targets:
        demand = f"must be one of {', '.join(TARGETS)}"
        _check(directive.targets in TARGETS, f"{place}.directive.targets", demand, directive.targets)
        settings.target_modules[:] = sorted(TARGETS[directive.targets])
    follows = few_shot or not directive.HasField("augmentations")
    _check(follows, f"{place}.directive.augmentations", "are of few-shot tasks alone", directive.augmentations)
    if directive.HasField("rank"):
        _check(1 <= directive.rank <= MAX_RANK, f"{place}.directive.rank", f"must be 1..{MAX_RANK}", directive.rank)
        settings.alpha *= directive.rank / settings.rank
        settings.rank = directive.rank
    if directive.HasField("learning_rate"):
        settings.learning_rate = directive.learning_rate
    if directive.HasField("epochs"):
        settings.epochs = directive.epochs
    if directive.HasField("replay_share"):
        settings.replay_share = directive.replay_share
    if directive.loss_mask:
        # Not OUTPUTS_ONLY: where a document lacks the marker, the choice would be a failure instead of a bad score.
        known = directive.loss_mask in (types.LOSS_MASK_ALL, types.LOSS_MASK_AFTER_MARKER)
        known = known or (few_shot and directive.loss_mask == types.LOSS_MASK_OUTPUTS_ONLY)
        _check(known, f"{place}.directive.loss_mask", "must be all or after_marker", directive.loss_mask)
        settings.loss_mask = directive.loss_mask
    _check_training(settings, f"{place}.directive")
    if settings.full:
        settings.rank, settings.alpha, settings.target_modules[:] = _RANK, _ALPHA, sorted(TARGETS["all"])
    return settings


def resolve_answers(given: trial.AnswerSettings) -> trial.AnswerSettings:
    """How questions are put, with defaults. Raises PreceptorError(INVALID_REQUEST)."""
    answers = trial.AnswerSettings()
    answers.CopyFrom(given)
    answers.prompt = given.prompt or "Question: {question}\nAnswer:"
    answers.max_new_tokens = given.max_new_tokens or 16
    if given.samples:
        answers.temperature = given.temperature or 1.0
    _check("{question}" in answers.prompt, "protocol.answers.prompt", "needs {question}", answers.prompt)
    size, demand = len(answers.prompt), f"must have at most {MAX_QUESTION_CHARACTERS} characters"
    _check(size <= MAX_QUESTION_CHARACTERS, "protocol.answers.prompt", demand, size)
    _check(
        answers.max_new_tokens <= MAX_NEW_TOKENS,
        "protocol.answers.max_new_tokens",
        f"must be 1..{MAX_NEW_TOKENS}",
        answers.max_new_tokens,
    )
    return answers


def resolve_weights(given: pb.RewardWeights) -> Weights:
    """The weights as they are; all zero is read as gain = 1. Raises PreceptorError(INVALID_REQUEST)."""
    values = {field.name: getattr(given, field.name) for field in fields(Weights)}
    for name, value in values.items():
        known = abs(value) <= MAX_WEIGHT  # not so for what is no number
        _check(known, f"protocol.weights.{name}", f"must be a finite number, at most {MAX_WEIGHT:g}", value)
    return Weights(**values) if any(values.values()) else Weights()


def _check_training(settings: trial.TrainingSettings, place: str) -> None:
    rate = settings.learning_rate
    _check(0 < rate <= 1, f"{place}.learning_rate", "must be above 0 and at most 1", rate)
    _check(1 <= settings.epochs <= MAX_EPOCHS, f"{place}.epochs", f"must be 1..{MAX_EPOCHS}", settings.epochs)
    share = settings.replay_share
    _check(0 <= share <= MAX_REPLAY_SHARE, f"{place}.replay_share", f"must be 0..{MAX_REPLAY_SHARE}", share)
    if place != "protocol.training":
        return  # the rest is not a directive's to change
    mask = settings.loss_mask
    _check(mask in types.LossMask.values(), f"{place}.loss_mask", "is not a known mask", mask)
    _check(settings.rank <= MAX_RANK, f"{place}.rank", f"must be 1..{MAX_RANK}", settings.rank)
    alpha = settings.alpha
    _check(0 < alpha <= MAX_ALPHA, f"{place}.alpha", f"must be above 0 and at most {MAX_ALPHA:g}", alpha)
    names = settings.target_modules
    demand = f"must be 1..{MAX_TARGET_MODULES} names of 1..{MAX_NAME_CHARACTERS} printable characters"
    usable = all(1 <= len(name) <= MAX_NAME_CHARACTERS and name.isprintable() for name in names)
    _check(len(names) <= MAX_TARGET_MODULES and usable, f"{place}.target_modules", demand, len(names))
    marker = len(settings.loss_marker)
    demand = f"must have at most {MAX_NAME_CHARACTERS} characters"
    _check(marker <= MAX_NAME_CHARACTERS, f"{place}.loss_marker", demand, marker)
    size = settings.batch_size
    _check(size <= MAX_BATCH_SIZE, f"{place}.batch_size", f"must be 1..{MAX_BATCH_SIZE}", size)
    warmup = settings.warmup_share
    _check(0 <= warmup <= 1, f"{place}.warmup_share", "must be 0..1", warmup)
    accumulated = settings.gradient_accumulation
    _check(accumulated <= MAX_BATCH_SIZE, f"{place}.gradient_accumulation", f"must be 1..{MAX_BATCH_SIZE}", accumulated)
    schedule, schedules = settings.schedule, get_args(Schedule)
    _check(schedule in schedules, f"{place}.schedule", f"must be one of {', '.join(schedules)}", schedule)
    decay = settings.weight_decay
    _check(0 <= decay < math.inf, f"{place}.weight_decay", "must be 0 or more", decay)
    norm = settings.max_grad_norm
    _check(0 < norm < math.inf, f"{place}.max_grad_norm", "must be above 0", norm)


def _check(holds: bool, place: str, demand: str, given: object) -> None:
    if not holds:
        raise PreceptorError("INVALID_REQUEST", f"{place} {demand} (given: {str(given)[:80]!r})", field=place)
