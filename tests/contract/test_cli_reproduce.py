"""``preceptor reproduce`` against services over real gRPC, which know what a run came to."""

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
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import student_pb2 as students
from tests.contract.cli_services import SUMMARY, Services

REPOSITORY = Path(__file__).parents[2]
SQUAD = [
    {
        "title": f"Passage {at}",
        "context": f"Word{at} is known. Nobody knows Other{at}.",
        "questions": [
            {"question": f"What is known of {at}?", "answer": f"Word{at}", "bank": "sealed"},
            {"question": f"What stands first in {at}?", "answer": f"Word{at}", "bank": "reward"},
            {"question": f"What is said of {at}?", "answer": f"Word{at}", "bank": "gate"},
            {"question": f"Who is missing in {at}?", "answer": f"Nobody{at}", "bank": "sealed"},
        ],
    }
    for at in range(64)
]


def summary(**shares: float) -> dict[str, Any]:
    """Every arm answers so many of ten questions about each of six passages, one more or less in turn."""
    held = {
        name: {
            "outcomes": [
                {"right": 10 * share + (-1) ** at * 0.5, "questions": 10, "retention": 0.9} for at in range(6)
            ],
            "malformed": 0,
            "trained_tokens": 1500.0,
            "worker_seconds": 0.5,
        }
        for name, share in shares.items()
    }
    counts = {"succeeded": 4, "failed": 0, "malformed": 0, "cached": 1}
    round_ = {"worker_seconds": 5.0, "reward": {"mean": 0.2}, "evaluations": counts}
    heldout = {
        "tasks": [f"t{at}" for at in range(6)],
        "arms": held,
        "fixed_strategy": {"prompt_format": "self_qa"},
        "selection_worker_seconds": 2.0,
    }
    return {**SUMMARY, "policies": ["base-1", "policy-9"], "rounds": [round_], "heldout": heldout, "notes": []}


ARMS = {"no_edit": 0.1, "untrained_teacher": 0.2, "fixed_strategy": 0.5, "trained_teacher": 0.6}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PRECEPTOR_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    Path("squad.json").write_text(json.dumps(SQUAD))


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    with Services() as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        for name in ("almanac", "almanac-qwen2"):
            student = students.Student(name=name)
            student.pinned.name, student.pinned.source, student.pinned.commit = name, f"/models/{name}", "c0ffee"
            made.students.students[name] = student
        made.orchestrator.summary = summary(**ARMS)
        yield made


def reproduce(*arguments: str) -> int:
    return main(["reproduce", *arguments, "--connect", "--out", "out"])


def results() -> Any:
    return json.loads(Path("out/results.json").read_text())


def test_all_arms_of_all_seeds_come_to_one_table(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce("knowledge", "--price", "2") == 0
    assert [json.loads(request.config_json)["seed"] for request in services.orchestrator.created] == [0, 1, 2]
    (section,) = results()["sections"]
    arms = {arm["arm"]: arm for arm in section["arms"]}
    assert arms["trained_teacher"]["accuracy"] == pytest.approx(0.6)
    assert (arms["trained_teacher"]["passages"], arms["trained_teacher"]["seeds"]) == (18, 3)
    assert arms["trained_teacher"]["preparation_cost"] == pytest.approx(6 / 3600 * 2)
    verdicts = {of["second"]: of["verdict"] for of in section["differences"]}
    assert verdicts == {"no_edit": "better", "untrained_teacher": "better", "fixed_strategy": "better"}
    out = capsys.readouterr().out
    for part in ("step 2 of 3", "trained teacher − best fixed strategy", "60.0%", "out/report.html"):
        assert part in out
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "almanac-arms.svg",
        "almanac-differences.svg",
        "report.html",
        "results.json",
        "runs",
        "table.md",
    ]
    assert len(list(Path("out/runs").iterdir())) == 3
    assert "Made by `preceptor " in Path("out/table.md").read_text()


def test_the_same_command_again_uses_the_runs_that_are_there(services: Services) -> None:
    assert reproduce("knowledge", "--seeds", "2") == 0
    first = results()["sections"]
    assert results()["evaluations"] == {"asked": 8, "known": 2}
    assert reproduce("knowledge", "--seeds", "3") == 0
    assert results()["evaluations"] == {"asked": 12, "known": 9}  # two runs were there, and one of the third's four
    assert len(services.orchestrator.created) == 3
    assert reproduce("knowledge", "--seeds", "2") == 0
    assert results()["sections"] == first


