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
from student.trainer import StepLimits, packable

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

    As many adapters are seated as can be put through the student together with a step's documents each: a seat that
    only makes for more and emptier passes brings nothing. What is left holds adapters that wait.
    Raises PreceptorError(TRIAL_OUT_OF_MEMORY) if not even one adapter fits with the longest lesson.
    """
    budget = usable(base, free)
    held = adapter_values * _FLOAT
    # while it is trained: values, gradient, two moments, and the copy that products take if the base is narrower
    seat = held + 4 * held + (held // 2 if base.model.dtype != torch.float32 else 0)
    steps = [[len(item.ids) + item.pads for item in step] for plan in plans for step in plan.steps]
    longest = max((max(step) for step in steps), default=0)
    widest = max((sum(step) for step in steps), default=0)
    most = max(longest, most_tokens(base))
    for checkpointing in (False, True) if caps.checkpointing is None else (caps.checkpointing,):
        going = Activations.of(base, longest, packed=packable(base, plans), checkpointing=checkpointing)
        if (least := seat + going.bytes(longest)) > budget:
            continue
        seats = min(len(plans), caps.adapters)
        while seats > 1 and seats * seat + going.bytes(min(most, seats * widest)) > budget:
            seats -= 1
        # the last one alone may need several passes a step
        rest = max(0, budget - seats * seat - going.bytes(min(most, max(longest, seats * widest))))
        bank = min(len(plans), seats + rest // held)
        tokens = going.tokens(budget - seats * seat - (bank - seats) * held)
        return MemoryPlan(bank, StepLimits(seats, max(longest, min(most, tokens)), checkpointing))
    raise PreceptorError(
        "TRIAL_OUT_OF_MEMORY",
        f"one adapter of {adapter_values:,} values with a document of {longest:,} tokens needs "
        f"{least / 2**30:.2f} GiB, and {budget / 2**30:.2f} GiB of {free / 2**30:.2f} are to be used",
    )


def usable(base: LoadedBase, free: int) -> int:
    """How many of so many free bytes of the student's device a plan may count on."""
    return int(free * _USABLE.get(base.device.type, 0.5))


def most_tokens(base: LoadedBase) -> int:
    """Tokens of one pass beyond which more bring nothing on the student's device."""
    return _PASS_TOKENS.get(base.device.type, 2_048)


@dataclass(frozen=True, slots=True)
class Activations:
    """What tokens need while they go through the student and back."""

    token: int  # bytes of activations, per token
    logits: int  # bytes of logits, their shares and the gradient, per token ...
    most_logits: int  # ... and in all: the packed decoder makes them in slices

    @classmethod
    def of(cls, base: LoadedBase, longest: int, *, packed: bool, checkpointing: bool) -> Activations:
        """Of lessons of up to ``longest`` tokens, with the packed decoder or without."""
        config: Any = base.model.config
        size = 2 if base.model.dtype != torch.float32 else 4
        width = config.hidden_size
        head = getattr(config, "head_dim", None) or width // config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        attention = (3 * config.num_attention_heads + 2 * keys) * head
        if base.device.type == "cpu":
            attention += config.num_attention_heads * min(longest, 256) // 2  # shares of attention are kept
        block = (4 * width + 2 * attention + 4 * config.intermediate_size) * size
        layers = config.num_hidden_layers
        # one block more: what is made on the way back through a block
        token = layers * width * size + 2 * block if checkpointing else (layers + 1) * block
        logits = (3 if packed else 4) * _FLOAT * int(config.vocab_size)
        return cls(int(token), logits, 3 * _FLOAT * (1 << 26) if packed else 1 << 62)

    def bytes(self, tokens: int) -> int:
        """What so many tokens need."""
        return tokens * self.token + min(tokens * self.logits, self.most_logits)

    def tokens(self, room: int) -> int:
        """How many tokens need no more than ``room`` bytes."""
        return max(0, room // (self.token + self.logits), (room - self.most_logits) // self.token)


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch has reserved and does not use is free for us
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    available = int(psutil.virtual_memory().available)
    limit, used, cached = _cgroup()
    return available if limit is None else max(0, min(available, limit - used + cached))


def cgroup_limit() -> int | None:
    """Bytes that this container may use; None where there is no limit."""
    return _cgroup()[0]


def _cgroup(folder: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int, int]:
    """The container's limit (None: there is none), what is used of it, and what of that is files read once, such as a
    student's weights, which the kernel drops when memory is asked for."""
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no cgroup, or "max"
        return None, 0, 0
    return limit, used, next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
