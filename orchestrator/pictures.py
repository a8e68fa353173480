"""The report's pictures, as SVG that takes its colours from the page (so that it is right in light and in dark).

Narrow on purpose: 360 units wide with 10-unit letters stays legible on a phone. Colours are drawn as placeholders and
become CSS variables; text stays text. Importing this imports matplotlib.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Placeholder -> CSS variable of the page.
_INK, _MUTED, _GRID, _ACCENT, _PLAIN = "#010101", "#020202", "#030303", "#040404", "#050505"
_GOOD, _BAD = "#0a0a0a", "#0b0b0b"
_PHASES = {"generate": "#060606", "evaluate": "#070707", "update": "#080808", "other": "#090909"}
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--grid",
    _ACCENT: "--accent",
    _PLAIN: "--plain",
    "#060606": "--phase-generate",
    "#070707": "--phase-evaluate",
    "#080808": "--phase-update",
    "#090909": "--phase-other",
    _GOOD: "--good",
    _BAD: "--bad",
}
_STYLE: Any = {  # matplotlib types the keys of this dictionary one by one
    "svg.fonttype": "none",
    "svg.hashsalt": "preceptor",  # the same numbers give the same file
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "axes.edgecolor": _GRID,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
}
_WIDTH_INCHES = 5.0
PHASE_WORDS = {
    "generate": "writing (evaluating meanwhile)",
    "evaluate": "waiting for evaluations",
    "update": "updating the teacher",
    "other": "other",
}


@dataclass(frozen=True, slots=True)
class Line:
    """Points of a line over the rounds: number, mean, standard error."""

    name: str
    points: Sequence[tuple[int, float, float | None]]


@dataclass(frozen=True, slots=True)
class Dots:
    """The self-edits of one passage: reward, standard error of its difference to the group's mean, whether it was
    chosen to be measured again."""

    name: str
    rewards: Sequence[tuple[float, float, bool]]


def by_round(lines: Sequence[Line], label: str) -> str:
    """Means by round with their 95% intervals; the first line is stressed. ``label``: what the numbers are."""
    with matplotlib.rc_context(_STYLE):
        several = len(lines) > 1
        figure, axes = _axes(2.8 if several else 2.5)
        axes.axhline(0, color=_GRID, linewidth=1)
        for line, colour, below in zip(lines, (_ACCENT, _PLAIN), (True, False), strict=False):
            # Two lines stand beside each other, so that no interval hides another.
            aside = 0.0 if not several else -0.03 if below else 0.03
            numbers = [number + aside * len(line.points) for number, _, _ in line.points]
            means = [mean for _, mean, _ in line.points]
            errors = [1.96 * (stderr or 0.0) for _, _, stderr in line.points]
            axes.errorbar(
                numbers,
                means,
                yerr=errors,
                color=colour,
                linewidth=2,
                marker="o",
                markersize=7,
                capsize=4,
                label=line.name,
            )
            # Of two lines the upper one has its numbers above, the lower one below.
            sign = -1 if several and below else 1
            for number, mean, error in zip(numbers, means, errors, strict=True):
                axes.annotate(
                    f"{mean:+.2f}",
                    (number, mean + sign * error),
                    (0, 6 * sign),
                    textcoords="offset points",
                    ha="center",
                    va="bottom" if sign > 0 else "top",
                    color=_INK,
                    fontsize=9,
                )
        numbers = sorted({number for line in lines for number, _, _ in line.points})
        axes.set_xlabel("round")
        axes.set_ylabel(label)
        axes.set_xticks(numbers if len(numbers) <= 12 else numbers[:: -(-len(numbers) // 12)])
        axes.margins(x=0.15, y=0.2)
        axes.grid(axis="y")
        if several:
            _legend(figure, *axes.get_legend_handles_labels())
        said = "; ".join(
            f"{line.name}, round {number}: {mean:+.3f}" for line in lines for number, mean, _ in line.points
        )
        return _svg(figure, f"{label} by round, with 95% intervals", said)


def differences(rows: Sequence[tuple[str, float, tuple[float, float], bool]]) -> str:
    """Forest plot of paired differences (name, mean, 95% interval, whether more is better; shares), top to bottom. What
    is clear of 0 is coloured by its side, where a side is better."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(0.6 + 0.34 * len(rows))
        axes.axvline(0, color=_MUTED, linewidth=1)
        for place, (_, mean, (low, high), judged) in enumerate(rows):
            colour = _PLAIN if not judged else _GOOD if low > 0 else _BAD if high < 0 else _PLAIN
            _interval(
                axes, place, (low * 100, mean * 100, high * 100), _signed(mean * 100), colour, marker="D", markersize=7
            )
        _name_rows(axes, [name for name, *_ in rows])
        axes.margins(x=0.12)
        axes.xaxis.set_major_formatter(lambda value, _: _signed(value) if value else "0")
        axes.set_xlabel("trained teacher − each, percentage points")
        axes.grid(axis="x")
        said = "; ".join(
            f"{name}: {mean * 100:+.1f} [{low * 100:+.1f}, {high * 100:+.1f}]" for name, mean, (low, high), _ in rows
        )
        return _svg(figure, "Paired differences with their 95% intervals", said)