def test_a_run_that_fails_is_counted_and_said_and_the_rest_goes_on(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    services.orchestrator.failing = {"almanac-2"}
    assert reproduce("knowledge") == 2
    (failure,) = results()["failures"]
    assert failure["what"] == "student almanac, seed 1"
    assert failure["reason"] == "TOO_MANY_FAILURES"
    (section,) = results()["sections"]
    assert set(section["arms"][0]["by_seed"]) == {"0", "2"}
    assert "failed: student almanac, seed 1" in capsys.readouterr().err
    services.orchestrator.failing = set()  # mended: the same command resumes that run alone
    assert reproduce("knowledge") == 0
    assert services.orchestrator.calls.count("ResumeRun") == 1
    assert results()["failures"] == []


def test_nothing_is_written_where_every_run_fails(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    services.orchestrator.ends = pb.RUN_STATE_FAILED
    assert reproduce("knowledge", "--seeds", "2") == 2
    assert "no run succeeded" in capsys.readouterr().err
    assert not Path("out").exists()


def test_json_is_a_line_for_everything_that_happens_and_the_results_at_last(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce("knowledge", "--seeds", "1", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["event"] for line in lines} >= {"step", "progress", "finished"}
    assert lines[-1]["results"] == results()
    step = next(line for line in lines if line["event"] == "step")
    assert (step["step"], step["steps"]) == (1, 1)


def test_transfer_asks_each_teacher_to_write_for_the_other_student(services: Services) -> None:
    assert reproduce("transfer", "--seeds", "1") == 0
    asked = [json.loads(request.config_json) for request in services.orchestrator.created]
    assert [(of["student"]["name"], of["rounds"]["count"], of["teacher"]["policy"]) for of in asked] == [
        ("almanac", 4, ""),
        ("almanac-qwen2", 4, ""),
        ("almanac-qwen2", 0, "policy-9"),
        ("almanac", 0, "policy-9"),
    ]
    found = results()
    assert [section["name"] for section in found["sections"]] == ["student-A", "student-B"]
    arms = [arm["words"] for arm in found["sections"][1]["arms"]]
    assert "A→B: teacher trained on A" in arms
    assert [table["name"] for table in found["tables"]] == ["square", "transferred"]
    assert "A→B" in Path("out/table.md").read_text()
    assert Path("out/transfer.svg").is_file()


def test_what_hangs_on_a_run_that_failed_is_not_tried(services: Services) -> None:
    services.orchestrator.failing = {"almanac-1"}  # A's teacher
    assert reproduce("transfer", "--seeds", "1") == 2
    assert len(services.orchestrator.created) == 3
    by_name = {section["name"]: section for section in results()["sections"]}
    assert [arm["arm"] for arm in by_name["student-A"]["arms"]] == ["trained_elsewhere"]
    assert "trained_elsewhere" not in [arm["arm"] for arm in by_name["student-B"]["arms"]]


def test_batch_teaches_the_passages_of_a_group_in_one_update_at_equal_tokens(services: Services) -> None:
    config = REPOSITORY / "configs" / "own.toml"
    own = ("--config", str(config), "--set", "tasks.path=squad.json", "--set", "tasks.heldout=16")
    # Nobody{at} stands in no passage, so half of the sealed questions stay open.
    assert reproduce("batch", "--seeds", "1", "--students", "almanac", *own) == 0
    found = results()
    sections = {section["name"]: section for section in found["sections"]}
    assert set(sections) == {"LoRA rank 64-1", "LoRA rank 64-4", "LoRA rank 64-16"} | {
        "full fine-tuning-4",
        "full fine-tuning-16",
    }
    for section in sections.values():
        arms = {arm["arm"]: arm for arm in section["arms"]}
        assert arms["no_edit"]["accuracy"] == 0.0
        assert arms["trained_teacher"]["accuracy"] == 0.5
        assert (arms["trained_teacher"]["passages"], arms["trained_teacher"]["questions"]) == (16, 32)
    sealed = [request for request in services.evaluator.created if request.protocol.bank == 3]
    for request in sealed:
        tasks = [request.task, *(one.task for one in request.more)]
        size = len(tasks[0].passage.questions) // 2
        assert len(tasks) * size == 16
        assert request.protocol.training.full or request.protocol.training.rank == 64
        for edits in (request.self_edits, *(one.self_edits for one in request.more)):
            assert {edit.directive.epochs for edit in edits} == {1024}  # the budget ends it
    budgets = sorted({request.protocol.training.max_train_tokens for request in sealed})
    assert budgets == [1500, 6000, 6000 * 2, 24000, 48000]
    assert {request.policy_id for request in services.teacher.asked} == {"base-1", "policy-9"}
    # Learning rates were chosen with other questions of other passages.
    chosen = [request for request in services.evaluator.created if request.protocol.bank == 2]
    assert chosen
    heldout = {task.id for request in sealed if not request.more for task in [request.task]}
    assert not heldout & {request.task.id for request in chosen}


def test_batch_with_too_few_passages_says_so_and_measures_what_it_can(services: Services) -> None:
    own = ("--config", str(REPOSITORY / "configs" / "own.toml"), "--set", "tasks.path=squad.json")
    assert reproduce("batch", "--seeds", "1", *own, "--set", "tasks.heldout=5") == 2
    found = results()
    assert {section["name"] for section in found["sections"]} == {
        "LoRA rank 64-1",
        "LoRA rank 64-4",
        "full fine-tuning-4",
    }
    assert all("needs 16 held-out passages" in failure["message"] for failure in found["failures"])


def test_a_malformed_self_edit_brings_no_documents_and_is_counted(services: Services) -> None:
    spoilt = [{**one, "context": f"{one['context']} illegible."} for one in SQUAD]
    Path("squad.json").write_text(json.dumps(spoilt))
    own = ("--config", str(REPOSITORY / "configs" / "own.toml"), "--set", "tasks.path=squad.json")
    reproduce("batch", "--seeds", "1", *own)
    assert any("malformed" in note for note in results()["notes"])


def test_dry_run_prints_the_steps_and_asks_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "transfer", "--dry-run", "--seeds", "1"]) == 0
    assert "A's teacher writes for B" in capsys.readouterr().out
    assert main(["reproduce", "knowledge", "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["experiment"], len(said["steps"]), said["estimate"]) == ("knowledge", 3, None)


def test_full_says_what_it_would_cost_before_it_starts(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("knowledge", "--full", "--tasks", "squad.json", "--students", "almanac", "--price", "3", "--seeds", "1")
    assert main(["reproduce", *asked, "--dry-run"]) == 0
    out = capsys.readouterr().out
    for part in ("ESTIMATE, nothing of it measured", "hours of one H100", "at $3 an hour", "every fine-tune as slow"):
        assert part in out
    assert reproduce(*asked) == 2  # nobody is there to be asked
    assert "--yes" in capsys.readouterr().err
    assert services.orchestrator.created == []
    assert reproduce(*asked, "--yes") == 0
    (request,) = services.orchestrator.created
    assert json.loads(request.config_json)["tasks"]["path"] == "squad.json"


def test_a_student_with_a_source_is_registered_once(services: Services) -> None:
    asked = ("knowledge", "--full", "--tasks", "squad.json", "--students", "big=/models/big", "--seeds", "1", "--yes")
    assert reproduce(*asked) == 0
    assert services.students.students["big"].pinned.source == "/models/big"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("knowledge", "--full"), "--full needs --tasks"),
        (("knowledge", "--tasks", "squad.json"), "go with --full"),
        (("transfer", "--students", "one"), "two students"),
        (("batch", "--students", "one,two"), "one student"),
        (("knowledge", "--set", "rounds.cuont=3"), "cuont"),
        (("knowledge", "--config", "none.toml"), "none.toml"),
        (("knowledge", "--full", "--tasks", "squad.json", "--students", "s", "--gpu", "abacus"), "abacus"),
        (("nothing",), "nothing"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", *arguments, "--dry-run"]) == 2
    assert said in capsys.readouterr().err


def test_results_that_cannot_be_written_are_told_before_anything_is_asked(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").write_text("a file")
    assert reproduce("knowledge") == 2
    assert "OUTPUT_NOT_WRITABLE" in capsys.readouterr().err
    assert services.orchestrator.created == []


def test_ctrl_c_says_how_to_go_on_and_leaves_the_run_of_a_stack_that_stays_up(services: Services) -> None:
    services.orchestrator.ends = None
    environment = {**os.environ, **services.environment, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "preceptor", "reproduce", "knowledge", "--connect", "--out", "out"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert services.orchestrator.watched.wait(60)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "the same command goes on where it stopped" in out
    assert "CancelRun" not in services.orchestrator.calls
    assert not Path("out").exists()
