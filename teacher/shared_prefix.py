"""Decoding in which the samples of one prompt share its keys and values.

K samples of a task read the same prompt. Copying its cache K times makes attention read K times the memory, and
attention is what a small model's decoding waits for. Here the prompt's cache is kept once, all K queries meet it in
one matrix product, and every row has a preallocated slab for its own tokens only. The softmax runs over both parts
together, so the result is that of plain attention. (The idea is that of Hydragen, Juravsky et al. 2024.)
Measured on a teacher of 1M parameters, 5 prompts of 200 tokens x 8 samples, one thread: attention 1.8 ms a step
instead of 4.2 ms.

Dimension letters: T prompts, P prompt columns, R rows, G most rows of one prompt, H key/value heads, Q queries per
key/value head, D head size, N new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from teacher.decoding import left_padded

ATTENTION = "preceptor_shared_prefix"
# Full attention in every layer, attention through transformers' interface, rotary positions; each is in the tests.
FAMILIES = frozenset({"llama", "qwen2", "qwen3", "mistral"})


def is_supported(model: PreTrainedModel) -> bool:
    """Whether ``SharedPrefixDecoder`` gives what plain attention would."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return config.model_type in FAMILIES and kinds == {"full_attention"} and not windowed


@dataclass(slots=True)
class _Prefix:
    """The prompts' cache and which row reads which prompt; travels to the attention as a keyword."""

    keys: list[Tensor]  # per layer [T, H, D, P]
    values: list[Tensor]  # per layer [T, H, P, D]
    bias: Tensor  # [T, 1, 1, P] 0, or -inf where a short prompt is padded
    row_of_slot: Tensor  # [T * G] the row in each slot of the grid (any row where the slot is empty)
    slot_of_row: Tensor  # [R]

    def to_grid(self, rows: Tensor) -> Tensor:
        """[R, H, Q, X] -> [T, H, G * Q, X]"""
        prompts, heads = self.bias.shape[0], rows.shape[1]
        grid = rows[self.row_of_slot].view(prompts, -1, *rows.shape[1:])
        return grid.transpose(1, 2).reshape(prompts, heads, -1, rows.shape[-1])

    def to_rows(self, grid: Tensor, queries: int) -> Tensor:
        """[T, H, G * Q, X] -> [R, H, Q, X]"""
        prompts, heads, slots, width = grid.shape
        split = grid.view(prompts, heads, slots // queries, queries, width).transpose(1, 2)
        return split.reshape(-1, heads, queries, width)[self.slot_of_row]


class _Slab(CacheLayerMixin):
    """One layer's keys and values of the new tokens, written in place."""

    def __init__(self, rows: int, prompt_keys: Tensor, max_new_tokens: int) -> None:
        super().__init__()
        shape = (rows, prompt_keys.shape[1], max_new_tokens, prompt_keys.shape[3])
        self.keys = prompt_keys.new_empty(shape)
        self.values = prompt_keys.new_empty(shape)
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the slab is made whole."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends [R, H, 1, D]; returns all new keys and values [R, H, n, D]."""
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        keys[:, :, self.length] = key_states[:, :, 0]
        values[:, :, self.length] = value_states[:, :, 0]
        self.length += 1
        return keys[:, :, : self.length], values[:, :, : self.length]

    def keep(self, rows: Tensor) -> None:
        """Drops the other rows."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty((len(rows), *old.shape[1:]))
            new[:, :, : self.length] = old[rows, :, : self.length]
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset, for mask builders; the mask here is our own."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """New tokens so far."""
        return self.length

    def get_max_length(self) -> int:
        """No bound that a mask builder should know."""
        return -1


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    prefix: _Prefix | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token per row [R, H * Q, 1, D] over the prompt's and the row's own keys [R, H, n, D]."""
    if prefix is None:  # the prompts themselves
        out: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)[0]
        return out, None
    rows, heads, new, size = key.shape
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    query = query.reshape(rows, heads, -1, size) * (size**-0.5 if scaling is None else scaling)
    queries = query.shape[2]
    to_prompt = prefix.to_grid(query) @ prefix.keys[layer] + prefix.bias
    to_own = query @ key.transpose(2, 3)
    weights = torch.cat([prefix.to_rows(to_prompt, queries), to_own], dim=-1).softmax(-1, dtype=torch.float32)
    weights = weights.to(query.dtype)
    split = weights.shape[-1] - new
    mixed = prefix.to_rows(prefix.to_grid(weights[..., :split]) @ prefix.values[layer], queries)
    mixed = mixed + weights[..., split:] @ value
    return mixed.reshape(rows, 1, heads * queries, size), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class SharedPrefixDecoder:
    """Decoder (see ``teacher.decoding``) for the families in ``FAMILIES``; sets the model's attention."""

    def __init__(self, model: PreTrainedModel, pad: int) -> None:
        if not is_supported(model):
            raise ValueError(f"shared prefixes are not tested on {model.config.model_type!r}")
        model.set_attn_implementation(ATTENTION)
        self._model: Any = model
        self._pad = pad

    def start(self, prompts: Sequence[Sequence[int]], rows: Sequence[int], max_new_tokens: int) -> Tensor:
        """See Decoder."""
        ids, starts = left_padded(prompts, self._pad, self._model.device)
        columns = torch.arange(ids.shape[1], device=ids.device)
        padding = columns < starts[:, None]  # [T, P]
        causal = columns[:, None] >= columns
        # A padded query sees itself, so that its softmax is not empty; nobody ever sees the padded keys.
        mask = causal & (~padding[:, None, None, :] | torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device))
        cache = DynamicCache()
        out = self._model(
            ids,
            attention_mask=mask,
            position_ids=(columns - starts[:, None]).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        layers: list[Any] = cache.layers
        bias = torch.zeros(padding.shape, dtype=layers[0].keys.dtype, device=ids.device)
        self._prompt_of_row = torch.tensor(list(rows), device=ids.device)
        self._prefix = _Prefix(
            keys=[layer.keys.transpose(2, 3).contiguous() for layer in layers],
            values=[layer.values.contiguous() for layer in layers],
            bias=bias.masked_fill(padding, -torch.inf)[:, None, None, :],
            row_of_slot=self._prompt_of_row,
            slot_of_row=self._prompt_of_row,
        )
        self._slabs = [_Slab(len(rows), layer.keys, max_new_tokens) for layer in layers]
        self._next = (ids.shape[1] - starts)[self._prompt_of_row, None]
        self._seat()
        logits: Tensor = out.logits[self._prompt_of_row, -1]
        return logits

    def step(self, tokens_R: Tensor) -> Tensor:
        """See Decoder."""
        out = self._model(
            tokens_R[:, None],
            attention_mask=self._no_mask,
            position_ids=self._next,
            past_key_values=Cache(layers=self._slabs),  # type: ignore[arg-type]
            use_cache=True,
            logits_to_keep=1,
            prefix=self._prefix,
        )
        self._next = self._next + 1
        logits: Tensor = out.logits[:, -1]
        return logits

    def keep(self, rows: Tensor) -> None:
        """See Decoder."""
        for slab in self._slabs:
            slab.keep(rows)
        self._prompt_of_row = self._prompt_of_row[rows]
        self._next = self._next[rows]
        self._seat()

    def _seat(self) -> None:
        """Gives every row a slot of the grid [T, G]; drops prompts that nobody reads any more."""
        present, prompt_of_row, counts = torch.unique(self._prompt_of_row, return_inverse=True, return_counts=True)
        prefix, device = self._prefix, self._prompt_of_row.device
        if len(present) < prefix.bias.shape[0]:
            prefix.keys = [keys[present] for keys in prefix.keys]
            prefix.values = [values[present] for values in prefix.values]
            prefix.bias = prefix.bias[present]
            self._prompt_of_row = prompt_of_row
        widest = int(counts.max())
        first_row = counts.cumsum(0) - counts
        rows = torch.arange(len(prompt_of_row), device=device)
        prefix.slot_of_row = prompt_of_row * widest + rows - first_row[prompt_of_row]
        prefix.row_of_slot = torch.zeros(len(present) * widest, dtype=torch.long, device=device)
        prefix.row_of_slot[prefix.slot_of_row] = rows
        # Four dimensions: transformers takes the mask as it is and builds none.
        self._no_mask = torch.ones((len(rows), 1, 1, 1), dtype=torch.bool, device=device)
