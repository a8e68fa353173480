"""Draws the trace of one evaluation as a waterfall.

    python scripts/draw_trace.py traces.jsonl slowest trace.png
    python scripts/draw_trace.py traces.jsonl eval-0a1b... trace.png

The file is what `scripts/collect_traces.py` or the `file` exporter of the OpenTelemetry collector has written; the
evaluation is named by its id, by its trace's id, or `slowest`: the one that took longest from being asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from preceptor.tracing import evaluation_place

WHOLE = "evaluation"
COLOURS = {"teacher": "#b877d9", "orchestrator": "#5794f2", "evaluator": "#73bf69", "worker": "#ff780a"}
BACKGROUND, TEXT, FAINT = "#ffffff", "#1f2328", "#6a737d"
ROW_INCHES = 0.32


@dataclass(frozen=True, slots=True)
class Span:
    """One line of the picture; times in unix seconds."""

    trace_id: str
    id: str
    parent: str
    service: str
    name: str
    began: float
    ended: float
    error: str
    attributes: dict[str, str]


def read(file: Path) -> Iterator[Span]:
    """The spans of a file. Raises OSError, ValueError where it is none."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            for one in json.loads(line).get("resourceSpans", ()):
                service = _attributes(one["resource"]).get("service.name", "").removeprefix("preceptor-")
                for part in one["scopeSpans"]:
                    for span in part["spans"]:
                        yield Span(
                            span["traceId"],
                            span["spanId"],
                            span.get("parentSpanId", ""),
                            service,
                            span["name"],
                            int(span["startTimeUnixNano"]) / 1e9,
                            int(span["endTimeUnixNano"]) / 1e9,
                            span.get("status", {}).get("message", ""),
                            _attributes(span),
                        )


def _attributes(holder: dict[str, Any]) -> dict[str, str]:
    return {
        one["key"].removeprefix("preceptor."): str(next(iter(one["value"].values())))
        for one in holder.get("attributes", ())
    }


def chosen(spans: Sequence[Span], wanted: str) -> list[Span]:
    """The spans of the wanted evaluation. Raises LookupError where there is none."""
    if wanted == "slowest":
        whole = [span for span in spans if span.name == WHOLE and not span.error]
        if not whole:
            raise LookupError("the file has no evaluation that has come to its end")
        trace_id = max(whole, key=lambda span: span.ended - span.began).trace_id
    else:
        trace_id = evaluation_place(wanted).trace_id if wanted.startswith("eval") else wanted
    found = [span for span in spans if span.trace_id == trace_id]
    if not found:
        raise LookupError(f"the file has no span of {wanted}")
    return found


def in_order(spans: Sequence[Span]) -> list[tuple[int, Span]]:
    """Parents before their children, by time; with the depth of each."""
    children: dict[str, list[Span]] = {}
    known = {span.id for span in spans}
    for span in sorted(spans, key=lambda span: (span.began, -span.ended)):
        children.setdefault(span.parent if span.parent in known else "", []).append(span)
    rows: list[tuple[int, Span]] = []

    def visit(parent: str, depth: int) -> None:
        for span in children.get(parent, ()):
            rows.append((depth, span))
            if span.id != parent:
                visit(span.id, depth + 1)

    visit("", 0)
    return rows


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    if not seconds:
        return "0"
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def note(span: Span) -> str:
    """What is worth saying beside the bar."""
    told = span.attributes
    parts = [duration(span.ended - span.began)]
    if "reward" in told:
        parts.append(f"reward {float(told['reward']):+.3f} ± {float(told['reward_stderr']):.3f}")
    if "trials" in told:
        parts.append(
            f"{told['trials']} trials of {told['evaluations']} evaluations on {told['worker']} ({told['device']})"
        )
    if "round" in told:
        parts.append(f"round {told['round']} of {told['run']}")
    return ", ".join([*parts, span.error] if span.error else parts)


def draw(spans: Sequence[Span], out: Path) -> None:
    """The waterfall as a PNG."""
    rows = in_order(spans)
    first, last = min(span.began for span in spans), max(span.ended for span in spans)
    whole = max(last - first, 1e-6)
    figure, axes = plt.subplots(figsize=(14, 1.3 + ROW_INCHES * len(rows)), facecolor=BACKGROUND, dpi=90)
    for row, (depth, span) in enumerate(rows):
        start, length = span.began - first, span.ended - span.began
        colour = "#d73a49" if span.error else COLOURS.get(span.service, FAINT)
        axes.barh(row, max(length, whole / 900), left=start, height=0.62, color=colour)
        axes.text(-0.01 * whole, row, f"{span.service}  ", ha="right", va="center", fontsize=8, color=FAINT)
        axes.text(-0.40 * whole + 0.018 * whole * depth, row, span.name, va="center", fontsize=9, color=TEXT)
        words, after = note(span), start + max(length, whole / 900)
        inside = after > 0.62 * whole
        if inside and length > 0.45 * whole:
            axes.text(start + 0.008 * whole, row, words, va="center", fontsize=8, color="#ffffff")
        elif inside:
            axes.text(start - 0.006 * whole, row, words, va="center", ha="right", fontsize=8, color=TEXT)
        else:
            axes.text(after + 0.006 * whole, row, words, va="center", fontsize=8, color=TEXT)
    axes.set_xlim(-0.41 * whole, 1.01 * whole)
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_yticks([])
    axes.set_xticks([whole * part / 4 for part in range(5)], [duration(whole * part / 4) for part in range(5)])
    axes.tick_params(colors=FAINT, labelsize=8, length=0)
    axes.grid(axis="x", color="#e1e4e8", lw=0.8)
    axes.set_axisbelow(True)
    for edge in axes.spines.values():
        edge.set_visible(False)
    name = next((span.attributes["evaluation"] for span in spans if span.name == WHOLE), "")
    axes.set_title(f"{name}   trace {spans[0].trace_id}", loc="left", fontsize=10, color=TEXT, x=0.007)
    figure.tight_layout()
    figure.savefig(out, facecolor=BACKGROUND)
    plt.close(figure)


def main() -> int:
    """Draws what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("evaluation", help="its id, its trace's id, or: slowest")
    parser.add_argument("out", type=Path, help="a .png")
    asked = parser.parse_args()
    try:
        draw(chosen(list(read(asked.file)), asked.evaluation), asked.out)
    except (OSError, LookupError, ValueError, KeyError) as error:
        print(f"{asked.file}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
