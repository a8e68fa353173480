"""Views of a query: the same question in other words, each with the way back, and the vote on its answer.

A view turns or mirrors all grids of the task, and from the ninth on it has the demonstrations in another order and in
other colours, too. The student answers each; an answer is turned back, and the two grids that are said most often are
the two attempts that ARC counts. With one vote the only view is the query as it is.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from preceptor.few_shot.grids import (
    COLOURS,
    IDENTITY,
    Transformation,
    chain,
    flip,
    recolouring,
    rotation,
    transformed,
    transposition,
)
from preceptor.few_shot.text import grid_text, prompt, read_grid
from preceptor.few_shot.training import permuted_colours
from preceptor.names import derived_seed
from preceptor.tasks import FewShotTask, Grid

ATTEMPTS = 2

# The eight symmetries of a square, the query as it is first.
_SYMMETRIES = (
    IDENTITY,
    transposition(),
    flip(0),
    flip(1),
    rotation(1),
    rotation(2),
    rotation(3),
    chain(rotation(2), transposition()),
)


@dataclass(frozen=True, slots=True)
class Way:
    """How a view came to be: the number of a symmetry, 0 for the query as it is, and what became of colours 0..9."""

    symmetry: int
    colours: str = "".join(map(str, range(COLOURS)))

    @property
    def transformation(self) -> Transformation:
        """What was done to every grid."""
        return chain(_SYMMETRIES[self.symmetry], recolouring([int(colour) for colour in self.colours]))

    def read(self, answer: str) -> Grid | None:
        """The grid that an answer means, turned back; None where it is none."""
        grid = read_grid(answer)
        return self.transformation.undo(grid) if grid is not None else None


@dataclass(frozen=True, slots=True)
class View:
    """A query as it is asked. ``gold``: the output as text, empty where it is not known."""

    prompt: str
    gold: str
    way: Way


def views(task: FewShotTask, votes: int, separator: str = "") -> tuple[tuple[View, ...], ...]:
    """``votes`` views of each query, in the order of the queries; of a task with equal content always the same."""
    made = [_seen(task, number, separator) for number in range(votes)]
    return tuple(zip(*made, strict=True))


def vote(grids: Sequence[Grid | None]) -> tuple[Grid, ...]:
    """The two most frequent grids, the most frequent first; fewer where fewer were said.

    Ties go to the grid that came first; unreadable answers (None) have no vote.
    """
    counted = Counter(grid for grid in grids if grid is not None)
    return tuple(
        grid for grid, _ in counted.most_common(ATTEMPTS)
    )  # equal counts stay in the order of their first vote


def _seen(task: FewShotTask, number: int, separator: str) -> list[View]:
    """All queries in the view of this number."""
    way, order = Way(number % len(_SYMMETRIES)), list(task.demonstrations)
    if number >= len(_SYMMETRIES):
        rng = random.Random(derived_seed("view", number, *(grid_text(pair.input) for pair in task.demonstrations)))
        way = replace(way, colours="".join(map(str, permuted_colours(task.demonstrations, rng))))
        rng.shuffle(order)
    seen = transformed(FewShotTask(task.name, tuple(order), task.queries), way.transformation)
    assert seen is not None  # no symmetry makes a grid larger
    return [
        View(
            prompt(seen.demonstrations, query.input, separator),
            grid_text(query.output, separator) if query.output else "",
            way,
        )
        for query in seen.queries
    ]
