"""Trains the adapters of a bank in the same steps, each as if it were alone.

One step puts the next batch of every unfinished adapter through the frozen base together, takes each adapter's mean
loss over its own labelled tokens, and makes one stacked AdamW step. Gradients of different adapters never meet: the
sum of the losses is differentiated once, and each loss depends on one adapter only. An adapter whose plan is carried
out, or whose loss is no longer a number, leaves: its rows are dropped from then on and its values stay.

Within a step, sequences of like length go through the base together, padded on the right to the longest of them; the
gradients of a step's passes add up. Attention is causal, so a pad is seen by no real token, and only labelled positions
reach the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from student.base import LoadedBase
from student.buckets import like_lengths
from student.lora_bank import LoraBank
from student.plan import Lesson, TrainingPlan

# AdamW as torch and PEFT users have it by default.
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8
# Nats per token. A uniform guess over a vocabulary of 150,000 costs 12: whatever is a hundred times worse is no
# student any more.
_EXPLODED = 1_000.0


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What became of one adapter."""

    losses: tuple[float, ...]  # mean over the labelled tokens of each step, natural logarithm
    tokens: int
    diverged: bool = False


@dataclass(slots=True)
class _Course:
    """An unfinished adapter: which, and how far it is."""

    adapter: int
    plan: TrainingPlan
    step: int = 0


def train_bank(
    base: LoadedBase,
    bank: LoraBank,
    plans: Sequence[TrainingPlan],
    *,
    on_step: Callable[[int], None] | None = None,
) -> list[TrainingResult]:
    """Carries out ``plans[k]`` on adapter k, changing ``bank.values_KP`` in place. ``bank`` must be attached.

    ``on_step`` is called after every step with its number; an exception from it ends the training.
    """
    losses: list[list[float]] = [[] for _ in plans]
    tokens = [0] * len(plans)
    diverged: set[int] = set()
    courses = [_Course(k, plan) for k, plan in enumerate(plans) if plan.steps]
    moments = torch.zeros(2, len(courses), bank.values_KP.shape[1], device=bank.values_KP.device)
    values_SP = bank.values_KP[[course.adapter for course in courses]] if courses else bank.values_KP[:0]
    steps = 0
    while courses:
        batch = [course.plan.steps[course.step] for course in courses]
        loss_S, gradient_SP = _differentiate(base, bank, [course.adapter for course in courses], values_SP, batch)
        norm_S = gradient_SP.norm(dim=1)
        _adamw(values_SP, gradient_SP, norm_S, moments, courses)
        staying: list[int] = []
        for seat, (course, loss, norm) in enumerate(zip(courses, loss_S.tolist(), norm_S.tolist(), strict=True)):
            losses[course.adapter].append(loss)
            tokens[course.adapter] += sum(len(item.ids) for item in batch[seat])
            course.step += 1
            sound = math.isfinite(norm) and loss < _EXPLODED  # a loss that is no number is not below anything
            if not sound:
                diverged.add(course.adapter)
            if sound and course.step < len(course.plan.steps):
                staying.append(seat)
            else:
                bank.values_KP[course.adapter] = values_SP[seat]
        if len(staying) < len(courses):
            courses = [courses[seat] for seat in staying]
            values_SP, moments = values_SP[staying], moments[:, staying]
        steps += 1
        if on_step is not None:
            on_step(steps)
    return [TrainingResult(tuple(losses[k]), tokens[k], k in diverged) for k in range(len(plans))]


