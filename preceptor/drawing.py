"""What every picture here is drawn with: SVG that takes its colours from the page (so that it is right in light and in
dark).

Narrow on purpose: 360 units wide with 10-unit letters stays legible on a phone. Colours are drawn as placeholders and
become CSS variables; text stays text. Importing this imports matplotlib, whose settings are the process's: one picture
at a time.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Placeholder -> CSS variable of the page.
INK, MUTED, GRID, ACCENT, PLAIN = "#010101", "#020202", "#030303", "#040404", "#050505"
GOOD, BAD = "#0a0a0a", "#0b0b0b"
PHASES = {"generate": "#060606", "evaluate": "#070707", "update": "#080808", "other": "#090909"}
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    ACCENT: "--accent",
    PLAIN: "--plain",
    "#060606": "--phase-generate",
    "#070707": "--phase-evaluate",
    "#080808": "--phase-update",
    "#090909": "--phase-other",
    GOOD: "--good",
    BAD: "--bad",
}
STYLE: Any = {  # matplotlib types the keys of this dictionary one by one
    "svg.fonttype": "none",
    "svg.hashsalt": "preceptor",  # the same numbers give the same file
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.edgecolor": GRID,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
}
WIDTH_INCHES = 5.0


def differences(
    rows: Sequence[tuple[str, float, tuple[float, float], bool]],
    label: str = "trained teacher − each, percentage points",
) -> str:
    """Forest plot of paired differences (name, mean, 95% interval, whether more is better; shares), top to bottom. What
    is clear of 0 is coloured by its side, where a side is better."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(0.6 + 0.34 * len(rows))
        axes.axvline(0, color=MUTED, linewidth=1)
        for place, (_, mean, (low, high), judged) in enumerate(rows):
            colour = PLAIN if not judged else GOOD if low > 0 else BAD if high < 0 else PLAIN
            interval(
                axes, place, (low * 100, mean * 100, high * 100), signed(mean * 100), colour, marker="D", markersize=7
            )
        name_rows(axes, [name for name, *_ in rows])
        axes.margins(x=0.12)
        axes.xaxis.set_major_formatter(lambda value, _: signed(value) if value else "0")
        axes.set_xlabel(label)
        axes.grid(axis="x")
        said = "; ".join(
            f"{name}: {mean * 100:+.1f} [{low * 100:+.1f}, {high * 100:+.1f}]" for name, mean, (low, high), _ in rows
        )
        return to_svg(figure, "Paired differences with their 95% intervals", said)


def accuracy_by_arm(
    arms: Sequence[tuple[str, float, tuple[float, float], bool]], label: str = "right answers on held-out passages, %"
) -> str:
    """Accuracy of each arm (name, accuracy, 95% interval, whether to stress it), top to bottom."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(0.6 + 0.34 * len(arms))
        for place, (_, accuracy, (low, high), stressed) in enumerate(arms):
            colour = ACCENT if stressed else PLAIN
            shown = f"{accuracy * 100:.0f}%"
            interval(axes, place, (low * 100, accuracy * 100, high * 100), shown, colour, marker="o", markersize=8)
        name_rows(axes, [name for name, *_ in arms])
        axes.set_xlim(-3, 112)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel(label)
        axes.grid(axis="x")
        said = "; ".join(f"{name}: {accuracy * 100:.0f}%" for name, accuracy, _, _ in arms)
        return to_svg(figure, "Accuracy of each arm with its 95% interval", said)


def signed(value: float) -> str:
    """A whole number with its sign."""
    return f"{value:+.0f}".replace("-", "−")


def legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
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
        text.set_color(INK)


def name_rows(axes: Axes, names: Sequence[str], **how: Any) -> None:
    """A name for each row, the first one on top."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", colors=INK, length=0, **how)
    axes.set_ylim(len(names) - 0.4, -0.6)


def interval(
    axes: Axes, place: int, points: tuple[float, float, float], words: str, colour: str, **marker: Any
) -> None:
    """A row's interval (low, middle, high), with words behind it."""
    low, middle, high = points
    axes.plot([low, high], [place, place], color=colour, linewidth=2.5, solid_capstyle="round")
    axes.plot([middle], [place], color=colour, **marker)
    behind: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9, "color": INK}
    axes.annotate(words, (high, place), (8, 0), **behind)


def new_axes(height_inches: float) -> tuple[Figure, Axes]:
    """A figure of the usual width without frame or ground, and its axes."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return figure, axes


def to_svg(figure: Figure, title: str, description: str) -> str:
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
    for placeholder, variable in VARIABLES.items():
        svg = svg.replace(placeholder, f"var({variable})")
    return svg


# The page's colours, for pictures that stand alone (docs): light and dark.
_COLOURS = {
    "--ink": ("#1a1a18", "#ecece6"),
    "--muted": ("#62625c", "#a3a39b"),
    "--grid": ("#dcdcd5", "#3a3a36"),
    "--accent": ("#2a6fc9", "#6aa8f2"),
    "--plain": ("#8b8b83", "#85857d"),
    "--good": ("#16794f", "#58c594"),
    "--bad": ("#b3372f", "#ef8a80"),
    "--phase-generate": ("#2a78d6", "#4b93ea"),
    "--phase-evaluate": ("#1a9d70", "#2bb184"),
    "--phase-update": ("#d08c00", "#dba02b"),
    "--phase-other": ("#a3a39b", "#6d6d66"),
}


def standalone(svg: str) -> str:
    """A picture of ``to_svg`` as a file of its own: with its colours, for light and for dark, and its font."""
    light, dark = (" ".join(f"{name}: {pair[side]};" for name, pair in _COLOURS.items()) for side in (0, 1))
    style = (
        f"<style>svg {{ {light} }} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}"
        " text { font-family: system-ui, sans-serif !important; }</style>"
    )
    return svg.replace("<title>", f"{style}<title>", 1)
