"""How a policy learns from rewarded self-edits: one interface with two hooks, one file for each algorithm.

* ``rest_em``: fine-tunes on the best (Singh et al. 2023; the default, and what SEAL does).
* ``grpo``: policy gradient, advantages in standard deviations of the group (Shao et al. 2024, DeepSeekMath).
* ``rloo``: policy gradient, advantages over the mean of the others (Ahmadian et al. 2024).

What holds for all of them is tested for all of them (tests/unit/test_teacher_algorithms.py): the result is a function
of the *set* of candidates, a failure cannot enter, a group that prefers nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from teacher.algorithms import grpo, rest_em, rloo
from teacher.algorithms.interface import Algorithm

ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(
    {"rest_em": rest_em.ALGORITHM, "grpo": grpo.ALGORITHM, "rloo": rloo.ALGORITHM}
)
