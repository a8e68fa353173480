"""Promises of the command line that need no stack: quick, light, and every error a message with its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from preceptor import __version__
from preceptor.cli import main
from preceptor.config import load_config

GOOD = 'name = "mine"\n\n[tasks]\nworld = "almanac"\ntrain = 6\nheldout = 3\n'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test in a folder of its own, with no settings of the person who runs it."""
    for name in list(os.environ):
        if name.startswith("PRECEPTOR_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.write_text(text, encoding="utf-8")
    return path


def test_help_answers_in_under_a_second() -> None:
    began = os.times()
    answer = subprocess.run(
        [sys.executable, "-m", "preceptor", "--help"], capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    ended = os.times()
    # Its own time, not that of what else runs on this machine.
    assert ended.children_user + ended.children_system - began.children_user - began.children_system < 1
    for command in ("run", "up", "runs", "students", "tasks", "doctor"):
        assert f"\n  {command} " in answer.stdout


def test_no_command_brings_torch_celery_or_sqlalchemy_into_the_process() -> None:
    write("c.toml", GOOD)
    code = (
        "import sys; from preceptor.cli import main\n"
        "main(['run', 'c.toml', '--dry-run']); main(['runs', 'list']); main(['students', 'list'])\n"
        "import preceptor.cli.run, preceptor.cli.runs, preceptor.cli.checks, preceptor.cli.session, preceptor.stack\n"
        "import preceptor.cli.live, preceptor.cli.summary\n"
        "print('loaded:', sorted({'torch', 'transformers', 'celery', 'sqlalchemy'} & set(sys.modules)))\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PRECEPTOR_ORCHESTRATOR_ADDRESS": "127.0.0.1:1",
        "PRECEPTOR_STUDENT_ADDRESS": "127.0.0.1:1",
    }
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    assert answer.stdout.splitlines()[-1] == "loaded: []"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"preceptor, version {__version__}\n"


def test_an_unknown_command_or_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fly"]) == 2
    assert main(["run", "c.toml", "--fast"]) == 2
    assert main(["run", "c.toml", "--workers", "0"]) == 2
    assert main(["up", "--port", "70000"]) == 2
    assert "No such command 'fly'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        (None, [], "error: c.toml: there is no config file c.toml\n  next: check the path"),
        (GOOD.replace("train", "trane"), [], "error: c.toml:5: unknown key tasks.trane [tasks.trane]\n  next: "),
        (GOOD.replace("6", "0"), [], "error: c.toml:5: tasks.train: Input should be greater than or equal to 1"),
        (GOOD.replace("= 6", "="), [], "error: c.toml:5: is not valid TOML: "),
        (GOOD, ["--set", "seed=-1"], "error: --set seed=-1: Input should be greater than or equal to 0 (given: -1)"),
        (GOOD, ["--set", "tasks.world=", "--set", "tasks.path=x.json"], "error: x.json: there is no task file x.json"),
    ],
)
@pytest.mark.parametrize("command", [["run"], ["run", "--dry-run"], ["runs", "create"]])
def test_bad_input_is_one_message_with_its_place_and_nothing_is_started_or_written(
    text: str | None, arguments: list[str], said: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        write("c.toml", text)
    before = sorted(Path().iterdir())
    assert main([*command, "c.toml", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(said)
    assert "next: " in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert sorted(Path().iterdir()) == before


def test_a_task_file_with_faults_stops_a_run_and_names_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    write("c.toml", '[tasks]\npath = "t.jsonl"\n')
    write("t.jsonl", '{"context": "x", "questions": [{"question": "Who?"}]}\n{"context": " "\n')
    assert main(["run", "c.toml"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: t.jsonl: 2 problems\n"
        "  t.jsonl:1: is missing [questions[0].answer]\n"
        "  t.jsonl:2: is not valid JSON: Expecting ',' delimiter (column 16)\n"
        "  next: correct the named place; `preceptor tasks check FILE` lists all of them (BAD_TASK_FILE)"
    )


def test_with_json_an_error_is_also_a_line_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    write("c.toml", GOOD.replace("train", "trane"))
    assert main(["run", "c.toml", "--json"]) == 2
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert error["reason"] == "BAD_CONFIG"
    assert error["place"] == {"file": "c.toml", "line": "5", "field": "tasks.trane"}
    assert error["next_step"] in captured.err


def test_the_traceback_is_shown_on_demand(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECEPTOR_DEBUG", "1")
    assert main(["run", "nowhere.toml"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bad_environment_variable_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECEPTOR_LOG_LEVEL", "LOUD")
    assert main(["runs", "list"]) == 2
    assert "environment variable PRECEPTOR_LOG_LEVEL: Input should be 'DEBUG'" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    write("c.toml", GOOD)
    write("taken", "something")
    assert main(["run", "c.toml", "--out", "taken"]) == 2
    assert capsys.readouterr().err.startswith("error: taken: results cannot be written there: ")
    assert Path("taken").read_text() == "something"


def test_connect_and_workers_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "c.toml", "--connect", "--workers", "2"]) == 2
    assert "does not go with --connect" in capsys.readouterr().err


def test_dry_run_prints_toml_that_reads_back_as_the_same_config(capsys: pytest.CaptureFixture[str]) -> None:
    strategy = '\n[[heldout.fixed_strategies]]\nprompt_format = "open"\nlearning_rate = 1e-5\nepochs = 2\n'
    path = write("c.toml", GOOD + strategy * 2 + '\n[training]\nloss_marker = "A\\u007f\\"\\\\:"\n')
    assert main(["run", "c.toml", "--set", "seed=4", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "# tasks: 6 to train on, 3 held out" in printed
    assert tomllib.loads(printed)["seed"] == 4
    assert load_config(write("again.toml", printed)) == load_config(path, ["seed=4"])
    assert sorted(Path().iterdir()) == [Path("again.toml"), Path("c.toml")]


def test_dry_run_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    path = write("c.toml", GOOD)
    assert main(["run", "c.toml", "--dry-run", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["config_sha256"] == load_config(path).digest()
    assert (len(printed["tasks"]["train"]), len(printed["tasks"]["heldout"])) == (6, 3)


def test_tasks_check_lists_passages_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    question = {"question": "Where?", "answer": "Lisbon"}
    write("t.json", json.dumps([{"title": "\x1b[31mAda", "context": "Ada lives.", "questions": [question] * 2}]))
    assert main(["tasks", "check", "t.json"]) == 0
    captured = capsys.readouterr()
    assert "1 passages, 1 questions, 0 problems" in captured.out
    assert "note: t.json:1: 'Where?' is asked twice and read once" in captured.out
    assert "\x1b" not in captured.out
    assert captured.err == ""


def test_how_questions_come_to_their_banks_is_shown_before_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    def asked(count: int, **more: str) -> list[dict[str, str]]:
        return [{"question": f"Which fact {n}?", "answer": "x", **more} for n in range(count)]

    own = [
        {"title": "A", "context": "About a.", "questions": asked(5)},
        {"title": "B", "context": "About b.", "questions": asked(2, bank="reward")},
    ]
    write("t.json", json.dumps(own))
    assert main(["tasks", "check", "t.json"]) == 0
    shown = capsys.readouterr().out
    assert "3 reward, 1 gate, 1 sealed (to be divided)" in shown
    assert "2 reward" in shown
    assert main(["tasks", "check", "t.json", "--json"]) == 0
    passages = json.loads(capsys.readouterr().out)["passages"]
    assert [one["banks"] for one in passages] == [
        {"reward": 3, "gate": 1, "sealed": 1},
        {"reward": 2, "gate": 0, "sealed": 0},
    ]
    write("c.toml", '[tasks]\npath = "t.json"\nheldout = 0\n')
    assert main(["run", "c.toml", "--dry-run", "--set", "seed=4"]) == 0
    how = "named in the file for 1 passages, divided once by seed 4 for 1"
    assert f"# banks of questions: {how}\n" in capsys.readouterr().out
    assert main(["run", "c.toml", "--dry-run", "--set", "seed=4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["banks"] == how


def test_tasks_check_names_every_problem_and_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    write("t.json", json.dumps([{"context": "", "questions": []}, 3], indent=1))
    assert main(["tasks", "check", "t.json"]) == 2
    assert capsys.readouterr().err.splitlines()[:3] == [
        "error: t.json:3: is empty [[0].context]",
        "error: t.json:4: is empty: a passage needs at least one question [[0].questions]",
        "error: t.json:6: must be an object, is a number [[1]]",
    ]
    assert main(["tasks", "check", "t.json", "--json"]) == 2
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 3
    assert main(["tasks", "check", "nowhere.json"]) == 2
    assert "there is no task file nowhere.json" in capsys.readouterr().err
