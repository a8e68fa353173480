"""``preceptor evaluations`` against a real evaluator with a small queue in memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preceptor.cli import main
from preceptor.cli.evaluations import unserved
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types
from tests.contract.test_evaluator_service import Bench, serving


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with serving(tmp_path) as made:
        monkeypatch.setenv("PRECEPTOR_EVALUATOR_ADDRESS", made.address)
        monkeypatch.setenv("PRECEPTOR_HOME", str(tmp_path))
        yield made


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def fail(bench: Bench, *documents: str, **options: object) -> list[str]:
    """Evaluations, all of which have failed."""
    ids = [item.id for item in bench.create(*documents, **options)]
    bench.work(1)
    list(bench.watch(ids))
    return ids


def test_failures_are_listed_with_what_can_be_done(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluations", "failed"]) == 0
    assert "none has failed" in capsys.readouterr().out
    ids = fail(bench, "fail:TRIAL_DIVERGED", "fail:RANK_TOO_LARGE", "fail:TRIAL_DIVERGED too")
    more = fail(bench, "fail:TRIAL_DIVERGED \x1b[31mred", owner="run-2")
    assert main(["evaluations", "failed"]) == 0
    out = capsys.readouterr().out
    assert all(one in out for one in ids)
    assert out.count("lower the learning rate") == 1  # once for each reason
    assert "RANK_TOO_LARGE (1): " in out
    assert "scripted:1" in out
    assert "\x1b" not in out
    assert main(["evaluations", "failed", "--limit", "1"]) == 0
    assert "... and 3 more" in capsys.readouterr().out
    assert main(["evaluations", "failed", "--json"]) == 0
    found = printed(capsys)["failed"]
    assert [item["id"] for item in found] == [*ids, *more]
    assert (found[0]["reason"], found[0]["next_step"]) == ("TRIAL_DIVERGED", "lower the learning rate")
    assert main(["evaluations", "failed", "--json", "--reason", "RANK_TOO_LARGE", "--owner", "run-1"]) == 0
    assert [item["id"] for item in printed(capsys)["failed"]] == [ids[1]]
    assert main(["evaluations", "failed", "--json", "--owner", "nobody"]) == 0
    assert printed(capsys)["failed"] == []


def test_failures_are_read_a_page_at_a_time(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package's attribute of this name is the command.
    monkeypatch.setattr(sys.modules["preceptor.cli.evaluations"], "PAGE", 2)
    ids = fail(bench, *(f"fail:TRIAL_DIVERGED {number}" for number in range(5)))
    assert main(["evaluations", "failed", "--json"]) == 0
    assert [item["id"] for item in printed(capsys)["failed"]] == ids


def test_everything_known_about_an_evaluation_is_shown(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = fail(bench, "fail:TRIAL_DIVERGED")
    assert main(["evaluations", "show", one]) == 0
    out = capsys.readouterr().out
    for part in (
        *(f"{one}: FAILED", "task: task-ada", "student: tiny (c0ffee)", "self-edit (1 documents): fail:TRIAL_DIVERGED"),
        *("failed: seed 1: scripted (TRIAL_DIVERGED, 1 tries)", "next: lower the learning rate", "scripted:1", "done"),
    ):
        assert part in out
    assert main(["evaluations", "show", one, "--json"]) == 0
    shown = printed(capsys)
    assert shown["evaluation"]["state"] == "FAILED"
    assert sorted(attempt.get("failure", {}).get("reason", "") for attempt in shown["attempts"]) == [
        "",
        "TRIAL_DIVERGED",
    ]
    assert main(["evaluations", "show", "eval-none"]) == 2
    assert "EVALUATION_NOT_FOUND" in capsys.readouterr().err


def test_failures_are_retried_by_name_or_all_of_them(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    ids = fail(bench, "fail:TRIAL_DIVERGED", "fail:RANK_TOO_LARGE")
    (good,) = [item.id for item in bench.create("Ada lives in Lisbon.")]
    assert main(["evaluations", "retry", ids[0], good]) == 0
    out = capsys.readouterr().out
    assert "1 evaluations are back at work" in out
    assert "1 of those named did not fail" in out

    def healed(batch: trial.TrialBatch) -> trial.TrialBatchResult:
        failure = types.Failure(reason="NOTHING_TO_TRAIN", message="scripted")
        return trial.TrialBatchResult(batch_id=batch.id, failure=failure)

    bench.wait_until(lambda: len(bench.broker.waiting) == 2)
    bench.broker.work(healed)
    list(bench.watch([ids[0], good]))
    assert main(["evaluations", "retry", "--all", "--reason", "NOTHING_TO_TRAIN", "--owner", "run-1", "--json"]) == 0
    assert printed(capsys) == {"retried": 2}
    assert main(["evaluations", "retry", "--all"]) == 0
    assert "1 evaluations" in capsys.readouterr().out
    for arguments in ([], [ids[0], "--all"], [ids[0], "--owner", "run-1"]):
        assert main(["evaluations", "retry", *arguments]) == 2
    assert main(["evaluations", "retry", "eval-none"]) == 2


def test_the_queue_shows_workers_and_what_they_are_at(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.create("Ada lives in Lisbon.")
    bench.wait_until(lambda: len(bench.broker.waiting) == 2)
    bench.broker.take()
    assert main(["evaluations", "queue"]) == 0
    out = capsys.readouterr().out
    assert "evaluations: 1 not final, 0 failed" in out
    assert "fake:1" in out
    assert min(bench.broker.leased).rpartition(".")[0] in out
    assert main(["evaluations", "queue", "--json"]) == 0
    assert printed(capsys)["workers"][0]["attempt"] == 1
    bench.broker.down = True
    assert main(["evaluations", "queue"]) == 2
    assert "BROKER_UNREACHABLE" in capsys.readouterr().err


def test_a_student_that_waits_for_workers_of_its_own_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bench: Bench
) -> None:
    monkeypatch.setattr(bench.broker, "serves", ("tiny",))
    bench.create("Ada lives in Lisbon.")
    bench.wait_until(lambda: len(bench.broker.waiting) == 2)
    assert main(["evaluations", "queue"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "students without a queue of their own wait for a worker with no PRECEPTOR_STUDENTS (2 batches)" in said
    own = pb.QueueReport(name="trials.large", student="large", waiting_batches=20, submitted_batches=4)
    served = pb.QueueReport(name="trials.small", student="small", waiting_batches=20, workers_alive=1)
    assert unserved(pb.GetQueueStatusResponse(queues=[pb.QueueReport(name="trials"), own, served])) == [
        "student large waits for a worker with PRECEPTOR_STUDENTS=large (24 batches)"
    ]
    worker = pb.WorkerReport(name="a:1", students=["large", "lagre"])
    assert unserved(pb.GetQueueStatusResponse(queues=[own], workers=[worker]))[0] == (
        "worker a:1 waits for student lagre, which the evaluator's PRECEPTOR_DEDICATED_STUDENTS lacks"
    )


def test_without_a_stack_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRECEPTOR_HOME", str(tmp_path))
    monkeypatch.setenv("PRECEPTOR_EVALUATOR_ADDRESS", "127.0.0.1:1")
    assert main(["evaluations", "failed"]) == 2
    assert "STACK_NOT_UP" in capsys.readouterr().err
