"""How different the self-edits of a group are, so that a policy that collapses to one way of writing is seen, and can
be paid not to.

The distance of two self-edits is the share of word pairs (neighbouring words, as a set) that they do not share: one
minus Jaccard's similarity of their word bigrams, 0 for the same text and 1 for texts that have no pair in common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from statistics import fmean

Pairs = frozenset[tuple[str, ...]]


def word_pairs(text: str) -> Pairs:
    """Neighbouring words of a text; of a text of one word, that word."""
    words = text.split()
    return frozenset(pairwise(words)) or frozenset({tuple(words)})


def distance(one: Pairs, other: Pairs) -> float:
    """0..1."""
    return 1 - len(one & other) / len(one | other)


def distances(texts: Sequence[str]) -> list[float]:
    """The mean distance of each text to the others of its group; 0 for one that is alone."""
    pairs = [word_pairs(text) for text in texts]
    apart: list[list[float]] = [[] for _ in texts]
    for i, j in combinations(range(len(texts)), 2):
        apart[i].append(distance(pairs[i], pairs[j]))
        apart[j].append(apart[i][-1])
    return [math.fsum(found) / max(1, len(found)) for found in apart]  # the same in any order of the texts


def diversity(groups: Mapping[str, Sequence[str]]) -> float | None:
    """The mean distance within groups, over groups with at least two texts; None where there is none."""
    found = [fmean(distances(texts)) for _, texts in sorted(groups.items()) if len(texts) > 1]
    return fmean(found) if found else None
