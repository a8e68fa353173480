"""Writes docs/errors.md from the error catalogue. Run it after adding a reason; a test fails until you do."""

from __future__ import annotations

from pathlib import Path

from preceptor.errors import CATALOGUE

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"


def page() -> str:
    """The page's text."""
    rows = [f"| `{reason}` | {entry.code.name} | {entry.next_step} |" for reason, entry in sorted(CATALOGUE.items())]
    return "\n".join(
        [
            "# Errors",
            "",
            "Every error has a reason. A service sends it as `google.rpc.ErrorInfo` (domain `preceptor`) beside the",
            "gRPC status, the Python client raises it as `preceptor.errors.PreceptorError`, and the command line",
            "prints it with its place and the next step and ends with 2. Made by `scripts/generate_errors_page.py`.",
            "",
            "| reason | gRPC status | what to do |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
