"""Promises of what is shown during a run and at its end."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from preceptor.cli.follow import Results, output_folder, raise_if_unsuccessful, write_files
from preceptor.cli.live import JsonView, PlainView, TerminalView, bar, duration
from preceptor.cli.summary import print_results, verdicts
from preceptor.errors import PreceptorError
from preceptor.v1 import orchestrator_pb2 as pb


def snapshot(phase: str = "round 1: evaluating", **progress: float) -> pb.WatchRunResponse:
    answer = pb.WatchRunResponse()
    answer.run.id, answer.run.state = "run-1", pb.RUN_STATE_RUNNING
    values = {"rounds": 3, "evaluations_done": 7, "workers": 2, "seconds_left": -1, "first_reward_seconds": -1}
    answer.progress.CopyFrom(pb.RunProgress(phase=phase, **(values | progress)))  # type: ignore[arg-type]
    answer.progress.rewards.add(round=1, mean=0.25, stderr=0.031, count=12)
    return answer


def drawn(view: TerminalView) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_live_view_shows_rounds_evaluations_workers_phase_and_time() -> None:
    view = TerminalView()
    assert "starting" in drawn(view)
    view.show(snapshot(evaluations_failed=2, seconds_left=90, done_share=0.5, seconds_elapsed=65))
    text = drawn(view)
    for part in ("run-1", "round 1: evaluating", "7 done", "2 failed", "+0.250 ± 0.031", "2 workers", "1m05s gone"):
        assert part in text
    assert "about 1m" in text
    assert "no reward yet" in text


def test_self_edits_that_a_race_stopped_are_said_in_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView()
    view.show(snapshot(phase="one", self_edits_stopped=5))
    view.show(snapshot(phase="two"))
    first, second = capsys.readouterr().out.splitlines()
    assert "0 running, 5 stopped early, 0 failed" in first
    assert "stopped" not in second


def test_the_live_view_claims_no_time_left_where_it_is_unknown() -> None:
    view = TerminalView()
    view.show(snapshot())
    assert "left" not in drawn(view)


def test_markup_and_control_characters_of_a_service_are_shown_as_they_are() -> None:
    view = TerminalView()
    view.show(snapshot(phase="[bold]x[/bold] [/nope] \x1b[2J"))
    assert "[bold]x[/bold] [/nope] \N{REPLACEMENT CHARACTER}[2J" in drawn(view)


def test_a_log_gets_a_line_per_phase_and_not_one_per_snapshot(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView()
    for _ in range(50):
        view.show(snapshot())
    view.show(snapshot(phase="round 1: updating"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "round 1: evaluating; evaluations: 7 done" in lines[0]
    assert "reward of round 1: +0.250 ± 0.031; 2 workers" in lines[0]


def test_json_lines_carry_every_number_and_the_state(capsys: pytest.CaptureFixture[str]) -> None:
    view = JsonView()
    view.say("starting")
    view.show(snapshot())
    first, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first == {"event": "message", "message": "starting"}
    assert second["run"] == "run-1"
    assert second["progress"]["state"] == "RUNNING"
    assert second["progress"]["evaluations_failed"] == 0
    assert second["progress"]["rewards"][0]["stderr"] == 0.031


@pytest.mark.parametrize(("seconds", "text"), [(-3, "0s"), (8.9, "8s"), (125, "2m05s"), (3720, "1h02m")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_bars_stay_within_their_width() -> None:
    assert {len(bar(share)) for share in (-1, 0, 0.3, 1, 7)} == {24}


SUMMARY = {
    "rounds": [{"round": 1, "evaluations": {"cached": 3}}],
    "heldout": {
        "passages": 32,
        "questions": 300,
        "bank": "sealed",
        "arms": {
            "no_edit": {"accuracy": 0.02, "ci95": [0.01, 0.04], "retention": 0.9},
            "oracle": None,
            "trained_teacher": {
                "accuracy": 0.55,
                "ci95": [0.45, 0.64],
                "retention": None,
                "trained_tokens": 1499.7,
                "worker_seconds": 0.2061,
            },
        },
        "differences": {
            "trained_minus_untrained": {"mean": 0.25, "ci95": [0.15, 0.35]},
            "trained_minus_fixed": {"mean": 0.01, "ci95": [-0.03, 0.05], "needed_questions": 900},
            "shuffled_minus_no_edit": {"mean": -0.01, "ci95": [-0.02, -0.005]},
            "trained_minus_oracle": None,
        },
    },
    "notes": ["The oracle was not measured."],
    "throughput": {"trials": 120},
    "wall_seconds": 273.2,
    "time_to_first_reward_seconds": 20.5,
    "peak_memory_bytes": 2**31,
}


def test_the_end_shows_arms_with_intervals_differences_and_paths(capsys: pytest.CaptureFixture[str]) -> None:
    print_results(Results(SUMMARY, Path("out/summary.json"), Path("out/report.html")))
    text = capsys.readouterr().out
    assert "held-out: 32 passages, 300 questions (bank: sealed)" in text
    assert "note: The oracle was not measured." in text
    row = next(line for line in text.splitlines() if line.startswith("trained teacher"))
    assert row.split() == ["trained", "teacher", "55.0%", "[45.0,", "64.0]", "-", "1500", "0.21"]
    assert "trained is better than untrained: +25.0 points, 95% interval [+15.0, +35.0]" in text
    assert (
        "trained is not told apart from fixed: +1.0 points, 95% interval [-3.0, +5.0]; to see a difference of "
        "this size: about 900 questions" in text
    )
    assert "shuffled is" not in text  # a control of which no side is better
    assert "3 evaluations were known already" in text
    assert "peak memory 2.00 GiB" in text
    assert text.splitlines()[-2:] == ["summary: out/summary.json", "report:  out/report.html"]


def test_a_summary_without_heldout_measurement_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    print_results(Results({"heldout": None}, Path("s"), Path("r")))
    assert "no held-out measurement was made" in capsys.readouterr().out


def test_a_loss_is_called_a_loss() -> None:
    assert verdicts({"a_minus_b": {"mean": -0.2, "ci95": [-0.3, -0.1]}})[0].startswith("a is worse than b")


def test_results_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("old")
    (tmp_path / "report.html").mkdir()  # cannot be replaced by a file
    with pytest.raises(PreceptorError) as caught:
        write_files(tmp_path, {"report.html": "<p>", "summary.json": "new"})
    assert caught.value.reason == "OUTPUT_NOT_WRITABLE"
    assert (tmp_path / "summary.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "summary.json"]


def test_a_folder_made_for_results_that_never_came_is_taken_away(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "runs" / "one"):
        raise KeyboardInterrupt
    assert not (tmp_path / "runs" / "one").exists()


def test_a_run_that_did_not_succeed_raises_its_own_reason() -> None:
    run = pb.Run(id="run-1", state=pb.RUN_STATE_FAILED)
    run.failure.reason, run.failure.message = "PASSAGE_TOO_LONG", "3,000 tokens"
    with pytest.raises(PreceptorError, match="run run-1 failed: 3,000 tokens") as caught:
        raise_if_unsuccessful(run)
    assert caught.value.reason == "PASSAGE_TOO_LONG"
    run.failure.reason = "FROM_A_NEWER_SERVICE"
    with pytest.raises(PreceptorError) as caught:
        raise_if_unsuccessful(run)
    assert caught.value.reason == "RUN_FAILED"
    with pytest.raises(PreceptorError, match="was cancelled"):
        raise_if_unsuccessful(pb.Run(id="run-1", state=pb.RUN_STATE_CANCELLED))
    raise_if_unsuccessful(pb.Run(state=pb.RUN_STATE_SUCCEEDED))
