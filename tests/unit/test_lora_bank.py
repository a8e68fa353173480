"""An adapter in a bank is the adapter that PEFT trains alone."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import PreTrainedModel

from preceptor.errors import PreceptorError
from preceptor.tasks import LossMask
from student.base import LoadedBase
from student.lora_bank import LoraBank
from student.plan import TrainingPlan, lesson, make_plan
from student.trainer import StepLimits, train_bank
from student.trial import ALL_LINEAR, TrainingSettings
from tests.unit.tiny_students import OTHERS, PACKED, byte_tokenizer, tiny_base, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]

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
    ("Short.", "The old harbour master of Lisbon sells nothing on Sundays, whatever the guide book of last year says."),
    ("Tom Hill owns a boat.", "Tom Hill owns two dogs.", "Eve sings."),
)
SETTINGS = (
    TrainingSettings(rank=8, alpha=16, learning_rate=3e-3, epochs=8, batch_size=2),
    TrainingSettings(rank=4, alpha=8, learning_rate=2e-3, epochs=60, batch_size=1, loss_mask=LossMask.AFTER_MARKER),
    TrainingSettings(
        rank=2, alpha=2, learning_rate=1e-3, epochs=20, batch_size=4, schedule="constant", weight_decay=0.1
    ),
    TrainingSettings(rank=8, alpha=8, learning_rate=5e-3, epochs=3, batch_size=8, max_grad_norm=0.1, warmup_share=0.0),
    TrainingSettings(rank=12, alpha=18, learning_rate=1e-3, epochs=9, batch_size=2, gradient_accumulation=2),
    TrainingSettings(rank=1, alpha=4, learning_rate=4e-3, epochs=7, batch_size=1, schedule="cosine", max_grad_norm=0.0),
)
LIMITS = {
    "all at once": StepLimits(),
    "seats taken over": StepLimits(seats=2),
    "several passes a step": StepLimits(seats=3, pass_tokens=60),
    "checkpointing": StepLimits(seats=4, pass_tokens=200, checkpointing=True),
}


def plan_of(base: LoadedBase, documents: tuple[str, ...], settings: TrainingSettings, seed: int) -> TrainingPlan:
    lessons = [
        lesson(text, item.ids, item.starts, settings, base.eos_id, base.context)
        for text, item in zip(documents, base.encode(documents), strict=True)
    ]
    return make_plan(lessons, [], settings, seed)


def plans_of(base: LoadedBase) -> list[TrainingPlan]:
    return [plan_of(base, docs, one, seed) for seed, (docs, one) in enumerate(zip(DOCUMENTS, SETTINGS, strict=True))]


def untrained(base: LoadedBase) -> LoraBank:
    """A bank with an adapter for each of SETTINGS."""
    targets = OTHERS.get(base.model.config.model_type, ALL_LINEAR)
    return LoraBank(base.model, targets, [s.rank for s in SETTINGS], [s.alpha for s in SETTINGS], range(len(SETTINGS)))


def train_alone_with_peft(
    model: PreTrainedModel, plan: TrainingPlan, settings: TrainingSettings, start: Factors
) -> tuple[Factors, list[float]]:
    """The reference: PEFT, one adapter, its own padded batch, torch's AdamW and clipping."""
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=list(start))
    adapted = get_peft_model(model, config)
    adapted.eval()
    factors = {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in adapted.base_model.model.named_modules()
        if hasattr(layer, "lora_A")
    }
    with torch.no_grad():
        for name, (a, b) in start.items():
            factors[name][0].copy_(a)
            factors[name][1].copy_(b)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, weight_decay=settings.weight_decay)
    losses = []
    for step, rate in zip(plan.steps, plan.learning_rates, strict=True):
        length = max(len(item.ids) for item in step)
        ids = torch.tensor([[*item.ids, *[256] * (length - len(item.ids))] for item in step])
        labels = torch.full_like(ids, -100)
        for row, item in enumerate(step):
            labels[row, item.loss_from : len(item.ids)] = ids[row, item.loss_from : len(item.ids)]
        mask = torch.tensor([[1] * len(item.ids) + [0] * (length - len(item.ids)) for item in step])
        logits = adapted(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm or math.inf)
        optimiser.step()
        losses.append(float(loss.detach()))
    return {name: (a.detach(), b.detach()) for name, (a, b) in factors.items()}, losses


