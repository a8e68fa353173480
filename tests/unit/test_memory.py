"""The memory plan: what it allows fits, and more memory never allows less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from preceptor.errors import PreceptorError
from student import memory
from student.base import LoadedBase
from student.lora_bank import LoraBank, adapter_values
from student.memory import Caps, MemoryPlan, free_bytes, plan_memory
from student.plan import Lesson, TrainingPlan
from student.trainer import StepLimits, train_bank
from student.trial import ALL_LINEAR
from tests.unit.tiny_students import OTHERS, PeakMemory, byte_tokenizer, tiny_base, tiny_model

BASES = {
    "llama": tiny_base(),
    "bfloat16": LoadedBase(tiny_model("qwen2").to(torch.bfloat16), byte_tokenizer()),
    "gemma2": tiny_base("gemma2"),
}
VALUES = {name: adapter_values(base.model, ("q_proj", "v_proj"), 8) for name, base in BASES.items()}


def plan_with(*steps: list[int], pads: int = 0) -> TrainingPlan:
    """A plan of steps with lessons of so many tokens."""
    lessons = tuple(tuple(Lesson(tuple(range(length)), pads=pads) for length in step) for step in steps)
    return TrainingPlan(lessons, (1e-3,) * len(lessons), 0.0, 1.0)


lengths = some.lists(some.lists(some.integers(2, 120), min_size=1, max_size=6), max_size=4)
plans_of = some.lists(lengths.map(lambda steps: plan_with(*steps)), min_size=1, max_size=12)
bases = some.sampled_from(list(BASES))
checkpointings = some.sampled_from([None, False, True])
megabytes = some.integers(0, 30 << 20)


def bytes_of(base: LoadedBase, values: int, plans: list[TrainingPlan], plan: MemoryPlan) -> int:
    """What the plan lets be taken, by the planner's own account of a token and of logits."""
    longest = max((len(item.ids) for one in plans for step in one.steps for item in step), default=0)
    seat = 4 * values * 4 + (0 if base.model.dtype == torch.float32 else 2 * values)
    through = memory.Activations.of(
        base, longest, packed=memory.packable(base, plans), checkpointing=plan.limits.checkpointing
    )
    assert plan.limits.seats is not None
    return plan.bank * values * 4 + plan.limits.seats * seat + through.bytes(plan.limits.pass_tokens)


@given(name=bases, plans=plans_of, free=megabytes, most=some.integers(1, 9), checkpointing=checkpointings)
def test_a_plan_never_takes_more_than_its_share_and_is_refused_only_where_one_adapter_is_too_much(
    name: str, plans: list[TrainingPlan], free: int, most: int, checkpointing: bool | None
) -> None:
    base, values = BASES[name], VALUES[name]
    longest = max((len(item.ids) for one in plans for step in one.steps for item in step), default=0)
    smallest = min(
        bytes_of(base, values, plans, MemoryPlan(1, StepLimits(1, longest, either)))
        for either in ((False, True) if checkpointing is None else (checkpointing,))
    )
    if smallest > free // 2:
        with pytest.raises(PreceptorError, match=f"{values:,} values .* {longest} tokens") as refused:
            plan_memory(base, values, plans, free, Caps(most, checkpointing))
        assert refused.value.reason == "TRIAL_OUT_OF_MEMORY"
        return
    plan = plan_memory(base, values, plans, free, Caps(most, checkpointing))
    assert bytes_of(base, values, plans, plan) <= free // 2
    assert plan.limits.seats is not None
    assert 1 <= plan.limits.seats <= min(plan.bank, most)
    assert plan.bank <= len(plans)
    assert plan.limits.pass_tokens >= longest
    if checkpointing is not None:
        assert plan.limits.checkpointing is checkpointing


@given(name=bases, plans=plans_of, free=megabytes, more=megabytes, checkpointing=some.booleans())
def test_more_memory_never_gives_fewer_seats(
    name: str, plans: list[TrainingPlan], free: int, more: int, checkpointing: bool
) -> None:
    def seats(free: int) -> int:
        try:
            plan = plan_memory(BASES[name], VALUES[name], plans, free, Caps(8, checkpointing))
        except PreceptorError:
            return 0
        return plan.limits.seats or 0

    assert seats(free + more) >= seats(free)


