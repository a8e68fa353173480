"""Trains the adapters of a bank in the same steps, each as if it were alone.

One step puts the next batch of every seated adapter through the frozen base together, takes each adapter's mean loss
over its own labelled tokens, and makes an AdamW step of each. Gradients of different adapters never meet. An adapter
whose plan is carried out, whose loss is no longer a number, or that nobody wants any more leaves its seat with its
values as they are, and the next one takes it: however unequal the plans are, the steps stay full.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from student.autograd_decoder import AutogradDecoder
from student.base import LoadedBase
from student.lora_bank import LoraBank
from student.packed_decoder import PackedDecoder, supports
from student.plan import Lesson, TrainingPlan

# AdamW as torch and PEFT users have it by default.
BETAS, EPSILON = (0.9, 0.999), 1e-8
# Nats per token. A uniform guess over a vocabulary of 150,000 costs 12: whatever is a hundred times worse is no
# student any more.
_EXPLODED = 1_000.0


class Decoder(Protocol):
    """Differentiates the loss of lessons by the values of seated adapters."""

    def bind(self, adapters: Sequence[int], values_SP: Tensor, gradient_SP: Tensor) -> None:
        """Seats these adapters with these values, and writes their gradients there from now on."""

    def differentiate(self, lessons_S: Sequence[Sequence[Lesson]]) -> Tensor:
        """Mean loss of each seat's lessons [S]."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What one step may hold at once. None of it changes what an adapter learns."""

    seats: int | None = None  # adapters in one step; None: all
    pass_tokens: int = 1 << 62  # tokens that go through the student at once
    checkpointing: bool = False  # a third more work for less memory


@dataclass(slots=True)
class TrainingResult:
    """What became of one adapter."""

    losses: list[float] = field(default_factory=list)  # mean over the labelled tokens of each step, natural logarithm
    tokens: int = 0  # real ones: pads do not count
    diverged: bool = False
    cancelled: bool = False


def is_broken(loss: float, norm: float) -> bool:
    """Whether a step with this loss and this norm of its gradient says that training has diverged."""
    return not (math.isfinite(norm) and loss < _EXPLODED)  # a loss that is no number is not below anything


@dataclass(slots=True)
class _Course:
    """A seated adapter and how far it is."""

    adapter: int
    plan: TrainingPlan
    count: Tensor  # steps taken, as torch's fused AdamW wants it
    step: int = 0

    @property
    def lessons(self) -> tuple[Lesson, ...]:
        return self.plan.steps[self.step]


def train_bank(
    base: LoadedBase,
    bank: LoraBank,
    plans: Sequence[TrainingPlan],
    limits: StepLimits = StepLimits(),
    *,
    on_step: Callable[[int], None] | None = None,
    cancelled: Callable[[], Collection[int]] = tuple,
) -> list[TrainingResult]:
    """Carries out ``plans[k]`` on adapter k, changing ``bank.values_KP`` in place. ``bank`` must be attached.

    Longer plans are seated first, so that no long one begins when the others end. ``on_step`` is called after every
    step with its number; an exception from it ends the training. ``cancelled`` is asked before every step for the
    adapters that nobody wants any more.
    """
    results = [TrainingResult() for _ in plans]
    waiting = deque(sorted((k for k, plan in enumerate(plans) if plan.steps), key=lambda k: -len(plans[k].steps)))
    seats = _Seats(bank, _decoder(base, bank, plans, limits), plans, limits.seats or len(plans))
    unread: _Report | None = None
    steps = 0
    while True:
        for adapter in cancelled():
            results[adapter].cancelled = True
        seats.refill(waiting, leaving=lambda k: results[k].diverged or results[k].cancelled)
        if not seats.courses:
            break
        report = seats.step()
        # Read one step late, so that a GPU works on this step meanwhile; a diverged adapter takes one step too many.
        if unread is not None:
            unread.enter(results)
        unread = report
        steps += 1
        if on_step is not None:
            on_step(steps)
    if unread is not None:
        unread.enter(results)
    return results


def packable(base: LoadedBase, plans: Sequence[TrainingPlan]) -> bool:
    """Whether the plans can be carried out by the packed decoder."""
    lessons = [item for plan in plans for step in plan.steps for item in step]
    longest = max((len(item.ids) for item in lessons), default=0)
    return supports(base.model, longest) and not any(item.pads for item in lessons)


