"""A frozen student with the adapters of a bank, forward and backward by hand: the inside of a training step.

What transformers and autograd would do, for the block that Llama, Mistral, Qwen2, Qwen3 and Gemma share, in fewer and
larger operations:

- tokens of all adapters in one row, without pads (``student.packing``);
- q, k and v are one product, gate and up another; the adapters' thin products are grouped matrix products;
- no gradient of a frozen weight is made, none below the lowest adapter, and none is kept by a graph;
- the head runs on labelled positions only, and the gradient of its loss is made with the loss.

Parity with PEFT, for every shape and for mixed ranks and lengths, is a unit test.

Letters: T tokens, S seats, H hidden width, N labels, V vocabulary, L longest lesson of an attention group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import grouped_mm
from transformers import PreTrainedModel

from student.lora_bank import BankedLinear, LoraBank, Site, SiteGroup
from student.packed_attention import PackedAttention
from student.packing import Item, Pack, pack
from student.plan import Lesson

_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma"})
# Rotary embeddings whose angles depend on the position alone.
_STATIC_ROPES = frozenset({"default", "linear", "llama3", "yarn"})
_ACTIVATIONS = frozenset({"silu", "gelu_pytorch_tanh"})
# Logits are made in slices of at most this many floats (256 MiB).
_LOGITS = 1 << 26

aten = torch.ops.aten


def supports(model: PreTrainedModel, longest: int) -> bool:
    """Whether ``PackedDecoder`` computes what the model does, for lessons of up to ``longest`` tokens."""
    config = model.config
    if config.model_type not in _FAMILIES:
        return False
    windows = {getattr(block.self_attn, "sliding_window", None) for block in model.get_decoder().layers}
    if config.model_type == "mistral":
        windows.add(config.sliding_window)
    return (
        (config.rope_parameters or {}).get("rope_type", "default") in _STATIC_ROPES
        and config.hidden_act in _ACTIVATIONS
        and all(window is None or window > longest for window in windows)
        and not getattr(config, "mlp_bias", False)
        and all(_is_plain(layer) for layer in _linears(model))
    )


def _linears(model: PreTrainedModel) -> Iterator[nn.Module]:
    for block in model.get_decoder().layers:
        attention, mlp = block.self_attn, block.mlp
        yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    yield model.get_output_embeddings()


def _is_plain(layer: nn.Module) -> bool:
    """Whether it multiplies with its weight; a quantised layer does more."""
    linear = layer.linear if isinstance(layer, BankedLinear) else layer
    return type(linear) is nn.Linear and linear.weight.is_floating_point()


@dataclass(frozen=True, slots=True)
class _Fused:
    """Linear layers with a common input as one: weight [out, in], bias, and where each one's outputs lie."""

    weight: Tensor
    bias: Tensor | None
    columns: dict[str, slice]  # by the layer's last name


def _fuse(block: nn.Module, *names: str) -> _Fused:
    """The layers' weights as one tensor. The layers' own weights become views of it, so nothing is held twice."""
    linears = [_plain(getattr(block, name)) for name in names]
    weights = [linear.weight for linear in linears]
    sizes = [len(weight) for weight in weights]
    rows = weights[0].shape[1] * weights[0].element_size()
    follows = all(other.data_ptr() == one.data_ptr() + len(one) * rows for one, other in itertools.pairwise(weights))
    if follows and weights[0].untyped_storage().data_ptr() == weights[-1].untyped_storage().data_ptr():
        fused = weights[0].data.as_strided((sum(sizes), weights[0].shape[1]), weights[0].stride())
    else:
        fused = torch.cat([weight.data for weight in weights])
        for linear, part in zip(linears, fused.split(sizes), strict=True):
            linear.weight.data = part
    biases = [linear.bias for linear in linears]
    bias = None if biases[0] is None else torch.cat([each.data for each in biases])
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    columns = {name: slice(end - size, end) for name, size, end in zip(names, sizes, ends, strict=True)}
    return _Fused(fused, bias, columns)


def _plain(linear: nn.Module) -> nn.Linear:
    plain = linear.linear if isinstance(linear, BankedLinear) else linear
    assert isinstance(plain, nn.Linear)
    return plain


