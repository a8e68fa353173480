"""Draws the Grafana dashboard from a Prometheus, where no Grafana is at hand.

    python scripts/draw_dashboard.py http://127.0.0.1:9090 dashboard.png --minutes 30

Each panel of deploy/observability/grafana/dashboards/preceptor.json is drawn where the dashboard has it, from its own
queries, by matplotlib: what one would see, and not how Grafana would paint it.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
import urllib.parse
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.dates as mdates
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

DASHBOARD = Path(__file__).parents[1] / "deploy/observability/grafana/dashboards/preceptor.json"
STEPS = 240
BACKGROUND, PANEL, TEXT, FAINT = "#111217", "#181b1f", "#d8d9da", "#8e9297"
COLOURS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff780a", "#f2495c", "#b877d9", "#37a2a8", "#e0b400", "#8ab8ff", "#ffb357")
COLUMN_INCHES, ROW_INCHES = 0.75, 0.33

Series = list[tuple[str, list[float], list[float]]]  # legend, unix seconds, values


def substituted(expression: str, step_seconds: float) -> str:
    """A query with Grafana's variables as it would fill them in for all runs."""
    interval = max(4 * step_seconds, 30)
    return expression.replace("$__rate_interval", f"{interval:.0f}s").replace("$run", ".*")


def legend(template: str, labels: dict[str, str]) -> str:
    """``{{name}}`` replaced by labels."""
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value)
    return template


def ask(url: str, expression: str, start: float, end: float) -> list[dict[str, Any]]:
    """The series of a range query. Raises OSError, ValueError where Prometheus does not answer or refuses."""
    step = (end - start) / STEPS
    query = {
        "query": substituted(expression, step),
        "start": f"{start:.3f}",
        "end": f"{end:.3f}",
        "step": f"{step:.3f}",
    }
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{urllib.parse.urlencode(query)}", timeout=30) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


def series_of(url: str, panel: dict[str, Any], start: float, end: float) -> Series:
    """What a panel shows, named as in its legend."""
    found: Series = []
    for target in panel["targets"]:
        for one in ask(url, target["expr"], start, end):
            if all(value == "NaN" for _, value in one["values"]):
                continue
            times, values = zip(*((float(at), float(value)) for at, value in one["values"]), strict=True)
            found.append(
                (legend(target["legendFormat"], one["metric"]).replace("Service/", "/"), list(times), list(values))
            )
    return found


def readable(unit: str, value: float) -> str:
    """A value in the panel's unit."""
    if unit == "percentunit":
        return f"{100 * value:.0f}%"
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB" if value < 2**30 else f"{value / 2**30:.1f} GiB"
    if unit == "s":
        return f"{value * 1000:.0f} ms" if 0 < abs(value) < 1 else f"{value:.3g} s"
    return f"{value:.3g}"


def draw_lines(axes: Axes, panel: dict[str, Any], found: Series, start: float, end: float) -> None:
    """A panel of lines, stacked where it says so."""
    wide_characters = panel["gridPos"]["w"] * 12
    defaults = panel["fieldConfig"]["defaults"]
    unit = defaults["unit"]
    clock = [[datetime.fromtimestamp(at) for at in times] for _, times, _ in found]
    if defaults["custom"]["stacking"]["mode"] == "normal" and found:
        grid = sorted({at for _, times, _ in found for at in times})
        rows = [[dict(zip(times, values, strict=True)).get(at, 0.0) for at in grid] for _, times, values in found]
        names = [name for name, _, _ in found]
        axes.stackplot([datetime.fromtimestamp(at) for at in grid], rows, labels=names, colors=COLOURS, alpha=0.8)
    else:
        for number, (name, _, values) in enumerate(found):
            bound = name.endswith((" +2 se", " -2 se"))
            colour = COLOURS[0] if bound else COLOURS[number % len(COLOURS)]
            axes.plot(
                clock[number], values, color=colour, lw=0.7 if bound else 1.6, ls="--" if bound else "-", label=name
            )
    axes.set_xlim(datetime.fromtimestamp(start), datetime.fromtimestamp(end))
    axes.xaxis.set_major_formatter(mdates.DateFormatter("%H:%M"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: readable(unit, value)))
    if "min" in defaults:
        axes.set_ylim(bottom=defaults["min"])
    if "max" in defaults:
        axes.set_ylim(top=defaults["max"])
    if found:
        columns = wide_characters // (max(len(name) for name, _, _ in found) + 6)
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=max(1, min(len(found), columns)),
            fontsize=6.5, frameon=False, labelcolor=TEXT, columnspacing=1.0, handlelength=1.2,
        )  # fmt: skip
    else:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", color=FAINT, transform=axes.transAxes)