def test_everything_at_once_where_there_is_room() -> None:
    plans = [plan_with([30, 40], [120]) for _ in range(9)]
    plan = plan_memory(BASES["llama"], VALUES["llama"], plans, 1 << 40)
    assert plan == MemoryPlan(9, StepLimits(9, 2_048, False))
    assert plan_memory(BASES["llama"], VALUES["llama"], plans, 1 << 40, Caps(4)).limits.seats == 4


def test_another_seat_is_not_bought_with_emptier_passes() -> None:
    """Room for three adapters with a step's documents each: not five that go through the student one by one."""
    base, values = BASES["llama"], VALUES["llama"]
    plans = [plan_with([100, 100]) for _ in range(9)]
    room = bytes_of(base, values, plans, MemoryPlan(3, StepLimits(3, 600)))
    plan = plan_memory(base, values, plans, 2 * room)
    assert (plan.limits.seats, plan.limits.checkpointing) == (3, False)
    assert plan.limits.pass_tokens >= 600
    assert plan_memory(base, values, plans, 2 * room - 2).limits.seats == 2


def test_pads_take_room_too() -> None:
    base, values = BASES["llama"], VALUES["llama"]
    with pytest.raises(PreceptorError, match="a document of 1,010 tokens"):
        plan_memory(base, values, [plan_with([10], pads=1000)], 4 << 20)
    assert plan_memory(base, values, [plan_with([10])], 4 << 20).limits.seats == 1


@pytest.mark.parametrize(
    ("shape", "dtype", "checkpointing", "pads", "vocabulary"),
    [
        ("llama", torch.float32, False, 0, 257),
        ("llama", torch.float32, True, 0, 20_000),
        ("qwen3", torch.bfloat16, False, 0, 20_000),
        ("qwen3", torch.bfloat16, True, 0, 257),
        ("qwen2", torch.float32, False, 70, 257),
        ("qwen2", torch.float32, True, 70, 257),
        ("gpt_neox", torch.float32, False, 0, 20_000),
    ],
)
def test_training_takes_what_was_planned(
    shape: str, dtype: torch.dtype, checkpointing: bool, pads: int, vocabulary: int
) -> None:
    config: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 160, "num_hidden_layers": 4}
    base = LoadedBase(tiny_model(shape, vocab_size=vocabulary, **config).to(dtype), byte_tokenizer())
    targets = OTHERS.get(shape, ALL_LINEAR)
    plans = [plan_with(*([[70 + adapter, 50, 20]] * 2), pads=pads) for adapter in range(6)]
    values = adapter_values(base.model, targets, 8)
    widest = 75 + 50 + 20 + 3 * pads
    room = 2 * bytes_of(base, values, plans, MemoryPlan(6, StepLimits(4, 4 * widest, checkpointing)))
    plan = plan_memory(base, values, plans, room, Caps(checkpointing=checkpointing))
    assert plan.limits.seats is not None
    assert 2 <= plan.limits.seats < 6, "memory is to be what limits"
    with PeakMemory() as measured:
        bank = LoraBank(base.model, targets, [8] * 6, [16.0] * 6, range(6))
        with bank.attached():
            train_bank(base, bank, plans, plan.limits)
    assert measured.peak <= room / 2
    assert measured.peak >= room / 2 * 0.25, "and the plan is not far too careful"


def test_free_memory_is_the_containers_without_files_that_can_be_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = free_bytes(torch.device("cpu"))
    assert 1 << 20 < real < 1 << 45
    for name, text in (
        ("memory.max", f"{100 << 20}\n"),
        ("memory.current", f"{80 << 20}\n"),
        ("memory.stat", f"anon 5\ninactive_anon 7\ninactive_file {50 << 20}\nactive_file 9\n"),
    ):
        (tmp_path / name).write_text(text)
    cgroup = memory._cgroup
    monkeypatch.setattr(memory, "_cgroup", lambda: cgroup(tmp_path))
    assert free_bytes(torch.device("cpu")) == 70 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(torch.device("cpu")) > 200 << 20
    monkeypatch.setattr(memory, "_cgroup", lambda: cgroup(tmp_path / "none"))
    assert free_bytes(torch.device("cpu")) > 200 << 20
