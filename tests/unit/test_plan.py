"""What a trial trains on: labels, pads, steps and rates follow from its settings alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from preceptor.errors import PreceptorError
from preceptor.recipes import SEAL_COMPAT
from preceptor.tasks import LossMask
from student.plan import Lesson, lesson, make_plan, warmup_steps
from student.trial import TrainingSettings

SETTINGS = TrainingSettings(epochs=3, batch_size=2)
EOS = 256
THEIRS = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warmup, steps: get_constant_schedule_with_warmup(optimizer, warmup),
}

settings_of_any_kind = some.builds(
    TrainingSettings,
    loss_mask=some.sampled_from(LossMask),
    loss_marker=some.just("A:"),
    pad_to=some.integers(0, 40),
)


def as_lesson(text: str, settings: TrainingSettings = SETTINGS, context: int = 128) -> Lesson:
    return lesson(text, list(text.encode()), list(range(len(text))), settings, EOS, context)


def labelled(item: Lesson) -> list[int]:
    """The target of every label, read off the padded row as the trainer has to."""
    return [*item.ids, *[EOS] * item.pads][item.loss_from :]


@given(schedule=some.sampled_from(sorted(THEIRS)), steps=some.integers(1, 80), share=some.floats(0, 1, allow_nan=False))
def test_after_the_warm_up_the_rates_are_those_of_transformers(schedule: str, steps: int, share: float) -> None:
    settings = replace(SETTINGS, schedule=schedule, warmup_share=share, batch_size=1, epochs=steps)  # type: ignore[arg-type]
    rates = make_plan([as_lesson("Ada.")], [], settings, 0).learning_rates
    warmup = warmup_steps(steps, settings)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
    scheduler = THEIRS[schedule](optimizer, warmup, steps)
    theirs = []
    for _ in range(steps + 1):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[warmup:] == pytest.approx(theirs[warmup:steps])
    if warmup < steps:  # where all is warm-up, transformers' first step after it is already on the way down
        assert rates[:warmup] == pytest.approx(theirs[1 : warmup + 1])
    assert all(0 < rate <= settings.learning_rate * (1 + 1e-12) for rate in rates)
    assert max(rates) == pytest.approx(settings.learning_rate)


@given(
    documents=some.integers(1, 12),
    batch=some.integers(1, 5),
    accumulation=some.integers(1, 5),
    seed=some.integers(0, 2**63),
)
def test_accumulation_is_a_larger_step_of_the_same_documents_in_the_same_order(
    documents: int, batch: int, accumulation: int, seed: int
) -> None:
    own = [as_lesson(f"own {number}") for number in range(documents)]
    one = replace(SETTINGS, batch_size=batch * accumulation)
    other = replace(SETTINGS, batch_size=batch, gradient_accumulation=accumulation)
    assert make_plan(own, own, one, seed) == make_plan(own, own, other, seed)


@given(limit=some.integers(1, 12), epochs=some.integers(1, 6), share=some.floats(0, 0.8))
def test_a_step_limit_ends_the_plan_early_and_the_rate_falls_over_what_is_left(
    limit: int, epochs: int, share: float
) -> None:
    own = [as_lesson(f"own {number}") for number in range(3)]
    settings = replace(SETTINGS, epochs=epochs, replay_share=share)
    unlimited = make_plan(own, own, settings, 3)
    plan = make_plan(own, own, replace(settings, max_steps=limit), 3)
    assert plan.steps == unlimited.steps[:limit]
    assert plan.learning_rates[-1] < plan.learning_rates[0] or len(plan.steps) <= 2


def test_steps_instead_of_epochs() -> None:
    own = [as_lesson(f"own {number}") for number in range(5)]
    plan = make_plan(own, [], replace(SETTINGS, epochs=1024, max_steps=100), 0)
    assert len(plan.steps) == len(plan.learning_rates) == 100


@given(text=some.text("abA: ", min_size=0, max_size=60), settings=settings_of_any_kind, context=some.integers(64, 80))
def test_the_number_of_labels_is_the_number_of_targets(text: str, settings: TrainingSettings, context: int) -> None:
    item = as_lesson(text, settings, context)
    assert item.labels == len(labelled(item)) >= 0
    assert item.loss_from >= 1 or item.labels == 0, "nothing is asked for the first token"
    assert len(item.ids) + item.pads <= context


@given(
    text=some.text("abA: ", min_size=1, max_size=60),
    mask=some.sampled_from([LossMask.AFTER_MARKER, LossMask.OUTPUTS_ONLY]),
)
def test_only_text_behind_the_marker_and_the_closing_token_carry_loss(text: str, mask: LossMask) -> None:
    settings = replace(SETTINGS, loss_mask=mask, loss_marker="A:")
    item = as_lesson(text, settings)
    if "A:" in text:
        assert bytes(labelled(item)[:-1]).decode() == text[text.rfind("A:") + 2 :]
        assert labelled(item)[-1] == EOS
    elif settings.loss_mask is LossMask.OUTPUTS_ONLY:
        assert item.labels == 0
    else:
        assert bytes(labelled(item)[:-1]).decode() == text[1:]


def test_outputs_only_leaves_out_documents_without_the_marker() -> None:
    settings = replace(SETTINGS, loss_mask=LossMask.OUTPUTS_ONLY)
    pair, plain = as_lesson("Question: Where?\nAnswer: Rome", settings), as_lesson("Ada is in Rome.", settings)
    plan = make_plan([pair, plain], [plain], replace(settings, replay_share=0.5), 0)
    assert {item for step in plan.steps for item in step} == {pair}


@pytest.mark.parametrize("pad_to", [0, 64])
def test_documents_without_any_label_are_a_failure_and_no_documents_are_the_baseline(pad_to: int) -> None:
    settings = replace(SETTINGS, loss_mask=LossMask.OUTPUTS_ONLY, pad_to=pad_to)
    unmarked = [as_lesson("Ada is in Rome.", settings), as_lesson("Tom is a smith.", settings)]
    with pytest.raises(PreceptorError, match=r"none of 2 documents .* outputs_only, marker 'Answer:'") as raised:
        make_plan(unmarked, [as_lesson("Answer: yes", settings)], settings, 0)
    assert raised.value.reason == "NOTHING_TO_TRAIN"
    with pytest.raises(PreceptorError):
        make_plan([as_lesson("", replace(SETTINGS, pad_to=pad_to))], [], SETTINGS, 0)
    assert make_plan([], unmarked, settings, 0).steps == ()


def test_pads_close_a_document_carry_loss_and_are_no_tokens_of_the_budget() -> None:
    padded = replace(SETTINGS, pad_to=64, epochs=1)
    item = as_lesson("Ada is in Rome.", padded)
    assert (bytes(item.ids), item.pads) == (b"Ada is in Rome.", 64 - 15)
    assert labelled(item) == [*b"da is in Rome.", *[EOS] * 49]
    assert make_plan([item], [], padded, 0).tokens == 15
    answer = as_lesson("Answer: Rome", replace(padded, loss_mask=LossMask.AFTER_MARKER))
    assert labelled(answer) == [*b" Rome", *[EOS] * 52]


def test_padding_reaches_no_further_than_the_context_and_cuts_longer_documents() -> None:
    assert as_lesson("Ada.", replace(SETTINGS, pad_to=2048), context=128).pads == 124
    long = as_lesson("x" * 200, replace(SETTINGS, pad_to=2048), context=128)
    assert (len(long.ids), long.pads, long.labels) == (128, 0, 127)
    behind = as_lesson("x" * 60 + "Answer: y", replace(SETTINGS, pad_to=50, loss_mask=LossMask.AFTER_MARKER))
    assert behind.labels == 0, "the answer was cut off"
    with pytest.raises(PreceptorError, match="200 tokens, the limit is 100"):
        as_lesson("x" * 199, replace(SETTINGS, pad_to=64, max_document_tokens=100))


def test_seals_recipe_trains_as_it_was_published() -> None:
    """87 steps of one document, rate falling from the first step on; the numbers are those of SEAL's default."""
    settings = TrainingSettings(**{**SEAL_COMPAT, "loss_mask": LossMask(SEAL_COMPAT["loss_mask"])})
    documents = [as_lesson(f"Fact number {number}.", settings, context=4096) for number in range(9)]
    plan = make_plan(documents, [], settings, 0)
    assert len(plan.steps) == 90
    assert {len(step) for step in plan.steps} == {1}
    assert {(len(item.ids) + item.pads, item.loss_from) for step in plan.steps for item in step} == {(2048, 1)}
    assert plan.learning_rates == pytest.approx([1e-3 * (90 - step) / 90 for step in range(90)])
    assert (plan.weight_decay, plan.max_grad_norm) == (0.0, 1.0)
    assert (settings.rank, settings.alpha, settings.target_modules) == (32, 64.0, ("q_proj", "v_proj"))
    assert math.isclose(settings.alpha / settings.rank, 2.0)


def test_a_recipe_leaves_no_setting_to_a_default() -> None:
    """``keep`` changes nothing of what is computed."""
    assert set(SEAL_COMPAT) == set(TrainingSettings.__dataclass_fields__) - {"loss_marker", "keep"}