@functools.cache
def trained_by_peft(shape: str) -> list[tuple[Factors, list[float]]]:
    """What PEFT makes of each trial alone."""
    base = tiny_base(shape)
    start = untrained(base)
    return [
        train_alone_with_peft(tiny_model(shape), plan, settings, start.factors(adapter))
        for adapter, (plan, settings) in enumerate(zip(plans_of(base), SETTINGS, strict=True))
    ]


@pytest.mark.parametrize(
    ("shape", "limits"),
    [
        *[(shape, limits) for shape in ("llama", "qwen2") for limits in LIMITS],
        *[(shape, "seats taken over") for shape in PACKED if shape not in ("llama", "qwen2")],
        *[(shape, "seats taken over") for shape in OTHERS],
    ],
)
def test_each_adapter_of_a_bank_equals_the_one_peft_trains_alone(shape: str, limits: str) -> None:
    base = tiny_base(shape)
    plans = plans_of(base)
    steps = [len(plan.steps) for plan in plans]
    assert max(steps) >= 100
    assert len(set(steps)) > 4, "the trials are to leave at different times"
    bank = untrained(base)
    with bank.attached():
        results = train_bank(base, bank, plans, LIMITS[limits])
    for adapter, (expected, losses) in enumerate(trained_by_peft(shape)):
        assert results[adapter].losses == pytest.approx(losses, abs=1e-5), f"adapter {adapter}"
        for name, (a, b) in bank.factors(adapter).items():
            assert (a - expected[name][0]).abs().max() <= 1e-5, f"A of {name}, adapter {adapter}"
            assert (b - expected[name][1]).abs().max() <= 1e-5, f"B of {name}, adapter {adapter}"
            assert b.abs().max() > 1e-4, "the adapter was to be trained"


def cosine(one: Factors, other: Factors, start: Factors) -> float:
    """Of the changes of all A and B."""
    changes = [
        torch.cat([(side[name][which] - start[name][which]).flatten() for name in start for which in (0, 1)])
        for side in (one, other)
    ]
    return float(functional.cosine_similarity(*changes, dim=0))


@pytest.mark.parametrize(
    ("shape", "targets", "limits"),
    [
        ("llama", ("q_proj", "v_proj"), "all at once"),
        ("qwen2", ("q_proj", "v_proj"), "all at once"),
        ("llama", ALL_LINEAR, "several passes a step"),
        ("qwen2", ALL_LINEAR, "all at once"),
    ],
)
def test_over_a_base_in_bfloat16_an_adapter_learns_what_peft_teaches_it(
    shape: str, targets: tuple[str, ...], limits: str
) -> None:
    # Weights as large as in the other tests make attention so sharp that rounding the base alone turns the changes by
    # more than the limit; these are as large as transformers makes them.
    config = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "initializer_range": 0.02}
    settings = [
        TrainingSettings(rank=rank, alpha=16, learning_rate=1e-3, epochs=10, batch_size=2, target_modules=targets)
        for rank in (8, 12)  # 16 / 12 is no number of bfloat16
    ]
    trained: dict[torch.dtype, LoraBank] = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = LoadedBase(tiny_model(shape, **config).to(dtype), byte_tokenizer())
        plans = [plan_of(base, DOCUMENTS[0], one, seed) for seed, one in enumerate(settings)]
        assert [len(plan.steps) for plan in plans] == [30, 30]
        trained[dtype] = LoraBank(base.model, targets, [8, 12], [16.0, 16.0], [0, 1])
        start = [trained[dtype].factors(adapter) for adapter in (0, 1)]
        with trained[dtype].attached():
            train_bank(base, trained[dtype], plans, LIMITS[limits])
    for adapter, (plan, one) in enumerate(zip(plans, settings, strict=True)):
        theirs, _ = train_alone_with_peft(tiny_model(shape, **config).bfloat16(), plan, one, start[adapter])
        exact, ours = (trained[dtype].factors(adapter) for dtype in (torch.float32, torch.bfloat16))
        assert cosine(ours, theirs, start[adapter]) >= 0.999
        assert cosine(ours, exact, start[adapter]) >= 0.999


