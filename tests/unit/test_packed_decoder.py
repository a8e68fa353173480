"""The step made by hand is the step that transformers and autograd make."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from student.autograd_decoder import AutogradDecoder
from student.base import LoadedBase
from student.lora_bank import LoraBank
from student.packed_decoder import PackedDecoder, supports
from student.packing import pack
from student.plan import Lesson, TrainingPlan
from student.trainer import StepLimits, train_bank
from student.trial import ALL_LINEAR
from tests.unit.tiny_students import OTHERS, PACKED, PeakMemory, byte_tokenizer, tiny_base, tiny_model

Step = Sequence[Sequence[tuple[int, int]]]  # for each seat its lessons, as (tokens, loss_from)
STEPS: dict[str, Step] = {
    "one token each": [[(2, 1)], [(2, 1)], [(2, 1)]],
    "one length": [[(33, 1)], [(33, 1)], [(33, 1)]],
    "one adapter": [[(20, 1), (7, 6), (20, 1)]],
    "mixed": [[(2, 1), (120, 1), (37, 30)], [(64, 63), (65, 1)], [(5, 1)]],
    "few labels": [[(40, 39)], [(90, 60), (3, 1)], [(12, 2)]],
}
LIMITS: dict[str, dict[str, Any]] = {
    "one pass": {},
    "checkpointing": {"checkpointing": True},
    "a pass for each lesson": {"pass_tokens": 1},
    "some passes": {"pass_tokens": 70, "checkpointing": True},
}
LLAMA = tiny_base()
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 32,
}


def lessons_of(step: Step) -> list[list[Lesson]]:
    draw = random.Random(0)
    return [
        [Lesson(tuple(draw.choices(range(257), k=tokens)), loss_from) for tokens, loss_from in seat] for seat in step
    ]


def trained_bank(base: LoadedBase, targets: Sequence[str] = ALL_LINEAR, ranks: Sequence[int] = (8, 3, 12)) -> LoraBank:
    """Adapters whose B are not zero, of different ranks and scales."""
    bank = LoraBank(base.model, targets, ranks, [2.0 * rank + 1 for rank in ranks], range(len(ranks)))
    generator = torch.Generator().manual_seed(0)
    for adapter in range(len(bank)):
        factors = bank.factors(adapter)
        bank.set_factors(
            adapter, {name: (a, torch.randn(b.shape, generator=generator) / 10) for name, (a, b) in factors.items()}
        )
    return bank


def differentiated(
    decoder: Any, bank: LoraBank, seats: Sequence[int], lessons: Sequence[Sequence[Lesson]]
) -> tuple[Tensor, Tensor]:
    """Losses and gradient."""
    values = bank.values_KP[list(seats)]
    gradient = torch.full_like(values, 7.0)  # what stood there before does not matter
    with bank.attached():
        decoder.bind(seats, values, gradient)
        return decoder.differentiate(lessons), gradient


def packed_decoder(base: LoadedBase, bank: LoraBank, **limits: Any) -> PackedDecoder:
    with bank.attached():
        return PackedDecoder(base.model, bank, **{"pass_tokens": 1 << 62, **limits})


def by_factor(bank: LoraBank, values: Tensor) -> dict[str, Tensor]:
    """A row of values, or a gradient of them, cut up: [S, in or r, r or out] by name."""
    parts = {f"A of {group.sites[0].name} and what reads the same": group.a_of(values) for group in bank.groups}
    return parts | {f"B of {site.name}": bank.b_of(values, site) for group in bank.groups for site in group.sites}


def assert_equal_steps(base: LoadedBase, bank: LoraBank, step: Step, tolerance: float = 2e-5, **limits: Any) -> None:
    """The packed decoder's losses and gradients are autograd's, relative to the largest of each factor; where gradients
    nearly cancel out (q and k of two tokens), relative to the largest of all."""
    lessons = lessons_of(step)
    seats = list(range(len(bank)))[::-1][: len(lessons)]  # not in the bank's order
    losses, gradient = differentiated(AutogradDecoder(base, bank, pass_tokens=1 << 62), bank, seats, lessons)
    packed = packed_decoder(base, bank, **limits)
    for attempt in range(2):  # nothing is left behind by the first
        our_losses, our_gradient = differentiated(packed, bank, seats, lessons)
        torch.testing.assert_close(our_losses, losses, atol=2e-6, rtol=2e-6)
        ours, theirs = by_factor(bank, our_gradient), by_factor(bank, gradient)
        for name, expected in theirs.items():
            for seat in range(len(seats)):
                limit = tolerance * float(expected[seat].abs().max()) + 1e-6 * float(gradient[seat].abs().max())
                off = float((ours[name][seat] - expected[seat]).abs().max())
                assert off <= limit, f"{name}, seat {seat}, {attempt=}: {off:.1e} > {limit:.1e}"
    assert float(gradient.abs().max()) > 1e-3, "there was something to learn"


@pytest.mark.parametrize("shape", PACKED)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_by_hand_equals_autograds(shape: str, step: str) -> None:
    base = tiny_base(shape)
    assert_equal_steps(base, trained_bank(base), STEPS[step])


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
@pytest.mark.parametrize("limits", LIMITS)
def test_passes_and_checkpointing_change_no_gradient(shape: str, limits: str) -> None:
    base = tiny_base(shape)
    assert_equal_steps(base, trained_bank(base), STEPS["mixed"], **LIMITS[limits])


@pytest.mark.parametrize("shape", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize(
    "targets",
    [
        ("q_proj", "v_proj"),
        ("down_proj",),
        ("k_proj", "up_proj"),
        ("o_proj",),
        ("model.layers.1.self_attn.q_proj",),
        ("layers.0.mlp.gate_proj", "layers.1.mlp.down_proj"),
    ],
)
def test_any_of_the_layers_may_carry_adapters(shape: str, targets: tuple[str, ...]) -> None:
    base = tiny_base(shape)
    assert_equal_steps(base, trained_bank(base, targets), STEPS["mixed"], **LIMITS["some passes"])


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 24}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": False}),
        ("qwen2", {"hidden_size": 40, "num_attention_heads": 2, "head_dim": 20, "num_key_value_heads": 1}),
        ("qwen3", {"attention_bias": True, "num_hidden_layers": 3}),
        ("gemma", {"num_key_value_heads": 1, "head_dim": 16}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 121}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 121, "max_window_layers": 1}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        ("llama", {"rope_parameters": YARN}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    ],
    ids=str,
)
def test_every_shape_that_is_supported_is_right(shape: str, changes: dict[str, Any]) -> None:
    base = tiny_base(shape, **changes)
    assert supports(base.model, 120)
    assert_equal_steps(base, trained_bank(base), STEPS["mixed"])


def test_long_lessons_beside_short_ones() -> None:
    base = tiny_base("qwen2", context=512)
    step = [[(300, 1)], [(258, 100), (257, 1), (20, 1)], [(400, 399)]]
    assert_equal_steps(base, trained_bank(base), step, tolerance=1e-4)
    assert_equal_steps(base, trained_bank(base), step, tolerance=1e-4, pass_tokens=300, checkpointing=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", PACKED)
@pytest.mark.parametrize("limits", LIMITS)
def test_a_step_by_hand_on_a_gpu_equals_autograds(shape: str, limits: str) -> None:
    """In bfloat16; grouped products leave anything in the gradients of seats that a pass has no token of."""
    config = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "initializer_range": 0.02}
    model = tiny_model(shape, **config).to("cuda", torch.bfloat16)
    base = LoadedBase(model, byte_tokenizer())
    bank = trained_bank(base)
    lessons = lessons_of(STEPS["mixed"])
    losses, gradient = differentiated(AutogradDecoder(base, bank, pass_tokens=1 << 62), bank, [2, 0, 1], lessons)
    decoder = packed_decoder(base, bank, **LIMITS[limits])
    for _ in range(2):
        our_losses, our_gradient = differentiated(decoder, bank, [2, 0, 1], lessons)
        torch.testing.assert_close(our_losses, losses, atol=0.01, rtol=0.01)
        assert (torch.cosine_similarity(our_gradient, gradient) >= 0.999).all()


@settings(max_examples=25, deadline=None)
@given(
    step=some.lists(
        some.lists(
            some.integers(2, 80).flatmap(lambda n: some.tuples(some.just(n), some.integers(1, n - 1))),
            min_size=1,
            max_size=5,
        ),
        min_size=1,
        max_size=3,
    ),
    pass_tokens=some.integers(1, 200),
)
def test_any_step_is_right(step: Step, pass_tokens: int) -> None:
    assert_equal_steps(LLAMA, trained_bank(LLAMA), step, tolerance=1e-4, pass_tokens=pass_tokens)


@given(lengths=some.lists(some.integers(2, 90), min_size=1, max_size=12))
def test_attention_grids_hold_every_lesson_once_and_in_order(lengths: list[int]) -> None:
    items = [(seat, item) for seat, lessons in enumerate(lessons_of([[(n, 1)] for n in lengths])) for item in lessons]
    packed = pack(items, [1.0] * len(items), torch.device("cpu"))
    places = sum(lessons * longest for lessons, longest in packed.grids)
    tokens = torch.arange(len(packed.ids))
    to_grid = tokens if packed.to_grid is None else packed.to_grid
    from_grid = tokens if packed.from_grid is None else packed.from_grid
    assert len(to_grid) == places
    assert torch.equal(to_grid[from_grid], tokens)
    start = 0
    rows = []
    for lessons, longest in packed.grids:
        rows += to_grid[start : start + lessons * longest].view(lessons, longest).tolist()
        start += lessons * longest
    for row in rows:
        seats = {int(packed.seats[token]) for token in row}
        assert len(seats) == 1, "no lesson looks at another"
        length = lengths[seats.pop()] - 1
        assert packed.positions[row[:length]].tolist() == list(range(length))
        assert set(row[length:]) <= {row[0]}, "a pad is a token of its own lesson"


@pytest.mark.parametrize("shape", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("limits", list(LIMITS)[1:])
def test_autograds_passes_and_checkpointing_change_no_gradient(shape: str, limits: str) -> None:
    base = tiny_base(shape)
    bank = trained_bank(base, OTHERS.get(shape, ALL_LINEAR))
    lessons = lessons_of(STEPS["mixed"])
    lessons[1].append(Lesson(lessons[1][0].ids[:30], pads=90))
    whole = AutogradDecoder(base, bank, pass_tokens=1 << 62)
    parts = AutogradDecoder(base, bank, **{"pass_tokens": 1 << 62, **LIMITS[limits]})
    losses, gradient = differentiated(whole, bank, [2, 0, 1], lessons)
    same_losses, same_gradient = differentiated(parts, bank, [2, 0, 1], lessons)
    torch.testing.assert_close(same_losses, losses, atol=2e-6, rtol=2e-6)
    assert (same_gradient - gradient).abs().max() <= 2e-6 * gradient.abs().max()
    assert not any(module.training for module in base.model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in base.model.modules())


@pytest.mark.parametrize("shape", ["llama", "gemma2"])
@pytest.mark.parametrize("pads", [0, 30])
def test_no_pass_has_more_tokens_than_it_may(shape: str, pads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base(shape)
    bank = trained_bank(base, ranks=(8, 8))
    lessons = lessons_of([[(40, 1), (41, 1), (20, 1)], [(90, 1), (3, 1), (39, 1), (40, 1)]])
    lessons[0][0] = Lesson(lessons[0][0].ids, pads=pads)
    plans = [TrainingPlan((tuple(some),), (1e-3,), 0.0, 1.0) for some in lessons]
    embedding = base.model.get_input_embeddings()
    sizes: list[int] = []
    handle = embedding.register_forward_hook(lambda _, args, out: sizes.append(args[0].numel()))
    with bank.attached():
        train_bank(base, bank, plans, StepLimits(pass_tokens=85))
    handle.remove()
    assert len(sizes) >= 4
    assert all(size <= 90 for size in sizes), "a single lesson may be longer"
    assert sum(size > 85 for size in sizes) == 1
    assert max(sizes[: sizes.index(max(sizes))] + sizes[sizes.index(max(sizes)) + 1 :]) > 70, "and passes are full"


@pytest.mark.parametrize(("shape", "pads"), [("llama", 0), ("llama", 20), ("gemma2", 0), ("gpt_neox", 0)])
def test_checkpointing_keeps_less(shape: str, pads: int) -> None:
    base = tiny_base(shape, num_hidden_layers=8)
    bank = trained_bank(base, OTHERS.get(shape, ALL_LINEAR), ranks=(8,))
    plans = [TrainingPlan(((Lesson(lessons_of([[(90, 1)]])[0][0].ids, pads=pads),),), (1e-3,), 0.0, 1.0)]

    def peak(checkpointing: bool) -> int:
        with bank.attached(), PeakMemory() as memory:
            train_bank(base, bank, plans, StepLimits(checkpointing=checkpointing))
        return memory.peak

    assert peak(True) < 0.6 * peak(False)


def test_what_is_padded_to_the_common_rank_has_no_gradient() -> None:
    base = tiny_base()
    bank = trained_bank(base, ranks=(12, 3, 8))
    _, gradient = differentiated(packed_decoder(base, bank), bank, [0, 1, 2], lessons_of(STEPS["mixed"]))
    unpadded = gradient.clone()
    keep = bank.values_KP.clone()
    bank.values_KP.copy_(gradient)
    factors = [bank.factors(adapter) for adapter in range(3)]
    bank.values_KP.zero_()
    for adapter, own in enumerate(factors):
        bank.set_factors(adapter, own)
    assert torch.equal(bank.values_KP, unpadded)
    assert bool((keep == 0).any())


@pytest.mark.parametrize("shape", PACKED)
def test_the_students_weights_stay_what_they_were(shape: str) -> None:
    base = tiny_base(shape)
    bank = trained_bank(base)
    ids = torch.tensor([[72, 101, 108, 108, 111]])
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    with torch.no_grad():
        logits = base.model(ids).logits
    differentiated(packed_decoder(base, bank), bank, [0, 1, 2], lessons_of(STEPS["mixed"]))
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, logits)


def test_a_broken_neighbour_is_not_seen() -> None:
    base = tiny_base()
    bank = trained_bank(base)
    lessons = lessons_of(STEPS["mixed"])
    decoder = packed_decoder(base, bank, pass_tokens=100)
    losses, gradient = differentiated(decoder, bank, [0, 1, 2], lessons)
    bank.values_KP[1] = float("nan")
    broken_losses, broken_gradient = differentiated(decoder, bank, [0, 1, 2], lessons)
    assert bool(broken_losses[1].isnan())
    assert torch.equal(broken_losses[[0, 2]], losses[[0, 2]])
    assert torch.equal(broken_gradient[[0, 2]], gradient[[0, 2]])


@pytest.mark.parametrize(
    ("shape", "changes", "longest", "expected"),
    [
        *[(shape, {}, 128, True) for shape in PACKED],
        ("mistral", {"sliding_window": 64}, 63, True),
        ("mistral", {"sliding_window": 64}, 66, False),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, 66, False),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, 66, False),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}, 66, True),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 66, False),
        ("llama", {"rope_parameters": LONGROPE}, 66, False),
        ("llama", {"hidden_act": "relu"}, 66, False),
        ("llama", {"mlp_bias": True}, 66, False),
        ("gemma2", {}, 10, False),
        ("gemma3_text", {}, 10, False),
        ("gpt_neox", {}, 10, False),
        ("phi3", {}, 10, False),
        ("olmo2", {}, 10, False),
        ("qwen3_moe", {}, 10, False),
    ],
    ids=str,
)
def test_only_what_is_computed_right_is_supported(
    shape: str, changes: dict[str, Any], longest: int, expected: bool
) -> None:
    assert supports(tiny_model(shape, **changes), longest) is expected


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj", "model.layers.0.mlp.down_proj", "lm_head"])
def test_layers_that_do_more_than_multiply_are_left_to_autograd(name: str) -> None:
    class Doubling(torch.nn.Linear):
        """As quantised layers: what it computes is not in its weight alone."""

        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    base = tiny_base(tie_word_embeddings=False)
    plain = base.model.get_submodule(name)
    assert isinstance(plain, torch.nn.Linear)
    layer = Doubling(plain.in_features, plain.out_features, bias=False)
    layer.weight = plain.weight
    base.model.set_submodule(name, layer)
    assert not supports(base.model, 10)
    bank = LoraBank(base.model, ("q_proj",), [8], [16.0], [0])
    ids = lessons_of([[(20, 1)]])[0][0].ids
    with bank.attached():
        result = train_bank(base, bank, [TrainingPlan(((Lesson(ids),),), (1e-3,), 0.0, 1.0)])[0]
    batch = torch.tensor([ids])
    assert result.losses[0] == pytest.approx(float(base.model(batch, labels=batch).loss), abs=1e-5)
