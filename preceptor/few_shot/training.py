"""Training documents of a few-shot task: small tasks made of its demonstrations, as test-time training makes them.

Each demonstration in turn is held out and shown last, behind all others (leave-one-out) or all but one of them
(leave-two-out). All of these are transformed by whatever the directive asks for, inputs and outputs alike, and stand
in the set as they are and once more with the demonstrations in another order and, where colours may be permuted, in
other colours (black, which is 0, stays what it is: the background). Akyürek et al. 2024, arXiv 2411.07279, after which
SEAL's few-shot experiment makes its documents.

What goes first where not all have room: the task's own grids, then leave-one-out, then leave-two-out; among equals the
seed decides. Equal arguments give equal documents, on any machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from preceptor.few_shot.grids import (
    COLOURS,
    IDENTITY,
    Transformation,
    chain,
    flip,
    recolouring,
    reflection,
    repetition,
    rotation,
    scaling,
    transformed,
    translation,
    transposition,
)
from preceptor.few_shot.text import document, grid_text
from preceptor.names import derived_seed
from preceptor.tasks import Augmentations, FewShotTask, GridPair

# How far a translation goes, at most: as published.
_FARTHEST = 3


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """Documents for one fine-tune. ``too_large``: transformed tasks that are left out because one of their grids would
    leave 30 x 30."""

    documents: tuple[str, ...]
    too_large: int


def training_documents(
    task: FewShotTask, augmentations: Augmentations, *, max_documents: int, separator: str = "", seed: int = 0
) -> tuple[str, ...]:
    """``training_set``'s documents."""
    made = training_set(task, augmentations, max_documents=max_documents, separator=separator, seed=seed)
    return made.documents


def training_set(
    task: FewShotTask, augmentations: Augmentations, *, max_documents: int, separator: str = "", seed: int = 0
) -> TrainingSet:
    """At most ``max_documents`` different documents; none where the task has no demonstration.

    The queries have no part in it, nor has the task's name.
    """
    rng = random.Random(derived_seed("few-shot", seed, *map(_pair_key, task.demonstrations)))
    bare = FewShotTask(task.name, task.demonstrations, ())
    variants = [IDENTITY, *transformations(augmentations, rng)]
    tasks = [transformed(bare, variant) for variant in variants]
    usable = [one for one in tasks if one is not None]
    kept: dict[str, None] = {}
    for left_out, among in ((1, usable[:1]), (1, usable[1:]), (2, usable)):
        room = max_documents - len(kept)
        if not room:
            break
        made = (
            text for one in among for text in _documents(one.demonstrations, left_out, augmentations, separator, rng)
        )
        group = [text for text in dict.fromkeys(made) if text not in kept]
        chosen = sorted(rng.sample(range(len(group)), room)) if len(group) > room else range(len(group))
        kept |= dict.fromkeys(group[place] for place in chosen)
    return TrainingSet(tuple(kept), len(tasks) - len(usable))


def transformations(augmentations: Augmentations, rng: random.Random) -> list[Transformation]:
    """Those that a directive asks for, colours apart."""
    turns = [rotation(quarters) for quarters in (1, 2, 3)]
    flips = [flip(0), flip(1)]
    asked: list[Transformation] = []
    if augmentations.basic:
        mirrored = [reflection(axis, image_first) for image_first in (True, False) for axis in (0, 1)]
        shifts = [(down, right) for down in range(_FARTHEST + 1) for right in range(_FARTHEST + 1) if down or right]
        asked += [*turns, *flips, *mirrored, translation(*rng.choice(shifts)), transposition()]
    if augmentations.size:
        asked += [scaling(2, 2), scaling(3, 3), scaling(2, 1), scaling(1, 2)]
    if augmentations.chain:
        asked += [chain(first, scaling(2, 2)) for first in (*turns, *flips, transposition())]
    if augmentations.repeat:
        asked += [repetition(2, 1), repetition(1, 2), repetition(2, 2)]
    return asked


def permuted_colours(pairs: Sequence[GridPair], rng: random.Random) -> list[int]:
    """What becomes of colours 0..9: 0 stays, and those that the pairs have become such as they do not have first."""
    used = sorted({cell for pair in pairs for grid in (pair.input, pair.output) for row in grid for cell in row} - {0})
    free = [colour for colour in range(1, COLOURS) if colour not in used]
    rng.shuffle(free)
    others = free + rng.sample(used, len(used))
    there = dict(zip(used, others, strict=False))
    rest = [colour for colour in range(1, COLOURS) if colour not in there.values()]
    unused = (colour for colour in range(1, COLOURS) if colour not in there)
    there |= dict(zip(unused, rest, strict=True))
    return [0, *(there[colour] for colour in range(1, COLOURS))]


def _documents(
    pairs: Sequence[GridPair], left_out: int, augmentations: Augmentations, separator: str, rng: random.Random
) -> Iterator[str]:
    """Every demonstration held out behind all that are not left out: as it is, and once permuted."""
    if left_out > 1 and len(pairs) <= left_out:  # nothing would be shown before it
        return
    for at, held_out in enumerate(pairs):
        others = [pair for place, pair in enumerate(pairs) if place != at]
        for shown in combinations(others, len(others) - left_out + 1):
            yield document(shown, held_out, separator)
            drawn = permuted_colours((*shown, held_out), rng) if augmentations.colours else range(COLOURS)
            colours = recolouring(drawn)
            order = rng.sample(shown, len(shown))
            yield document([colours.pair(pair) for pair in order], colours.pair(held_out), separator)


def _pair_key(pair: GridPair) -> str:
    return f"{grid_text(pair.input)}>{grid_text(pair.output)}"
