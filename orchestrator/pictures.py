"""The report's pictures, as SVG that takes its colours from the page (so that it is right in light and in dark).

Narrow on purpose: 360 units wide with 10-unit letters stays legible on a phone. Colours are drawn as placeholders and
become CSS variables; text stays text. Importing this imports matplotlib.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Placeholder -> CSS variable of the page.
_INK, _MUTED, _GRID, _ACCENT, _PLAIN = "#010101", "#020202", "#030303", "#040404", "#050505"
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


def reward_by_round(points: Sequence[tuple[int, float, float | None]]) -> str:
    """Mean reward of each round (number, mean, standard error) with its 95% interval."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(2.5)
        numbers = [number for number, _, _ in points]
        means = [mean for _, mean, _ in points]
        errors = [1.96 * (stderr or 0.0) for _, _, stderr in points]
        axes.axhline(0, color=_GRID, linewidth=1)
        axes.errorbar(numbers, means, yerr=errors, color=_ACCENT, linewidth=2, marker="o", markersize=7, capsize=4)
        for number, mean, error in zip(numbers, means, errors, strict=True):
            place = (number, mean + error)
            axes.annotate(
                f"{mean:+.2f}", place, (0, 6), textcoords="offset points", ha="center", color=_INK, fontsize=9
            )
        axes.set_xlabel("round")
        axes.set_ylabel("mean reward")
        axes.set_xticks(numbers if len(numbers) <= 12 else numbers[:: -(-len(numbers) // 12)])
        axes.margins(x=0.15, y=0.2)
        axes.grid(axis="y")
        said = "; ".join(f"round {number}: {mean:+.3f}" for number, mean, _ in points)
        return _svg(figure, "Mean reward of each round with its 95% interval", said)


def accuracy_by_arm(arms: Sequence[tuple[str, float, tuple[float, float], bool]]) -> str:
    """Accuracy of each arm (name, accuracy, 95% interval, whether to stress it), top to bottom."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(0.6 + 0.34 * len(arms))
        for place, (_, accuracy, (low, high), stressed) in enumerate(arms):
            colour = _ACCENT if stressed else _PLAIN
            axes.plot([low * 100, high * 100], [place, place], color=colour, linewidth=2.5, solid_capstyle="round")
            axes.plot([accuracy * 100], [place], color=colour, marker="o", markersize=8)
            axes.annotate(
                f"{accuracy * 100:.0f}%",
                (high * 100, place),
                (8, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=_INK,
            )
        axes.set_yticks(range(len(arms)), [name for name, *_ in arms])
        axes.tick_params(axis="y", colors=_INK, length=0)
        axes.invert_yaxis()
        axes.set_xlim(-3, 112)
        axes.set_ylim(len(arms) - 0.4, -0.6)
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
        handles = [axes.barh(0, 0, color=colour, label=PHASE_WORDS[phase]) for phase, colour in _PHASES.items()]
        legend = figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=2,
            frameon=False,
            fontsize=9,
            handlelength=1,
            handleheight=1,
        )
        for text in legend.get_texts():
            text.set_color(_INK)
        totals = "; ".join(f"{name}: {sum(seconds.values()):.0f} s" for name, seconds in bars)
        return _svg(figure, "Time by phase", totals)


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