@dataclass(frozen=True, slots=True)
class _Norm:
    """Root mean square normalisation of the last axis; computed in float32."""

    weight: Tensor  # as it is multiplied with, float32
    epsilon: float

    @classmethod
    def of(cls, norm: Any, shift: float) -> _Norm:
        epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
        return cls(norm.weight.data.float() + shift, float(epsilon))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised x in its dtype, and 1 / root mean square [..., 1]."""
        wide = x.float()
        scale = (wide.square().mean(-1, keepdim=True)).add_(self.epsilon).rsqrt_()
        return (wide * scale).mul_(self.weight).to(x.dtype), scale

    def backward(self, gradient: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        """d loss / d x."""
        inner = gradient.float() * self.weight
        unit = x.float() * scale
        along = (inner * unit).mean(-1, keepdim=True)
        return inner.addcmul_(unit, along, value=-1).mul_(scale).to(x.dtype)


@dataclass(frozen=True, slots=True)
class _Pass:
    """What all blocks need to know of one pass."""

    pack: Pack
    scale: Tensor  # [T, 1], float32: alpha / rank of each token's adapter
    cosine: Tensor  # [T, 1, d]
    sine: Tensor  # [T, 1, d], its first half negated
    add: bool  # gradients are added to what is there

    def put(self, to: Tensor, gradient_S: Tensor) -> None:
        """Writes factors' gradients, one of each seat."""
        if self.pack.empty:  # grouped products leave anything there (pytorch issue 172439)
            gradient_S[list(self.pack.empty)] = 0
        if self.add:
            to.add_(gradient_S)
        else:
            to.copy_(gradient_S)


class _Adapted:
    """A fused linear layer with the adapters of some of its parts."""

    def __init__(self, fused: _Fused, group: SiteGroup | None, bank: LoraBank) -> None:
        self._weight, self._bias, self._group, self._bank = fused.weight, fused.bias, group, bank
        sites: Sequence[Site] = group.sites if group else ()
        self._r = group.width // len(sites) if group else 0
        # per adapted part: its outputs, its share of the inner products, its place in the values
        self._parts = [
            (fused.columns[site.name.rpartition(".")[2]], slice(site.column, site.column + self._r), site)
            for site in sites
        ]

    @property
    def adapted(self) -> bool:
        return self._group is not None

    def bind(self, values_SP: Tensor, gradient_SP: Tensor) -> None:
        """Reads the factors from ``values_SP`` and writes their gradients to ``gradient_SP`` from now on."""
        if self._group is None:
            return
        self._a, self._a_gradient = self._group.a_of(values_SP), self._group.a_of(gradient_SP)
        self._a_turned = self._a.transpose(1, 2)
        self._b = [self._bank.b_of(values_SP, site) for _, _, site in self._parts]
        self._b_turned = [b.transpose(1, 2) for b in self._b]
        self._b_gradient = [self._bank.b_of(gradient_SP, site) for _, _, site in self._parts]

    def forward(self, x: Tensor, run: _Pass) -> tuple[Tensor, Tensor | None]:
        """x [T, in] -> outputs [T, out], and the scaled inner products [T, width] that ``backward`` wants back."""
        y = functional.linear(x, self._weight, self._bias)
        if self._group is None:
            return y, None
        ends = run.pack.ends
        low = grouped_mm(x, self._a, offs=ends).mul_(run.scale)
        for b, (columns, share, _) in zip(self._b, self._parts, strict=True):
            y[:, columns].add_(grouped_mm(low[:, share], b, offs=ends))
        return y, low

    def backward(self, gradient: Tensor, x: Tensor, low: Tensor | None, run: _Pass, *, below: bool) -> Tensor | None:
        """d loss / d x [T, in], if anything below wants it. The factors' gradients are written."""
        result = gradient @ self._weight if below else None
        if self._group is None or low is None:
            return result
        ends = run.pack.ends
        parts = [
            grouped_mm(gradient[:, columns], b, offs=ends)
            for b, (columns, _, _) in zip(self._b_turned, self._parts, strict=True)
        ]
        inner = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).mul_(run.scale)
        for to, (columns, share, _) in zip(self._b_gradient, self._parts, strict=True):
            run.put(to, grouped_mm(low[:, share].t(), gradient[:, columns], offs=ends))
        run.put(self._a_gradient, grouped_mm(x.t(), inner, offs=ends))
        if result is not None:
            result.add_(grouped_mm(inner, self._a_turned, offs=ends))
        return result


