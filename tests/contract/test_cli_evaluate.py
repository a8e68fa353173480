"""``preceptor evaluate`` against services over real gRPC."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preceptor.cli import main
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import student_pb2 as students
from preceptor.v1 import types_pb2 as types
from tests.contract.cli_services import Services

REPOSITORY = Path(__file__).parents[2]
QUESTIONS = {
    "In which city has Ada settled?": "Rome",
    "Which trade feeds Ada today?": "baker",
    "What instrument can Ada play?": "harp",
    "What animal lives with Ada?": "dove",
    "Who went to school with her?": "Bela",
    "Which colour has the front door?": "green",
    "In which month was she born?": "May",
    "What does she drink at noon?": "tea",
}
TASK: dict[str, Any] = {
    "title": "Ada",
    "context": "Ada in Rome: baker, harp, dove, Bela, green, May, tea.",
    "questions": [
        *({"question": text, "answer": answer} for text, answer in QUESTIONS.items()),
        {"question": "What does Ada hide?", "answer": "dove", "bank": "sealed"},
    ],
}
ALL = "Ada: Rome. Ada: baker.\nAda: harp. Ada: dove.\nAda: Bela, green, May, tea.\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PRECEPTOR_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    Path("t.json").write_text(json.dumps([TASK]))
    Path("all.txt").write_text(ALL)
    Path("half.txt").write_text("directive: epochs=2\nAda: Rome.\nAda: baker.\nAda: Bela, green.\n")
    Path("shaky.txt").write_text("shaky\n" + ALL)
    Path("none.txt").write_text("Nothing to see.\n")
    Path("broken.txt").write_text("broken\n")


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    with Services() as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        student = students.Student(name="mine", active=True)
        student.pinned.name, student.pinned.source, student.pinned.commit = "mine", "/models/mine", "c0ffee"
        made.students.students["mine"] = student
        made.students.active = "mine"
        yield made


def evaluate(*arguments: str, task: tuple[str, ...] = ("--task", "t.json")) -> int:
    return main(["evaluate", "--connect", *task, *arguments])


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    evaluate("--json", *arguments)
    return json.loads(capsys.readouterr().out)


def test_self_edits_are_measured_beside_controls_and_compared(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--self-edit", "all.txt", "half.txt", "none.txt") == 0
    (request,) = services.evaluator.created
    assert request.student.name == "mine"
    assert not request.task.reference_edits
    assert [edit.documents[0] for edit in request.self_edits] == [
        "Ada: Rome. Ada: baker.",
        "Ada: Rome.",
        "Nothing to see.",
        "Ada in Rome: baker, harp, dove, Bela, green, May, tea.",
    ]
    assert request.self_edits[1].directive.epochs == 2
    assert len(set(request.protocol.seeds)) == 3
    assert (request.protocol.weights.gain, request.protocol.weights.overlap) == (1.0, 1.0)
    out = capsys.readouterr().out
    for part in (
        "Ada: 8 reward questions, 0 retention probes; student mine; grader exact; 3 seeds",
        "0.0% -> 100.0%",
        "0.0% -> 50.0%",
        "all beats none: +1.000 ± 0.000",
        "all beats half: +0.500 ± 0.189 (seeds alone ± 0.000)",
        "all is not told apart from raw passage: +0.000",
        "all beats no edit: +1.000",
        "doubt: 8 questions: a single one is worth 0.125 of accuracy",
        "doubt: no retention probes were asked",
    ):
        assert part in out
    assert "one seed" not in out


def test_the_report_for_programs_has_everything_and_stdout_has_nothing_else(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluated(capsys, "--self-edit", "half.txt", "shaky.txt", "--questions", "--seeds", "8")
    assert report["schema"] == "preceptor.evaluate/1"
    half, shaky = report["self_edits"]
    assert half["directive"] == {"epochs": 2}
    assert half["reward"]["value"] == 0.5
    assert (half["reward"]["seed_stderr"], half["reward"]["accuracy"]) == (0, 0.5)
    assert half["overlap"]["answers_stated"] == 4
    assert [trial["correct"] for trial in half["trials"]] == [[True, True, False, False] * 2] * 8
    assert shaky["reward"]["seed_stderr"] > 0
    assert [one["name"] for one in report["controls"]] == ["raw passage"]
    assert [question["answer"] for question in report["questions"]] == list(QUESTIONS.values())
    assert report["best"] in ("half", "shaky")
    assert 0 <= report["reliability"] <= 1
    assert {made["other"] for made in report["differences"]} >= {"raw passage", "no edit"}
    assert len(report["seeds"]) == 8
    assert report["baseline"]["correct"] == [False] * 8


def test_what_is_known_is_not_measured_again(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    first = evaluated(capsys, "--self-edit", "all.txt")
    again = evaluated(capsys, "--self-edit", "all.txt")
    assert (first["evaluations"]["cached"], again["evaluations"]["cached"]) == (0, 2)
    assert first["self_edits"][0]["reward"] == again["self_edits"][0]["reward"]
    assert evaluate("--self-edit", "all.txt") == 0
    assert "2 evaluations were known already" in capsys.readouterr().out


def test_a_race_looks_first_and_gives_seeds_only_where_it_must(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["--set", "reward.race.look_steps=4", "--set", "reward.fresh_seeds=2"]
    report = evaluated(capsys, "--race", *sets, "--self-edit", "none.txt", "all.txt", "half.txt", "all.txt")
    look, first, *_, controls, fresh = services.evaluator.created
    assert look.protocol.answers.logprobs_only
    assert look.protocol.training.max_steps == 4
    assert (len(look.self_edits), len(look.protocol.seeds)) == (3, 1)  # the one that was given twice races once
    assert len(first.self_edits) == 2
    assert look.protocol.seeds[:] == first.protocol.seeds[:] == controls.protocol.seeds[:1]
    assert len(fresh.self_edits) == 1
    assert not set(fresh.protocol.seeds) & set(controls.protocol.seeds)
    nothing, everything, half, twin = report["self_edits"]
    assert (nothing["stopped"], nothing["reward"], nothing["failure"]) == (True, None, None)
    assert everything["evaluation_id"] == twin["evaluation_id"] != half["evaluation_id"]
    assert everything["fresh"]["seeds"] == 2
    assert report["best"] == "all.txt"
    assert report["race"]["max_seeds"] == 3
    assert evaluate("--race", *sets, "--self-edit", "none.txt", "all.txt", "half.txt") == 0
    out = capsys.readouterr().out
    assert "stopped" in out
    assert "all on 2 fresh seeds, which had no part in choosing it: +1.000 ± 0.000" in out


def test_a_failure_has_its_reason_and_next_step_and_the_others_their_rewards(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--self-edit", "broken.txt", "all.txt") == 2
    captured = capsys.readouterr()
    assert "error: broken: the loss is not a number\n  next: lower the learning rate (TRIAL_DIVERGED)" in captured.err
    assert "all beats no edit" in captured.out
    report = evaluated(capsys, "--self-edit", "broken.txt", "--no-controls")
    assert report["self_edits"][0]["failure"]["reason"] == "TRIAL_DIVERGED"
    assert (report["best"], report["baseline"], report["doubts"]) == (None, None, [])
    assert evaluate("--self-edit", "broken.txt", "--no-controls", "--questions") == 2


def test_each_question_is_shown_with_what_it_came_to(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--self-edit", "half.txt", "--questions", "--no-controls") == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if "In which city has Ada settled?" in line)
    assert lines[at].split()[-4:] == ["no", "edit", "-", "-3.00"]
    assert lines[at + 1].split() == ["half", "+++", "-0.50"]


def test_a_self_edit_that_copies_the_questions_is_named(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    Path("exam.json").write_text(json.dumps({"documents": ["In which city has Ada settled? Rome"]}))
    report = evaluated(capsys, "--self-edit", "exam.json")
    assert report["self_edits"][0]["overlap"]["copied"] == 1
    assert any("exam has 1 of 8 questions nearly word for word" in doubt for doubt in report["doubts"])


def test_each_look_at_sealed_questions_is_counted_and_said(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    for times in (1, 2):
        report = evaluated(capsys, "--self-edit", "all.txt", "--bank", "sealed")
        assert report["sealed_openings"] == times
    assert services.evaluator.created[0].protocol.bank == types.QUESTION_BANK_SEALED
    assert any("have been opened 2 times" in doubt for doubt in report["doubts"])


def test_the_world_brings_probes_replay_and_shuffled_facts(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--json", "--self-edit", "all.txt", task=("--world", "almanac:2")) == 0
    report = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in report["controls"]] == ["raw passage", "shuffled facts"]
    assert report["task"]["probes"] == 32
    (request,) = services.evaluator.created
    assert request.protocol.replay_documents
    assert not any("retention" in doubt for doubt in report["doubts"])


def test_settings_and_tasks_may_come_from_a_config(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.toml").write_text(
        '[tasks]\npath = "t.json"\n[training]\nepochs = 3\n[reward]\nseeds = 5\ngrader = "lexical"\n'
    )
    assert evaluate("--config", "c.toml", "--self-edit", "all.txt", task=()) == 0
    (request,) = services.evaluator.created
    assert (request.protocol.training.epochs, request.protocol.grader) == (3, "lexical")
    assert len(request.protocol.seeds) == 5
    arguments = ["--config", "c.toml", "--set", "training.epochs=4", "--grader", "exact", "--seeds", "1"]
    report = evaluated(capsys, *arguments, "--self-edit", "all.txt")
    assert report["config"]["training"]["epochs"] == 4
    assert report["grader"] == "exact"
    assert any(doubt.startswith("one seed:") for doubt in report["doubts"])


def test_the_report_is_written_and_that_it_can_be_is_known_before_anything_is_asked(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--self-edit", "all.txt", "--out", "deep/er/report.json") == 0
    assert json.loads(Path("deep/er/report.json").read_text())["best"] == "all"
    assert "all beats no edit" in capsys.readouterr().out
    asked = len(services.evaluator.created)
    assert evaluate("--self-edit", "all.txt", "--out", "all.txt/report.json") == 2
    assert "(OUTPUT_NOT_WRITABLE)" in capsys.readouterr().err
    assert len(services.evaluator.created) == asked


def test_a_watch_that_breaks_is_opened_again(services: Services) -> None:
    services.evaluator.cuts = 3
    assert evaluate("--self-edit", "all.txt") == 0


def test_waiting_ends_and_nothing_goes_on_unwanted(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    services.evaluator.holds = True
    assert evaluate("--self-edit", "all.txt", "--timeout", "3") == 2
    err = capsys.readouterr().err
    assert "0 of 2 evaluations after 3 s; no worker is alive" in err
    assert services.evaluator.cancelled == [services.evaluator.created[0].owner]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_cancels_what_was_asked_for(services: Services, number: signal.Signals, code: int) -> None:
    services.evaluator.holds = True
    process = subprocess.Popen(
        [sys.executable, "-m", "preceptor", "evaluate", "--task", "t.json", "--self-edit", "all.txt"],
        env={**os.environ, **services.environment, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert services.evaluator.watched.wait(30)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert "Traceback" not in err
    assert out == ""
    assert services.evaluator.cancelled == [services.evaluator.created[0].owner]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "t.json"], "give at least one --self-edit FILE"),
        (["--self-edit", "all.txt"], "give --task FILE or --world almanac:N"),
        (["--task", "t.json", "--world", "almanac", "--self-edit", "all.txt"], "give --task or --world, not both"),
        (["--world", "almanac:2", "--passage", "3", "--self-edit", "all.txt"], "leave out --passage"),
        (["--world", "oz", "--self-edit", "all.txt"], "'oz' is not almanac or almanac:NUMBER"),
        (["--world", "almanac:", "--self-edit", "all.txt"], "'almanac:' is not almanac or almanac:NUMBER"),
        (["--world", "almanac:x", "--self-edit", "all.txt"], "'x' is no number"),
        (["--world", "almanac:0", "--self-edit", "all.txt"], "'0' is no number"),
        (["--task", "nope.json", "--self-edit", "all.txt"], "there is no task file nope.json"),
        (["--task", "all.txt", "--self-edit", "all.txt"], "all.txt: is neither .json nor .jsonl nor a folder"),
        (["--task", "t.json", "--self-edit", "nope.txt"], "there is no file nope.txt"),
        (["--task", "t.json", "--passage", "Bob", "--self-edit", "all.txt"], "t.json: has no passage 'Bob'"),
        (["--task", "t.json", "--bank", "gate", "--self-edit", "all.txt"], "no question in the bank gate, only in"),
        (["--task", "t.json", "--self-edit", "all.txt", "--seeds", "0"], "0 is not in the range 1<=x<=64"),
        (["--task", "t.json", "--self-edit", "all.txt", "--grader", "oracle"], '--set reward.grader="oracle"'),
        (["--task", "t.json", "--self-edit", "all.txt", "--set", "reward.gain=much"], "[reward.gain]"),
        (["--task", "t.json", "--self-edit", "all.txt", "--student", "nobody"], "there is no student 'nobody'"),
        (["--task", "t.json", "--self-edit", "all.txt", "--config", "no.toml"], "there is no config file no.toml"),
        (["--task", "t.json", "--self-edit", "all.txt", "--set", "answers.max_new_tokens=0"], "max_new_tokens"),
    ],
)
def test_bad_input_is_told_with_its_place_and_nothing_is_asked(
    services: Services, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--connect", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not services.evaluator.created


def test_without_a_stack_connect_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECEPTOR_EVALUATOR_ADDRESS", "127.0.0.1:1")
    assert evaluate("--self-edit", "all.txt") == 2
    assert "error: no evaluator answers at 127.0.0.1:1\n  next: start it with `preceptor up`" in capsys.readouterr().err


def test_errors_are_json_for_programs(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.json").write_text('{"documents": [3]}')
    assert evaluate("--json", "--self-edit", "bad.json") == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["reason"] == "BAD_SELF_EDIT"
    assert error["place"] == {"file": "bad.json", "line": "1", "field": "documents[0]"}


def test_an_evaluation_that_somebody_cancelled_is_no_reward(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(capsys, "--self-edit", "all.txt")
    for evaluation in services.evaluator.known.values():
        evaluation.ClearField("reward")
        evaluation.state = pb.EVALUATION_STATE_CANCELLED
    assert evaluate("--self-edit", "all.txt") == 2
    assert "error: all: it was cancelled" in capsys.readouterr().err


def test_what_holds_for_these_questions_only_is_said_to(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    Path("more.txt").write_text(ALL.replace("tea", "wine"))
    report = evaluated(capsys, "--self-edit", "all.txt", "more.txt")
    doubt = (
        "all is not told apart from more, but for these very questions: it would take about 31 like them to say more"
    )
    assert doubt in report["doubts"]
    task = {**TASK, "questions": TASK["questions"][:4]}
    named = [{"bank": "reward", **question} for question in task["questions"]]
    Path("t.json").write_text(json.dumps([{**task, "questions": named}]))
    report = evaluated(capsys, "--self-edit", "all.txt", "none.txt")
    assert not any(made["clear"] for made in report["differences"])
    assert any("fewer than 6 tell nothing apart" in doubt for doubt in report["doubts"])


def test_where_nothing_differs_nothing_is_made_of_it(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    Path("idle.txt").write_text("Nothing at all.\n")
    report = evaluated(capsys, "--self-edit", "none.txt", "idle.txt", "--no-controls")
    assert report["reliability"] is None
    assert "none is not told apart from idle, no edit: no difference was seen on these questions" in report["doubts"]
    assert not any("chosen on the seeds" in doubt for doubt in report["doubts"])
