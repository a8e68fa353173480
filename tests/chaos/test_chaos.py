"""The breaking test, short: whatever is broken, the run ends with the result of one that nobody disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from preceptor.stack import shipped_models
from tests.chaos.arena import can_mount
from tests.chaos.chaos import Outcome, disturbed, undisturbed
from tests.chaos.proof import differences
from tests.chaos.schedule import KILLING, OWNER, PROCESSES, Blow, Kind, make

SMALL = Path(__file__).parents[1] / "e2e" / "small.toml"
# Scripted trials are over in a moment; it takes some more for a dozen blows.
LONGER = ("rounds.count=4", "rounds.tasks=6", "tasks.train=12", "tasks.heldout=6")
SCRIPTED: dict[str, Any] = {"workers": 2, "scripted": True, "limit": 300.0}
REAL: dict[str, Any] = {"workers": 2, "scripted": False, "limit": 600.0}

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not shipped_models().is_dir(), reason="the world's models are not built"),
]


def proven(outcome: Outcome) -> None:
    """Says everything that is wrong at once."""
    assert not outcome.proof.lost
    assert not outcome.proof.twice
    assert not outcome.proof.left
    assert not outcome.different
    assert not outcome.line["problems"]


def test_a_dozen_blows_with_scripted_models_lose_nothing_and_count_nothing_twice(tmp_path: Path) -> None:
    blows = make(3, 8, ["worker-1", "worker-2"], disk=can_mount(tmp_path))
    expected = undisturbed(tmp_path, SMALL, LONGER, **SCRIPTED)
    outcome = disturbed(tmp_path, SMALL, LONGER, blows, expected, print, **SCRIPTED, shortest=1, longest=3)
    proven(outcome)
    assert outcome.line["not_dealt"] <= 3
    assert outcome.line["recovery_seconds"]["worker_kill"] <= 15
    assert outcome.line["recovery_seconds"]["worker_stop"] <= 60


def test_the_only_worker_hangs_and_its_trials_run_within_a_minute(tmp_path: Path) -> None:
    alone = {**SCRIPTED, "workers": 1}
    expected = undisturbed(tmp_path, SMALL, (), **alone)
    blows = [Blow(Kind.STOP, "worker-1", calm=True)]
    outcome = disturbed(tmp_path, SMALL, (), blows, expected, print, **alone, shortest=0, longest=1)
    proven(outcome)
    assert outcome.line["recovery_seconds"]["worker_stop"] <= 60


def test_the_tiny_real_models_come_to_the_same_result_through_every_kind_of_death(tmp_path: Path) -> None:
    blows = [
        Blow(Kind.KILL, "worker-1", calm=True),
        Blow(Kind.KILL, "evaluator"),
        Blow(Kind.FLUSH, "redis"),
        Blow(Kind.KILL, OWNER),
        Blow(Kind.KILL, "teacher"),
        Blow(Kind.DROP, "redis"),
        Blow(Kind.KILL, "orchestrator"),
    ]
    expected = undisturbed(tmp_path, SMALL, (), **REAL)
    proven(disturbed(tmp_path, SMALL, (), blows, expected, print, **REAL, shortest=2, longest=8))


def test_a_schedule_is_a_function_of_its_seed_and_hits_everybody() -> None:
    workers = ["worker-1", "worker-2"]
    blows = make(7, 50, workers, disk=True)
    assert blows == make(7, 50, workers, disk=True)
    assert blows != make(8, 50, workers, disk=True)
    killed = [blow.victim for blow in blows if blow.kind in KILLING]
    assert len(killed) == 50
    assert {*PROCESSES, *workers, OWNER} == set(killed)
    assert {blow.kind for blow in blows} == set(Kind)


def test_summaries_differ_only_in_what_counts() -> None:
    first = {"run": "a-1", "rounds": [{"reward": 0.5, "seconds": {"update": 1.0}}], "wall_seconds": 3}
    assert differences(first, {**first, "run": "a-2", "wall_seconds": 5}) == []
    other = {**first, "rounds": [{"reward": 0.25, "seconds": {"update": 1.0}}]}
    assert differences(first, other) == ["summary.rounds[0].reward: 0.25 instead of 0.5"]
    assert differences(first, {}) != []
