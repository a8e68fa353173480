"""The picture of the continual experiment: forgetting matrices beside each other. Importing this imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from preceptor.drawing import ACCENT, INK, MUTED, STYLE, WIDTH_INCHES, to_svg

# A cell in inches; a gap before the last column, which is no passage.
_CELL = 0.24
_GAP = 0.4


def forgetting(matrices: Mapping[str, Sequence[Sequence[float | None]]]) -> str:
    """One heat map for each way, below each other: rows are edits (the first: none yet), columns passages and, apart,
    the old knowledge; the darker, the more of it is right. Numbers are percentages."""
    with matplotlib.rc_context(STYLE):
        count = max(len(rows) for rows in matrices.values())
        height = len(matrices) * (count * _CELL + 0.75)
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        figure.patch.set_alpha(0)
        for place, (way, rows) in enumerate(matrices.items(), 1):
            axes = figure.add_subplot(len(matrices), 1, place)
            axes.patch.set_alpha(0)
            for side in axes.spines.values():
                side.set_visible(False)
            for y, row in enumerate(rows):
                for column, share in enumerate(row):
                    x = column + (_GAP if column == len(row) - 1 else 0)
                    if share is None:  # nothing was asked
                        continue
                    # The colour's strength is the share, so that it is right on light and on dark ground.
                    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=ACCENT, alpha=0.75 * share, linewidth=0))
                    axes.text(x, y, f"{share * 100:.0f}", ha="center", va="center", fontsize=8, color=INK)
            passages = len(rows[0]) - 1
            axes.set_xlim(-0.55, passages + _GAP + 0.55)
            axes.set_ylim(len(rows) - 0.45, -0.55)
            axes.set_xticks([*range(passages), passages + _GAP], [*map(str, range(1, passages + 1)), "old"])
            axes.set_yticks(range(len(rows)), ["none", *map(str, range(1, len(rows)))])
            axes.tick_params(length=0, labelsize=9)
            axes.set_ylabel("after edit", color=MUTED)
            axes.set_title(f"{way}: right answers about passage ..., %", fontsize=10, color=INK, loc="left")
        said = "; ".join(
            f"{way}, after the last edit: "
            + ", ".join("not asked" if share is None else f"{share * 100:.0f}%" for share in rows[-1])
            for way, rows in matrices.items()
        )
        return to_svg(figure, "Forgetting matrices: right answers to every passage after every edit", said)
