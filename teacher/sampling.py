"""Draws completions for many prompts at once.

Promises: a completion depends on its prompt, its own uniform numbers and the settings, never on a neighbour's
randomness; rows that have ended leave the batch; the same call gives the same bits on the same machine.

Dimension letters: R rows (one completion each), V vocabulary, N new tokens at most.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from preceptor.errors import PreceptorError
from teacher.backend import SamplingSettings, row_digest
from teacher.decoding import Decoder

# Ended rows are dropped once they are this share of the batch: dropping copies the cache, about one step's time.
_DROP_SHARE = 1 / 8


@dataclass(frozen=True, slots=True)
class Completion:
    """What one row wrote: token ids without the end token; ``finished`` is False where it ran into the limit."""

    tokens: tuple[int, ...]
    finished: bool


def uniforms(
    seed: int, task_id: str, sample: int, draw: int, length: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """``length`` numbers in [0, 1), one per position, that depend on the arguments and nothing else.

    Philox (Salmon et al. 2011) is counter-based: the key stands for (seed, task, sample, draw), the counter for the
    position, so that a longer sequence begins with the shorter one. 32 bits each: number * total then stays below
    total in double precision.
    """
    digest = row_digest(seed, task_id, sample, draw)
    key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
    raw = np.random.Philox(key=key).random_raw(length)
    return (raw >> np.uint64(32)).astype(np.float64) / 2.0**32


def sample(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    uniforms_RN: Tensor,
    settings: SamplingSettings,
    ends: Collection[int],
    limits_R: Sequence[int] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Completion]:
    """One completion per row; row i continues ``prompts[rows[i]]`` with the numbers ``uniforms_RN[i]`` (float64).

    ``ends`` are the token ids that end a completion. ``limits_R`` bounds single rows further than
    ``settings.max_new_tokens`` does. ``stopped`` is asked before every step.
    Raises PreceptorError(CANCELLED) when ``stopped`` says so.
    """
    if not rows:
        return []
    if list(rows) != sorted(rows):
        raise ValueError("rows of the same prompt must stand side by side, in the order of the prompts")
    steps = settings.max_new_tokens if limits_R is None else min(settings.max_new_tokens, max(limits_R))
    with torch.inference_mode():
        logits = decoder.start(prompts, rows, steps)
        device = logits.device
        uniforms_RN = uniforms_RN.to(device)
        ends_E = torch.tensor(sorted(ends), device=device)
        limits = torch.full((len(rows),), steps, device=device)
        if limits_R is not None:
            limits = torch.minimum(limits, torch.tensor(list(limits_R), device=device))
        written = torch.zeros((len(rows), steps), dtype=torch.long, device=device)
        lengths = torch.zeros(len(rows), dtype=torch.long, device=device)
        ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
        alive = torch.arange(len(rows), device=device)  # rows still in the decoder's batch, some of them done
        done = torch.zeros(len(rows), dtype=torch.bool, device=device)  # of those
        for step in range(steps):
            if stopped():
                raise PreceptorError("CANCELLED", "the client went away while self-edits were written")
            tokens = choose(logits, uniforms_RN[alive, step], settings)
            at_end = torch.isin(tokens, ends_E) & ~done
            written[alive, step] = tokens
            ended[alive[at_end]] = True
            lengths[alive] += (~done & ~at_end).long()
            done = done | at_end | (lengths[alive] >= limits[alive])
            count = int(done.sum())
            if count == len(done):
                break
            if count >= len(done) * _DROP_SHARE:
                keep = (~done).nonzero()[:, 0]
                decoder.keep(keep)
                alive, tokens, done = alive[keep], tokens[keep], done[keep]
            logits = decoder.step(tokens)
    table, stops, finished = written.tolist(), lengths.tolist(), ended.tolist()
    return [Completion(tuple(table[row][: stops[row]]), finished[row]) for row in range(len(rows))]


def choose(logits_RV: Tensor, uniforms_R: Tensor, settings: SamplingSettings) -> Tensor:
    """Token ids [R]: the inverse of the cumulative distribution at each row's number.

    ``top_p`` keeps the smallest set of likeliest tokens that has at least that probability (Holtzman et al. 2020).
    """
    if settings.temperature == 0:
        return logits_RV.argmax(-1)
    weights = (logits_RV.float() / settings.temperature).softmax(-1)
    order = None
    if settings.top_p < 1:
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        left_out = weights.cumsum(-1) - weights >= settings.top_p
        left_out[:, 0] = False  # also where top_p is too small for a float
        weights = weights.masked_fill(left_out, 0.0)
    cumulative = weights.double().cumsum(-1)
    targets = uniforms_R[:, None] * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, targets, right=True)
    if order is not None:
        picked = order.gather(-1, picked)
    return picked[:, 0]
