"""K LoRA adapters side by side over one frozen base: the adapter bank.

For every target linear layer the bank holds stacked factors ``A[K, in, r]`` and ``B[K, r, out]`` over the layer's
frozen weight. A forward pass through a bank with S seated adapters takes rows grouped by adapter: first those of the
first seated adapter, then those of the second. How many each one has is said when they are seated.

Promises
- An adapter's initial values depend on its seed, its rank and the shapes of the base's layers only, and equal PEFT's
  in distribution: A ~ U(-1/sqrt(in), 1/sqrt(in)) (kaiming_uniform with a = sqrt 5), B = 0; its output is scaled by
  alpha / rank.
- Adapters do not see one another: a row's output depends on its own adapter alone. Ranks may differ; factors are
  zero-padded to the largest, and the padding stays exactly zero under training, because each half of a padded pair
  has the other half as a factor of its gradient.
- All values of an adapter lie in one row of one matrix ``[K, P]``, so an optimiser step is a few operations on a matrix
  instead of a few on every tensor of the model.

Letters: K adapters of the bank, S seated ones, P values of one adapter, r the largest rank, N tokens of one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preceptor.errors import PreceptorError


@dataclass(frozen=True, slots=True)
class _Site:
    """One target layer and where its factors lie in an adapter's row of values."""

    name: str  # dotted name inside the model
    linear: nn.Linear
    a_start: int
    b_start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Route:
    """Unequal numbers of rows as the grid [S, n] that a batched product needs, n the most rows that an adapter has."""

    to_grid: Tensor  # [S * n]: the row at each place of the grid; a place without one repeats row 0 and is not read
    from_grid: Tensor  # [rows]: the place of each row


class BankedLinear(nn.Module):
    """A frozen linear layer plus the seated adapters' low-rank terms."""

    a: Tensor  # [S, in, r]
    b: Tensor  # [S, r, out]
    scale: Tensor  # [S, 1, 1]
    route: _Route | None  # None: every adapter has the same number of rows

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight(self) -> Tensor:
        """The frozen weight [out, in]; some models look at it for its dtype."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [rows, ..., in], rows grouped by adapter."""
        base: Tensor = self.linear(x)
        seats = self.a.shape[0]
        if self.route is not None:
            x = x.flatten(1).index_select(0, self.route.to_grid)
        low_SNr = torch.bmm(x.reshape(seats, -1, self.a.shape[1]).to(self.a.dtype), self.a) * self.scale
        if self.route is not None:
            # the base's product has no padding, only the thin one has
            delta = torch.bmm(low_SNr, self.b).view(len(x), -1).index_select(0, self.route.from_grid)
            return base + delta.view(base.shape).to(base.dtype)
        if base.dtype == self.a.dtype:
            return torch.baddbmm(base.view(seats, -1, base.shape[-1]), low_SNr, self.b).view(base.shape)
        return base + torch.bmm(low_SNr, self.b).view(base.shape).to(base.dtype)


