"""The one update: the documents of every kept self-edit together, mixed with old material, and the result kept.

The config's ``[training]`` holds, with what ``joint_config`` changes: replay, loss on what follows the marker (answers
are to be remembered, questions are not; docs/adapt.md has what that is worth) and no budget of tokens, which is a
trial's. Directives of the single self-edits count for nothing here: they were chosen for a few documents at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from preceptor.config import RunConfig, TrainingConfig, load_config
from preceptor.convert import question_to_proto
from preceptor.errors import PreceptorError
from preceptor.names import derived_seed
from preceptor.protocols import evaluation_protocol
from preceptor.tasks import Question
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import types_pb2 as types

JOINT_DEFAULTS = {"replay_share": 0.5, "loss_mask": "after_marker", "max_train_tokens": 0}


def joint_config(config: RunConfig, overrides: Sequence[str], replay: bool) -> RunConfig:
    """The config of the joint update: ``overrides`` are ``KEY=VALUE`` of ``[training]``. ``replay``: whether there is
    anything to replay. Raises PreceptorError(BAD_CONFIG)."""
    given = [override if override.partition("=")[0].count(".") else f"training.{override}" for override in overrides]
    for override in given:
        if not override.startswith("training."):
            raise PreceptorError("BAD_CONFIG", f"{override!r} is no key of [training]", field="--joint")
    # Read as a config is, so that a wrong key is named as there.
    read = load_config(None, ["tasks.world=almanac", *given]).training
    named = {override.partition("=")[0].removeprefix("training.") for override in given}
    values = config.training.model_dump() | {"recipe": None, "include_passage": False}
    values |= JOINT_DEFAULTS if replay else JOINT_DEFAULTS | {"replay_share": 0.0}
    values |= {name: value for name, value in read.model_dump().items() if name in named}
    try:
        training = TrainingConfig.model_validate(values)
    except ValidationError as error:
        raise PreceptorError("BAD_CONFIG", f"the joint update's training: {error}", field="--joint") from None
    if training.replay_share and not replay:
        problem = "replay_share is above 0, and there is nothing to replay (--replay FILE)"
        raise PreceptorError("BAD_CONFIG", problem, field="--joint")
    return config.model_copy(update={"training": training})


def joint_protocol(
    config: RunConfig,
    probes: Sequence[Question],
    replay_documents: Sequence[str],
    *,
    bank: types.QuestionBank.ValueType = types.QUESTION_BANK_SEALED,
    seed: int | None = None,
) -> evaluator.EvaluationProtocol:
    """One trial, kept, asked all sealed questions and all probes. ``config``: with the joint update's training."""
    protocol = evaluation_protocol(
        config,
        bank=bank,
        probes=[question_to_proto(probe) for probe in probes],
        replay_documents=replay_documents,
        seeds=[derived_seed(config.seed, "joint") if seed is None else seed],
    )
    protocol.training.keep = True
    return protocol