def rewards_by_group(groups: Sequence[Dots]) -> str:
    """Every self-edit's reward, a row for each passage, with its error beside the differences: where the bars are as
    wide as the row, the row is noise."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(0.75 + 0.36 * len(groups))
        axes.axvline(0, color=_MUTED, linewidth=1)
        for place, group in enumerate(groups):
            if place:
                axes.axhline(place - 0.5, color=_GRID, linewidth=0.8)
            size = len(group.rewards)
            for at, (value, error, chosen) in enumerate(sorted(group.rewards)):
                # The bars of one row lie above each other, so that none hides another.
                y = place + (0.0 if size == 1 else 0.32 - 0.64 * at / (size - 1))
                colour = _ACCENT if chosen else _PLAIN
                axes.plot([value - error, value + error], [y, y], color=colour, linewidth=1.2)
                axes.plot([value], [y], color=colour, marker="o", markersize=4.5 if chosen else 3.5)
        _name_rows(axes, [group.name for group in groups], labelsize=9)
        axes.margins(x=0.04)
        axes.set_xlabel("reward")
        axes.grid(axis="x")
        said = "; ".join(
            f"{group.name}: {min(group.rewards)[0]:+.2f} to {max(group.rewards)[0]:+.2f}, "
            f"error {fmean(error for _, error, _ in group.rewards):.2f}"
            for group in groups
        )
        return _svg(figure, "Rewards of the last round's self-edits by passage, with their errors", said)


def accuracy_by_arm(arms: Sequence[tuple[str, float, tuple[float, float], bool]]) -> str:
    """Accuracy of each arm (name, accuracy, 95% interval, whether to stress it), top to bottom."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(0.6 + 0.34 * len(arms))
        for place, (_, accuracy, (low, high), stressed) in enumerate(arms):
            colour = _ACCENT if stressed else _PLAIN
            shown = f"{accuracy * 100:.0f}%"
            _interval(axes, place, (low * 100, accuracy * 100, high * 100), shown, colour, marker="o", markersize=8)
        _name_rows(axes, [name for name, *_ in arms])
        axes.set_xlim(-3, 112)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel("right answers on held-out passages, %")
        axes.grid(axis="x")
        said = "; ".join(f"{name}: {accuracy * 100:.0f}%" for name, accuracy, _, _ in arms)
        return _svg(figure, "Accuracy of each arm with its 95% interval", said)


def time_by_phase(bars: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Seconds of each stage by phase, stacked."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(1.15 + 0.34 * len(bars))
        for place, (_, seconds) in enumerate(bars):
            left = 0.0
            for phase, colour in _PHASES.items():
                width = seconds.get(phase, 0.0)
                axes.barh(place, width, left=left, color=colour, height=0.55, edgecolor="none")
                left += width
            axes.annotate(
                f"{left:.0f} s" if left >= 10 else f"{left:.1f} s",
                (left, place),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        axes.set_yticks(range(len(bars)), [name for name, _ in bars])
        axes.tick_params(axis="y", colors=_INK, length=0)
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.set_xlabel("seconds")
        axes.grid(axis="x")
        handles = [axes.barh(0, 0, color=colour) for colour in _PHASES.values()]
        _legend(figure, handles, [PHASE_WORDS[phase] for phase in _PHASES])
        totals = "; ".join(f"{name}: {sum(seconds.values()):.0f} s" for name, seconds in bars)
        return _svg(figure, "Time by phase", totals)


def _signed(value: float) -> str:
    return f"{value:+.0f}".replace("-", "−")


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Below the picture."""
    legend = figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
        handlelength=1,
        handleheight=1,
    )
    for text in legend.get_texts():
        text.set_color(_INK)


def _name_rows(axes: Axes, names: Sequence[str], **how: Any) -> None:
    """A name for each row, the first one on top."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", colors=_INK, length=0, **how)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _interval(
    axes: Axes, place: int, points: tuple[float, float, float], words: str, colour: str, **marker: Any
) -> None:
    """A row's interval (low, middle, high), with words behind it."""
    low, middle, high = points
    axes.plot([low, high], [place, place], color=colour, linewidth=2.5, solid_capstyle="round")
    axes.plot([middle], [place], color=colour, **marker)
    behind: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9, "color": _INK}
    axes.annotate(words, (high, place), (8, 0), **behind)


def _axes(height_inches: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _svg(figure: Figure, title: str, description: str) -> str:
    """The figure as an element to put into a page: no prolog, no metadata, its colours the page's."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    view = size[0] if size else ""
    named = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {view} role="img">'
    named += f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    svg = re.sub(r"<svg[^>]*>", lambda _: named, svg, count=1)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, f"var({variable})")
    return svg
