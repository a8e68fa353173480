"""What GRPO and RLOO share: advantages that know their noise, and a clipped loss that stays near the start.

**Noise.** The variance between a group's rewards is that of what the self-edits are worth (signal) and that of
measuring it (noise). The best guess of an advantage, given a noisy one, is nearer to 0 by signal / (signal + noise) (a
normal prior of the signal's variance around the group's mean: James & Stein's shrinkage), with each self-edit's own
noise. Where the group varies no more than its noise explains, the signal is nothing, and the group is dropped: an
advantage in units of such a group's deviation would be luck, scaled up.

**Loss.** PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7) for each token, with the ratio to the
policy that wrote it, so that several passes over the same self-edits, and self-edits of an older policy, are corrected
for; plus ``kl`` times the divergence from the untouched teacher by the k3 estimator r - 1 - log r (Schulman 2020,
"Approximating KL Divergence", joschu.net/blog/kl-approx.html), as in GRPO. Its mean is over the tokens of a batch, not
over each completion's own first, as GRPO was published: that favours short completions where they are right and long
ones where they are wrong (Liu et al. 2025, arXiv 2503.20783).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from teacher.algorithms.interface import Candidate, LearningSettings, Weighted, advantages, by_group

if TYPE_CHECKING:
    from torch import Tensor

# From the group's advantages, which sum to 0, to what multiplies the gradient. ``deviation`` is the group's, not 0.
Scale = Callable[[float, int, float], float]  # advantage, size of the group, deviation


class PolicyGradient:
    """See ``teacher.algorithms.interface.Algorithm``."""

    needs_history = True

    def __init__(self, scale: Scale) -> None:
        self._scale = scale

    def weigh(self, candidates: Sequence[Candidate], settings: LearningSettings) -> list[Weighted]:
        """Every candidate that is not there for comparison alone, weighted by its scaled and shrunk advantage."""
        return [
            Weighted(index, weight)
            for members in by_group(candidates)
            for index, weight in zip(members, self._weights([candidates[i] for i in members]), strict=False)
            if not candidates[index].only_compared
        ]

    def _weights(self, group: Sequence[Candidate]) -> list[float]:
        """Of each; nothing where the group is dropped."""
        count = len(group)
        if len({candidate.reward for candidate in group}) < 2:  # said exactly: given advantages may be a bit off 0
            return []
        measured = advantages(group)
        # A difference from a mean that it is part of varies less than the reward itself, by 1 - 1 / count.
        variance = math.fsum(advantage**2 for advantage, _ in measured) / (count - 1)
        noises = [stderr**2 * count / (count - 1) for _, stderr in measured]
        signal = variance - math.fsum(noises) / count
        if signal <= 0:
            return []
        deviation = math.sqrt(math.fsum(advantage**2 for advantage, _ in measured) / count)
        return [
            self._scale(advantage, count, deviation) * signal / (signal + noise)
            for (advantage, _), noise in zip(measured, noises, strict=True)
        ]

    def token_losses(
        self, now: Tensor, then: Tensor, start: Tensor, weights: Tensor, settings: LearningSettings
    ) -> Tensor:
        """The clipped surrogate and the divergence from the start."""
        ratio = (now - then).exp()
        losses = -(ratio * weights).minimum(ratio.clamp(1 - settings.clip, 1 + settings.clip) * weights)
        return losses + settings.kl * divergence(now, start) if settings.kl else losses


def divergence(now: Tensor, start: Tensor) -> Tensor:
    """k3 of KL(now || start) for each token drawn from ``now``, in nats: not negative, unbiased, of little variance."""
    gap = start - now
    return gap.exp() - 1 - gap
