"""GRPO: policy gradient with advantages in standard deviations of the group.

Group relative policy optimisation (Shao et al. 2024, "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in
Open Language Models", arXiv 2402.03300, section 4.1): (reward - mean) / deviation within the group. Groups count alike,
however far apart their rewards are.
"""

from __future__ import annotations

from teacher.algorithms.interface import Algorithm
from teacher.algorithms.policy_gradient import PolicyGradient


def _in_deviations(advantage: float, count: int, deviation: float) -> float:
    return advantage / deviation


ALGORITHM: Algorithm = PolicyGradient(_in_deviations)
