"""A training step through transformers' own modules and autograd: for every student that the packed decoder does not
know, and for lessons whose pads carry loss.

Lessons of like length go through the student together, padded on the right to the longest of them; the gradients of
a step's passes add up. Attention is causal, so a pad is seen by no real token, and only labelled positions reach the
head.

A full fine-tune (``student.full``) makes its passes and losses here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from student.base import LoadedBase
from student.buckets import like_lengths
from student.lora_bank import LoraBank
from student.plan import Lesson


class AutogradDecoder:
    """Losses of lessons and the gradients of the seated adapters' values. The bank must be attached.

    No pass has more than ``pass_tokens`` tokens, pads included, unless it is a single lesson. ``checkpointing``: of
    each block only its input is kept, if transformers knows how to for this model.
    """

    def __init__(self, base: LoadedBase, bank: LoraBank, *, pass_tokens: int, checkpointing: bool = False) -> None:
        self._base, self._bank, self._pass_tokens = base, bank, pass_tokens
        self._checkpointing = checkpointing

    def bind(self, adapters: Sequence[int], values_SP: Tensor, gradient_SP: Tensor) -> None:
        """Seats these adapters with these values, and writes their gradients there from now on."""
        self._adapters, self._values, self._gradient = tuple(adapters), values_SP, gradient_SP

    def differentiate(self, lessons_S: Sequence[Sequence[Lesson]]) -> Tensor:
        """Mean loss of each seat's lessons [S]; its gradient is in the matrix that was bound."""
        items = [(seat, item) for seat, lessons in enumerate(lessons_S) for item in lessons]
        loss_S = self._values.new_zeros(len(lessons_S))
        self._gradient.zero_()
        for group in passes([item for _, item in items], self._pass_tokens):
            of_seat: dict[int, list[Lesson]] = {}
            for index in group:
                seat, item = items[index]
                of_seat.setdefault(seat, []).append(item)
            seats = list(of_seat)
            weights = [1 / sum(item.labels for item in lessons_S[seat]) for seat in seats]
            part_S, gradient = self._pass(seats, list(of_seat.values()), weights)
            loss_S[seats] += part_S
            if gradient is not self._gradient:
                self._gradient[seats] += gradient
        return loss_S

    def _pass(
        self, seats: Sequence[int], lessons: Sequence[Sequence[Lesson]], weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        everyone = len(seats) == len(self._adapters)
        values = self._values if everyone else self._values[list(seats)]
        gradient = self._gradient if everyone else torch.zeros_like(values)
        length = longest(lessons)
        self._bank.seat_for_training(
            [self._adapters[seat] for seat in seats], [len(some) * length for some in lessons], values
        )
        with checkpoints(self._base.model) if self._checkpointing else nullcontext():
            part_S = losses(self._base, lessons, weights)
            self._bank.add_gradient(part_S.sum(), gradient)
        return part_S.detach(), gradient


def passes(lessons: Sequence[Lesson], pass_tokens: int) -> Iterator[Sequence[int]]:
    """Which lessons go through the student together: of like length, at most so many tokens unless it is one lesson."""
    lengths = [len(item.ids) + item.pads for item in lessons]
    for group in like_lengths(lengths):
        size = max(1, pass_tokens // max(lengths[index] for index in group))
        yield from (group[start : start + size] for start in range(0, len(group), size))


def longest(lessons: Sequence[Sequence[Lesson]]) -> int:
    """Tokens of a row of the pass that the lessons go through in: the last of the longest one is only a label."""
    return max(len(item.ids) + item.pads for some in lessons for item in some) - 1


def losses(base: LoadedBase, lessons: Sequence[Sequence[Lesson]], weights: Sequence[float]) -> Tensor:
    """For each seat the sum of its labelled tokens' losses times its weight, [S]; all lessons in one pass."""
    length = longest(lessons)
    ids: list[int] = []
    seen: list[int] = []  # 0: a pad, which no token looks at
    positions: list[int] = []  # into the flattened [rows * length]
    targets: list[int] = []
    for item in (item for some in lessons for item in some):
        start, pads = len(ids), (base.eos_id,) * (length + 1 - len(item.ids))
        whole = (*item.ids, *pads)
        end = len(item.ids) + item.pads
        ids += whole[:-1]
        seen += (*(1,) * len(item.ids), *(0,) * len(pads))[:-1]
        positions += range(start + item.loss_from - 1, start + end - 1)
        targets += whole[item.loss_from : end]
    device = base.device
    padded = any(item.pads for some in lessons for item in some)
    mask = torch.tensor(seen, device=device).view(-1, length) if padded else None
    ids_RL = torch.tensor(ids, device=device).view(-1, length)
    hidden = base.decoder(ids_RL, attention_mask=mask, use_cache=False)[0]
    labelled = hidden.reshape(-1, hidden.shape[-1]).index_select(0, torch.tensor(positions, device=device))
    nll_N = functional.cross_entropy(base.logits(labelled), torch.tensor(targets, device=device), reduction="none")
    parts = nll_N.split([sum(item.labels for item in some) for some in lessons])
    # each adapter's own sum: a broken one (NaN) does not reach the others
    return torch.stack([weight * part.sum() for weight, part in zip(weights, parts, strict=True)])


@contextmanager
def checkpoints(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, blocks keep only their input. They do that in training mode alone; what is inside of them stays
    in evaluation mode, without dropout. (Transformers' own switch asks for a gradient of the embeddings too.)"""
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in blocks:
        block.training = block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in blocks:
            block.training = block.gradient_checkpointing = False
