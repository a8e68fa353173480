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
from student.payload import answering_of, probes_of, result_of, settings_of
from student.trial import ALL_LINEAR, Answer, AnsweringSettings, TrainingSettings, TrialOutcome

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


@given(
    some.builds(
        wire.AnswerSettings,
        prompt=some.sampled_from(["{question}?", "Q: {question} A:"]),
        max_new_tokens=counts,
        logprobs_only=some.booleans(),
        samples=some.integers(0, 64),
        temperature=some.floats(1e-3, 100),
        certainty=some.booleans(),
    )
)
def test_every_answer_setting_reaches_the_worker_as_it_was_given(message: wire.AnswerSettings) -> None:
    assert answering_of(message) == AnsweringSettings(
        prompt_template=message.prompt,
        max_new_tokens=message.max_new_tokens,
        generate=not message.logprobs_only,
        samples=message.samples,
        temperature=message.temperature,
        certainty=message.certainty,
    )
    assert answering_of(wire.AnswerSettings()) == AnsweringSettings()


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused_by_name(temperature: float) -> None:
    with pytest.raises(PreceptorError, match=r"answers\.temperature is") as raised:
        answering_of(wire.AnswerSettings(temperature=temperature))
    assert raised.value.reason == "INVALID_REQUEST"


def test_probes_are_not_asked_where_only_log_probabilities_are_measured() -> None:
    probes = [types.Question(text="Where is Ada?", answer="Rome")]
    assert len(probes_of(wire.TrialBatch(probes=probes))) == 1
    assert not probes_of(wire.TrialBatch(probes=probes, answers=wire.AnswerSettings(logprobs_only=True)))


def test_an_answer_goes_back_with_all_that_was_measured() -> None:
    given_answer = Answer(0, "Rome", -1.5, 4, certainty=5.25, samples=("Rome", "Paris"))
    outcome = TrialOutcome("one", (given_answer,), (Answer(0, "a smith", -2.0, 7),), train_seconds=2, answer_seconds=1)
    (result,) = result_of("batch", [outcome], "here", 1).results
    expected = wire.Answer(text="Rome", gold_logprob=-1.5, gold_tokens=4, certainty=5.25, samples=["Rome", "Paris"])
    assert list(result.answers) == [expected]
    assert list(result.probe_answers) == [wire.Answer(text="a smith", gold_logprob=-2.0, gold_tokens=7)]
    assert result.seconds == 3
