"""The worker's edge: what the contract says arrives in the trial, and what this worker cannot do is refused."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as some

from evaluator.resolve import resolve_training
from preceptor.convert import mask_to_proto
from preceptor.errors import PreceptorError
from preceptor.tasks import LossMask, Schedule
from preceptor.v1 import trial_pb2 as wire
from preceptor.v1 import types_pb2 as types
from student.payload import settings_of
from student.trial import ALL_LINEAR, TrainingSettings

rates = some.floats(1e-6, 1.0)
counts = some.integers(1, 1000)
settings = some.builds(
    TrainingSettings,
    rank=some.integers(1, 1024),
    alpha=some.floats(0.1, 256),
    target_modules=some.sampled_from([ALL_LINEAR, ("q_proj", "v_proj")]),
    learning_rate=rates,
    epochs=counts,
    batch_size=counts,
    gradient_accumulation=counts,
    max_steps=some.integers(0, 10_000),
    schedule=some.sampled_from(get_args(Schedule)),
    warmup_share=some.floats(0, 1),
    weight_decay=some.floats(0, 1),
    max_grad_norm=some.floats(1e-3, 1e9),
    replay_share=some.floats(0, 0.9),
    loss_mask=some.sampled_from(LossMask),
    loss_marker=some.text(min_size=1, max_size=9),
    max_train_tokens=some.integers(0, 2**40),
    max_document_tokens=some.integers(0, 2**20),
    pad_to=some.integers(0, 2**20),
)


def message_of(given_settings: TrainingSettings) -> wire.TrainingSettings:
    values = {name: getattr(given_settings, name) for name in TrainingSettings.__dataclass_fields__}
    return wire.TrainingSettings(**(values | {"loss_mask": mask_to_proto(given_settings.loss_mask)}))


@given(settings)
def test_every_setting_reaches_the_worker_as_it_was_given(one: TrainingSettings) -> None:
    assert settings_of(message_of(one)) == one


def test_the_evaluator_resolves_what_is_not_said_to_the_students_defaults() -> None:
    resolved = settings_of(resolve_training(wire.TrainingSettings(), types.Directive(), "self_edits[0]"))
    assert set(resolved.target_modules) == set(ALL_LINEAR)
    assert resolved == TrainingSettings(target_modules=resolved.target_modules)


def test_an_unknown_schedule_and_a_share_of_one_are_refused_by_name() -> None:
    for message, said in (
        (wire.TrainingSettings(schedule="polynomial"), "'polynomial', known are linear, constant, cosine"),
        (wire.TrainingSettings(replay_share=1.0), "replay_share is 1.0"),
    ):
        with pytest.raises(PreceptorError, match=said) as raised:
            settings_of(message)
        assert raised.value.reason == "INVALID_REQUEST"
