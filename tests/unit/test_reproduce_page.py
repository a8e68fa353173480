"""docs/reproduce.md is made of result files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from preceptor import arms
from preceptor.reproduce.experiment import Findings
from preceptor.reproduce.report import SCHEMA
from preceptor.reproduce.runs import section
from scripts import write_reproduce_page as writer
from tests.unit.test_reproduce_table import SHARES, summary, written


def results(shares: dict[str, float]) -> Any:
    findings = Findings(
        title="Knowledge", about="About.", sections=[section("s", "Student s", {0: summary(0, shares)})]
    )
    return json.loads(written(findings)["results.json"])


def test_the_page_is_what_the_result_files_say() -> None:
    assert writer.PAGE.read_text(encoding="utf-8") == writer.page(writer.read())


def test_every_picture_on_the_page_is_there_and_every_result_file_is_readable() -> None:
    page = writer.PAGE.read_text(encoding="utf-8")
    for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
        assert (writer.DOCS / target).is_file(), target
    for of in writer.read():
        assert of["schema"] == SCHEMA
        assert f"`{of['command']}`" in page


def test_the_page_says_where_the_trained_teacher_was_no_better() -> None:
    (lost,) = writer.failed(results({**SHARES, arms.FIXED: 0.8}))
    assert lost == "Student s: the trained teacher was worse than best fixed strategy (−10.0) (points)."
    (won,) = writer.failed(results(SHARES))
    assert won.startswith("No simpler arm was as good")
    assert writer.failed({"sections": [], "failures": []}) == []  # no arms, no claim about them


def test_results_are_taken_over_with_their_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "RESULTS", tmp_path / "docs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "knowledge-old.svg").write_text("<svg/>")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text(json.dumps(results(SHARES)))
    (tmp_path / "out" / "s-arms.svg").write_text("<svg/>")
    writer.take(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == ["knowledge-s-arms.svg", "knowledge.json"]
    page = writer.page(writer.read())
    assert "(reproduce/knowledge-s-arms.svg)" in page
    assert "transfer, continual: no result file is there" in page
