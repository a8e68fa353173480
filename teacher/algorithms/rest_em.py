"""ReST-EM: fine-tunes on the best self-edits of each group, and only where they clearly helped.

ReST-EM (Singh et al. 2023, "Beyond Human Data: Scaling Self-Training for Problem-Solving with Language Models",
arXiv 2312.06585): sample from the policy, keep what earned a reward, fine-tune on it, repeat. SEAL (Zweiger, Pari et
al. 2025, arXiv 2506.10943, section 3.1) uses it on self-edits and keeps the best of each passage's five whatever
they earned; here a self-edit must also beat the untouched student (``min_reward``) and its own group's mean, and both,
where that is asked, by so many of its own standard errors, because with rewards as noisy as these the best of five is
often no better than none. A group of which nothing is kept is dropped. With ``top_k`` as large as the groups, all
that helped and are above their group's mean are kept.

Everything kept weighs 1, and it does not matter who wrote it: fine-tuning is no estimate of a gradient of the reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from teacher.algorithms.interface import (
    Algorithm,
    Candidate,
    LearningSettings,
    Weighted,
    by_group,
    independent_error,
)

if TYPE_CHECKING:
    from torch import Tensor


class _RestEm:
    needs_history = False

    def weigh(self, candidates: Sequence[Candidate], settings: LearningSettings) -> list[Weighted]:
        """The candidates to keep, ordered by group and then from best to worst.

        The same text twice in a group is kept once. In a group whose rewards are all equal nothing is above the mean,
        so nothing is kept: there is nothing to prefer. A group of one has nothing to be compared with, unless an
        advantage is given; only its reward decides there.
        """
        kept = []
        for members in by_group(candidates):
            group = [candidates[i] for i in members]
            seen: set[str] = set()
            for index, candidate in zip(members, group, strict=True):
                good = (
                    not candidate.only_compared and _helps(candidate, settings) and _leads(candidate, group, settings)
                )
                if good and candidate.completion not in seen and len(seen) < settings.top_k:
                    seen.add(candidate.completion)
                    kept.append(Weighted(index, 1.0))
        return kept

    def token_losses(
        self, now: Tensor, then: Tensor, start: Tensor, weights: Tensor, settings: LearningSettings
    ) -> Tensor:
        """Cross-entropy."""
        return -now * weights


ALGORITHM: Algorithm = _RestEm()


def _helps(candidate: Candidate, settings: LearningSettings) -> bool:
    return candidate.reward > settings.min_reward + settings.min_reward_z * candidate.stderr


def _leads(candidate: Candidate, group: Sequence[Candidate], settings: LearningSettings) -> bool:
    """Whether the candidate is far enough above its group's mean."""
    rewards = [other.reward for other in group]
    if candidate.advantage is None and len(group) == 1:
        return True
    if min(rewards) == max(rewards):  # said exactly: the mean of equal floats may be a bit off
        mean, deviation = rewards[0], 0.0
    else:
        mean = math.fsum(rewards) / len(rewards)
        deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    if candidate.advantage is None:
        advantage, stderr = candidate.reward - mean, independent_error(candidate, group)
    else:
        advantage, stderr = candidate.advantage, candidate.advantage_stderr
    return advantage > settings.min_advantage * deviation and advantage > settings.min_advantage_z * stderr