def _differentiate(
    base: LoadedBase, bank: LoraBank, adapters: Sequence[int], values_SP: Tensor, batch: Sequence[Sequence[Lesson]]
) -> tuple[Tensor, Tensor]:
    """Mean loss of each adapter [S] on its lessons, and its gradient [S, P]."""
    items = [(seat, item) for seat, lessons in enumerate(batch) for item in lessons]
    weights = [1 / sum(item.labels for item in lessons) for lessons in batch]
    loss_S = values_SP.new_zeros(len(batch))
    gradient_SP = torch.zeros_like(values_SP)
    for group in like_lengths([len(item.ids) for _, item in items]):
        lessons_of: dict[int, list[Lesson]] = {}
        for index in group:
            seat, item = items[index]
            lessons_of.setdefault(seat, []).append(item)
        seats = list(lessons_of)
        some_SP = values_SP if len(seats) == len(batch) else values_SP[seats]
        rows = [len(lessons) for lessons in lessons_of.values()]
        bank.seat_for_training([adapters[seat] for seat in seats], rows, some_SP)
        part_S = _weighted_losses(base, list(lessons_of.values()), [weights[seat] for seat in seats])
        gradient_SP[seats] += bank.gradient(part_S.sum())
        loss_S[seats] += part_S.detach()
    return loss_S, gradient_SP


def _weighted_losses(base: LoadedBase, batch: Sequence[Sequence[Lesson]], weights: Sequence[float]) -> Tensor:
    """For each seated adapter the sum of its labelled tokens' losses times its weight, [S]."""
    length = max(len(item.ids) for lessons in batch for item in lessons) - 1  # the last token is only a label
    ids: list[int] = []
    positions: list[int] = []  # into the flattened [rows * length]
    targets: list[int] = []
    weights_SN = torch.zeros(len(batch), sum(item.labels for lessons in batch for item in lessons))
    for seat, lessons in enumerate(batch):
        labels = sum(item.labels for item in lessons)
        weights_SN[seat, len(targets) : len(targets) + labels] = weights[seat]
        for item in lessons:
            start = len(ids)
            ids += item.ids[:-1]
            ids += (base.eos_id,) * (length + 1 - len(item.ids))
            positions += range(start + item.loss_from - 1, start + len(item.ids) - 1)
            targets += item.ids[item.loss_from :]
    device = base.device
    hidden = base.decoder(torch.tensor(ids, device=device).view(-1, length), use_cache=False)[0]
    labelled = hidden.reshape(-1, hidden.shape[-1]).index_select(0, torch.tensor(positions, device=device))
    nll_N = functional.cross_entropy(base.logits(labelled), torch.tensor(targets, device=device), reduction="none")
    weights_SN = weights_SN.to(device)
    if bool(torch.isfinite(nll_N).all()):
        # A product instead of a scattered sum: its order of summation is the same every time, on a GPU too.
        return weights_SN @ nll_N
    # 0 * NaN is NaN: one broken adapter must not reach the others.
    return torch.stack([(weights_N * nll_N)[weights_N > 0].sum() for weights_N in weights_SN])


def _adamw(values_SP: Tensor, gradient_SP: Tensor, norm_S: Tensor, moments: Tensor, courses: Sequence[_Course]) -> None:
    """One AdamW step with each adapter's own rate, step count, decay and clip, in place."""
    limit_S = values_SP.new_tensor([course.plan.max_grad_norm or math.inf for course in courses])
    rates = [course.plan.learning_rates[course.step] for course in courses]
    counts = [course.step + 1 for course in courses]
    gradient_SP *= (limit_S / (norm_S + 1e-6)).clamp(max=1.0)[:, None]  # as torch's clip_grad_norm_
    first, second = moments[0], moments[1]
    first.lerp_(gradient_SP, 1 - _BETA1)
    second.mul_(_BETA2).addcmul_(gradient_SP, gradient_SP, value=1 - _BETA2)
    if any(course.plan.weight_decay for course in courses):
        decay = [1 - rate * course.plan.weight_decay for rate, course in zip(rates, courses, strict=True)]
        values_SP *= values_SP.new_tensor(decay)[:, None]
    root = values_SP.new_tensor([math.sqrt(1 - _BETA2**count) for count in counts])[:, None]
    size = values_SP.new_tensor([rate / (1 - _BETA1**c) for rate, c in zip(rates, counts, strict=True)])[:, None]
    values_SP -= size * first / ((second.sqrt() / root).add_(_EPSILON))
