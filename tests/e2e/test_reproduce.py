"""An experiment of ``preceptor reproduce`` on the embedded stack: every process real, the models tiny."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from preceptor import arms
from tests.e2e.conftest import DEADLINE_SECONDS, SMALL, Preceptor, read_until

pytestmark = pytest.mark.timeout(900)


def test_transfer_that_was_interrupted_goes_on_and_leads_from_runs_to_the_page(
    preceptor: Preceptor, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # Two fine-tunes a round are enough for a teacher that is another one afterwards.
    less = ["rounds.count=1", "rounds.tasks=2", "rounds.self_edits=3", "tasks.heldout=2"]
    asked = ["reproduce", "transfer", "--seeds", "1", "--config", str(SMALL), "--out", str(out), "--workers", "1"]
    asked += [word for override in less for word in ("--set", override)]
    process = preceptor.start(*asked)
    read_until(process, "step 2 of 4")
    read_until(process, r"evaluations: [1-9]\d* done")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 130, output
    assert "the same command goes on where it stopped" in output
    assert not (out / "results.json").exists()

    code, output = preceptor(*asked)
    assert code == 0, output
    results = json.loads((out / "results.json").read_text())
    assert results["failures"] == []
    for section, others in zip(results["sections"], ("B→A", "A→B"), strict=True):
        found = {arm["arm"]: arm for arm in section["arms"]}
        assert found["trained_elsewhere"]["words"].startswith(others)
        for name in (arms.NO_EDIT, arms.PASSAGE, arms.UNTRAINED, arms.FIXED, arms.TRAINED, arms.ORACLE):
            assert found[name]["passages"] == 2, name
        assert found[arms.ORACLE]["trained_tokens"] > 1000
        assert found[arms.TRAINED]["preparation_seconds"] > 0
    runs = results["data"]["runs"]
    # Each teacher writes for the other student as it was when its own run ended.
    for teacher, other in (("A", "B"), ("B", "A")):
        trained = runs["own"][teacher]["0"]["policies"][-1]
        assert trained != runs["own"][teacher]["0"]["policies"][0]
        assert runs["foreign"][other]["0"]["policies"][-1] == trained
    assert (out / "report.html").read_text().count("<svg") == 5
    # The interrupted run went on: there are four runs, not five.
    assert len(list((out / "runs").iterdir())) == 4
