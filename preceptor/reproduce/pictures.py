"""Pictures that several experiments draw. Importing this imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

from preceptor.drawing import (
    ACCENT,
    GOOD,
    GRID,
    INK,
    PHASES,
    PLAIN,
    STYLE,
    interval,
    legend,
    name_rows,
    new_axes,
    to_svg,
)

# Name, accuracy, its 95% interval, and how it is stressed: 0 not, 1 or 2 in a colour of its own.
Row = tuple[str, float, tuple[float, float], int]
# Lines are told apart by colour and marker.
_LINES = (
    (ACCENT, "o"),
    (PHASES["update"], "s"),
    (GOOD, "D"),
    (PLAIN, "^"),
    (PHASES["generate"], "v"),
    (PHASES["other"], "P"),
)


def grouped(groups: Sequence[tuple[str, Sequence[Row]]], label: str) -> str:
    """Shares with their intervals, one row each, groups below each other under their titles."""
    with matplotlib.rc_context(STYLE):
        names: list[str] = []
        count = sum(len(rows) + 1 for _, rows in groups)
        figure, axes = new_axes(0.7 + 0.3 * count)
        place = 0
        titles = []
        for title, rows in groups:
            if place:
                axes.axhline(place - 0.5, color=GRID, linewidth=0.8)
            titles.append(place)
            names.append(title)
            place += 1
            for name, mean, (low, high), stress in rows:
                colour = (PLAIN, ACCENT, PHASES["update"])[stress]
                shown = (low * 100, mean * 100, high * 100)
                interval(axes, place, shown, f"{mean * 100:.0f}%", colour, marker="o", markersize=8)
                names.append(name)
                place += 1
        name_rows(axes, names, labelsize=9)
        for tick, tick_label in enumerate(axes.get_yticklabels()):
            if tick in titles:
                tick_label.set_fontweight("bold")
        axes.set_xlim(-3, 112)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel(label)
        axes.grid(axis="x")
        said = "; ".join(
            f"{title}: " + ", ".join(f"{name} {mean * 100:.0f}%" for name, mean, *_ in rows) for title, rows in groups
        )
        return to_svg(figure, label, said)


def lines(
    series: Sequence[tuple[str, Sequence[tuple[float, float, tuple[float, float]]]]], across: str, up: str
) -> str:
    """Shares (x, mean, 95% interval) along a quantity that doubles, one line for each name; x is drawn as logarithm."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(3.6)
        for (name, points), (colour, marker) in zip(series, _LINES * 3, strict=False):
            where = [x for x, *_ in points]
            means = [mean * 100 for _, mean, _ in points]
            below = [(mean - low) * 100 for _, mean, (low, _) in points]
            above = [(high - mean) * 100 for _, mean, (_, high) in points]
            axes.errorbar(
                where,
                means,
                yerr=(below, above),
                color=colour,
                marker=marker,
                markersize=6,
                linewidth=2,
                elinewidth=1,
                capsize=3,
                label=name,
            )
        axes.set_xscale("log", base=2)
        at = sorted({x for _, points in series for x, *_ in points})
        axes.set_xticks(at, [f"{x:,.0f}" for x in at])
        axes.set_xticks([], minor=True)
        axes.set_ylim(-4, 104)
        axes.set_yticks([0, 25, 50, 75, 100])
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.yaxis.label.set_color(INK)
        axes.grid(axis="y")
        legend(figure, *axes.get_legend_handles_labels())
        said = "; ".join(
            f"{name}: " + ", ".join(f"{x:,.0f}: {mean * 100:.0f}%" for x, mean, _ in points) for name, points in series
        )
        return to_svg(figure, f"{up} by {across}", said)
