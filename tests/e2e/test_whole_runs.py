"""Whole runs of the embedded stack: every process real, the models tiny."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from preceptor.stack import shipped_models
from tests.e2e.conftest import (
    DEADLINE_SECONDS,
    SMALL,
    Preceptor,
    none_is_left,
    outcome,
    read_until,
    summary_in,
    wait_until,
)

pytestmark = pytest.mark.timeout(900)

ARMS = {
    "no_edit",
    "passage_only",
    "untrained_teacher",
    "fixed_strategy",
    "trained_teacher",
    "oracle",
    "shuffled_facts",
}


def test_a_run_writes_the_summary_that_other_tools_read(undisturbed: tuple[Preceptor, dict[str, Any]]) -> None:
    _, summary = undisturbed
    assert summary["schema"] == "preceptor.summary/1"
    assert summary["seed"] == 5
    assert len(summary["rounds"]) == 2
    for number, entry in enumerate(summary["rounds"], 1):
        assert entry["round"] == number
        assert (entry["tasks"], entry["self_edits"]) == (3, 12)
        assert set(entry["seconds"]) == {"generate", "evaluate", "update", "other"}
        counted = entry["evaluations"]
        assert counted["succeeded"] + counted["failed"] + counted["malformed"] == 12
    heldout = summary["heldout"]
    assert heldout["passages"] == 3
    assert set(heldout["arms"]) == ARMS
    for arm in heldout["arms"].values():
        assert 0 <= arm["ci95"][0] <= arm["accuracy"] <= arm["ci95"][1] <= 1
    assert {"trained_minus_untrained", "trained_minus_fixed"} <= set(heldout["differences"])
    assert summary["throughput"]["trials"] > 0
    assert summary["peak_memory_bytes"] > 2**28
    assert 0 < summary["time_to_first_reward_seconds"] < summary["wall_seconds"]


def test_the_effect_is_real_right_questions_teach_and_wrong_facts_do_not(
    undisturbed: tuple[Preceptor, dict[str, Any]],
) -> None:
    arms = undisturbed[1]["heldout"]["arms"]
    assert arms["oracle"]["accuracy"] > 0.6
    assert arms["no_edit"]["accuracy"] < 0.2
    assert arms["shuffled_facts"]["accuracy"] < 0.2


def test_the_same_run_again_trains_nothing_and_gives_the_same_result(
    undisturbed: tuple[Preceptor, dict[str, Any]], tmp_path: Path
) -> None:
    command, first = undisturbed
    again = command.run(tmp_path / "out")
    assert outcome(again) == outcome(first)
    assert sum(entry["evaluations"]["cached"] for entry in again["rounds"]) > 0
    assert again["throughput"]["trials"] == 0


def test_killing_every_process_once_changes_nothing(
    undisturbed: tuple[Preceptor, dict[str, Any]], preceptor: Preceptor, tmp_path: Path
) -> None:
    process = preceptor.start("run", str(SMALL), "--out", str(tmp_path / "out"), "--json")
    read_until(process, '"run"')
    victims = ["worker-1", "evaluator", "redis", "worker-2", "teacher", "student", "orchestrator"]
    for victim in victims:
        before = preceptor.pids()
        if victim not in before:  # a machine with one core has one worker
            continue
        os.kill(before[victim], signal.SIGKILL)
        wait_until(
            lambda name=victim, old=before: preceptor.pids().get(name, old[name]) != old[name],  # type: ignore[misc]
            60,
            f"{victim} was started again",
        )
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, output
    assert outcome(summary_in(tmp_path / "out")) == outcome(undisturbed[1])


def test_killing_who_drives_a_race_and_who_trains_for_it_changes_nothing(preceptor: Preceptor, tmp_path: Path) -> None:
    race = ("reward.race.look_steps=4", "reward.fresh_seeds=1", "tasks.heldout=0")
    expected = Preceptor(tmp_path / "other").run(tmp_path / "expected", *race)
    assert sum(entry["stopped"] for entry in expected["rounds"]) > 0
    sets = [word for override in race for word in ("--set", override)]
    process = preceptor.start("run", str(SMALL), "--out", str(tmp_path / "out"), "--json", *sets)
    # In the looks, and when some have been stopped and the better ones go on.
    for reached, victims in (
        (r'"evaluations_running": [1-9]', ["orchestrator"]),
        (r'"self_edits_stopped": [1-9]', ["orchestrator", "worker-1", "evaluator"]),
    ):
        read_until(process, reached)
        for victim in victims:
            before = preceptor.pids()[victim]
            os.kill(before, signal.SIGKILL)
            wait_until(
                lambda name=victim, old=before: preceptor.pids().get(name, old) != old,  # type: ignore[misc]
                60,
                f"{victim} was started again",
            )
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, output
    summary = summary_in(tmp_path / "out")
    for key in ("reward", "look", "stopped", "fresh", "evaluations", "groups", "update", "policy"):
        assert [entry[key] for entry in summary["rounds"]] == [entry[key] for entry in expected["rounds"]]


def test_a_run_whose_owner_was_killed_is_resumed_to_the_same_result(
    undisturbed: tuple[Preceptor, dict[str, Any]], preceptor: Preceptor, tmp_path: Path
) -> None:
    process = preceptor.start("run", str(SMALL), "--out", str(tmp_path / "lost"))
    run = read_until(process, r"run (small-\w+)")[1]
    read_until(process, r"evaluations: [1-9]\d* done")
    pids = preceptor.pids()
    process.kill()
    process.communicate()
    services = [pid for name, pid in pids.items() if name != "redis"]
    wait_until(lambda: none_is_left(services), 60, "the orphaned services ended by themselves")
    code, output = preceptor("runs", "resume", run, "--out", str(tmp_path / "out"))
    assert code == 0, output
    assert outcome(summary_in(tmp_path / "out")) == outcome(undisturbed[1])
    assert none_is_left([pids["redis"]])
    assert not any((tmp_path / "lost").iterdir())  # made to see that it can be written; nothing half-written in it


def test_a_run_keeps_its_student_while_another_is_activated_and_the_next_run_uses_that(
    undisturbed: tuple[Preceptor, dict[str, Any]], preceptor: Preceptor, tmp_path: Path
) -> None:
    stack = preceptor.start("up")
    try:
        wait_until(lambda: preceptor("students", "list", "--json")[0] == 0, 240, "the stack is up")
        code, output = preceptor("runs", "create", str(SMALL), "--json")
        assert code == 0, output
        first = json.loads(output)["id"]
        code, output = preceptor("students", "register", "other", "--source", str(shipped_models() / "student_qwen2"))
        assert code == 0, output
        code, output = preceptor("students", "activate", "other", "--wait")
        assert code == 0, output
        code, output = preceptor("runs", "watch", first)
        assert code == 0, output
        assert preceptor("runs", "report", first, "--out", str(tmp_path / "first"))[0] == 0
        assert outcome(summary_in(tmp_path / "first")) == outcome(undisturbed[1])
        code, output = preceptor("run", str(SMALL), "--connect", "--out", str(tmp_path / "second"))
        assert code == 0, output
        assert summary_in(tmp_path / "first")["student"]["name"] == "almanac"
        assert summary_in(tmp_path / "second")["student"]["name"] == "other"
    finally:
        stack.send_signal(signal.SIGINT)
        stack.communicate(timeout=60)


def test_own_passages_go_through_and_nothing_is_claimed(preceptor: Preceptor, tmp_path: Path) -> None:
    passages = [
        {
            "title": f"River {number}",
            "context": f"The river {name} rises in the hills of Arden. It is {length} km long and ends in a lake.",
            "questions": [
                {"question": f"How long is the {name}?", "answer": f"{length} km"},
                {"question": f"Where does the {name} rise?", "answer": "the hills of Arden"},
            ],
        }
        for number, (name, length) in enumerate(
            [("Alva", 90), ("Brin", 120), ("Coor", 33), ("Dunn", 47), ("Ebel", 210)]
        )
    ]
    tasks = tmp_path / "passages.json"
    tasks.write_text(json.dumps(passages))
    summary = preceptor.run(
        tmp_path / "out", "tasks.world=", f"tasks.path={tasks}", "tasks.train=5", "tasks.heldout=0", "rounds.count=1"
    )
    assert summary["rounds"][0]["tasks"] == 3
    assert summary["notes"]
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
