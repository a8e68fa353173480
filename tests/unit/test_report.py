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
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import types_pb2 as types
from tests.unit.test_summary import FAILED, arm, entry, full, measured, race_round, results, seeded

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
    assert len(pictures) == 5  # arms, differences, rewards, the last round's groups, time
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
        race_round({"look_steps": 5}),
        results([], [[entry(round_stage(1), "", 0, look=seeded({1: 0.1}, "l"), stopped=True)]], tasks=()),
    ],
    ids=["nothing", "only a failure", "only malformed", "one reward", "two arms", "a race", "only a look"],
)
def test_a_poor_run_has_a_page_too(of: Results) -> None:
    html, shown = page(of)
    assert "Where the time went" in shown.text
    assert not re.search(r">[^<]*\bnan\b[^<]*<", html.partition("</style>")[2])


def test_a_gain_that_could_be_chance_is_not_called_one() -> None:
    _, shown = page(results([*arm("trained_teacher", 0.5), *arm("untrained_teacher", 0.5)]))
    assert "includes 0" in shown.text
    assert "Nothing was gained over the untrained teacher" in shown.text


def test_a_race_shows_who_was_stopped_the_looks_and_the_fresh_rewards() -> None:
    html, shown = page(race_round({"look_steps": 5}))
    assert len(re.findall(r"<svg", html)) == 4  # rewards, looks, groups, time
    assert "those left after a look" in html
    assert "measured again on fresh seeds" in shown.text
    assert "that are fresh (+0.500 when it was chosen)" in shown.text  # the only one among the best
    assert shown.text.count("mean first look, nats") >= 1


def test_an_example_says_what_it_has_of_the_questions() -> None:
    copied = evaluator.OverlapAudit(copied=1, exam_form=1, answers_stated=3, examples=[INJECTION])
    _, shown = page(
        results([], [[entry(round_stage(1), "", 0, evaluation=seeded({1: 0.1}, "x", overlap=copied))]], tasks=())
    )
    assert "Copies 1 of 4 questions, 1 with the answer behind them; states 3 of their answers." in shown.text
    assert "script" not in shown.tags
    _, unknown = page(full())
    assert "Overlap with the questions was not looked at." in unknown.text


def test_what_needed_no_labels_is_marked_wherever_a_reward_is_shown() -> None:
    of = results(arm("trained_teacher", 0.5), [[entry(round_stage(1), "", 0, evaluation=seeded({1: 0.1}, "x"))]])
    assert "label-free" not in page(of)[1].text.lower()
    for line in of.all_entries:
        assert line.evaluation is not None
        line.evaluation.reward.label_free = True
    html, _ = page(of)
    assert html.count('class="mark">label-free') >= 6  # title, held-out tile, reliability, arm, rounds, examples
    assert "mean label-free reward" in html


def test_the_reward_is_written_as_the_formula_that_makes_it() -> None:
    _, shown = page(full())
    assert "Reward = 1 × gain − 0.3 × retention loss − 1 × overlap" in shown.text


def test_a_difference_that_does_not_show_says_what_would_show_it() -> None:
    mixed = [
        entry("heldout", "trained_teacher", task, evaluation=measured(1.0 if task % 2 else 0.25, name=f"t{task}"))
        for task in range(12)
    ]
    _, shown = page(results([*arm("untrained_teacher", 0.5), *mixed]))
    assert "to see a difference of this size: about 312 questions (78 passages)" in shown.text


def test_the_wrong_facts_control_is_read_the_other_way_round() -> None:
    assert (
        "as it must be: at chance" in page(results([*arm("trained_teacher", 0.5), *arm("shuffled_facts", 0.0)]))[1].text
    )
    learnt = page(results([*arm("trained_teacher", 0.5), *arm("shuffled_facts", 0.75)]))[1].text
    assert "wrong facts teach something" in learnt
