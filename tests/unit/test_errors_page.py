"""The page of errors says what the catalogue says."""

from __future__ import annotations

import runpy
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_page_is_what_the_generator_makes_of_the_catalogue() -> None:
    made = runpy.run_path(str(REPOSITORY / "scripts" / "generate_errors_page.py"))["page"]()
    assert (REPOSITORY / "docs" / "errors.md").read_text(encoding="utf-8") == made, (
        "run: python scripts/generate_errors_page.py"
    )
