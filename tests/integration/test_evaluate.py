"""``preceptor evaluate`` with an embedded stack and the student that ships."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from preceptor.stack import shipped_models
from worlds.almanac.passages import passages

REPOSITORY = Path(__file__).parents[2]
# Several imports of torch on a busy machine.
SECONDS = 240

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not (shipped_models() / "student").is_dir(), reason="the world's models are not built"),
]


def evaluate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("PRECEPTOR_")}
    command = [sys.executable, "-m", "preceptor", "evaluate", "--world", "almanac:1", "--workers", "1", *arguments]
    environment = {**own, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)


def test_self_edits_get_their_rewards_and_the_next_command_knows_them(tmp_path: Path) -> None:
    passage = passages(0, "train", 1)[0]
    oracle = passage.reference_edits["oracle"]
    (tmp_path / "facts.txt").write_text("directive: lr=1e-2 epochs=32 replay=0.25\n" + "\n".join(oracle.documents))
    (tmp_path / "idle.json").write_text(json.dumps({"documents": ["Nothing to see."]}))
    (tmp_path / "long.txt").write_text("word " * 4000)
    arguments = ("--seeds", "2", "--self-edit", "facts.txt", "idle.json", "long.txt", "--json")

    first = evaluate(tmp_path, *arguments)
    assert first.returncode == 2, first.stderr  # one of them failed
    assert "error: long: " in first.stderr
    assert "(SEQUENCE_TOO_LONG)" in first.stderr
    report: dict[str, Any] = json.loads(first.stdout)
    facts, idle, long = report["self_edits"]
    assert (report["best"], long["reward"]) == ("facts", None)
    assert facts["reward"]["seeds"] == 2
    assert facts["reward"]["accuracy"] > facts["reward"]["baseline_accuracy"] + 0.3
    assert facts["reward"]["terms"].keys() >= {"gain", "gold_logprob_gain", "gold_probability_gain", "retention_loss"}
    assert facts["overlap"]["answers_stated"] == 8
    assert abs(idle["reward"]["value"]) < 0.2
    assert [one["name"] for one in report["controls"]] == ["raw passage", "shuffled facts"]
    clear = {made["other"]: made["clear"] for made in report["differences"]}
    assert clear["idle"]
    assert clear["no edit"]
    assert clear["shuffled facts"]
    assert report["reliability"] > 0.5

    again = evaluate(tmp_path, *arguments)
    repeated = json.loads(again.stdout)
    assert repeated["evaluations"]["cached"] == 4  # the failure is tried again
    assert repeated["self_edits"][0]["reward"] == facts["reward"]
    # Nothing is left of either stack.
    assert not (tmp_path / ".preceptor" / "stack.json").exists()
    assert not [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(tmp_path)]
