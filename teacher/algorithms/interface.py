"""What an algorithm is given and what it has to say."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor  # a teacher that does not learn needs no torch


@dataclass(frozen=True, slots=True)
class Candidate:
    """One self-edit with what it earned. All numbers are finite.

    ``advantage`` is its reward minus the group's mean, with the standard error of that difference from paired answers;
    None: both are worked out from the rewards, as if their errors were independent. ``only_compared``: it is there for
    the group's mean and spread, and is not learnt from.
    """

    group: str
    completion: str
    reward: float
    stderr: float = 0.0
    advantage: float | None = None
    advantage_stderr: float = 0.0
    only_compared: bool = False


@dataclass(frozen=True, slots=True)
class LearningSettings:
    """What an algorithm looks at; each ignores what it does not know.

    ``rest_em`` keeps ``top_k`` of a group at most, with a reward above ``min_reward`` by more than ``min_reward_z`` of
    its standard errors, and above the group's mean by more than ``min_advantage`` standard deviations of the group and
    more than ``min_advantage_z`` standard errors of that difference. ``grpo`` and ``rloo`` clip the ratio to the policy
    that wrote at 1 -/+ ``clip`` and add ``kl`` times the divergence from the untouched teacher.
    """

    top_k: int = 2
    min_reward: float = 0.0
    min_advantage: float = 0.0
    min_reward_z: float = 0.0
    min_advantage_z: float = 0.0
    clip: float = 0.2
    kl: float = 0.0


@dataclass(frozen=True, slots=True)
class Weighted:
    """What is learnt from: a candidate by its place, and how much (below 0: away from it)."""

    index: int
    weight: float


class Algorithm(Protocol):
    """Pure functions; how the optimiser goes over the examples is ``teacher.update``'s."""

    needs_history: bool  # whether ``token_losses`` looks at ``then`` and ``start``

    def weigh(self, candidates: Sequence[Candidate], settings: LearningSettings) -> list[Weighted]:
        """What to learn from, in an order that is a function of the set of candidates (evaluations finish in any
        order); every weight is finite and none is 0. A group of which nothing is learnt is absent.

        Raises ValueError if a reward is not finite: a failure has no reward and must not come here.
        """

    def token_losses(
        self, now: Tensor, then: Tensor, start: Tensor, weights: Tensor, settings: LearningSettings
    ) -> Tensor:
        """What each token adds to the loss, same shape as ``now``; an update's loss is its mean over all tokens.

        ``now``, ``then``, ``start`` (B, C): log-probabilities of the completions' tokens in nats, by the policy in
        training, by the one that wrote them and by the untouched teacher; the last two are constants, and zeros where
        the algorithm does not need history. ``weights`` (B, 1): of the examples, from ``weigh``.
        """


def by_group(candidates: Sequence[Candidate]) -> list[list[int]]:
    """Places of the candidates by group, the groups by name and in each the best first. Equal rewards are told apart
    by the smaller standard error, then by a hash of the text, which favours neither short nor early ones.

    Raises ValueError if a reward is not finite.
    """
    groups: dict[str, list[int]] = {}
    for index, candidate in enumerate(candidates):
        if not math.isfinite(candidate.reward):
            raise ValueError(f"the reward of a candidate of group {candidate.group!r} is {candidate.reward}")
        groups.setdefault(candidate.group, []).append(index)
    return [sorted(members, key=lambda i: _rank(candidates[i])) for _, members in sorted(groups.items())]


def _rank(candidate: Candidate) -> tuple[float, float, str]:
    return -candidate.reward, candidate.stderr, hashlib.sha256(candidate.completion.encode()).hexdigest()


def advantages(group: Sequence[Candidate]) -> list[tuple[float, float]]:
    """Each reward minus the mean of the group, and the standard error of that difference: as given, or as if errors
    were independent. Of equal rewards all advantages are exactly 0, which the mean of equal floats may not give."""
    rewards = [candidate.reward for candidate in group]
    mean = rewards[0] if min(rewards) == max(rewards) else math.fsum(rewards) / len(rewards)
    return [
        (one.reward - mean, independent_error(one, group))
        if one.advantage is None
        else (one.advantage, one.advantage_stderr)
        for one in group
    ]


def independent_error(candidate: Candidate, group: Sequence[Candidate]) -> float:
    """Standard error of the candidate's distance from the mean of its group, itself included."""
    count = len(group)
    own = candidate.stderr**2 * (1 - 2 / count)
    return math.sqrt(max(0.0, own + math.fsum(other.stderr**2 for other in group) / count**2))
