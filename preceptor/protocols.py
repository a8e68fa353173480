"""What a config asks of the evaluator, as a pure function: the same for a run and for an evaluation by hand.

Equal arguments give equal messages, so what one of them has had measured, the other finds known.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from preceptor.config import LimitConfig, RunConfig, TrainingConfig
from preceptor.convert import mask_to_proto
from preceptor.limits import MAX_EPOCHS
from preceptor.names import derived_seed
from preceptor.tasks import LossMask
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types


def evaluation_protocol(
    config: RunConfig,
    *,
    bank: types.QuestionBank.ValueType,
    probes: Sequence[types.Question],
    replay_documents: Sequence[str],
    seeds: Sequence[int],
) -> evaluator.EvaluationProtocol:
    """Everything but the self-edit that a reward depends on, one trial for each of ``seeds``."""
    training = config.training.model_dump(exclude={"recipe", "include_passage", "loss_mask"})
    reward = config.reward
    weights = {name: getattr(reward, name) for name in evaluator.RewardWeights.DESCRIPTOR.fields_by_name}
    return evaluator.EvaluationProtocol(
        training=trial.TrainingSettings(**training, loss_mask=mask_to_proto(LossMask(config.training.loss_mask))),
        answers=trial.AnswerSettings(
            **config.answers.model_dump(), samples=reward.samples, certainty=reward.certainty_gain != 0
        ),
        probes=probes,
        replay_documents=replay_documents,
        bank=bank,
        grader=reward.grader,
        weights=evaluator.RewardWeights(**weights),
        seeds=seeds,
        include_passage=config.training.include_passage,
        few_shot=evaluator.FewShotSettings(**config.few_shot.model_dump()),
    )


def directive_limits(config: RunConfig) -> teacher.DirectiveLimits | None:
    """What directives may ask for, where that is not what holds without a word: a request is the same as before. What
    an edit costs whose directive is silent follows from the config's own training settings."""
    limits, training = config.teacher.limits, config.training
    said = {
        name: value for name, value in limits.model_dump().items() if value != LimitConfig.model_fields[name].default
    }
    if limits.max_trained_characters:
        said |= {"default_epochs": training.epochs, "default_replay_share": training.replay_share}
    return teacher.DirectiveLimits(**said) if said else None


def look_protocol(protocol: evaluator.EvaluationProtocol, steps: int) -> evaluator.EvaluationProtocol:
    """The first look of a race under this protocol: its first seed, so many optimiser steps, and nothing measured but
    the log-probabilities of the gold answers."""
    look = evaluator.EvaluationProtocol()
    look.CopyFrom(protocol)
    limit = protocol.training.max_steps
    look.training.max_steps = min(steps, limit) if limit else steps
    look.answers.CopyFrom(
        trial.AnswerSettings(
            prompt=protocol.answers.prompt, max_new_tokens=protocol.answers.max_new_tokens, logprobs_only=True
        )
    )
    del look.probes[:]
    look.grader = "exact"  # nothing is graded; a judge that is down is no reason not to look
    look.weights.CopyFrom(evaluator.RewardWeights(gold_logprob_gain=1.0))
    del look.seeds[1:]
    return look


def chosen_probes(config: RunConfig, probes: Sequence[types.Question]) -> tuple[types.Question, ...]:
    """The retention probes that rewards ask, ``reward.probes`` at most: one choice for the whole run, so that the
    untouched student is asked once."""
    if len(probes) <= config.reward.probes:
        return tuple(probes)
    places = random.Random(derived_seed(config.seed, "probes")).sample(range(len(probes)), config.reward.probes)
    return tuple(probes[place] for place in sorted(places))


def own_text(task: types.Task, training: TrainingConfig) -> types.SelfEdit:
    """The passage as the only study material, one document a line (see ``repeated``)."""
    lines = [line.strip() for line in task.passage.text.splitlines()]
    return repeated([line for line in lines if line], training)


def repeated(documents: Sequence[str], training: TrainingConfig) -> types.SelfEdit:
    """These documents under the run's own training settings.

    A passage is often a single line, which the usual number of epochs would show only a few times; where the run has
    a token budget, the documents are repeated until it is spent, as much training as any other material can get.
    """
    directive = types.Directive(epochs=MAX_EPOCHS) if training.max_train_tokens else types.Directive()
    return types.SelfEdit(documents=documents, directive=directive)


def as_trained(self_edit: types.SelfEdit, training: TrainingConfig) -> types.SelfEdit:
    """A recipe is followed as published: no directive changes it."""
    return types.SelfEdit(documents=self_edit.documents) if training.recipe else self_edit
