"""K LoRA adapters side by side over one frozen base: the adapter bank.

For every target linear layer the bank holds stacked factors ``A[K, in, r]`` and ``B[K, r, out]`` over the layer's
frozen weight. A forward pass through a bank with S seated adapters takes tokens grouped by adapter: first those of the
first seated adapter, then those of the second, as many of each as they are. The thin products are grouped matrix
products (torch's ``grouped_mm``), so unequal numbers cost nothing.

Promises
- An adapter's initial values depend on its seed, its rank and the shapes of the base's layers only, and equal PEFT's
  in distribution: A ~ U(-1/sqrt(in), 1/sqrt(in)) (kaiming_uniform with a = sqrt 5), B = 0; its output is scaled by
  alpha / rank.
- Adapters do not see one another: a token's output depends on its own adapter alone. Ranks may differ; factors are
  zero-padded to a common width, and the padding stays exactly zero under training, because each half of a padded pair
  has the other half as a factor of its gradient.
- All values of an adapter lie in one row of one matrix ``[K, P]``, so an optimiser step is a few operations on a row
  instead of a few on every tensor of the model. Layers that read the same input (q, k and v; gate and up) have their A
  side by side, so that their inner products are one.

Letters: K adapters of the bank, S seated ones, P values of one adapter, r the common width of all ranks, T tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm
from transformers import PreTrainedModel

from preceptor.errors import PreceptorError

# grouped_mm wants rows that begin at multiples of 16 bytes: 8 values in bfloat16, 4 in float32.
_ALIGNED_BYTES, _ALIGNED_VALUES = 16, 8
# Layers of a block that read the same input, in transformers' order.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, slots=True)
class Site:
    """One target layer and where its factors lie: columns of its group's A, and B in an adapter's row of values."""

    name: str  # dotted name inside the model
    linear: nn.Linear
    column: int
    b_start: int


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Target layers with a common input. Their A lie side by side: one matrix [in, width] of an adapter's values."""

    sites: tuple[Site, ...]
    a_start: int
    width: int

    @property
    def in_features(self) -> int:
        """Width of the common input."""
        return self.sites[0].linear.in_features

    def a_of(self, values_SP: Tensor) -> Tensor:
        """The A of all its layers, a view [S, in, width]."""
        size = self.in_features * self.width
        return values_SP[:, self.a_start : self.a_start + size].view(-1, self.in_features, self.width)


class BankedLinear(nn.Module):
    """A frozen linear layer plus the seated adapters' low-rank terms."""

    a: Tensor  # [S, in, r], in the layer's dtype
    b: Tensor  # [S, r, out]
    scale: Tensor  # [T, 1], float32: in bfloat16 a scale of 4/3 would be 0.2% too large
    ends: Tensor  # [S], int32: where each adapter's tokens end

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight(self) -> Tensor:
        """The frozen weight [out, in]; some models look at it for its dtype."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [rows, ..., in], tokens grouped by adapter."""
        base: Tensor = self.linear(x)
        tokens = x.reshape(-1, x.shape[-1])
        low_Tr = grouped_mm(tokens, self.a, offs=self.ends).mul_(self.scale)
        return base + grouped_mm(low_Tr, self.b, offs=self.ends).view(base.shape)


