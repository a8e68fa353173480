"""Writes the table of docs/observability.md from the catalogue of metrics. Run it after adding one; a test fails until
you do."""

from __future__ import annotations

from pathlib import Path

from preceptor.metrics import CATALOGUE, EVERYBODY, SERVICES

PAGE = Path(__file__).parents[1] / "docs" / "observability.md"
BEGIN, END = "<!-- metrics -->\n", "<!-- /metrics -->"


def table() -> str:
    """The table's text."""
    everywhere = {EVERYBODY: "all", SERVICES: "services"}
    rows = []
    for metric in CATALOGUE:
        labels = ", ".join(
            f"`{name}`" + (f" ({', '.join(values)})" if values else "") for name, values in metric.labels.items()
        )
        where = everywhere.get(metric.processes, ", ".join(metric.processes))
        rows.append(f"| `{metric.name}` | {metric.kind} | {where} | {labels} | {metric.help} |")
    return "\n".join(["| metric | kind | of | labels | what it tells |", "|---|---|---|---|---|", *rows, ""])


def page(text: str) -> str:
    """The page with the table as it is now."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
