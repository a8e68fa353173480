"""What can be done to a grid of three by three, each rule with the word that names it in the student's lessons.

A *move* takes every cell to another place and keeps its colour: a shift around the edges. A *paint* gives every colour
another one and keeps the place: colour c becomes a * c + b modulo ten.
The rules, their words and what they are for depend on ``WORLD_SEED`` alone, not on a run's seed.

What keeps a rule true, and what breaks it:

* permuted colours, of inputs and outputs alike, leave a move what it is and make of a paint another map;
* turned and mirrored grids leave a paint what it is and make of a move another one (but for some: a mirrored grid that
  moves down still moves down).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

from preceptor.few_shot.grids import COLOURS, translation
from preceptor.tasks import Grid, GridPair

Family = Literal["move", "paint"]

WORLD_SEED = 7
SIZE = 3  # rows and columns
FAMILIES: tuple[Family, ...] = ("move", "paint")
RULES_OF_A_FAMILY = 8
HELDOUT_OF_A_FAMILY = 3
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. ``places``: for each cell, row by row, the cell of the input that it is taken from; ``colours``: what
    each colour becomes. One of the two changes nothing."""

    word: str
    family: Family
    places: tuple[int, ...]
    colours: tuple[int, ...]

    def apply(self, grid: Grid) -> Grid:
        """The output for an input of ``SIZE`` x ``SIZE``."""
        cells = [cell for row in grid for cell in row]
        moved = [self.colours[cells[place]] for place in self.places]
        return tuple(tuple(moved[row * SIZE : (row + 1) * SIZE]) for row in range(SIZE))

    def show(self, grid: Grid) -> GridPair:
        """Input and output."""
        return GridPair(grid, self.apply(grid))


_NUMBERED: Grid = tuple(tuple(row * SIZE + column for column in range(SIZE)) for row in range(SIZE))
_SAME_PLACES = tuple(range(SIZE * SIZE))
_SAME_COLOURS = tuple(range(COLOURS))


@cache
def all_moves() -> tuple[tuple[int, ...], ...]:
    """The places of the eight moves: shifts around the edges."""
    ways = [translation(down, right) for down, right in product(range(SIZE), repeat=2) if down or right]
    return tuple(tuple(cell for row in way.apply(_NUMBERED) for cell in row) for way in ways)


@cache
def all_paints() -> tuple[tuple[int, ...], ...]:
    """The 39 maps c -> a * c + b modulo ten that are one to one, without the one that changes nothing."""
    maps = (
        tuple((a * colour + b) % COLOURS for colour in range(COLOURS)) for a in (1, 3, 7, 9) for b in range(COLOURS)
    )
    return tuple(colours for colours in maps if colours != _SAME_COLOURS)


@cache
def rules() -> tuple[Rule, ...]:
    """Every rule that the student knows by a word."""
    rng = random.Random(f"mosaic/{WORLD_SEED}/rules")
    moves, paints = (rng.sample(some, RULES_OF_A_FAMILY) for some in (all_moves(), all_paints()))
    syllables = [consonant + vowel for consonant, vowel in product(_CONSONANTS, _VOWELS)]
    words = iter(rng.sample([first + second for first, second in product(syllables, syllables)], 2 * len(moves)))
    return (
        *(Rule(next(words), "move", places, _SAME_COLOURS) for places in moves),
        *(Rule(next(words), "paint", _SAME_PLACES, colours) for colours in paints),
    )


def rules_of(split: str, family: Family) -> tuple[Rule, ...]:
    """The rules whose tasks are in a split, ``train`` or ``heldout``: no rule is in both. Raises ValueError."""
    of_family = [rule for rule in rules() if rule.family == family]
    if split == "train":
        return tuple(of_family[HELDOUT_OF_A_FAMILY:])
    if split == "heldout":
        return tuple(of_family[:HELDOUT_OF_A_FAMILY])
    raise ValueError(f"split {split!r} is neither train nor heldout")


def draw_grid(rng: random.Random, colours: Sequence[int] = _SAME_COLOURS) -> Grid:
    """A grid of cells drawn from ``colours``."""
    return tuple(tuple(rng.choice(colours) for _ in range(SIZE)) for _ in range(SIZE))
