"""Causal attention of packed lessons, forward and backward.

Lessons of like length are laid side by side as rectangles (``student.packing`` says which); no lesson sees another.
Letters: T tokens, L longest lesson of a rectangle, d width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from student.packing import Pack

# Up to this length attention on a CPU goes by plain matrix products: faster than torch's blocked kernel, but a score of
# every pair of tokens is kept.
_SHORT = 256
# Queries of one stripe; 64 to 128 do equally well.
_STRIPE = 96


class PackedAttention:
    """Causal attention of lessons of like length, side by side; q, k and v of all heads are one tensor."""

    def __init__(self, module: Any) -> None:
        config = module.config
        self.width = int(module.head_dim)
        self.queries, self.keys = config.num_attention_heads, config.num_key_value_heads
        self._scale = float(module.scaling)

    def forward(self, qkv: Tensor, pack: Pack) -> tuple[Tensor, list[Callable[[Tensor], Tensor]]]:
        """qkv [T, heads * d] -> mixed values [T, query heads * d], and what turns their gradients back, by group."""
        grid = qkv if pack.to_grid is None else qkv.index_select(0, pack.to_grid)
        mixed, back = [], []
        start = 0
        for lessons, longest in pack.grids:
            rows = grid[start : start + lessons * longest].view(lessons, longest, -1, self.width)
            start += lessons * longest
            one, backward = self._short(rows) if _by_products(rows) else self._long(rows)
            mixed.append(one)
            back.append(backward)
        together = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        return together if pack.from_grid is None else together.index_select(0, pack.from_grid), back

    def backward(self, gradient: Tensor, pack: Pack, back: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """d loss / d qkv [T, heads * d]."""
        if pack.to_grid is not None and pack.from_grid is not None:
            # pads get no gradient, and hand none on
            spread = gradient.new_zeros(len(pack.to_grid), gradient.shape[1])
            gradient = spread.index_copy_(0, pack.from_grid, gradient)
        parts = []
        start = 0
        for (lessons, longest), backward in zip(pack.grids, back, strict=True):
            rows = gradient[start : start + lessons * longest].view(lessons, longest, self.queries, self.width)
            start += lessons * longest
            parts.append(backward(rows))
        together = parts[0] if len(parts) == 1 else torch.cat(parts)
        return together if pack.from_grid is None else together.index_select(0, pack.from_grid)

    def _short(self, rows: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        lessons, longest, _, width = rows.shape
        heads, repeats = self.queries, self.queries // self.keys
        turned = rows.permute(2, 0, 1, 3).contiguous()  # [heads, lessons, L, d]
        q = turned[:heads].view(-1, longest, width)
        k, v = (
            turned[first : first + self.keys].unsqueeze(1).expand(-1, repeats, -1, -1, -1).reshape(-1, longest, width)
            for first in (heads, heads + self.keys)
        )
        mixed = torch.empty_like(q)
        shares: list[Tensor] = []
        for begin, end in _stripes(longest):
            scores = torch.baddbmm(
                _causal(longest, rows.dtype)[:, begin:end, :end],
                q[:, begin:end],
                k[:, :end].transpose(1, 2),
                alpha=self._scale,
            )
            shares.append(torch.softmax(scores, -1))
            torch.bmm(shares[-1], v[:, :end], out=mixed[:, begin:end])

        def backward(gradient: Tensor) -> Tensor:
            gradient = gradient.permute(2, 0, 1, 3).reshape(-1, longest, width)
            into = torch.empty_like(turned)
            into_q = into[:heads].view(-1, longest, width)
            into_k, into_v = torch.empty_like(k), torch.empty_like(v)
            for (begin, end), share in reversed(list(zip(_stripes(longest), shares, strict=True))):
                part = gradient[:, begin:end]
                score = torch.bmm(part, v[:, :end].transpose(1, 2))
                score = torch.ops.aten._softmax_backward_data(score, share, -1, share.dtype).mul_(self._scale)
                torch.bmm(score, k[:, :end], out=into_q[:, begin:end])
                beta = 0 if end == longest else 1  # the last stripe looks at every key
                into_k[:, :end].baddbmm_(score.transpose(1, 2), q[:, begin:end], beta=beta)
                into_v[:, :end].baddbmm_(share.transpose(1, 2), part, beta=beta)
            for first, one in ((heads, into_k), (heads + self.keys, into_v)):
                torch.sum(one.view(self.keys, repeats, lessons, longest, width), 1, out=into[first : first + self.keys])
            return into.permute(1, 2, 0, 3).reshape(lessons * longest, -1)

        mixed = mixed.view(heads, lessons, longest, width)
        return mixed.permute(1, 2, 0, 3).reshape(lessons * longest, -1), backward

    def _long(self, rows: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        lessons, longest = rows.shape[:2]
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_()
            q, k, v = (part.transpose(1, 2) for part in leaf.split((self.queries, self.keys, self.keys), 2))
            mixed = functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self._scale, enable_gqa=self.queries != self.keys
            ).transpose(1, 2)

        def backward(gradient: Tensor) -> Tensor:
            (result,) = torch.autograd.grad(mixed, leaf, gradient)
            return result.reshape(lessons * longest, -1)

        return mixed.detach().reshape(lessons * longest, -1), backward


def _stripes(length: int) -> list[tuple[int, int]]:
    """Queries in stripes, each with the keys up to its end: the longer a lesson, the nearer to half of all products."""
    count = -(-length // _STRIPE)
    ends = [length * (number + 1) // count for number in range(count)]
    return list(zip([0, *ends], ends, strict=False))


def _by_products(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.shape[1] <= _SHORT


@functools.lru_cache(maxsize=_SHORT)
def _causal(length: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores [L, L]: nothing where a token may look, minus infinity ahead of it."""
    return torch.full((1, length, length), float("-inf"), dtype=dtype).triu(1)