def _activate(name: str, gate: Tensor) -> Tensor:
    return functional.silu(gate) if name == "silu" else functional.gelu(gate, approximate="tanh")


def _activate_backward(name: str, gradient: Tensor, gate: Tensor) -> Tensor:
    if name == "silu":
        return aten.silu_backward(gradient, gate)  # type: ignore[no-any-return]
    return aten.gelu_backward(gradient, gate, approximate="tanh")  # type: ignore[no-any-return]


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of [T, heads, d]. With the sine negated it is its own inverse, which is its gradient too."""
    return (heads * cosine).addcmul_(heads.roll(heads.shape[-1] // 2, -1), sine)


@dataclass(slots=True)
class _Kept:
    """What a block's backward pass needs of its forward pass."""

    x: Tensor
    scale: Tensor
    normed: Tensor
    low_qkv: Tensor | None
    heads: Tensor | None  # q and k before their own norm
    heads_scale: Tensor | None
    attention: list[Callable[[Tensor], Tensor]]
    mixed: Tensor
    low_o: Tensor | None
    x_middle: Tensor
    scale_middle: Tensor
    normed_middle: Tensor
    low_gate_up: Tensor | None
    gate_up: Tensor
    opened: Tensor
    active: Tensor
    low_down: Tensor | None


class _Block:
    """One transformer block."""

    def __init__(self, block: Any, name: str, bank: LoraBank, shift: float) -> None:
        groups = {site.name.removeprefix(name): group for group in bank.groups for site in group.sites}

        def adapted(parent: str, *layers: str) -> _Adapted:
            some = [groups[path] for layer in layers if (path := f"{parent}.{layer}") in groups]
            return _Adapted(_fuse(getattr(block, parent), *layers), some[0] if some else None, bank)

        self._qkv = adapted("self_attn", "q_proj", "k_proj", "v_proj")
        self._o = adapted("self_attn", "o_proj")
        self._gate_up = adapted("mlp", "gate_proj", "up_proj")
        self._down = adapted("mlp", "down_proj")
        self._attention = PackedAttention(block.self_attn)
        self._norm = _Norm.of(block.input_layernorm, shift)
        self._norm_middle = _Norm.of(block.post_attention_layernorm, shift)
        self._norm_heads = _heads_norm(block.self_attn, shift)
        self._activation = block.mlp.config.hidden_act

    @property
    def _layers(self) -> tuple[_Adapted, ...]:
        return self._qkv, self._o, self._gate_up, self._down

    @property
    def adapted(self) -> bool:
        """Whether an adapter has anything to learn here."""
        return any(layer.adapted for layer in self._layers)

    def bind(self, values_SP: Tensor, gradient_SP: Tensor) -> None:
        for layer in self._layers:
            layer.bind(values_SP, gradient_SP)

    def forward(self, x: Tensor, run: _Pass) -> tuple[Tensor, _Kept]:
        """x [T, H] -> [T, H]."""
        normed, scale = self._norm.forward(x)
        qkv, low_qkv = self._qkv.forward(normed, run)
        heads = qkv[:, : self._rotated].view(len(x), -1, self._attention.width)
        before = heads_scale = None
        if self._norm_heads is not None:
            before = heads.clone()
            normed_heads, heads_scale = self._norm_heads.forward(heads)
            heads.copy_(_rotate(normed_heads, run.cosine, run.sine))
        else:
            heads.copy_(_rotate(heads, run.cosine, run.sine))
        mixed, attention = self._attention.forward(qkv, run.pack)
        x_middle, low_o = self._o.forward(mixed, run)
        x_middle.add_(x)
        normed_middle, scale_middle = self._norm_middle.forward(x_middle)
        gate_up, low_gate_up = self._gate_up.forward(normed_middle, run)
        gate, up = gate_up.chunk(2, 1)
        opened = _activate(self._activation, gate)
        active = opened * up
        y, low_down = self._down.forward(active, run)
        y.add_(x_middle)
        kept = _Kept(
            x, scale, normed, low_qkv, before, heads_scale, attention, mixed, low_o, x_middle, scale_middle,
            normed_middle, low_gate_up, gate_up, opened, active, low_down,
        )  # fmt: skip
        return y, kept

    def backward(self, gradient: Tensor, kept: _Kept, run: _Pass, *, below: bool) -> Tensor | None:
        """d loss / d x [T, H] if anything below wants it; the adapters' gradients are written."""

        def through(layer: _Adapted, gradient: Tensor, x: Tensor, low: Tensor | None, below: bool = True) -> Any:
            return layer.backward(gradient, x, low, run, below=below)

        active = through(self._down, gradient, kept.active, kept.low_down)
        gate, up = kept.gate_up.chunk(2, 1)
        gate_up = torch.empty_like(kept.gate_up)
        gate_gradient, up_gradient = gate_up.chunk(2, 1)
        torch.mul(active, kept.opened, out=up_gradient)
        gate_gradient.copy_(_activate_backward(self._activation, active.mul_(up), gate))
        normed = through(self._gate_up, gate_up, kept.normed_middle, kept.low_gate_up)
        gradient = self._norm_middle.backward(normed, kept.x_middle, kept.scale_middle).add_(gradient)
        mixed = through(self._o, gradient, kept.mixed, kept.low_o, below or self._qkv.adapted)
        if mixed is None:
            return None
        qkv = self._attention.backward(mixed, run.pack, kept.attention)
        heads = qkv[:, : self._rotated].view(len(qkv), -1, self._attention.width)
        turned = _rotate(heads, run.cosine, -run.sine)
        if self._norm_heads is not None and kept.heads is not None and kept.heads_scale is not None:
            turned = self._norm_heads.backward(turned, kept.heads, kept.heads_scale)
        heads.copy_(turned)
        normed = through(self._qkv, qkv, kept.normed, kept.low_qkv, below)
        return self._norm.backward(normed, kept.x, kept.scale).add_(gradient) if below else None

    @property
    def _rotated(self) -> int:
        """Columns of q and k."""
        return int((self._attention.queries + self._attention.keys) * self._attention.width)


