"""How a model is stepped: prompts in, then one token per row and step, logits out.

Two implementations: ``SharedPrefixDecoder`` (``teacher.shared_prefix``) for the model families it is tested on, and
``GeneralDecoder`` here for everything else that transformers can load. They write the same completions; a test says so.

Dimension letters: T prompts, P longest prompt, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class Decoder(Protocol):
    """A batch under way. ``start`` begins a new one; nothing of the batch before is left."""

    def start(self, prompts: Sequence[Sequence[int]], rows: Sequence[int], max_new_tokens: int) -> Tensor:
        """Reads each prompt once and returns the logits [R, V] of every row's first token.

        Row i continues ``prompts[rows[i]]``; rows of the same prompt stand side by side.
        """

    def step(self, tokens_R: Tensor) -> Tensor:
        """Appends one token per row; returns the logits [R, V] of the next ones."""

    def keep(self, rows: Tensor) -> None:
        """Goes on with only these rows (ascending indices into the present ones)."""


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as ids [T, P] that all end in the last column, and where each begins [T].

    Padding on the left lets all rows write their n-th new token into the same column.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.long)
    starts = torch.tensor([longest - len(prompt) for prompt in prompts])
    return ids.to(device), starts.to(device)


class GeneralDecoder:
    """Any causal language model of transformers, with its own kind of cache (sliding windows and all)."""

    def __init__(self, model: PreTrainedModel, pad: int) -> None:
        self._model: Any = model
        self._pad = pad

    def start(self, prompts: Sequence[Sequence[int]], rows: Sequence[int], max_new_tokens: int) -> Tensor:
        """See Decoder."""
        ids, starts = left_padded(prompts, self._pad, self._model.device)
        columns = torch.arange(ids.shape[1], device=ids.device)
        self._mask = (columns >= starts[:, None]).long()
        self._cache = DynamicCache(config=self._model.config)
        out = self._model(
            ids,
            attention_mask=self._mask,
            position_ids=(columns - starts[:, None]).clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._next = ids.shape[1] - starts[:, None]
        index = torch.tensor(list(rows), device=ids.device)
        self.keep(index)  # here: one copy of its prompt's cache per row
        logits: Tensor = out.logits[index, -1]
        return logits

    def step(self, tokens_R: Tensor) -> Tensor:
        """See Decoder."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        out = self._model(
            tokens_R[:, None],
            attention_mask=self._mask,
            position_ids=self._next,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._next = self._next + 1
        logits: Tensor = out.logits[:, -1]
        return logits

    def keep(self, rows: Tensor) -> None:
        """See Decoder."""
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]
        self._next = self._next[rows]
