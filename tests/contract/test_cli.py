"""The command line against services over real gRPC."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preceptor.channel import connect
from preceptor.cli import main
from preceptor.cli.follow import snapshots
from preceptor.config import load_config
from preceptor.convert import task_to_proto
from preceptor.errors import PreceptorError
from preceptor.task_sources import gather_tasks
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import orchestrator_pb2_grpc
from preceptor.v1 import student_pb2 as students
from tests.contract.cli_services import SUMMARY, Services

CONFIG = 'name = "mine"\n\n[tasks]\nworld = "almanac"\ntrain = 4\nheldout = 3\n'
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PRECEPTOR_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    Path("c.toml").write_text(CONFIG)


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    with Services() as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made


def printed_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


# -- run ---------------------------------------------------------------------------------------------------------------


def test_run_follows_to_the_end_and_writes_summary_and_report(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "c.toml", "--connect", "--set", "seed=3", "--out", "runs/mine"]) == 0
    (request,) = services.orchestrator.created
    assert (len(request.tasks), len(request.heldout_tasks)) == (4, 3)
    assert request.probes
    assert request.replay_documents
    assert json.loads(request.config_json)["seed"] == 3
    summary = json.loads(Path("runs/mine/summary.json").read_text())
    assert summary == {**SUMMARY, "run": "mine-1"}
    assert Path("runs/mine/report.html").read_text() == "<title>mine-1</title>"
    assert sorted(path.name for path in Path("runs/mine").iterdir()) == ["report.html", "summary.json"]
    out = capsys.readouterr().out
    for part in ("round 1: evaluating", "trained teacher", "trained is better than untrained", "runs/mine/report.html"):
        assert part in out


def test_run_with_json_prints_lines_and_ends_with_the_summary(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "c.toml", "--connect", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["event"] for line in lines} == {"message", "progress", "finished"}
    assert lines[-1]["state"] == "SUCCEEDED"
    assert lines[-1]["summary"]["heldout"] == SUMMARY["heldout"]
    assert Path(lines[-1]["summary_path"]).parent.name.startswith("mine-0-")
    assert Path(lines[-1]["report_path"]).is_file()


def test_run_survives_an_orchestrator_that_is_started_again(services: Services) -> None:
    services.orchestrator.breaks = 3
    assert main(["run", "c.toml", "--connect", "--out", "out"]) == 0


def test_a_failed_run_ends_with_2_its_reason_and_nothing_written(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    services.orchestrator.ends = pb.RUN_STATE_FAILED
    assert main(["run", "c.toml", "--connect", "--out", "out/here"]) == 2
    err = capsys.readouterr().err
    assert "error: run mine-1 failed: 9 of 10 evaluations failed" in err
    assert "next: look at the failures' reasons" in err
    assert not Path("out/here").exists()


def test_an_error_about_a_task_is_told_with_the_file_and_line_it_was_read_from(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"context": text, "questions": [{"question": "Who?", "answer": "Ada"}]} for text in ("One.", "Two.")]
    Path("t.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    config = load_config(Path("c.toml"), ["tasks.world=", "tasks.path=t.jsonl", "tasks.heldout=0"])
    second = next(task for task in gather_tasks(config).train if task.text == "Two.")
    services.orchestrator.ends = pb.RUN_STATE_FAILED
    services.orchestrator.failure = ("PASSAGE_TOO_LONG", f"task {task_to_proto(second).id} has 3000 tokens")
    arguments = ["--set", "tasks.world=", "--set", "tasks.path=t.jsonl", "--set", "tasks.heldout=0"]
    assert main(["run", "c.toml", "--connect", *arguments]) == 2
    assert "error: t.jsonl:2: run mine-1 failed: task task-" in capsys.readouterr().err


def test_a_cancelled_run_does_not_succeed(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    services.orchestrator.ends = pb.RUN_STATE_CANCELLED
    assert main(["run", "c.toml", "--connect"]) == 2
    assert "run mine-1 was cancelled" in capsys.readouterr().err


def test_what_the_orchestrator_refuses_is_told_with_its_field(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "c.toml", "--connect", "--set", "student.name=unknown"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no student 'unknown' [student.name]\n  next: ")
    assert sorted(Path().iterdir()) == [Path("c.toml"), Path("runs")]
    assert not list(Path("runs").iterdir())


def test_the_same_request_id_gives_the_same_run(services: Services) -> None:
    for _ in range(2):
        assert main(["run", "c.toml", "--connect", "--request-id", "once", "--out", "out"]) == 0
    assert len(services.orchestrator.created) == 1


def test_once_goes_on_with_the_run_of_this_config_and_another_config_is_another_run(services: Services) -> None:
    once = ("run", "c.toml", "--connect", "--once", "--out", "out")
    services.orchestrator.ends = pb.RUN_STATE_FAILED
    assert main(once) == 2
    services.orchestrator.ends = pb.RUN_STATE_SUCCEEDED
    assert main(once) == 0
    assert "ResumeRun" in services.orchestrator.calls
    assert main(once) == 0
    assert len(services.orchestrator.created) == 1
    assert main([*once, "--set", "seed=3"]) == 0
    assert len(services.orchestrator.created) == 2


def start(services: Services, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **services.environment, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, "-m", "preceptor", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_follower_leaves_the_run_of_another_stack_alone_and_says_how_to_go_on(
    services: Services, number: signal.Signals, code: int
) -> None:
    services.orchestrator.ends = None
    process = start(services, "run", "c.toml", "--connect", "--out", "out")
    assert services.orchestrator.watched.wait(30)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert "follow the run with: preceptor runs watch mine-1" in err
    assert "Traceback" not in err
    assert "CancelRun" not in services.orchestrator.calls
    assert not Path("out").exists()


def test_output_that_nobody_reads_ends_the_command_quietly(services: Services) -> None:
    process = start(services, "tasks", "check", "nowhere.json", "--json")
    assert process.stdout
    process.stdout.close()
    process.wait(20)
    assert process.stderr
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


def test_following_an_orchestrator_that_never_comes_back_ends() -> None:
    with Services() as services:
        services.orchestrator.ends = None
        services.orchestrator.add("run-1", pb.RUN_STATE_RUNNING)
        stub = connect(
            services.environment["PRECEPTOR_ORCHESTRATOR_ADDRESS"], orchestrator_pb2_grpc.OrchestratorServiceStub
        )
        following = snapshots(stub, "run-1", patience=0.5)
        assert next(following).run.id == "run-1"
    began = time.monotonic()
    with pytest.raises(PreceptorError) as caught:
        for _ in following:
            pass
    assert caught.value.reason in ("SERVICE_UNREACHABLE", "DEADLINE_EXCEEDED")
    assert time.monotonic() - began < 30


def test_following_hears_of_a_stack_that_has_failed(services: Services) -> None:
    services.orchestrator.ends = None
    services.orchestrator.add("run-1", pb.RUN_STATE_RUNNING)
    stub = connect(
        services.environment["PRECEPTOR_ORCHESTRATOR_ADDRESS"], orchestrator_pb2_grpc.OrchestratorServiceStub
    )
    failed: list[PreceptorError] = []

    def check() -> None:
        if failed:
            raise failed[0]

    following = snapshots(stub, "run-1", check)
    next(following)
    failed.append(PreceptorError("PROCESS_DIED", "worker-1 does not stay up"))
    with pytest.raises(PreceptorError, match="worker-1 does not stay up"):
        for _ in following:
            pass


# -- runs --------------------------------------------------------------------------------------------------------------


def test_runs_create_returns_at_once_and_list_and_show_tell_of_it(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    services.orchestrator.add("older", pb.RUN_STATE_SUCCEEDED)
    assert main(["runs", "create", "c.toml", "--set", "seed=9", "--json"]) == 0
    created = printed_json(capsys)
    assert (created["id"], created["state"], created["config"]["seed"]) == ("mine-2", "RUNNING", 9)
    assert main(["runs", "list", "--json"]) == 0
    assert [(run["id"], run["state"]) for run in printed_json(capsys)["runs"]] == [
        ("mine-2", "RUNNING"),
        ("older", "SUCCEEDED"),
    ]
    assert main(["runs", "show", "mine-2", "--json"]) == 0
    assert printed_json(capsys)["progress"]["phase"] == "round 1: evaluating"
    for arguments in (["runs", "list"], ["runs", "show", "mine-2"]):
        assert main(arguments) == 0
        assert "mine-2" in capsys.readouterr().out


def test_an_empty_list_says_what_to_do(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "list"]) == 0
    assert "no runs yet; `preceptor runs create CONFIG`" in capsys.readouterr().out


def test_runs_watch_follows_to_the_end(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    services.orchestrator.add("run-1", pb.RUN_STATE_RUNNING)
    assert main(["runs", "watch", "run-1"]) == 0
    assert "run run-1 succeeded" in capsys.readouterr().out
    services.orchestrator.add("run-2", pb.RUN_STATE_CANCELLED)
    assert main(["runs", "watch", "run-2"]) == 2


def test_runs_cancel(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    services.orchestrator.add("run-1", pb.RUN_STATE_RUNNING)
    assert main(["runs", "cancel", "run-1"]) == 0
    assert "run run-1 is CANCELLED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "asked"),
    [
        (pb.RUN_STATE_FAILED, ["ResumeRun"]),
        (pb.RUN_STATE_CANCELLED, ["ResumeRun"]),
        (pb.RUN_STATE_RUNNING, []),
        (pb.RUN_STATE_PENDING, []),
        (pb.RUN_STATE_SUCCEEDED, []),
    ],
)
def test_runs_resume_goes_on_from_any_state_and_writes_the_results(
    services: Services, state: pb.RunState.ValueType, asked: list[str]
) -> None:
    services.orchestrator.add("run-1", state)
    assert main(["runs", "resume", "run-1", "--out", "out"]) == 0
    assert services.orchestrator.calls == asked
    assert json.loads(Path("out/summary.json").read_text())["run"] == "run-1"


def test_runs_resume_may_return_at_once(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    services.orchestrator.ends = None
    services.orchestrator.add("run-1", pb.RUN_STATE_FAILED)
    assert main(["runs", "resume", "run-1", "--detach", "--json"]) == 0
    assert printed_json(capsys)["state"] == "PENDING"


def test_runs_report_writes_the_files(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    services.orchestrator.add("run-1", pb.RUN_STATE_SUCCEEDED)
    assert main(["runs", "report", "run-1", "--out", "deep/er", "--json"]) == 0
    assert printed_json(capsys)["summary"]["run"] == "run-1"
    assert Path("deep/er/report.html").is_file()
    services.orchestrator.add("run-2", pb.RUN_STATE_RUNNING)
    assert main(["runs", "report", "run-2", "--out", "other"]) == 2
    assert not Path("other").exists()


@pytest.mark.parametrize("command", ["show", "watch", "cancel", "resume", "report"])
def test_an_unknown_run_is_named(services: Services, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", command, "nope"]) == 2
    err = capsys.readouterr().err
    assert "error: there is no run 'nope' [run_id]\n  next: `preceptor runs list` shows the known ones" in err


# -- students ----------------------------------------------------------------------------------------------------------


def test_students_are_registered_listed_shown_and_activated(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("model").mkdir()
    assert main(["students", "list"]) == 0
    assert "no student is registered" in capsys.readouterr().out
    assert main(["students", "register", "mine", "--source", "model"]) == 0
    assert services.students.students["mine"].pinned.source == str(Path("model").resolve())
    assert main(["students", "register", "hub", "--source", "org/model", "--revision", "v1", "--json"]) == 0
    assert services.students.students["hub"].pinned.source == "org/model"
    capsys.readouterr()
    assert main(["students", "activate", "mine", "--wait"]) == 0
    captured = capsys.readouterr()
    assert "mine is active (ready)" in captured.out
    assert "mine: LOADING" in captured.err
    assert main(["students", "list", "--json"]) == 0
    listed = printed_json(capsys)["students"]
    assert [(student["name"], student["active"]) for student in listed] == [("mine", True), ("hub", False)]
    assert listed[0]["parameters"] == 1_500_000
    assert main(["students", "show", "--json"]) == 0
    assert printed_json(capsys)["versions"][0]["version"] == 1
    for arguments in (["students", "list"], ["students", "show", "mine"]):
        assert main(arguments) == 0
        assert "LlamaForCausalLM" in capsys.readouterr().out


def test_a_source_that_is_refused_is_told_with_the_next_step(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["students", "register", "mine", "--source", "hub/pickled"]) == 2
    assert capsys.readouterr().err == (
        "error: hub/pickled: pytorch_model.bin is a pickle file\n"
        "  next: convert the checkpoint to safetensors; pickle files are never loaded (UNSAFE_CHECKPOINT)\n"
    )


def test_waiting_for_a_student_ends_when_it_fails_or_takes_too_long(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["students", "register", "mine", "--source", "hub/model"]) == 0
    services.students.deployments = [students.DEPLOYMENT_STATE_FAILED]
    assert main(["students", "activate", "mine", "--wait"]) == 2
    assert "mine could not be loaded: the folder is gone" in capsys.readouterr().err
    services.students.deployments = [students.DEPLOYMENT_STATE_LOADING]
    assert main(["students", "activate", "mine", "--wait", "--timeout", "0.5"]) == 2
    assert "after 0.5 s no worker has it in memory (2 workers alive)" in capsys.readouterr().err
    assert main(["students", "activate", "nobody"]) == 2
    assert "there is no student 'nobody'" in capsys.readouterr().err


# -- no stack ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "c.toml", "--connect"],
        ["runs", "list"],
        ["runs", "create", "c.toml"],
        ["runs", "show", "x"],
        ["runs", "watch", "x"],
        ["runs", "cancel", "x"],
        ["runs", "resume", "x", "--detach"],
        ["runs", "report", "x"],
        ["students", "list"],
        ["students", "register", "x", "--source", "y"],
        ["students", "activate", "x"],
        ["students", "show"],
    ],
)
def test_a_stack_that_is_not_up_is_said_to_be_and_how_to_start_it(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nothing answers there
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        service = "student" if arguments[0] == "students" else "orchestrator"
        monkeypatch.setenv(f"PRECEPTOR_{service.upper()}_ADDRESS", address)
        assert main(arguments) == 2
    err = capsys.readouterr().err
    assert f"error: no {service} answers at {address}\n  next: start it with `preceptor up`" in err
    assert "(STACK_NOT_UP)" in err
    assert not Path("runs/x").exists()


def test_without_any_address_the_home_folder_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    if (code := main(["runs", "list"])) == 0:
        pytest.skip("an orchestrator of somebody else serves on the default port")
    assert code == 2
    assert f"no stack is up for {Path('.preceptor').resolve()}" in capsys.readouterr().err


# -- doctor ------------------------------------------------------------------------------------------------------------


def test_doctor_tells_what_serves_and_what_does_not(
    services: Services, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TEACHER", "EVALUATOR"):
        monkeypatch.setenv(f"PRECEPTOR_{name}_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("PRECEPTOR_BROKER_URL", "redis://:secret@127.0.0.1:1/0")
    assert main(["doctor", "--json"]) == 1
    out = capsys.readouterr().out
    assert "secret" not in out
    found = {finding["what"]: finding for finding in json.loads(out)["findings"]}
    assert found["orchestrator"]["state"] == "ok"
    assert found["student"]["state"] == "ok"
    for name in ("teacher", "evaluator", "redis", "active student"):
        assert found[name]["state"] == "problem"
        assert found[name]["next_step"]


def test_doctor_without_a_stack_is_content(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preceptor.cli.stack_checks.find_stack", lambda _settings: None)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for part in ("python", "redis server", "home folder", "disk", "memory", "gpu", "none is up for"):
        assert part in out
    assert "Preceptor can be used here" in out


def test_doctor_names_a_home_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("")
    monkeypatch.setenv("PRECEPTOR_HOME", "file/home")
    monkeypatch.setenv("PRECEPTOR_ORCHESTRATOR_ADDRESS", "127.0.0.1:1")
    assert main(["doctor", "--json"]) == 1
    found = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert found["home folder"]["state"] == "problem"
