"""Which sequences go through the model together: those of like length. Pure; no torch."""

from __future__ import annotations

from collections.abc import Sequence

# What one more pass costs, in padded tokens that it would have to save: starting a few hundred small operations on a
# CPU, or reading the weights once more on a GPU. With 4 layers of 128 on one core, 64 to 256 do equally well.
PASS_TOKENS = 128


def like_lengths(lengths: Sequence[int], pass_tokens: int = PASS_TOKENS) -> list[list[int]]:
    """Splits sequences into groups, each padded to its longest, as long as a split saves more than a pass costs.

    Returns indices, ascending within a group. A function of the lengths alone.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [sorted(group) for group in _split(order, lengths, pass_tokens)]


def _split(order: list[int], lengths: Sequence[int], pass_tokens: int) -> list[list[int]]:
    longest, count = lengths[order[0]], len(order)
    best, saved = 0, pass_tokens
    for cut in range(1, count):
        saves = (count - cut) * (longest - lengths[order[cut]])
        if saves > saved:
            best, saved = cut, saves
    if not best:
        return [order]
    return _split(order[:best], lengths, pass_tokens) + _split(order[best:], lengths, pass_tokens)
