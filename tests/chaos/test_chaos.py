"""The breaking test, short: whatever is broken, the run ends with the result of one that nobody disturbed."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from preceptor.stack import shipped_models
from tests.chaos.arena import can_mount
from tests.chaos.chaos import Outcome, disturbed, undisturbed
from tests.chaos.proof import differences, prove
from tests.chaos.schedule import KILLING, OWNER, PROCESSES, Blow, Kind, make

SMALL = Path(__file__).parents[1] / "e2e" / "small.toml"
# Scripted trials are over in a moment; it takes some more for a dozen blows.
LONGER = ("rounds.count=4", "rounds.tasks=6", "tasks.train=12", "tasks.heldout=6")
SCRIPTED: dict[str, Any] = {"workers": 2, "scripted": True, "limit": 300.0}
ALONE: dict[str, Any] = {**SCRIPTED, "workers": 1}
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
    storm = make(3, 8, ["worker-1", "worker-2"], disk=can_mount(tmp_path), calm=False)
    blows = [Blow(Kind.KILL, "worker-1", calm=True), *storm]
    expected = undisturbed(tmp_path, SMALL, LONGER, **SCRIPTED)
    outcome = disturbed(tmp_path, SMALL, LONGER, blows, expected, print, **SCRIPTED, shortest=1, longest=3)
    proven(outcome)
    assert outcome.line["not_dealt"] <= 3
    # 15 s is the promise for a machine that is not busy (bench/control_plane.py measures it); this is far from any
    # other way in which a batch comes back.
    assert outcome.line["recovery_seconds"]["worker_kill"] <= 45


@pytest.fixture(scope="module")
def calm_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A scripted run that nobody disturbed: its home and its summary."""
    folder = tmp_path_factory.mktemp("calm")
    return folder / "undisturbed", undisturbed(folder, SMALL, (), **ALONE)


def test_the_only_worker_hangs_and_its_trials_run_all_the_same(
    calm_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    blows = [Blow(Kind.STOP, "worker-1", calm=True)]
    outcome = disturbed(tmp_path, SMALL, (), blows, calm_run[1], print, **ALONE, shortest=0, longest=1)
    proven(outcome)
    assert outcome.line["recovery_seconds"]["worker_stop"] <= 120  # 60 s where the machine is not busy


TRAINED_TWICE = """UPDATE policies SET request =
    json_set(CAST(request AS TEXT), '$.examples[#]', json_extract(CAST(request AS TEXT), '$.examples[0]'))
    WHERE number = (SELECT max(number) FROM policies)"""
ANOTHER_REWARD = """UPDATE policies SET request = json_set(CAST(request AS TEXT), '$.examples[0].reward', 7.5)
    WHERE number = (SELECT max(number) FROM policies)"""


@pytest.mark.parametrize(
    ("database", "damage", "found"),
    [
        ("evaluator", "UPDATE evaluations SET state = 'RUNNING' WHERE seq = 3", {"lost"}),
        ("evaluator", "UPDATE evaluation_trials SET seed = '7' WHERE position = 0", {"lost"}),
        ("evaluator", "UPDATE batches SET state = 'SUBMITTED' WHERE id = (SELECT min(id) FROM batches)", {"left"}),
        ("evaluator", "DELETE FROM trials WHERE id IN (SELECT trial_id FROM evaluation_trials LIMIT 3)", {"lost"}),
        (
            "orchestrator",
            "UPDATE self_edits SET evaluation = NULL WHERE task = 0 AND malformed = ''",
            {"lost", "twice"},
        ),
        ("orchestrator", "DELETE FROM rounds WHERE round = 1", {"lost", "twice"}),
        ("orchestrator", "UPDATE runs SET state = 2", {"left"}),
        ("teacher", TRAINED_TWICE, {"twice"}),
        ("teacher", ANOTHER_REWARD, {"lost", "twice"}),
    ],
)
def test_the_proof_finds_what_was_lost_or_counted_twice(
    calm_run: tuple[Path, dict[str, Any]], tmp_path: Path, database: str, damage: str, found: set[str]
) -> None:
    home, summary = calm_run
    shutil.copytree(home, tmp_path / "home")
    assert prove(tmp_path / "home", summary["run"])
    with closing(sqlite3.connect(tmp_path / "home" / f"{database}.db")) as tampered, tampered:
        assert tampered.execute(damage).rowcount > 0
    proof = prove(tmp_path / "home", summary["run"])
    assert {name for name in ("lost", "twice", "left") if getattr(proof, name)} == found


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
    first = {
        "run": "a-1",
        "rounds": [{"reward": 0.5, "seconds": {"update": 1.0}, "worker_seconds": 2}],
        "wall_seconds": 3,
    }
    assert differences(first, {**first, "run": "a-2", "wall_seconds": 5}) == []
    other = {**first, "rounds": [{"reward": 0.25, "seconds": {"update": 1.0}}]}
    assert differences(first, other) == ["summary.rounds[0].reward: 0.25 instead of 0.5"]
    assert differences(first, {}) != []