def test_alpha_by_rank_is_not_rounded_over_a_base_in_bfloat16() -> None:
    base = LoadedBase(tiny_model().to(torch.bfloat16), byte_tokenizer())
    bank = LoraBank(base.model, ("up_proj",), [12], [16.0], [0])
    name = bank.modules[0]
    linear = base.model.get_submodule(name)
    assert isinstance(linear, torch.nn.Linear)
    linear.weight.zero_()
    a, _ = bank.factors(0)[name]
    b = torch.randn(linear.out_features, 12)
    bank.set_factors(0, dict.fromkeys(bank.modules, (a, b)))
    x = torch.randn(200, linear.in_features).bfloat16()
    with bank.attached():
        bank.seat([0], [200])
        y = base.model.get_submodule(name)(x).float()
    expected = x.float() @ a.bfloat16().float().T @ b.bfloat16().float().T * (16 / 12)
    assert float((y * expected).sum() / expected.square().sum()) == pytest.approx(1, abs=5e-4)


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


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_factors_are_copies(rank: int) -> None:
    bank = LoraBank(tiny_model(), ALL_LINEAR, [rank], [8.0], [0])
    before = bank.factors(0)
    bank.values_KP += 1
    assert all(a.abs().max() < 0.5 and not b.any() for a, b in before.values())
    assert all(factor.is_contiguous() for pair in before.values() for factor in pair)


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


def refusal(base: LoadedBase, targets: tuple[str, ...], rank: int = 4) -> PreceptorError:
    before = {name: id(module) for name, module in base.model.named_modules()}
    with pytest.raises(PreceptorError) as caught:
        LoraBank(base.model, targets, [rank], [8.0], [0])
    assert {name: id(module) for name, module in base.model.named_modules()} == before
    return caught.value


def test_a_rank_above_the_width_of_a_layer_is_refused_by_name() -> None:
    refused = refusal(tiny_base(), ("q_proj", "v_proj"), rank=17)
    assert refused.reason == "RANK_TOO_LARGE"
    assert refused.message == "rank 17 is above the width of model.layers.0.self_attn.v_proj, which is 16"
    assert len(LoraBank(tiny_model(), ("q_proj", "v_proj"), [16], [8.0], [0])) == 1


class Linear8bit(torch.nn.Linear):
    """As quantisation libraries make them of linear layers."""


class PackedLinear(torch.nn.Module):
    """As others make them: no linear layer of torch any more."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(16, 32, dtype=torch.uint8))


def quantised() -> torch.nn.Module:
    linear = torch.nn.Linear(32, 16, bias=False)
    linear.weight = torch.nn.Parameter(torch.zeros(16, 32, dtype=torch.int8), requires_grad=False)
    return linear


@pytest.mark.parametrize("layer", [Linear8bit(32, 16), PackedLinear(), quantised()], ids=lambda one: type(one).__name__)
def test_a_quantised_layer_is_refused_by_name_and_the_others_can_be_adapted(layer: torch.nn.Module) -> None:
    base = tiny_base()
    base.model.get_submodule("model.layers.1.self_attn").v_proj = layer
    refused = refusal(base, ALL_LINEAR)
    assert refused.reason == "BASE_NOT_ADAPTABLE"
    assert "model.layers.1.self_attn.v_proj is" in refused.message
    assert LoraBank(base.model, ("q_proj", "down_proj"), [4], [8.0], [0]).modules[0].endswith("q_proj")


def test_layers_that_share_their_weight_are_refused_by_name() -> None:
    base = tiny_base()
    first, second = (base.model.get_submodule(f"model.layers.{number}.self_attn") for number in (0, 1))
    second.o_proj.weight = first.o_proj.weight  # type: ignore[union-attr]
    refused = refusal(base, ("v_proj", "o_proj"))
    assert refused.reason == "BASE_NOT_ADAPTABLE"
    assert refused.message == "model.layers.0.self_attn.o_proj shares its weight with another layer of the student"
    base = tiny_base()
    attention = base.model.get_submodule("model.layers.0.self_attn")
    attention.v_proj = attention.k_proj  # the same layer under two names
    assert "k_proj" in refusal(base, ("v_proj", "k_proj")).message


@pytest.mark.parametrize(("dtype", "width", "multiple"), [(torch.float32, 50, 4), (torch.bfloat16, 52, 8)])
def test_widths_that_grouped_products_do_not_take_are_refused_by_name(
    dtype: torch.dtype, width: int, multiple: int
) -> None:
    model = tiny_model(intermediate_size=width).to(dtype)
    base = LoadedBase(model, byte_tokenizer())
    refused = refusal(base, ALL_LINEAR)
    assert refused.reason == "BASE_NOT_ADAPTABLE"
    assert refused.message == f"model.layers.0.mlp.gate_proj is 32 x {width}, no multiples of {multiple}"
    plans = [plan_of(base, DOCUMENTS[3], TrainingSettings(epochs=2), 0)]
    bank = LoraBank(model, ("q_proj", "v_proj"), [4], [8.0], [0])  # what is not adapted may have any width
    with bank.attached():
        assert len(train_bank(base, bank, plans)[0].losses) == 2
