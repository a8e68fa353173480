"""Full fine-tuning: all weights of a copy of the student, trained as an adapter is, by the same plan.

Order, replay, masks, schedule, clipping, weight decay and token budget are the plan's; the loss of a step is the mean
over its labelled tokens; AdamW is torch's own, over every weight alike. The student itself is not touched: its copy is
trained in float32 (on a GPU with bfloat16 products) and then rounded to the student's own type, and that is what is
asked and kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from preceptor.errors import PreceptorError
from student.autograd_decoder import checkpoints, losses, passes
from student.base import LoadedBase
from student.memory import Activations, Caps, most_tokens, usable
from student.plan import Lesson, TrainingPlan
from student.trainer import BETAS, EPSILON, StepLimits, TrainingResult, is_broken

_GIB = 2**30
# Of each weight, in float32: itself, its gradient and two moments.
_BYTES = 16


class NoAdapters:
    """What stands in for a bank where there are no adapters: a student is asked as it is."""

    def values_of(self, adapters: Sequence[int]) -> Tensor:
        """No values, of each."""
        return torch.zeros(len(adapters), 0)

    def seat(self, adapters: Sequence[int], tokens: Sequence[int], values_SP: Tensor | None = None) -> None:
        """Nobody takes a seat."""


def train_full(
    base: LoadedBase,
    plan: TrainingPlan,
    limits: StepLimits,
    *,
    on_step: Callable[[int], None] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> tuple[LoadedBase, TrainingResult]:
    """Carries out ``plan`` on a copy of the student; the copy, and what became of it.

    ``on_step`` is called after every step with its number; an exception from it ends the training. ``cancelled`` is
    asked before every step.
    """
    result = TrainingResult()
    model = copy.deepcopy(base.model)
    trained = base.with_model(model)
    weights = list(model.parameters())  # those that are tied are one
    for weight in weights:  # not the buffers: angles of rotary embeddings have a type of their own
        weight.data = weight.data.float()
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=plan.weight_decay, fused=True)
    for number, (lessons, rate) in enumerate(zip(plan.steps, plan.learning_rates, strict=True), start=1):
        if cancelled():
            result.cancelled = True
            break
        optimizer.param_groups[0]["lr"] = rate
        loss = _differentiate(trained, lessons, limits)
        norm = float(nn.utils.clip_grad_norm_(weights, plan.max_grad_norm or math.inf))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        result.losses.append(loss)
        result.tokens += sum(len(item.ids) for item in lessons)
        if on_step is not None:
            on_step(number)
        if is_broken(loss, norm):
            result.diverged = True
            break
    for weight, before in zip(weights, base.model.parameters(), strict=True):
        weight.requires_grad_(False)
        weight.data = weight.data.to(before.dtype)
    return trained, result


def _differentiate(trained: LoadedBase, lessons: tuple[Lesson, ...], limits: StepLimits) -> float:
    """The mean loss of the lessons' labelled tokens; its gradient is added to that of the weights."""
    weight = 1 / sum(item.labels for item in lessons)
    total = 0.0
    on_gpu = trained.device.type == "cuda"
    for group in passes(lessons, limits.pass_tokens):
        with (
            torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext(),
            checkpoints(trained.model) if limits.checkpointing else nullcontext(),
        ):
            loss = losses(trained, [[lessons[index] for index in group]], [weight]).sum()
            loss.backward()
        total += float(loss.detach())
    return total


def check_trainable(base: LoadedBase) -> None:
    """Raises PreceptorError(BASE_NOT_ADAPTABLE) for a student with weights that have no gradient."""
    for name, weight in base.model.named_parameters():
        if not weight.is_floating_point():
            message = f"{name} is quantised ({weight.dtype}); full fine-tuning needs all weights as they were"
            raise PreceptorError("BASE_NOT_ADAPTABLE", message, field="full")


def plan_full_memory(base: LoadedBase, plan: TrainingPlan, free: int, caps: Caps) -> StepLimits:
    """What a pass may hold with ``free`` bytes, beside the copy, its gradient and its moments.

    Raises PreceptorError: TRIAL_OUT_OF_MEMORY if these do not fit with the longest lesson.
    """
    numbers = sum(parameter.numel() for parameter in base.model.parameters())
    held, budget = numbers * _BYTES, usable(base, free)
    lengths = [len(item.ids) + item.pads for step in plan.steps for item in step]
    longest = max(lengths, default=0)
    for checkpointing in (False, True) if caps.checkpointing is None else (caps.checkpointing,):
        going = Activations.of(base, longest, packed=False, checkpointing=checkpointing)
        if (least := held + going.bytes(longest)) <= budget:
            tokens = going.tokens(budget - held)
            return StepLimits(1, max(longest, min(most_tokens(base), tokens)), checkpointing)
    raise PreceptorError(
        "TRIAL_OUT_OF_MEMORY",
        f"full fine-tuning of {numbers:,} weights, with gradient and moments of each in float32, and a document of "
        f"{longest:,} tokens needs {least / _GIB:.2f} GiB, and {budget / _GIB:.2f} GiB of {free / _GIB:.2f} are to be "
        "used; adapters (fine_tuning: lora) need a fraction of it",
    )
