"""How much one step may hold, planned from free memory before training starts.

The plan is an estimate with a reserve; what it gets wrong is caught as out-of-memory by the trial runner, which goes on
with half as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from preceptor.errors import PreceptorError
from student.base import LoadedBase
from student.plan import TrainingPlan
from student.trainer import StepLimits

# Of free memory; the rest is for fragments, for what the estimate leaves out and, on a CPU, for neighbours.
_USABLE = {"cuda": 0.85, "cpu": 0.5}
# Tokens of one pass. On a GPU more do not make the matrix units any busier; on a CPU the activations of a small
# student fall out of the core's cache.
_PASS_TOKENS = {"cuda": 16_384, "cpu": 2_048}
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class Caps:
    """What whoever runs the worker allows."""

    # Adapters in one step. More bring nothing that was measured (docs/log.md), and each lengthens a batch's last steps.
    adapters: int = 32
    checkpointing: bool | None = None  # None: where memory needs it


DEFAULT_CAPS = Caps()


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How many adapters one bank holds, and what its steps may hold."""

    bank: int
    limits: StepLimits


def plan_memory(
    base: LoadedBase, adapter_values: int, plans: Sequence[TrainingPlan], free: int, caps: Caps = DEFAULT_CAPS
) -> MemoryPlan:
    """Plans for ``plans`` with adapters of ``adapter_values`` numbers each and ``free`` bytes.

    Raises PreceptorError(TRIAL_OUT_OF_MEMORY) if not even one adapter fits with the longest lesson.
    """
    kind = base.device.type
    budget = int(free * _USABLE.get(kind, 0.5))
    held = adapter_values * _FLOAT
    # while it is trained: values, gradient, two moments, and the copy that products take if the base is narrower
    seat = 4 * held + (held // 2 if base.model.dtype != torch.float32 else 0)
    longest = max((len(item.ids) + item.pads for plan in plans for step in plan.steps for item in step), default=0)
    for checkpointing in (False, True) if caps.checkpointing is None else (caps.checkpointing,):
        token = _token_bytes(base, longest, checkpointing=checkpointing)
        least = longest * token + _fixed_bytes(base, longest)
        left = budget - least - held
        if left >= seat:
            bank = min(len(plans), max(1, left // 2 // held))
            seats = min(bank, caps.adapters, (left - (bank - 1) * held) // seat)
            if seats < 1:
                bank, seats = 1, 1
            tokens = (left - (bank - 1) * held - seats * seat) // token + longest
            pass_tokens = max(longest, min(tokens, _PASS_TOKENS.get(kind, 2_048)))
            return MemoryPlan(bank, StepLimits(int(seats), int(pass_tokens), checkpointing))
    raise PreceptorError(
        "TRIAL_OUT_OF_MEMORY",
        f"one adapter of {adapter_values:,} values with a document of {longest:,} tokens needs "
        f"{(least + held + seat) / 2**30:.1f} GiB, and {budget / 2**30:.1f} GiB of {free / 2**30:.1f} are to be used",
    )


def _token_bytes(base: LoadedBase, longest: int, *, checkpointing: bool) -> int:
    """Bytes that the backward pass needs per token."""
    config: Any = base.model.config
    size = 2 if base.model.dtype != torch.float32 else 4
    width = config.hidden_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    attention = (3 * config.num_attention_heads + 2 * config.num_key_value_heads) * head
    if base.device.type == "cpu":
        attention += config.num_attention_heads * min(longest, 256)  # shares of attention are kept
    block = (4 * width + 2 * attention + 4 * config.intermediate_size) * size
    layers = config.num_hidden_layers
    return int(layers * width * size + block if checkpointing else layers * block)


def _fixed_bytes(base: LoadedBase, tokens: int) -> int:
    """Logits, their shares and the gradient, for the slice that is made at once."""
    vocabulary = int(base.model.config.vocab_size)
    return 3 * _FLOAT * min(1 << 26, max(tokens, 1) * vocabulary)


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch has reserved and does not use is free for us
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    available = int(psutil.virtual_memory().available)
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    return available if limit is None or used is None else max(0, min(available, limit - used))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no cgroup, or "max"
        return None
