"""Which self-edits a policy learns from: the best of each group, and only where they clearly helped.

ReST-EM (Singh et al. 2023, "Beyond Human Data: Scaling Self-Training for Problem-Solving with Language Models",
arXiv 2312.06585): sample from the policy, keep what earned a reward, fine-tune on it, repeat. SEAL (Zweiger, Pari et
al. 2025, arXiv 2506.10943, section 3.1) uses it on self-edits and keeps the best of each passage's five whatever
they earned; here a self-edit must also beat the untouched student (``min_reward``) and its own group's mean, and both,
where that is asked, by so many of its own standard errors, because with rewards as noisy as these the best of five is
often no better than none. A group of which nothing is kept is dropped.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """One self-edit with what it earned. All numbers are finite.

    ``advantage`` is its reward minus the group's mean, with the standard error of that difference from paired answers;
    None: both are worked out from the rewards, as if their errors were independent. ``only_compared``: it is there for
    the group's mean and spread, and is not kept.
    """

    group: str
    completion: str
    reward: float
    stderr: float = 0.0
    advantage: float | None = None
    advantage_stderr: float = 0.0
    only_compared: bool = False


@dataclass(frozen=True, slots=True)
class SelectionSettings:
    """``top_k`` are kept per group at most, with a reward above ``min_reward`` by more than ``min_reward_z`` of its
    standard errors, and above the group's mean by more than ``min_advantage`` standard deviations of the group and
    more than ``min_advantage_z`` standard errors of that difference."""

    top_k: int = 2
    min_reward: float = 0.0
    min_advantage: float = 0.0
    min_reward_z: float = 0.0
    min_advantage_z: float = 0.0


def select(candidates: Sequence[Candidate], settings: SelectionSettings) -> list[int]:
    """Indices of the candidates to keep, ordered by group and then from best to worst.

    The result is a function of the *set* of candidates: it does not depend on their order (evaluations finish in
    any order). Equal rewards are told apart by the smaller standard error, then by a hash of the text, which favours
    neither short nor early ones. The same text twice in a group is kept once. In a group whose rewards are all equal
    nothing is above the mean, so nothing is kept: there is nothing to prefer. A group of one has nothing to be
    compared with, unless an advantage is given; only its reward decides there.
    Raises ValueError if a reward is not finite: a failure has no reward and must not come here.
    """
    groups: dict[str, list[int]] = {}
    for index, candidate in enumerate(candidates):
        if not math.isfinite(candidate.reward):
            raise ValueError(f"the reward of a candidate of group {candidate.group!r} is {candidate.reward}")
        groups.setdefault(candidate.group, []).append(index)
    kept: list[int] = []
    for _, members in sorted(groups.items()):
        group = [candidates[i] for i in members]
        seen: set[str] = set()
        for index in sorted(members, key=lambda i: _rank(candidates[i])):
            candidate = candidates[index]
            good = not candidate.only_compared and _helps(candidate, settings) and _leads(candidate, group, settings)
            if good and candidate.completion not in seen and len(seen) < settings.top_k:
                seen.add(candidate.completion)
                kept.append(index)
    return kept


def _rank(candidate: Candidate) -> tuple[float, float, str]:
    return -candidate.reward, candidate.stderr, hashlib.sha256(candidate.completion.encode()).hexdigest()


def _helps(candidate: Candidate, settings: SelectionSettings) -> bool:
    return candidate.reward > settings.min_reward + settings.min_reward_z * candidate.stderr


def _leads(candidate: Candidate, group: Sequence[Candidate], settings: SelectionSettings) -> bool:
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
        advantage, stderr = candidate.reward - mean, _independent_error(candidate, group)
    else:
        advantage, stderr = candidate.advantage, candidate.advantage_stderr
    return advantage > settings.min_advantage * deviation and advantage > settings.min_advantage_z * stderr


def _independent_error(candidate: Candidate, group: Sequence[Candidate]) -> float:
    """Standard error of the candidate's distance from the mean of its group, itself included."""
    count = len(group)
    own = candidate.stderr**2 * (1 - 2 / count)
    return math.sqrt(max(0.0, own + math.fsum(other.stderr**2 for other in group) / count**2))
