"""Lessons of several adapters as one row of tokens without a single pad, and where everything in it lies.

Tokens stand grouped by seat, lesson after lesson. Only attention needs rectangles: lessons of like length are laid
side by side there, each group padded to its longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from student.buckets import like_lengths
from student.plan import Lesson

# Attention to a lesson of n tokens costs n squared and something for every token; one more grid costs some dozen small
# operations, on a GPU as many kernels. In scores that it would have to save; half or double do equally well.
_TOKEN_SCORES = 32
_GRID_SCORES = {"cpu": 7_000, "cuda": 1 << 20}

# No grid is narrower: torch's softmax on a CPU takes rows shorter than a vector (16 floats) number by number, and then
# alone costs ten times what the products cost.
_NARROWEST = 16

# (seat, lesson), in the order of seats
Item = tuple[int, Lesson]


@dataclass(frozen=True, slots=True)
class Pack:
    """One pass through the student. Letters: T tokens, N labels, S seats, G places of the attention grids."""

    ids: Tensor  # [T]
    positions: Tensor  # [T]: of each token in its lesson
    seats: Tensor  # [T]
    ends: Tensor  # [S], int32: where each seat's tokens end
    empty: tuple[int, ...]  # seats without a token in this pass
    grids: tuple[tuple[int, int], ...]  # attention: (lessons, longest) of each group
    to_grid: Tensor | None  # [G]: the token at each place of the grids, one after the other; None: they are the tokens
    from_grid: Tensor | None  # [T]: the place of each token
    labelled: Tensor | None  # [N]: the tokens that predict a label; None: all
    targets: Tensor  # [N]
    weights: Tensor  # [N]: of each label's loss in its seat's mean
    labels: tuple[int, ...]  # labels of each seat


def pack(items: Sequence[Item], weights_S: Sequence[float], device: torch.device) -> Pack:
    """Packs the items of one pass. A label of seat s counts ``weights_S[s]``. A lesson's last token is only a label."""
    seats = len(weights_S)
    lengths = [len(item.ids) - 1 for _, item in items]
    starts = [0, *accumulate(lengths)]
    tokens_S, labels_S = [0] * seats, [0] * seats
    for (seat, item), length in zip(items, lengths, strict=True):
        tokens_S[seat] += length
        labels_S[seat] += item.labels
    ids = _flat((item.ids[:-1] for _, item in items), starts[-1])
    positions = np.concatenate([np.arange(length) for length in lengths])
    masked = any(item.loss_from > 1 for _, item in items)
    labelled = (
        np.concatenate(
            [
                np.arange(start + item.loss_from - 1, start + len(item.ids) - 1)
                for start, (_, item) in zip(starts, items, strict=False)
            ]
        )
        if masked
        else None
    )
    targets = _flat((item.ids[item.loss_from :] for _, item in items), sum(labels_S))

    costs = [length * (length + _TOKEN_SCORES) for length in lengths]
    groups = like_lengths(costs, _GRID_SCORES.get(device.type, 7_000))
    grids = tuple((len(group), max(_NARROWEST, *(lengths[index] for index in group))) for group in groups)
    to_grid = from_grid = None
    if len(groups) > 1 or min(lengths) < grids[0][1]:
        to_grid = np.empty(sum(count * longest for count, longest in grids), np.int64)
        from_grid = np.empty(starts[-1], np.int64)
        at = 0
        for group, (_, longest) in zip(groups, grids, strict=True):
            for index in group:
                start, length = starts[index], lengths[index]
                to_grid[at : at + length] = range(start, start + length)
                to_grid[at + length : at + longest] = start  # a pad: seen by none, its own outcome not read
                from_grid[start : start + length] = range(at, at + length)
                at += longest

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return Pack(
        on_device(ids),
        on_device(positions),
        on_device(np.repeat(np.arange(seats), tokens_S)),
        on_device(np.cumsum(tokens_S, dtype=np.int32)),
        tuple(seat for seat, count in enumerate(tokens_S) if not count),
        grids,
        None if to_grid is None else on_device(to_grid),
        None if from_grid is None else on_device(from_grid),
        None if labelled is None else on_device(labelled),
        on_device(targets),
        on_device(np.repeat(np.asarray(weights_S, np.float32), labels_S)),
        tuple(labels_S),
    )


def _flat(parts: Iterable[Sequence[int]], count: int) -> np.ndarray:
    return np.fromiter(chain.from_iterable(parts), np.int64, count)