class LoraBank:
    """K adapters over one frozen model.

    ``ranks``, ``alphas`` and ``seeds`` have one entry per adapter. Raises PreceptorError(TARGET_MODULES_UNMATCHED) if
    a target matches no linear layer of the model's decoder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        target_modules: Sequence[str],
        ranks: Sequence[int],
        alphas: Sequence[float],
        seeds: Sequence[int],
    ) -> None:
        self._model = model
        self.ranks = tuple(ranks)
        self.alphas = tuple(alphas)
        self._r = max(self.ranks)
        self._sites = _lay_out(model, target_modules, self._r)
        self._banked = [BankedLinear(site.linear) for site in self._sites]
        device = self._sites[0].linear.weight.device
        self._scales_K = torch.tensor([a / r for a, r in zip(alphas, ranks, strict=True)], device=device)
        self.values_KP = torch.zeros(len(self.ranks), self._sites[-1].end)
        for adapter, (rank, seed) in enumerate(zip(ranks, seeds, strict=True)):
            self._initialise(adapter, rank, seed)
        self.values_KP = self.values_KP.to(device)

    def _initialise(self, adapter: int, rank: int, seed: int) -> None:
        # Drawn on the CPU, so that a seed means the same adapter on every device.
        generator = torch.Generator().manual_seed(seed)
        for site in self._sites:
            width = site.linear.in_features
            drawn = torch.empty(rank, width).uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
            self._a_of(self.values_KP[adapter : adapter + 1], site)[0, :, :rank] = drawn.T

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def modules(self) -> tuple[str, ...]:
        """Dotted names of the layers that carry adapters, in the model's order."""
        return tuple(site.name for site in self._sites)

    def factors(self, adapter: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Per layer name the adapter's (A, B) in PEFT's orientation: A [rank, in], B [out, rank]. Copies."""
        row, rank = self.values_KP[adapter : adapter + 1], self.ranks[adapter]
        return {
            site.name: (
                self._a_of(row, site)[0, :, :rank].T.contiguous(),
                self._b_of(row, site)[0, :rank].T.contiguous(),
            )
            for site in self._sites
        }

    def set_factors(self, adapter: int, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """The inverse of ``factors``: gives the adapter these values. Every layer must be there, in its shape."""
        row, rank = self.values_KP[adapter : adapter + 1], self.ranks[adapter]
        for site in self._sites:
            a, b = factors[site.name]
            self._a_of(row, site)[0, :, :rank] = a.T.to(row.device)
            self._b_of(row, site)[0, :rank] = b.T.to(row.device)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While it lasts, the model's target layers run through the bank; afterwards the model is as it was."""
        try:
            for site, banked in zip(self._sites, self._banked, strict=True):
                _replace(self._model, site.name, banked)
            yield
        finally:
            for site in self._sites:
                _replace(self._model, site.name, site.linear)

    def seat(self, adapters: Sequence[int], rows: Sequence[int], values_SP: Tensor | None = None) -> None:
        """Seats the adapters; the next batches hold ``rows[s]`` rows of ``adapters[s]``.

        ``values_SP`` [S, P] stands in for the bank's own values, e.g. while they are being trained.
        """
        if values_SP is None:
            values_SP = self.values_KP[list(adapters)]
        scales = self._scales_K[list(adapters)].view(-1, 1, 1)
        route = self._route(rows)
        for site, banked in zip(self._sites, self._banked, strict=True):
            banked.a, banked.b, banked.scale = self._a_of(values_SP, site), self._b_of(values_SP, site), scales
            banked.route = route

    def seat_for_training(self, adapters: Sequence[int], rows: Sequence[int], values_SP: Tensor) -> None:
        """Seats the adapters with ``values_SP`` so that ``gradient`` can be asked for."""
        self.seat(adapters, rows, values_SP)
        for banked in self._banked:
            banked.a, banked.b = banked.a.detach().requires_grad_(), banked.b.detach().requires_grad_()

    def _route(self, rows: Sequence[int]) -> _Route | None:
        most = max(rows)
        if min(rows) == most:
            return None
        to_grid: list[int] = []
        from_grid: list[int] = []
        for seat, count in enumerate(rows):
            first = len(from_grid)
            to_grid += [*range(first, first + count), *(0,) * (most - count)]
            from_grid += range(seat * most, seat * most + count)
        device = self.values_KP.device
        return _Route(torch.tensor(to_grid, device=device), torch.tensor(from_grid, device=device))

    def gradient(self, loss: Tensor) -> Tensor:
        """d loss / d values of the seated adapters, [S, P].

        Each factor is its own leaf: were the matrix of all values the leaf, every one of its slices would hand back a
        gradient as large as the whole.
        """
        leaves = [leaf for banked in self._banked for leaf in (banked.a, banked.b)]
        return torch.cat([part.reshape(len(part), -1) for part in torch.autograd.grad(loss, leaves)], dim=1)

    def _a_of(self, values_SP: Tensor, site: _Site) -> Tensor:
        return values_SP[:, site.a_start : site.b_start].view(-1, site.linear.in_features, self._r)

    def _b_of(self, values_SP: Tensor, site: _Site) -> Tensor:
        return values_SP[:, site.b_start : site.end].view(-1, self._r, site.linear.out_features)


def _lay_out(model: PreTrainedModel, target_modules: Sequence[str], rank: int) -> list[_Site]:
    sites: list[_Site] = []
    unmatched = set(target_modules)
    start = 0
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        # The head runs on the labelled positions only, which are not grouped by adapter; no recipe adapts it.
        if not isinstance(module, nn.Linear) or module is head:
            continue
        matched = {target for target in target_modules if name == target or name.endswith(f".{target}")}
        if not matched:
            continue
        unmatched -= matched
        b_start = start + module.in_features * rank
        end = b_start + rank * module.out_features
        sites.append(_Site(name, module, start, b_start, end))
        start = end
    if unmatched or not sites:
        there = sorted(
            {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
        )
        raise PreceptorError(
            "TARGET_MODULES_UNMATCHED",
            f"no linear layer of the student is named {', '.join(sorted(unmatched)) or '(no target was given)'}; "
            f"there are: {', '.join(there) or 'none'}",
            field="target_modules",
        )
    return sites


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
