from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from orchestrator.entries import round_stage
from orchestrator.report import ReportRenderer
from orchestrator.results import Results
from orchestrator.summary import build_summary
from preceptor.v1 import types_pb2 as types
from tests.unit.test_summary import FAILED, arm, entry, full, measured, results

INJECTION = '<script>alert(1)</script><img src=x onerror="alert(2)">\'"&{{ 7 * 7 }}'


class Page(HTMLParser):
    """The tags of a page, its texts, and whatever it would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.fetched += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def page(of: Results) -> tuple[str, Page]:
    html = ReportRenderer().render(of, build_summary(of))
    return html, Page(html)


def test_the_report_shows_the_numbers_and_says_where_they_come_from() -> None:
    _, shown = page(full())
    for words in (
        "75.0%",
        "+35.0",
        "no_edit".replace("_", " "),
        "student first",
        "seed 0",
        "TRIAL_LOST",
        "no document",
    ):
        assert words in shown.text
    assert "Self-edits that earned most" in shown.text


def test_the_report_fetches_nothing_and_runs_nothing() -> None:
    html, shown = page(full())
    assert "script" not in shown.tags
    assert all(target.startswith("#") for target in shown.fetched)  # within the pictures
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", html)
    assert "default-src 'none'" in html


def test_texts_of_tasks_and_teachers_are_shown_as_text() -> None:
    of = full()
    evil_task = types.Task.FromString(of.plan.tasks[0].SerializeToString())
    evil_task.passage.title = evil_task.passage.text = INJECTION
    evil_task.labels["genre"] = INJECTION
    evil_edit = types.SelfEdit(documents=[INJECTION])
    lines = [
        replace(line, self_edit=evil_edit, malformed=line.malformed and INJECTION) if line.key.task in (0, 1) else line
        for line in of.rounds[0].entries
    ]
    lines = [replace(line, task_id=evil_task.id) for line in lines]
    evil = replace(
        of,
        run=replace(of.run, name=INJECTION),
        plan=replace(of.plan, tasks=(evil_task, *of.plan.tasks[1:])),
        rounds=(replace(of.rounds[0], entries=tuple(lines)),),
        all_entries=tuple(lines),
    )
    html, shown = page(evil)
    assert "script" not in shown.tags
    assert "img" not in shown.tags
    assert not any(target.startswith("on") for target in shown.fetched)
    assert "49" not in re.findall(r"alert\(2\).{0,30}", html)
    assert shown.text.count("alert(1)") >= 4  # title, text, document, run's name


def test_pictures_take_their_colours_from_the_page_and_are_named_for_those_who_do_not_see_them() -> None:
    html, _ = page(full())
    pictures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(pictures) == 3
    for picture in pictures:
        root = ET.fromstring(picture)
        assert root.get("role") == "img"
        names = [child.tag.rpartition("}")[2] for child in root][:2]
        assert names == ["title", "desc"]
        colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", picture))
        assert not colours - {"#ffffff"}, "a colour that dark mode cannot change"
        assert "var(--" in picture
    assert "prefers-color-scheme: dark" in html
    assert 'lang="en"' in html


def test_the_same_results_give_the_same_page() -> None:
    assert page(full())[0] == page(full())[0]


@pytest.mark.parametrize(
    "of",
    [
        results([], tasks=()),
        results([], [[entry(round_stage(1), "", 0, evaluation=FAILED)]]),
        results([], [[entry(round_stage(1), "", 0, malformed="no document", self_edit=None)]], tasks=()),
        results([], [[entry(round_stage(1), "", 0, evaluation=measured(0.5))]], tasks=()),
        results([*arm("trained_teacher", 0.5), *arm("untrained_teacher", 0.5)]),
    ],
    ids=["nothing", "only a failure", "only malformed", "one reward", "two arms"],
)
def test_a_poor_run_has_a_page_too(of: Results) -> None:
    html, shown = page(of)
    assert "Where the time went" in shown.text
    assert not re.search(r">[^<]*\bnan\b[^<]*<", html.partition("</style>")[2])


def test_a_gain_that_could_be_chance_is_not_called_one() -> None:
    _, shown = page(results([*arm("trained_teacher", 0.5), *arm("untrained_teacher", 0.5)]))
    assert "includes 0" in shown.text
    assert "Nothing was gained over the untrained teacher" in shown.text