class LoraBank:
    """K adapters over one frozen model.

    ``ranks``, ``alphas`` and ``seeds`` have one entry per adapter. Raises PreceptorError: TARGET_MODULES_UNMATCHED if
    a target matches no linear layer of the model's decoder; BASE_NOT_ADAPTABLE if a target is quantised, shares its
    weight with another layer or has a width that is no multiple of 16 bytes; RANK_TOO_LARGE if a rank is above a
    target's width.
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
        self._r = _aligned(max(self.ranks))
        self.groups, size = _lay_out(_targets(model, target_modules, max(self.ranks)), self._r)
        self._sites = [(group, site) for group in self.groups for site in group.sites]
        self._banked = [BankedLinear(site.linear) for _, site in self._sites]
        device = self._sites[0][1].linear.weight.device
        self.scales_K = torch.tensor([a / r for a, r in zip(alphas, ranks, strict=True)], device=device)
        self.values_KP = torch.zeros(len(self.ranks), size)
        for adapter, (rank, seed) in enumerate(zip(ranks, seeds, strict=True)):
            self._initialise(adapter, rank, seed)
        self.values_KP = self.values_KP.to(device)

    def _initialise(self, adapter: int, rank: int, seed: int) -> None:
        # Drawn on the CPU, so that a seed means the same adapter on every device.
        generator = torch.Generator().manual_seed(seed)
        for group, site in self._sites:
            width = site.linear.in_features
            drawn = torch.empty(rank, width).uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
            self._a_of(self.values_KP[adapter : adapter + 1], group, site)[0, :, :rank] = drawn.T

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def modules(self) -> tuple[str, ...]:
        """Dotted names of the layers that carry adapters, in the model's order."""
        return tuple(site.name for _, site in self._sites)

    def factors(self, adapter: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Per layer name the adapter's (A, B) in PEFT's orientation: A [rank, in], B [out, rank]. Copies."""
        row, rank = self.values_KP[adapter : adapter + 1], self.ranks[adapter]
        return {
            site.name: (
                # not contiguous(): of rank 1 a transposed B is contiguous as it is, and would stay a view
                self._a_of(row, group, site)[0, :, :rank].T.clone(memory_format=torch.contiguous_format),
                self.b_of(row, site)[0, :rank].T.clone(memory_format=torch.contiguous_format),
            )
            for group, site in self._sites
        }

    def set_factors(self, adapter: int, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """The inverse of ``factors``: gives the adapter these values. Every layer must be there, in its shape."""
        row, rank = self.values_KP[adapter : adapter + 1], self.ranks[adapter]
        for group, site in self._sites:
            a, b = factors[site.name]
            self._a_of(row, group, site)[0, :, :rank] = a.T.to(row.device)
            self.b_of(row, site)[0, :rank] = b.T.to(row.device)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While it lasts, the model's target layers run through the bank; afterwards the model is as it was."""
        try:
            for (_, site), banked in zip(self._sites, self._banked, strict=True):
                _replace(self._model, site.name, banked)
            yield
        finally:
            for _, site in self._sites:
                _replace(self._model, site.name, site.linear)

    def values_of(self, adapters: Sequence[int]) -> Tensor:
        """The values of these adapters [S, P], a copy."""
        return self.values_KP[list(adapters)]

    def seat(self, adapters: Sequence[int], tokens: Sequence[int], values_SP: Tensor | None = None) -> None:
        """Seats the adapters; the next batches hold ``tokens[s]`` tokens of ``adapters[s]``, pads included.

        ``values_SP`` [S, P] stands in for the bank's own values, e.g. while they are being trained.
        """
        if values_SP is None:
            values_SP = self.values_of(adapters)
        dtype, device = self._sites[0][1].linear.weight.dtype, values_SP.device
        values_SP = values_SP.to(dtype)
        ends = torch.tensor(list(accumulate(tokens)), dtype=torch.int32, device=device)
        scale = self.scales_K[list(adapters)].repeat_interleave(torch.tensor(tokens, device=device))[:, None]
        for (group, site), banked in zip(self._sites, self._banked, strict=True):
            banked.a, banked.b = self._a_of(values_SP, group, site), self.b_of(values_SP, site)
            banked.ends, banked.scale = ends, scale

    def seat_for_training(self, adapters: Sequence[int], tokens: Sequence[int], values_SP: Tensor) -> None:
        """Seats the adapters with ``values_SP`` so that ``add_gradient`` can be asked for."""
        self.seat(adapters, tokens, values_SP)
        for banked in self._banked:
            banked.a, banked.b = banked.a.detach().requires_grad_(), banked.b.detach().requires_grad_()

    def add_gradient(self, loss: Tensor, gradient_SP: Tensor) -> None:
        """Adds d loss / d values of the seated adapters to ``gradient_SP``.

        Each factor is its own leaf: were the matrix of all values the leaf, every one of its slices would hand back a
        gradient as large as the whole.
        """
        leaves = [leaf for banked in self._banked for leaf in (banked.a, banked.b)]
        parts = iter(torch.autograd.grad(loss, leaves))
        for group, site in self._sites:
            self._a_of(gradient_SP, group, site).add_(next(parts))
            self.b_of(gradient_SP, site).add_(next(parts))

    def b_of(self, values_SP: Tensor, site: Site) -> Tensor:
        """The layer's B, a view [S, r, out]."""
        out = site.linear.out_features
        return values_SP[:, site.b_start : site.b_start + self._r * out].view(-1, self._r, out)

    def _a_of(self, values_SP: Tensor, group: SiteGroup, site: Site) -> Tensor:
        return group.a_of(values_SP)[:, :, site.column : site.column + self._r]


def adapter_values(model: PreTrainedModel, target_modules: Sequence[str], rank: int) -> int:
    """How many numbers an adapter of this rank is. Raises as ``LoraBank`` does."""
    return _lay_out(_targets(model, target_modules, rank), _aligned(rank))[1]


def _aligned(rank: int) -> int:
    return -(-rank // _ALIGNED_VALUES) * _ALIGNED_VALUES


def _targets(model: PreTrainedModel, target_modules: Sequence[str], rank: int) -> list[tuple[str, nn.Linear]]:
    """The linear layers that the targets name, in the model's order."""
    found: list[tuple[str, nn.Linear]] = []
    unmatched = set(target_modules)
    head = model.get_output_embeddings()
    held = Counter(parameter.data_ptr() for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        # The head runs on the labelled positions only, which are not grouped by adapter; no recipe adapts it.
        if module is head:
            continue
        matched = {target for target in target_modules if name == target or name.endswith(f".{target}")}
        if not matched or not hasattr(module, "weight"):
            continue
        if not isinstance(module, nn.Linear):
            if "linear" in type(module).__name__.lower():
                raise _not_adaptable(name, f"is a {type(module).__name__}, not a plain linear layer")
            continue
        if type(module) is not nn.Linear or not module.weight.is_floating_point():
            raise _not_adaptable(name, f"is quantised ({type(module).__name__}, {module.weight.dtype})")
        if held[module.weight.data_ptr()] > 1:
            raise _not_adaptable(name, "shares its weight with another layer of the student")
        size = module.weight.element_size()
        if any(width * size % _ALIGNED_BYTES for width in (module.in_features, module.out_features)):
            widths = f"{module.in_features} x {module.out_features}"
            raise _not_adaptable(name, f"is {widths}, no multiples of {_ALIGNED_BYTES // size}")
        if rank > (width := min(module.in_features, module.out_features)):
            message = f"rank {rank} is above the width of {name}, which is {width}"
            raise PreceptorError("RANK_TOO_LARGE", message, field="rank")
        unmatched -= matched
        found.append((name, module))
    if unmatched or not found:
        there = sorted(
            {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
        )
        raise PreceptorError(
            "TARGET_MODULES_UNMATCHED",
            f"no linear layer of the student's decoder is named "
            f"{', '.join(sorted(unmatched)) or '(no target was given)'}; there are: {', '.join(there) or 'none'} "
            "(the head carries no adapter)",
            field="target_modules",
        )
    return found


def _not_adaptable(name: str, why: str) -> PreceptorError:
    return PreceptorError("BASE_NOT_ADAPTABLE", f"{name} {why}", field="target_modules")


def _lay_out(targets: Sequence[tuple[str, nn.Linear]], r: int) -> tuple[tuple[SiteGroup, ...], int]:
    """Where everything lies in an adapter's row of values, and the length of the row."""
    together: list[list[tuple[str, nn.Linear]]] = []
    for name, linear in targets:
        if together and _siblings(together[-1][-1][0], name):
            together[-1].append((name, linear))
        else:
            together.append([(name, linear)])
    groups: list[SiteGroup] = []
    start = 0
    for members in together:
        width = r * len(members)
        a_start, start = start, start + members[0][1].in_features * width
        sites: list[Site] = []
        for number, (name, linear) in enumerate(members):
            sites.append(Site(name, linear, number * r, start))
            start += r * linear.out_features
        groups.append(SiteGroup(tuple(sites), a_start, width))
    return tuple(groups), start


def _siblings(one: str, other: str) -> bool:
    block, _, name = one.rpartition(".")
    other_block, _, other_name = other.rpartition(".")
    return block == other_block and any(name in some and other_name in some for some in _SIBLINGS)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
