"""What the logits of a position say: the likeliest token, drawn tokens, a target's log-probability, certainty.

Letters: N positions, H hidden width, V vocabulary, S numbers to draw with.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from student.base import LoadedBase

# Logits are made in slices of at most this many floats (64 MiB).
_LOGITS = 1 << 24


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be read. What nobody wants costs nothing."""

    tokens: bool = True  # the likeliest ones; without them nothing is drawn either
    certainty: bool = False
    temperature: float = 1.0  # of what is drawn


@dataclass(frozen=True, slots=True)
class Reading:
    """Lists of N; empty where not wanted."""

    tokens: list[list[int]]  # the likeliest one, then one for each number of the position
    logprobs: list[float]  # of the targets, nats
    certainties: list[float]  # nats


def read(
    base: LoadedBase,
    hidden_NH: Tensor,
    wanted: Wanted,
    targets: Sequence[int] | None = None,
    uniforms_NS: Sequence[Sequence[float]] | None = None,
) -> Reading:
    """Reads the positions with hidden states ``hidden_NH``; ``targets`` [N] are scored, ``uniforms_NS`` are numbers in
    [0, 1) to draw with."""
    reading = Reading([], [], [])
    at_once = max(1, _LOGITS // base.model.config.vocab_size)
    for start in range(0, len(hidden_NH), at_once):
        logits = base.logits(hidden_NH[start : start + at_once])
        if wanted.tokens:
            tokens = logits.argmax(-1, keepdim=True)
            if uniforms_NS is not None:
                some = torch.tensor(uniforms_NS[start : start + at_once], dtype=torch.float64, device=logits.device)
                tokens = torch.cat([tokens, draw(logits, some, wanted.temperature)], 1)
            reading.tokens.extend(tokens.tolist())
        if targets is not None:
            expected = torch.tensor(targets[start : start + at_once], device=logits.device)
            reading.logprobs.extend((-functional.cross_entropy(logits, expected, reduction="none")).tolist())
        if wanted.certainty:
            reading.certainties.extend(self_certainty(logits).tolist())
    return reading


def draw(logits_NV: Tensor, uniforms_NS: Tensor, temperature: float) -> Tensor:
    """Token ids [N, S]: the inverse of the cumulative distribution at each number (float64)."""
    cumulative = (logits_NV / temperature).softmax(-1).double().cumsum(-1)
    picked = torch.searchsorted(cumulative, uniforms_NS * cumulative[:, -1:], right=True)
    # An adapter that has diverged has no distribution; its answers are thrown away, but must not point outside.
    return picked.clamp_(max=logits_NV.shape[1] - 1)


def self_certainty(logits_NV: Tensor) -> Tensor:
    """KL(uniform || p) in nats [N]: -log V - mean over the vocabulary of log p (Kang et al. 2025, arXiv 2502.18581)."""
    return logits_NV.logsumexp(-1) - logits_NV.mean(-1) - math.log(logits_NV.shape[1])


def uniforms(seed: int, question: str, sample: int, length: int) -> tuple[float, ...]:
    """``length`` numbers in [0, 1), one per token of a sampled answer, that depend on the arguments and nothing else.

    Philox (Salmon et al. 2011) is counter-based: the key stands for (seed, question, sample), the counter for the
    token, so that a longer answer's numbers begin with a shorter one's. 32 bits each: number * total then stays below
    total in double precision.
    """
    digest = hashlib.sha256(f"{seed}\n{sample}\n{question}".encode("utf-8", "surrogatepass")).digest()
    raw = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)).random_raw(length)
    return tuple((raw >> np.uint64(32)).astype(np.float64) / 2.0**32)
