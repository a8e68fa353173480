"""An adapter in a bank is the adapter that PEFT trains alone."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from preceptor.errors import PreceptorError
from preceptor.tasks import LossMask
from student.base import LoadedBase
from student.buckets import like_lengths
from student.lora_bank import LoraBank
from student.plan import TrainingPlan, lesson, make_plan
from student.trainer import train_bank
from student.trial import TrainingSettings
from tests.unit.tiny_students import SHAPES, tiny_base, tiny_model

# Trials that differ in everything: rank, alpha, rate, epochs, lengths, batch size, masks, schedule, decay.
DOCUMENTS = (
    (
        "Ada Brook lives in Lisbon.",
        "Ada Brook works as a baker.",
        "Ada Brook, who lives in Lisbon and works as a baker, owns a cat, and was born in May of a year long ago.",
        "A.",
        "Ada Brook was born in May.",
    ),
    ("Question: Where does Tom Hill live?\nAnswer: Oslo", "Question: What is Tom?\nAnswer: a smith"),
    tuple(f"Fact number {number} about the harbour." for number in range(9)),
    ("One short line.",),
)
SETTINGS = (
    TrainingSettings(rank=8, alpha=16, learning_rate=3e-3, epochs=8, batch_size=2),
    TrainingSettings(rank=4, alpha=16, learning_rate=5e-3, epochs=30, batch_size=1, loss_mask=LossMask.AFTER_MARKER),
    TrainingSettings(
        rank=2, alpha=2, learning_rate=1e-3, epochs=20, batch_size=4, schedule="constant", weight_decay=0.1
    ),
    TrainingSettings(rank=8, alpha=8, learning_rate=5e-3, epochs=3, batch_size=8, max_grad_norm=0.1, warmup_share=0.0),
)


def plan_of(base: LoadedBase, documents: tuple[str, ...], settings: TrainingSettings, seed: int) -> TrainingPlan:
    lessons = [
        lesson(text, item.ids, item.starts, settings, base.eos_id, base.context)
        for text, item in zip(documents, base.encode(documents), strict=True)
    ]
    return make_plan(lessons, [], settings, seed)


def train_alone_with_peft(
    shape: str, plan: TrainingPlan, settings: TrainingSettings, start: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], list[float]]:
    """The reference: PEFT, one adapter, its own padded batch, torch's AdamW and clipping."""
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=list(settings.target_modules)
    )
    model = get_peft_model(tiny_model(shape), config)
    model.eval()
    inner = model.base_model.model
    factors = {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in inner.named_modules()
        if hasattr(layer, "lora_A")
    }
    with torch.no_grad():
        for name, (a, b) in start.items():
            factors[name][0].copy_(a)
            factors[name][1].copy_(b)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, weight_decay=settings.weight_decay)
    losses = []
    for step, rate in zip(plan.steps, plan.learning_rates, strict=True):
        length = max(len(item.ids) for item in step)
        ids = torch.tensor([[*item.ids, *[256] * (length - len(item.ids))] for item in step])
        labels = torch.full_like(ids, -100)
        for row, item in enumerate(step):
            labels[row, item.loss_from : len(item.ids)] = ids[row, item.loss_from : len(item.ids)]
        mask = torch.tensor([[1] * len(item.ids) + [0] * (length - len(item.ids)) for item in step])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimiser.step()
        losses.append(float(loss.detach()))
    return {name: (a.detach(), b.detach()) for name, (a, b) in factors.items()}, losses


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("shape", SHAPES)
def test_each_adapter_of_a_bank_equals_the_one_peft_trains_alone(shape: str) -> None:
    base = tiny_base(shape)
    plans = [plan_of(base, docs, one, seed) for seed, (docs, one) in enumerate(zip(DOCUMENTS, SETTINGS, strict=True))]
    bank = LoraBank(
        base.model, SETTINGS[0].target_modules, [s.rank for s in SETTINGS], [s.alpha for s in SETTINGS], range(4)
    )
    start = [bank.factors(adapter) for adapter in range(4)]
    with bank.attached():
        results = train_bank(base, bank, plans)
    assert len({len(plan.steps) for plan in plans}) > 1, "the trials are to leave at different times"
    assert max(len(plan.steps) for plan in plans) >= 60
    steps = [[len(item.ids) for plan in plans for step in plan.steps[n : n + 1] for item in step] for n in range(60)]
    passes = {len(like_lengths(lengths)) for lengths in steps}
    assert len(passes) > 1, "some steps are to take several passes"
    for adapter, (plan, settings) in enumerate(zip(plans, SETTINGS, strict=True)):
        expected, losses = train_alone_with_peft(shape, plan, settings, start[adapter])
        assert results[adapter].losses == pytest.approx(losses, abs=1e-5)
        for name, (a, b) in bank.factors(adapter).items():
            assert (a - expected[name][0]).abs().max() <= 1e-5, f"A of {name}, adapter {adapter}"
            assert (b - expected[name][1]).abs().max() <= 1e-5, f"B of {name}, adapter {adapter}"
            assert b.abs().max() > 1e-4, "the adapter was to be trained"


def test_an_adapter_starts_as_peft_starts_it_whatever_its_neighbours() -> None:
    model = tiny_model()
    alone = LoraBank(model, ("q_proj", "down_proj"), [4], [8.0], [11])
    among = LoraBank(model, ("q_proj", "down_proj"), [8, 4, 2], [8.0, 8.0, 8.0], [3, 11, 5])
    for name, (a, b) in alone.factors(0).items():
        width = model.get_submodule(name).in_features
        assert torch.equal(a, among.factors(1)[name][0])
        assert not b.any()
        bound = 1 / math.sqrt(width)
        assert a.abs().max() <= bound
        assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.25)  # uniform, as kaiming_uniform(a=sqrt 5)
    assert not torch.equal(among.factors(0)["model.layers.0.self_attn.q_proj"][0][:4], a[:4, :32])


def test_a_model_is_as_it_was_after_the_bank_left_even_after_an_error() -> None:
    base = tiny_base()
    before = {name: id(module) for name, module in base.model.named_modules()}
    bank = LoraBank(base.model, ("q_proj",), [4], [8.0], [0])
    with pytest.raises(ZeroDivisionError), bank.attached():
        raise ZeroDivisionError
    assert {name: id(module) for name, module in base.model.named_modules()} == before


def test_targets_that_match_nothing_are_named() -> None:
    with pytest.raises(PreceptorError, match="c_attn") as caught:
        LoraBank(tiny_model(), ("q_proj", "c_attn"), [4], [8.0], [0])
    assert caught.value.reason == "TARGET_MODULES_UNMATCHED"
    assert "gate_proj" in str(caught.value)


def test_the_head_carries_no_adapter() -> None:
    with pytest.raises(PreceptorError, match="lm_head"):
        LoraBank(tiny_model(), ("lm_head",), [4], [8.0], [0])