def draw_number(axes: Axes, panel: dict[str, Any], found: Series) -> None:
    """A panel with one number, red from its threshold on."""
    value = found[0][2][-1] if found else 0.0
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    bad = any(step["value"] is not None and value >= step["value"] for step in steps)
    axes.text(
        0.5, 0.45, readable("short", value), ha="center", va="center", fontsize=24,
        color=COLOURS[4] if bad else COLOURS[0], transform=axes.transAxes,
    )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])


def draw(url: str, dashboard: dict[str, Any], start: float, end: float, out: Path) -> None:
    """The whole dashboard as a PNG. Raises as ``ask``."""
    panels = dashboard["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(24 * COLUMN_INCHES, height * ROW_INCHES), facecolor=BACKGROUND, dpi=80)
    for panel in panels:
        place = panel["gridPos"]
        left, top = place["x"] / 24, 1 - place["y"] / height
        if panel["type"] == "row":
            figure.text(
                left + 0.006, top - 0.7 / height, panel["title"], color=TEXT, fontsize=13, weight="bold", va="center"
            )
            continue
        wide, high = place["w"] / 24, place["h"] / height
        frame = figure.add_axes((left + 0.003, top - high + 0.15 / height, wide - 0.006, high - 0.3 / height))
        frame.set_facecolor(PANEL)
        frame.set_xticks([])
        frame.set_yticks([])
        for edge in frame.spines.values():
            edge.set_color("#2c3235")
        frame.text(
            0.02, 1 - 0.35 / place["h"], panel["title"], color=TEXT, fontsize=9, weight="bold", va="top",
            transform=frame.transAxes,
        )  # fmt: skip
        words = textwrap.fill(panel.get("description", ""), int(place["w"] * 16))
        lines = words.count("\n") + 1 if words else 0
        frame.text(0.02, 1 - 1.0 / place["h"], words, color=FAINT, fontsize=6.5, va="top", transform=frame.transAxes)
        below, above = 1.9 / height, (1.3 + 0.42 * lines) / height
        axes = figure.add_axes((left + 0.035, top - high + below, wide - 0.045, high - below - above))
        axes.set_facecolor(PANEL)
        axes.tick_params(colors=FAINT, labelsize=6.5, length=0)
        axes.grid(color="#2c3235", lw=0.5)
        for edge in axes.spines.values():
            edge.set_visible(False)
        found = series_of(url, panel, start, end)
        if panel["type"] == "stat":
            axes.grid(visible=False)
            axes.set_position((left + 0.01, top - high + 0.3 / height, wide - 0.02, high - 1.8 / height))
            draw_number(axes, panel, found)
        else:
            draw_lines(axes, panel, found, start, end)
    figure.savefig(out, facecolor=BACKGROUND)
    plt.close(figure)


def main() -> None:
    """Draws what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prometheus", help="its URL")
    parser.add_argument("out", type=Path, help="a .png")
    parser.add_argument("--minutes", type=float, default=60.0, help="how far back")
    parser.add_argument("--end", type=float, default=0.0, help="until when, in unix seconds; now unless given")
    asked = parser.parse_args()
    end = asked.end or time.time()
    draw(asked.prometheus.rstrip("/"), json.loads(DASHBOARD.read_text()), end - 60 * asked.minutes, end, asked.out)


if __name__ == "__main__":
    main()