def _heads_norm(attention: Any, shift: float) -> _Norm | None:
    """Qwen3 normalises each head of q and k: one norm with a weight [heads, d]."""
    if not hasattr(attention, "q_norm"):
        return None
    q, k = _Norm.of(attention.q_norm, shift), _Norm.of(attention.k_norm, shift)
    config = attention.config
    weight = torch.cat(
        [q.weight.expand(config.num_attention_heads, -1), k.weight.expand(config.num_key_value_heads, -1)]
    )
    return _Norm(weight, q.epsilon)


class PackedDecoder:
    """Losses of packed lessons and the gradients of the seated adapters' values.

    A step of more than ``pass_tokens`` tokens is made in several passes, whose gradients add up. ``checkpointing``: of
    each block only its input is kept, and its forward pass is done again for the backward pass: less memory, a third
    more work.
    """

    def __init__(
        self, model: PreTrainedModel, bank: LoraBank, *, pass_tokens: int, checkpointing: bool = False
    ) -> None:
        decoder: Any = model.get_decoder()
        shift = 1.0 if model.config.model_type == "gemma" else 0.0  # Gemma's norms multiply with 1 + weight
        path = next(name for name, module in model.named_modules() if module is decoder)
        self._blocks = [
            _Block(block, f"{path}.layers.{number}.", bank, shift) for number, block in enumerate(decoder.layers)
        ]
        self._bank = bank
        self._lowest = next(number for number, block in enumerate(self._blocks) if block.adapted)
        self._embedding, self._rotary = decoder.embed_tokens, decoder.rotary_emb
        self._norm = _Norm.of(decoder.norm, shift)
        head = model.get_output_embeddings()
        self._head: Tensor = head.weight.data
        self._head_bias = None if getattr(head, "bias", None) is None else head.bias.data
        self._pass_tokens, self._checkpointing = pass_tokens, checkpointing
        self._factors: Tensor | None = None
        self._values = torch.empty(0)

    def bind(self, adapters: Sequence[int], values_SP: Tensor, gradient_SP: Tensor) -> None:
        """Seats these adapters with these values, and writes their gradients there from now on."""
        dtype = self._head.dtype
        self._values, self._scales = values_SP, self._bank.scales_K[list(adapters)]
        # in bfloat16 the products take a rounded copy of the factors
        self._factors = None if values_SP.dtype == dtype else values_SP.to(dtype)
        for block in self._blocks:
            block.bind(values_SP if self._factors is None else self._factors, gradient_SP)

    @torch.no_grad()
    def differentiate(self, lessons_S: Sequence[Sequence[Lesson]]) -> Tensor:
        """Mean loss of each seat's lessons [S]; its gradient is in the matrix that was bound."""
        if self._factors is not None:
            self._factors.copy_(self._values)
        weights_S = [1 / sum(item.labels for item in lessons) for lessons in lessons_S]
        losses = [
            self._differentiate(pack(items, weights_S, self._head.device), add=number > 0)
            for number, items in enumerate(_passes(lessons_S, self._pass_tokens))
        ]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)

    def _differentiate(self, packed: Pack, *, add: bool) -> Tensor:
        x: Tensor = self._embedding(packed.ids)
        cosine, sine = (angle[0].unsqueeze(1) for angle in self._rotary(x, packed.positions[None]))
        sine = sine.clone()
        sine[..., : sine.shape[-1] // 2].neg_()
        run = _Pass(packed, self._scales.index_select(0, packed.seats)[:, None], cosine, sine, add)
        kept: list[_Kept | Tensor | None] = []
        for number, block in enumerate(self._blocks):
            y, of_block = block.forward(x, run)
            kept.append(None if number < self._lowest else x if self._checkpointing else of_block)
            x = y
            del of_block  # what is not kept makes room for the next block
        loss_S, gradient = self._loss(x, packed)
        for number in range(len(self._blocks) - 1, self._lowest - 1, -1):
            block, of_it = self._blocks[number], kept.pop()
            if isinstance(of_it, Tensor):
                of_it = block.forward(of_it, run)[1]
            assert of_it is not None
            result = block.backward(gradient, of_it, run, below=number > self._lowest)
            gradient = gradient if result is None else result
        return loss_S

    def _loss(self, x: Tensor, packed: Pack) -> tuple[Tensor, Tensor]:
        """Weighted losses [S] and their gradient by x [T, H]."""
        labelled = x if packed.labelled is None else x.index_select(0, packed.labelled)
        normed, scale = self._norm.forward(labelled)
        gradient = torch.empty_like(normed)
        losses = torch.empty(len(normed), device=x.device)
        at_once = max(1, _LOGITS // len(self._head))
        for start in range(0, len(normed), at_once):
            part = slice(start, start + at_once)
            logits = functional.linear(normed[part], self._head, self._head_bias).float()
            targets = packed.targets[part, None]
            wanted = logits.gather(1, targets)
            shares = torch.softmax(logits, -1)
            # log of the sum of exponentials, from the likeliest token: its share is never tiny
            log_sum = logits.amax(1, keepdim=True) - shares.amax(1, keepdim=True).log()
            losses[part] = (log_sum - wanted)[:, 0]
            shares.scatter_add_(1, targets, shares.new_full((1, 1), -1.0).expand_as(targets))
            shares *= packed.weights[part, None]
            torch.mm(shares.to(x.dtype), self._head, out=gradient[part])
        gradient = self._norm.backward(gradient, labelled, scale)
        if packed.labelled is not None:
            gradient = torch.zeros_like(x).index_copy_(0, packed.labelled, gradient)
        weighted = (losses * packed.weights).split(packed.labels)
        return torch.stack([part.sum() for part in weighted]), gradient


def _passes(lessons_S: Sequence[Sequence[Lesson]], pass_tokens: int) -> Iterator[list[Item]]:
    """The lessons in passes of at most so many tokens, or of a single lesson."""
    items: list[Item] = []
    tokens = 0
    for seat, lessons in enumerate(lessons_S):
        for lesson in lessons:
            if items and tokens + len(lesson.ids) > pass_tokens:
                yield items
                items, tokens = [], 0
            items.append((seat, lesson))
            tokens += len(lesson.ids)
    yield items