def _decoder(base: LoadedBase, bank: LoraBank, plans: Sequence[TrainingPlan], limits: StepLimits) -> Decoder:
    tokens, checkpointing = limits.pass_tokens, limits.checkpointing
    if packable(base, plans):
        return PackedDecoder(base.model, bank, pass_tokens=tokens, checkpointing=checkpointing)
    return AutogradDecoder(base, bank, pass_tokens=tokens, checkpointing=checkpointing)


@dataclass(frozen=True, slots=True)
class _Report:
    """One step's outcome: loss and gradient norm of each seat, perhaps still under way on a GPU."""

    adapters: tuple[int, ...]
    tokens: tuple[int, ...]
    figures: Tensor  # [2, S]

    def enter(self, results: Sequence[TrainingResult]) -> None:
        """Adds it to the results; waits for the GPU."""
        for adapter, tokens, loss, norm in zip(self.adapters, self.tokens, *self.figures.tolist(), strict=True):
            result = results[adapter]
            if not result.diverged:
                result.losses.append(loss)
                result.tokens += tokens
                result.diverged = is_broken(loss, norm)


class _Seats:
    """The adapters that are in training, and what training needs of each: gradient, moments, count."""

    def __init__(self, bank: LoraBank, decoder: Decoder, plans: Sequence[TrainingPlan], seats: int) -> None:
        self._bank, self._decoder, self._plans, self._limit = bank, decoder, plans, seats
        self.courses: list[_Course] = []
        self._values = self._gradient = self._first = self._second = bank.values_KP[:0]

    def refill(self, waiting: deque[int], leaving: Callable[[int], bool]) -> None:
        """Frees the seats of those that are through or leave, and seats waiting ones."""
        staying = []
        for seat, course in enumerate(self.courses):
            if course.step < len(course.plan.steps) and not leaving(course.adapter):
                staying.append(seat)
            else:
                self._bank.values_KP[course.adapter] = self._values[seat]
        entering: list[int] = []
        while waiting and len(staying) + len(entering) < self._limit:
            if not leaving(adapter := waiting.popleft()):
                entering.append(adapter)
        if len(staying) == len(self.courses) and not entering:
            return
        free = [seat for seat in range(len(self.courses)) if seat not in set(staying)]
        if len(entering) == len(free):  # the new ones take the seats of the old
            for seat, adapter in zip(free, entering, strict=True):
                self._values[seat] = self._bank.values_KP[adapter]
                self._first[seat] = self._second[seat] = 0
                self.courses[seat] = self._course(adapter)
        else:
            new = self._bank.values_KP[entering]
            nothing = torch.zeros_like(new)
            self._values = torch.cat([self._values[staying], new])
            self._first = torch.cat([self._first[staying], nothing])
            self._second = torch.cat([self._second[staying], nothing])
            self._gradient = torch.empty_like(self._values)
            self.courses = [*(self.courses[seat] for seat in staying), *map(self._course, entering)]
        if self.courses:
            adapters = [course.adapter for course in self.courses]
            self._decoder.bind(adapters, self._values, self._gradient)

    def _course(self, adapter: int) -> _Course:
        return _Course(adapter, self._plans[adapter], torch.zeros((), device=self._bank.values_KP.device))

    def step(self) -> _Report:
        """One step of every seated adapter."""
        loss_S = self._decoder.differentiate([course.lessons for course in self.courses])
        norm_S = torch.linalg.vector_norm(self._gradient, dim=1)
        limit_S = norm_S.new_tensor([course.plan.max_grad_norm or math.inf for course in self.courses])
        self._gradient *= (limit_S / (norm_S + 1e-6)).clamp(max=1.0)[:, None]  # as torch's clip_grad_norm_
        tokens = tuple(sum(len(item.ids) for item in course.lessons) for course in self.courses)
        for seat, course in enumerate(self.courses):
            course.step += 1
            # what AdamW(fused=True) calls; going through it costs as much again as the step of a small adapter
            torch._fused_adamw_(
                [self._values[seat]],
                [self._gradient[seat]],
                [self._first[seat]],
                [self._second[seat]],
                [],
                [course.count.add_(1)],
                lr=course.plan.learning_rates[course.step - 1],
                beta1=BETAS[0],
                beta2=BETAS[1],
                weight_decay=course.plan.weight_decay,
                eps=EPSILON,
                amsgrad=False,
                maximize=False,
            )
        return _Report(tuple(course.adapter for course in self.courses), tokens, torch.stack([loss_S, norm_S]))
