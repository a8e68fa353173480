"""The arithmetic of the control-plane bench, and a run of it as small as it gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import control_plane as bench


def test_milliseconds_are_those_of_the_services_and_not_of_the_workers() -> None:
    used = {"evaluator": 2.0, "redis": 0.5, "workers": 99.0}
    assert bench.cpu_per_evaluation(used, 1000) == {"evaluator": 2.0, "redis": 0.5, "all": 2.5}


@pytest.mark.parametrize(("pause", "efficiency"), [(0.0, 1.0), (0.25, 0.8)])
def test_efficiency_is_the_ideal_time_of_a_round_over_the_real_one(pause: float, efficiency: float) -> None:
    workers = 3
    # Each worker begins at another time; its trials take a second, with a pause between them.
    ends = [worker * 0.1 + (1 + pause) * turn for turn in range(12) for worker in range(workers)]
    assert bench.steady_efficiency(ends, workers, 1.0) == pytest.approx(efficiency)


def test_a_worker_that_stands_still_costs_its_share() -> None:
    one, other = [float(turn) for turn in range(40)], [0.5 + 2 * turn for turn in range(20)]
    assert bench.steady_efficiency([*one, *other], 2, 1.0) == pytest.approx(0.75, abs=0.02)


def test_efficiency_of_too_few_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer than five rounds"):
        bench.steady_efficiency([0.0, 1.0, 2.0, 3.0], 1, 1.0)


def test_percentiles_are_values_that_came() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert (bench.percentile(values, 0.5), bench.percentile(values, 0.99)) == (50.0, 99.0)
    assert bench.percentile([7.0], 0.99) == 7.0


def test_every_self_edit_is_another_and_every_task_has_its_questions() -> None:
    asked = bench.request(bench.Shape("", 2, 3), 10)
    groups = [(asked.task, asked.self_edits), *((more.task, more.self_edits) for more in asked.more)]
    assert [len(edits) for _, edits in groups] == [3, 3]
    assert len({edit.SerializeToString() for _, edits in groups for edit in edits}) == 6
    assert all(len(task.passage.questions) == bench.QUESTIONS for task, _ in groups)
    assert len(asked.protocol.probes) == bench.PROBES


def test_what_is_kept_says_that_the_workers_are_simulated(tmp_path: Path) -> None:
    details = {
        "cpu": {
            "plain Celery": {"ms_per_task": 1.0},
            "run, group": {"ms": {"evaluator": 2.0, "redis": 1.0, "all": 3.0}},
        },
        "efficiency": {"64": {"steady": 0.97, "whole": 0.9}},
        "memory": {"1000": {"all": 90.0, "mib": {"evaluator": 80.0, "redis": 10.0}}},
        "watch": {"median": 30.0, "p99": 60.0, "evaluations": 8},
        "recovery": {"worker_kill": {"final": 11.0, "begun_again": 8.0}},
    }
    kept = bench.written(details)
    assert kept["workers"] == "simulated"
    assert {name: kept[name] for name in ("cpu_ms_per_evaluation", "efficiency", "memory_mib", "recovery_seconds")} == {
        "cpu_ms_per_evaluation": 3.0,
        "efficiency": {"64": 0.97},
        "memory_mib": {"1000": 90.0},
        "recovery_seconds": {"worker_kill": 11.0},
    }
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(kept), encoding="utf-8")
    bench.main(["--measured", str(file), "--plot", str(tmp_path / "measured.png")])
    assert (tmp_path / "measured.png").stat().st_size > 10_000


def test_a_small_run_of_real_services_with_simulated_workers(tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    bench.main(["--parts", "efficiency", "--quick", "--workers", "2", "--json", str(file)])
    measured = json.loads(file.read_text(encoding="utf-8"))
    assert 0 < measured["efficiency"]["2"] < 1.2  # how much is a matter of the machine and its load
    one = measured["details"]["efficiency"]["2"]
    assert one["evaluations"] == 12
    assert one["cpu_ms"]["evaluator"] > 0
    assert "workers" not in one["cpu_ms"]
    assert one["watch_ms"]["median"] > 0
