"""The pictures of a run's report that are its alone; ``preceptor.drawing`` has the rest. Importing this imports
matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import matplotlib

from preceptor.drawing import (
    ACCENT,
    GRID,
    INK,
    MUTED,
    PHASES,
    PLAIN,
    STYLE,
    legend,
    name_rows,
    new_axes,
    to_svg,
)
from preceptor.drawing import accuracy_by_arm as accuracy_by_arm
from preceptor.drawing import differences as differences

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


def by_round(lines: Sequence[Line], label: str, *, signed: bool = True) -> str:
    """Means by round with their 95% intervals; the first line is stressed. ``label``: what the numbers are;
    ``signed``: they may be below 0."""
    form = "+.2f" if signed else ".2f"
    with matplotlib.rc_context(STYLE):
        several = len(lines) > 1
        figure, axes = new_axes(2.8 if several else 2.5)
        axes.axhline(0, color=GRID, linewidth=1)
        for line, colour, below in zip(lines, (ACCENT, PLAIN), (True, False), strict=False):
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
                    f"{mean:{form}}",
                    (number, mean + sign * error),
                    (0, 6 * sign),
                    textcoords="offset points",
                    ha="center",
                    va="bottom" if sign > 0 else "top",
                    color=INK,
                    fontsize=9,
                )
        numbers = sorted({number for line in lines for number, _, _ in line.points})
        axes.set_xlabel("round")
        axes.set_ylabel(label)
        axes.set_xticks(numbers if len(numbers) <= 12 else numbers[:: -(-len(numbers) // 12)])
        axes.margins(x=0.15, y=0.2)
        axes.grid(axis="y")
        if several:
            legend(figure, *axes.get_legend_handles_labels())
        said = "; ".join(
            f"{line.name}, round {number}: {mean:+.3f}" for line in lines for number, mean, _ in line.points
        )
        return to_svg(figure, f"{label} by round, with 95% intervals", said)


def rewards_by_group(groups: Sequence[Dots]) -> str:
    """Every self-edit's reward, a row for each passage, with its error beside the differences: where the bars are as
    wide as the row, the row is noise."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(0.75 + 0.36 * len(groups))
        axes.axvline(0, color=MUTED, linewidth=1)
        for place, group in enumerate(groups):
            if place:
                axes.axhline(place - 0.5, color=GRID, linewidth=0.8)
            size = len(group.rewards)
            for at, (value, error, chosen) in enumerate(sorted(group.rewards)):
                # The bars of one row lie above each other, so that none hides another.
                y = place + (0.0 if size == 1 else 0.32 - 0.64 * at / (size - 1))
                colour = ACCENT if chosen else PLAIN
                axes.plot([value - error, value + error], [y, y], color=colour, linewidth=1.2)
                axes.plot([value], [y], color=colour, marker="o", markersize=4.5 if chosen else 3.5)
        name_rows(axes, [group.name for group in groups], labelsize=9)
        axes.margins(x=0.04)
        axes.set_xlabel("reward")
        axes.grid(axis="x")
        said = "; ".join(
            f"{group.name}: {min(group.rewards)[0]:+.2f} to {max(group.rewards)[0]:+.2f}, "
            f"error {fmean(error for _, error, _ in group.rewards):.2f}"
            for group in groups
        )
        return to_svg(figure, "Rewards of the last round's self-edits by passage, with their errors", said)


def time_by_phase(bars: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Seconds of each stage by phase, stacked."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(1.15 + 0.34 * len(bars))
        for place, (_, seconds) in enumerate(bars):
            left = 0.0
            for phase, colour in PHASES.items():
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
        axes.tick_params(axis="y", colors=INK, length=0)
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.set_xlabel("seconds")
        axes.grid(axis="x")
        handles = [axes.barh(0, 0, color=colour) for colour in PHASES.values()]
        legend(figure, handles, [PHASE_WORDS[phase] for phase in PHASES])
        totals = "; ".join(f"{name}: {sum(seconds.values()):.0f} s" for name, seconds in bars)
        return to_svg(figure, "Time by phase", totals)
