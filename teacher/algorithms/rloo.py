"""RLOO: policy gradient with advantages over the mean of the others.

REINFORCE leave-one-out (Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE Style Optimization for Learning
from Human Feedback in LLMs", arXiv 2402.14740, after Kool et al. 2019): the reward minus the mean of the *other*
rewards of the group, a baseline that does not bias the gradient. In units of the reward: groups that differ more count
more. Clipped like GRPO's where it is off-policy, which plain REINFORCE is not.
"""

from __future__ import annotations

from teacher.algorithms.interface import Algorithm
from teacher.algorithms.policy_gradient import PolicyGradient


def _over_the_others(advantage: float, count: int, deviation: float) -> float:
    return advantage * count / (count - 1)


ALGORITHM: Algorithm = PolicyGradient(_over_the_others)
