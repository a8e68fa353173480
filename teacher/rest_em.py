"""Which self-edits a policy learns from: the best of each group, and only where they clearly helped.

ReST-EM (Singh et al. 2023, "Beyond Human Data: Scaling Self-Training for Problem-Solving with Language Models",
arXiv 2312.06585): sample from the policy, keep what earned a reward, fine-tune on it, repeat. SEAL (Zweiger, Pari et
al. 2025, arXiv 2506.10943, section 3.1) uses it on self-edits and keeps the best of each passage's five whatever
they earned; here a self-edit must also beat the untouched student (``min_reward``) and its own group's mean, because
with rewards as noisy as these the best of five is often no better than none.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """One self-edit with what it earned. ``reward`` is finite."""

    group: str
    completion: str
    reward: float
    stderr: float = 0.0


@dataclass(frozen=True, slots=True)
class SelectionSettings:
    """``top_k`` are kept per group at most, with a reward above ``min_reward`` and more than ``min_advantage``
    standard deviations of the group above its mean."""

    top_k: int = 2
    min_reward: float = 0.0
    min_advantage: float = 0.0


def select(candidates: Sequence[Candidate], settings: SelectionSettings) -> list[int]:
    """Indices of the candidates to keep, ordered by group and then from best to worst.

    The result is a function of the *set* of candidates: it does not depend on their order (evaluations finish in
    any order). Equal rewards are told apart by the smaller standard error, then by a hash of the text, which favours
    neither short nor early ones. The same text twice in a group is kept once. In a group whose rewards are all equal
    nothing is above the mean, so nothing is kept: there is nothing to prefer. A group of one has nothing to be
    compared with; only ``min_reward`` decides there.
    Raises ValueError if a reward is not finite: a failure has no reward and must not come here.
    """
    groups: dict[str, list[int]] = {}
    for index, candidate in enumerate(candidates):
        if not math.isfinite(candidate.reward):
            raise ValueError(f"the reward of a candidate of group {candidate.group!r} is {candidate.reward}")
        groups.setdefault(candidate.group, []).append(index)
    kept: list[int] = []
    for _, members in sorted(groups.items()):
        threshold = _threshold([candidates[i].reward for i in members], settings.min_advantage)
        seen: set[str] = set()
        for index in sorted(members, key=lambda i: _rank(candidates[i])):
            candidate = candidates[index]
            good = candidate.reward > settings.min_reward and candidate.reward > threshold
            if good and candidate.completion not in seen and len(seen) < settings.top_k:
                seen.add(candidate.completion)
                kept.append(index)
    return kept


def _rank(candidate: Candidate) -> tuple[float, float, str]:
    return -candidate.reward, candidate.stderr, hashlib.sha256(candidate.completion.encode()).hexdigest()


def _threshold(rewards: Sequence[float], min_advantage: float) -> float:
    if len(rewards) == 1:
        return -math.inf
    if min(rewards) == max(rewards):  # said exactly: the mean of equal floats may be a bit off
        return rewards[0]
    mean = math.fsum(rewards) / len(rewards)
    variance = math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards)
    return mean + min_advantage * math.sqrt(variance)
