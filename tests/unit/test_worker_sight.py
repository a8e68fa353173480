"""What a worker tells of a batch."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import pytest

from preceptor.metrics import WORKER, PrometheusMetrics
from preceptor.telemetry import Telemetry
from preceptor.v1 import trial_pb2 as wire
from student.sight import NO_MESSAGE, WorkerSight


@pytest.fixture
def metrics() -> Iterator[PrometheusMetrics]:
    made = PrometheusMetrics(WORKER, "127.0.0.1", 0)
    yield made
    made.close()


def told(metrics: PrometheusMetrics) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_trials_that_failed_are_no_work_done(metrics: PrometheusMetrics) -> None:
    result = wire.TrialBatchResult(load_seconds=1, train_seconds=2, answer_seconds=3)
    result.results.add(trial_id="sound", trained_tokens=70)
    result.results.add(trial_id="diverged").failure.reason = "TRIAL_DIVERGED"
    WorkerSight(Telemetry(metrics)).ran(result, NO_MESSAGE, "b.1", 0.0)
    seen = told(metrics)
    assert seen["preceptor_worker_trials_total"] == 1
    assert seen["preceptor_trained_tokens_total"] == 70
    assert seen['preceptor_worker_batches_total{outcome="done"}'] == 1
    assert seen['preceptor_trial_batch_seconds_sum{phase="train"}'] == 2


def test_a_batch_that_failed_says_why_and_has_no_phases(metrics: PrometheusMetrics) -> None:
    result = wire.TrialBatchResult()
    result.failure.reason = "OUT_OF_MEMORY"
    WorkerSight(Telemetry(metrics)).ran(result, NO_MESSAGE, "b.1", 0.0)
    seen = told(metrics)
    assert seen['preceptor_worker_batches_total{outcome="OUT_OF_MEMORY"}'] == 1
    assert seen['preceptor_trial_batch_seconds_count{phase="train"}'] == 0
