"""A whole stack that is seen: every process answers scrapes, and an evaluation's trace goes through all of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from preceptor.metrics import EVALUATOR, ORCHESTRATOR, STUDENT, TEACHER, WORKER
from preceptor.stack import shipped_models
from preceptor.tracing import evaluation_place, run_place
from scripts.collect_traces import Collector

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "tests" / "e2e" / "small.toml"
# In the order of the stack's ports.
PROCESSES = (STUDENT, EVALUATOR, TEACHER, ORCHESTRATOR, WORKER)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (shipped_models() / "teacher").is_dir(), reason="the world's models are not built"),
]


class Seen:
    """What a run of the small config has told."""

    def __init__(self, folder: Path) -> None:
        self.spans: list[dict[str, Any]] = []
        self.scraped: dict[str, set[str]] = {process: set() for process in PROCESSES}
        self.folder, self._done = folder, threading.Event()
        self._first = free_ports(len(PROCESSES))

    def run(self) -> None:
        collector = Collector(self._take)
        watcher = threading.Thread(target=self._scrape_for_ever, daemon=True)
        watcher.start()
        own = {key: value for key, value in os.environ.items() if not key.startswith("PRECEPTOR_")}
        settings = {
            "PYTHONPATH": str(REPOSITORY),
            "PRECEPTOR_HOME": str(self.folder / "home"),
            "PRECEPTOR_METRICS_PORT": str(self._first),
            "PRECEPTOR_OTLP_ENDPOINT": collector.endpoint,
            "PRECEPTOR_LOG_FORMAT": "json",
        }
        command = [sys.executable, "-m", "preceptor", "run", str(CONFIG), "--workers", "1", "--set", "rounds.count=1"]
        ended = subprocess.run(
            [*command, "--out", str(self.folder / "out")],
            env={**own, **settings},
            capture_output=True,
            text=True,
            timeout=800,
        )
        self._done.set()
        watcher.join(20)
        collector.close()
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]

    def of(self, name: str) -> list[dict[str, Any]]:
        return [span for span in self.spans if span["name"] == name]

    def _take(self, request: dict[str, Any]) -> None:
        for one in request["resourceSpans"]:
            (service,) = (
                pair["value"]["stringValue"] for pair in one["resource"]["attributes"] if pair["key"] == "service.name"
            )
            for part in one["scopeSpans"]:
                self.spans += [{**span, "service": service} for span in part["spans"]]

    def _scrape_for_ever(self) -> None:
        while not self._done.wait(1):
            for number, process in enumerate(PROCESSES):
                try:
                    url = f"http://127.0.0.1:{self._first + number}/metrics"
                    with urllib.request.urlopen(url, timeout=5) as answer:
                        lines = answer.read().decode().splitlines()
                except OSError:  # it starts or ends just now
                    continue
                told = (line.rpartition(" ") for line in lines if not line.startswith("#"))
                self.scraped[process] |= {name.partition("{")[0] for name, _, value in told if float(value) > 0}


def free_ports(number: int) -> int:
    """The first of so many free ports in a row."""
    for first in range(20_000 + os.getpid() % 5000, 32_000, number):
        probes = [socket.socket() for _ in range(number)]
        try:
            for offset, probe in enumerate(probes):
                probe.bind(("127.0.0.1", first + offset))
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
        return first
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    made = Seen(tmp_path_factory.mktemp("seen"))
    made.run()
    return made


def test_every_process_answers_scrapes_with_what_it_does(seen: Seen) -> None:
    expected = {
        STUDENT: {"preceptor_build_info", "preceptor_grpc_calls_total"},
        EVALUATOR: {
            "preceptor_batches",
            "preceptor_unfinished_batches",
            "preceptor_workers_alive",
            "preceptor_evaluations_finished_total",
            "preceptor_trials_total",
            "preceptor_attempts_total",
            "preceptor_reward_count",
            "preceptor_grading_seconds_count",
            "preceptor_evaluation_seconds_sum",
        },
        TEACHER: {
            "preceptor_teacher_tokens_total",
            "preceptor_teacher_writing_seconds_sum",
            "preceptor_self_edits_total",
            "preceptor_policy_updates_total",
            "preceptor_policy_update_seconds_sum",
        },
        ORCHESTRATOR: {"preceptor_runs", "preceptor_run_round", "preceptor_run_done_ratio"},
        WORKER: {
            "preceptor_trial_batch_seconds_sum",
            "preceptor_worker_batches_total",
            "preceptor_worker_busy",
            "preceptor_trained_tokens_total",
            "preceptor_loaded_students",
        },
    }
    for process, names in expected.items():
        assert names <= seen.scraped[process], process
        assert "process_cpu_seconds_total" in seen.scraped[process]


def test_an_evaluation_has_one_trace_through_all_processes(seen: Seen) -> None:
    (chosen, *_) = seen.of("written by the teacher")
    trace = [span for span in seen.spans if span["traceId"] == chosen["traceId"]]
    (whole,) = (span for span in trace if span["name"] == "evaluation")
    evaluation = next(
        pair["value"]["stringValue"] for pair in whole["attributes"] if pair["key"] == "preceptor.evaluation"
    )
    assert (whole["traceId"], whole["spanId"]) == (
        evaluation_place(evaluation).trace_id,
        evaluation_place(evaluation).span_id,
    )
    assert "parentSpanId" not in whole
    names = {span["name"] for span in trace}
    assert names >= {"asked for", "waiting in SQL", "on the queue", "trial batch", "load", "train", "answer", "grading"}
    services = {span["service"] for span in trace}
    assert services == {"preceptor-orchestrator", "preceptor-evaluator", "preceptor-worker"}
    known = {span["spanId"] for span in trace}
    assert all(span["parentSpanId"] in known for span in trace if span is not whole)
    train = next(span for span in trace if span["name"] == "train")
    batch = next(span for span in trace if span["spanId"] == train["parentSpanId"])
    assert batch["name"] == "trial batch"
    assert int(batch["startTimeUnixNano"]) <= int(train["startTimeUnixNano"]) < int(train["endTimeUnixNano"])


def test_the_run_has_a_trace_that_its_evaluations_are_linked_to(seen: Seen) -> None:
    (run,) = seen.of("run")
    (round_,) = seen.of("round")
    run_id = json.loads((seen.folder / "out" / "summary.json").read_text())["run"]
    assert (run["traceId"], run["spanId"]) == (run_place(run_id).trace_id, run_place(run_id).span_id)
    assert (round_["traceId"], round_["parentSpanId"]) == (run["traceId"], run["spanId"])
    below = {span["name"] for span in seen.spans if span.get("parentSpanId") == round_["spanId"]}
    assert {
        "TeacherService/GenerateSelfEdits",
        "EvaluatorService/CreateEvaluations",
        "TeacherService/UpdatePolicy",
    } <= below
    (update,) = seen.of("update the policy")
    (batch, *_) = seen.of("write a batch")
    assert update["traceId"] == batch["traceId"] == run["traceId"]
    written = seen.of("written by the teacher")
    assert len(written) == 12  # 3 tasks, 4 self-edits each
    assert {link["spanId"] for span in written for link in span["links"]} == {round_["spanId"]}
    calls = {span["spanId"] for span in seen.of("EvaluatorService/CreateEvaluations")}
    asked = [span for span in seen.of("asked for") if span["traceId"] in {one["traceId"] for one in written}]
    assert asked
    assert {link["spanId"] for span in asked for link in span["links"]} <= calls


def test_logs_name_run_and_batch(seen: Seen) -> None:
    logs = seen.folder / "home" / "logs"
    lines = [json.loads(line) for line in (logs / "worker-1.log").read_text().splitlines() if line.startswith("{")]
    assert any(line["message"].startswith("batch ") and line["batch"].startswith("batch-") for line in lines)
    lines = [json.loads(line) for line in (logs / "orchestrator.log").read_text().splitlines() if line.startswith("{")]
    (ended,) = (line for line in lines if line["message"].endswith(" succeeded"))
    assert ended["message"] == f"{ended['run']} succeeded"
