"""The comparison of algorithms: its settings are read, and its table and picture say what the runs said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.algorithms import ALGORITHMS, SMALL, main, means
from preceptor.config import load_config
from teacher.algorithms import ALGORITHMS as KNOWN


def summary(rewards: list[float], trained: float) -> dict[str, Any]:
    rounds = [
        {
            "reward": {"mean": reward, "stderr": 0.01},
            "groups": {"offered": 6, "dropped": 1},
            "evaluations": {"malformed": 2},
            "diversity": 0.5,
            "kl": None,
            "seconds": {"update": 2.5},
        }
        for reward in rewards
    ]
    arms = {"untrained_teacher": {"accuracy": 0.25}, "trained_teacher": {"accuracy": trained}}
    difference = {"mean": trained - 0.25, "ci95": [0.0, 0.5]}
    return {"rounds": rounds, "heldout": {"arms": arms, "differences": {"trained_minus_untrained": difference}}}


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_the_settings_of_every_arm_are_read(algorithm: str) -> None:
    config = load_config(Path("configs/almanac.toml"), [*SMALL, *ALGORITHMS[algorithm]])
    assert config.update.algorithm == algorithm
    assert config.rounds.count * config.rounds.tasks == config.tasks.train  # no passage twice
    assert set(ALGORITHMS) == set(KNOWN)


def test_results_that_are_there_are_read_shown_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, shift in ((0, 0.0), (1, 0.1)):
        for place, algorithm in enumerate(ALGORITHMS):
            folder = tmp_path / f"{algorithm}-{seed}"
            folder.mkdir()
            made = summary([0.1, 0.2 + 0.1 * place + shift], 0.5 + shift)
            (folder / "summary.json").write_text(json.dumps(made), encoding="utf-8")
    figures, picture = tmp_path / "figures.json", tmp_path / "curves.png"
    main(["--seeds", "0", "1", "--out", str(tmp_path), "--json", str(figures), "--picture", str(picture)])
    lines = json.loads(figures.read_text(encoding="utf-8"))
    assert [(one["algorithm"], one["seed"]) for one in lines] == [
        (name, seed) for seed in (0, 1) for name in ALGORITHMS
    ]
    said = capsys.readouterr().out
    assert "| grpo | 1 | 0.10 0.40 |" in said
    assert "| rloo | 0.45 (0.40 .. 0.50) | 0.55 (0.50 .. 0.60) | 2 |" in means(lines)
    assert picture.read_bytes().startswith(b"\x89PNG")
