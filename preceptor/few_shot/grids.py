"""Grids and what can be done to them, each transformation with its exact inverse.

``undo(apply(grid)) == grid`` for every grid, and ``undo`` of a grid that no grid becomes is None: a doubled grid whose
cells do not come in equal blocks is the answer to no question. The families are those of test-time training on ARC
(Akyürek et al. 2024, arXiv 2411.07279), which SEAL's self-edits choose among.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from preceptor.tasks import FewShotTask, Grid, GridPair

# Rows and columns of a grid, at most, and its colours.
MOST_CELLS = 30
COLOURS = 10


def grid_fault(grid: Sequence[Sequence[int]]) -> str:
    """Why these rows are no grid; empty if they are one: 1..30 rows of 1..30 cells each, all as long, colours 0..9."""
    if not grid or not grid[0]:
        return "is empty"
    widths = {len(row) for row in grid}
    if len(widths) > 1:
        return f"has rows of {min(widths)} to {max(widths)} cells"
    if not fits(grid):
        return f"is {len(grid)} x {len(grid[0])}; at most {MOST_CELLS} x {MOST_CELLS} are allowed"
    wrong = next((cell for row in grid for cell in row if not 0 <= cell < COLOURS), None)
    return "" if wrong is None else f"has the colour {wrong}; colours are 0..{COLOURS - 1}"


def fits(grid: Sequence[Sequence[int]]) -> bool:
    """Whether it is no larger than a grid may be."""
    return len(grid) <= MOST_CELLS and len(grid[0]) <= MOST_CELLS


@dataclass(frozen=True, slots=True)
class Transformation:
    """What makes one grid of another, and back. ``undo`` gives None for what ``apply`` never gives."""

    name: str
    apply: Callable[[Grid], Grid]
    undo: Callable[[Grid], Grid | None]

    def pair(self, pair: GridPair) -> GridPair:
        """Input and output, both transformed; an output that is not known stays so."""
        return GridPair(self.apply(pair.input), self.apply(pair.output) if pair.output else ())

    def __str__(self) -> str:
        return self.name


def rotation(quarters: int) -> Transformation:
    """A turn to the left by so many quarters, 0..3."""
    return Transformation(
        f"rotation({90 * quarters})", lambda grid: _turned(grid, quarters), lambda grid: _turned(grid, -quarters % 4)
    )


def flip(axis: int) -> Transformation:
    """The rows (axis 0) or the cells of each row (axis 1) in reverse order."""
    return Transformation(f"flip({axis})", lambda grid: _flipped(grid, axis), lambda grid: _flipped(grid, axis))


def transposition() -> Transformation:
    """Rows become columns."""
    return Transformation("transposition", _transposed, _transposed)


def translation(rows: int, columns: int) -> Transformation:
    """Moved down and to the right; what leaves the grid on one side comes in on the other."""
    return Transformation(
        f"translation({rows}, {columns})",
        lambda grid: _rolled(grid, rows, columns),
        lambda grid: _rolled(grid, -rows, -columns),
    )


def reflection(axis: int, image_first: bool) -> Transformation:
    """The grid and its mirror image, one below the other (axis 0) or side by side (axis 1)."""

    def apply(grid: Grid) -> Grid:
        image = _flipped(grid, axis)
        return _joined((image, grid) if image_first else (grid, image), axis)

    def cut(grid: Grid) -> Grid:
        return _part(grid, axis, 1 if image_first else 0, 2)

    return Transformation(f"reflection({axis}{', image first' if image_first else ''})", apply, _checked(apply, cut))


def scaling(rows: int, columns: int) -> Transformation:
    """Every cell becomes a block of so many rows and columns."""

    def apply(grid: Grid) -> Grid:
        return tuple(
            row
            for cells in grid
            for row in (tuple(cell for cell in cells for _ in range(columns)),)
            for _ in range(rows)
        )

    def cut(grid: Grid) -> Grid:
        return tuple(row[::columns] for row in grid[::rows])

    return Transformation(f"scaling({rows}, {columns})", apply, _checked(apply, cut))


def repetition(rows: int, columns: int) -> Transformation:
    """The grid so many times below and beside itself."""

    def apply(grid: Grid) -> Grid:
        return tuple(row * columns for row in grid) * rows

    def cut(grid: Grid) -> Grid:
        return _part(_part(grid, 0, 0, rows), 1, 0, columns)

    return Transformation(f"repetition({rows}, {columns})", apply, _checked(apply, cut))


def recolouring(colours: Sequence[int]) -> Transformation:
    """Colour c becomes ``colours[c]``. Raises ValueError unless they are a permutation of 0..9."""
    if sorted(colours) != list(range(COLOURS)):
        raise ValueError(f"{colours} is no permutation of 0..{COLOURS - 1}")
    there = tuple(colours)
    back = tuple(there.index(colour) for colour in range(COLOURS))
    return Transformation(
        f"recolouring({''.join(map(str, there))})",
        lambda grid: _recoloured(grid, there),
        lambda grid: _recoloured(grid, back),
    )


def chain(*parts: Transformation) -> Transformation:
    """One after the other."""

    def apply(grid: Grid) -> Grid:
        for part in parts:
            grid = part.apply(grid)
        return grid

    def undo(grid: Grid) -> Grid | None:
        found: Grid | None = grid
        for part in reversed(parts):
            found = part.undo(found) if found is not None else None
        return found

    return Transformation(" + ".join(part.name for part in parts) or "identity", apply, undo)


IDENTITY = chain()


def transformed(task: FewShotTask, transformation: Transformation) -> FewShotTask | None:
    """The task with all its grids transformed; None where one of them leaves 30 x 30."""
    demonstrations = tuple(transformation.pair(pair) for pair in task.demonstrations)
    queries = tuple(transformation.pair(pair) for pair in task.queries)
    grids = [grid for pair in (*demonstrations, *queries) for grid in (pair.input, pair.output) if grid]
    return FewShotTask(task.name, demonstrations, queries) if all(map(fits, grids)) else None


def _checked(apply: Callable[[Grid], Grid], cut: Callable[[Grid], Grid]) -> Callable[[Grid], Grid | None]:
    """``cut`` where it really is the way back."""

    def undo(grid: Grid) -> Grid | None:
        found = cut(grid)
        return found if found and found[0] and apply(found) == grid else None

    return undo


def _turned(grid: Grid, quarters: int) -> Grid:
    for _ in range(quarters):
        grid = _transposed(grid)[::-1]
    return grid


def _transposed(grid: Grid) -> Grid:
    return tuple(zip(*grid, strict=True))


def _flipped(grid: Grid, axis: int) -> Grid:
    return grid[::-1] if axis == 0 else tuple(row[::-1] for row in grid)


def _rolled(grid: Grid, rows: int, columns: int) -> Grid:
    down, right = -rows % len(grid), -columns % len(grid[0])
    return tuple(row[right:] + row[:right] for row in grid[down:] + grid[:down])


def _joined(grids: tuple[Grid, Grid], axis: int) -> Grid:
    first, second = grids
    return first + second if axis == 0 else tuple(a + b for a, b in zip(first, second, strict=True))


def _part(grid: Grid, axis: int, number: int, of: int) -> Grid:
    """One of so many equal parts along an axis; what is left over belongs to none."""
    size = (len(grid) if axis == 0 else len(grid[0]) if grid else 0) // of
    cut = slice(number * size, (number + 1) * size)
    return grid[cut] if axis == 0 else tuple(row[cut] for row in grid)


def _recoloured(grid: Grid, colours: Sequence[int]) -> Grid:
    return tuple(tuple(colours[cell] for cell in row) for row in grid)
