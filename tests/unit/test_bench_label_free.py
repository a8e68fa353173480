"""The benchmark of rewards without labels: its statistics, and its table from trials that are given."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.label_free import LABELLED, SEALED, WRITTEN, Candidate, Group, _best_two, interval, main, spearman
from bench.label_free_runs import ARMS, SMALL
from bench.label_free_runs import main as runs
from evaluator.reward import Marks
from preceptor.config import load_config


def test_rank_correlation_is_spearmans() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Without ties: 1 - 6 * (sum of squared differences of ranks) / (n (n^2 - 1)); here 1, -1, 0, -1, 1.
    assert spearman([86, 97, 99, 100, 101], [20, 0, 27, 50, 28]) == pytest.approx(1 - 6 * 4 / 120)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.8660254)  # ties share their mean rank


def test_a_reward_that_is_always_the_same_says_nothing() -> None:
    assert spearman([0.5, 0.5, 0.5], [1, 2, 3]) == 0.0


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8), st.data())
def test_the_best_two_share_their_places_with_their_equals(truth: list[float], data: st.DataObject) -> None:
    liked = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=len(truth), max_size=len(truth)))
    found = _best_two(liked, truth)
    assert min(truth) - 1e-9 <= found <= max(truth) + 1e-9
    if len(set(liked)) == 1:
        assert found == pytest.approx(fmean(truth))
    assert _best_two(truth, truth) >= found - 1e-9


def test_the_interval_holds_the_mean_and_is_the_same_again() -> None:
    values = [0.1 * i for i in range(20)]
    low, high = interval(values)
    assert low < fmean(values) < high
    assert interval(values) == (low, high)


def marks(right: int, of: int = 4) -> Marks:
    correct = tuple(i < right for i in range(of))
    return Marks(
        correct=correct,
        gold_logprobs=tuple(-0.1 if one else -3.0 for one in correct),
        probes_correct=(True, True),
        certainties=tuple(9.0 - one for one in correct),  # the sure ones are the ignorant
        agreements=tuple(0.5 for _ in correct),
        tokens=1000,
    )


def group(rights: list[int]) -> Group:
    def candidate(right: int) -> Candidate:
        some = (marks(right),) * 3
        return Candidate(dict.fromkeys((LABELLED, SEALED, WRITTEN), some), {LABELLED: 0, SEALED: 0, WRITTEN: right})

    written = {"written": 4, "right": 3, "facts": 4, "asked": 3, "dropped": {"in one completion only": 1}}
    baseline = dict.fromkeys((LABELLED, SEALED, WRITTEN), marks(0))
    return Group((0, 1, 2, 3), written, baseline, tuple(map(candidate, rights)))


def test_the_table_tells_good_rewards_from_bad_ones_and_the_file_of_trials_is_read_again(tmp_path: Path) -> None:
    trials, found = tmp_path / "trials.json", tmp_path / "found.json"
    groups = [group([0, 1, 2, 3, 4]), group([4, 0, 2, 1, 3])]
    main(["--measured", str(trials), "--json", str(found)], measured=lambda _seed, _count: groups)
    first = json.loads(found.read_text())

    def unasked(_seed: int, _count: int) -> list[Group]:
        raise AssertionError("measured again")

    main(["--measured", str(trials), "--json", str(found)], measured=unasked)
    assert json.loads(found.read_text()) == first
    of = {row["reward"]: row for row in first["rewards"]}
    assert of["labelled questions, gain"]["spearman"] == pytest.approx(1.0)
    assert of["written questions (half), gain"]["best_two"] == pytest.approx(1.5 / 4)
    assert of["certainty on given questions"]["spearman"] == pytest.approx(-1.0)
    assert of["agreement on given questions"]["spearman"] == 0.0
    assert of["written (half), gain, overlap penalty 1"]["spearman"] == 0.0  # the penalty takes what the gain gives
    assert first["questions"]["right"] == 6


def test_runs_that_are_there_are_read_and_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = {
        "rounds": [{"reward": {"mean": 0.5}}, {"reward": {"mean": None}}],
        "canary": [{"round": i, "mean": 0.3, "stderr": 0.1, "stopped": i == 2} for i in range(3)],
        "heldout": {
            "arms": {"untrained_teacher": {"accuracy": 0.2}, "trained_teacher": {"accuracy": 0.25}},
            "differences": {"trained_minus_untrained": {"mean": 0.05, "ci95": [-0.1, 0.2]}},
        },
    }
    folder = tmp_path / "certainty-all-kept-unwatched-7"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(summary))
    kept = tmp_path / "found.json"
    runs(["--arms", "certainty, all kept, unwatched", "--seeds", "7", "--out", str(tmp_path), "--json", str(kept)])
    expected = "| 7 | 0.50 - | 0.30 0.30 0.30, stopped after 2 | 0.20 -> 0.25 | +0.05 (-0.10 .. +0.20) |"
    assert expected in capsys.readouterr().out
    assert json.loads(kept.read_text())[0]["stopped_after"] == 2


def test_every_arm_is_a_config_that_can_be_run() -> None:
    for settings in ARMS.values():
        load_config(Path(__file__).parents[2] / "configs" / "almanac.toml", [*SMALL, *settings])
