"""The capacity formula: by hand, at its edges, and as the command says it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from preceptor import capacity
from preceptor.capacity import GPUS, Gpu, Work, estimated_seconds, estimates, gpus_needed, read_bench, surroundings
from preceptor.cli import main
from preceptor.errors import PreceptorError

H200 = next(gpu for gpu in GPUS if gpu.name == "H200")
BENCH = {
    "arms": {
        "ours_k1": {"trials_per_second": 1.0},
        "ours_k15": {"trials_per_second": 4.0},
        "bare_peft": {"trials_per_second": 99.0},
    },
    "details": {
        "arms": {
            "ours_k1": {"answer_seconds": 0.0, "export_seconds": 0.0},
            "ours_k15": {"answer_seconds": 0.04, "export_seconds": None},
            "bare_peft": {"answer_seconds": 0.0, "export_seconds": 0.0},
        }
    },
    "shape": "7b",
    "device": "cuda",
}


def test_gpus_are_what_a_day_of_trials_takes_by_hand() -> None:
    # 2,000 x 12 x 3 = 72,000 trials of 2.4 s are 172,800 s, two days; a GPU trains half of each.
    work = Work(2_000, 12, 3, busy_share=0.5)
    assert work.trials == 72_000
    assert gpus_needed(work, 2.4) == 4
    assert gpus_needed(work, 2.4001) == 5
    assert gpus_needed(work, 1e-12) == 1  # no work is done by no GPU


def test_a_race_that_trains_a_fifth_needs_a_fifth() -> None:
    everybody, raced = Work(10_000, 8, 8), Work(10_000, 8, 8, work_share=0.2)
    assert raced.trials == everybody.trials / 5
    assert gpus_needed(everybody, 10.0) == 93
    assert gpus_needed(raced, 10.0) == 19


def test_an_estimate_counts_four_operations_a_trained_token_and_two_a_read_one() -> None:
    gpu = Gpu("one", peak=1e15, memory=1e12)
    assert estimated_seconds(7e9, gpu, 1.0, 4_000, 0.0) == pytest.approx(4 * 7e9 * 4_000 / 1e15)
    assert estimated_seconds(7e9, gpu, 0.5, 4_000, 4_000) == pytest.approx(6 * 7e9 * 4_000 / 0.5e15)


def test_the_count_of_the_design_comes_out() -> None:
    """0.13 s for a default self-edit (4,437 tokens) of a 7B student on an H200, batched, at the GPU's full rate."""
    assert estimated_seconds(7e9, H200, 1.0, 87 * 51, 0.0) == pytest.approx(0.13, abs=0.005)


def test_a_student_that_leaves_no_room_is_not_estimated() -> None:
    assert estimated_seconds(70e9, H200) is None
    assert estimated_seconds(14e9, GPUS[0]) is None
    assert estimated_seconds(7e9, GPUS[0]) is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("passages", 0), ("self_edits", -1), ("seeds", 0), ("work_share", 0.0), ("work_share", 1.1),
        ("busy_share", math.nan), ("self_edit_tokens", math.inf),
    ],
)  # fmt: skip
def test_what_is_no_work_is_refused_with_its_name(field: str, value: float) -> None:
    good: dict[str, Any] = {"passages": 1, "self_edits": 1, "seeds": 1}
    with pytest.raises(PreceptorError) as raised:
        Work(**{**good, field: value})
    assert raised.value.metadata["field"] == field


def test_surroundings_follow_from_what_was_measured() -> None:
    work = Work(100_000, 10, 2, busy_share=1.0, self_edit_tokens=432)
    around = surroundings(work, gpus=200)
    assert around.trials_per_second == pytest.approx(2_000_000 / 86_400)
    assert around.cores == pytest.approx(around.trials_per_second * capacity.CPU_MS_PER_EVALUATION / 1000)
    assert around.teacher_tokens_per_second == pytest.approx(5_000)
    assert around.batches_in_flight == 400
    assert around.of_measured_rate < 1


def test_the_default_limit_of_batches_is_the_evaluators() -> None:
    from evaluator import lanes
    from evaluator.settings import EvaluatorSettings

    assert capacity.BATCHES_PER_WORKER == lanes.BATCHES_PER_WORKER
    assert EvaluatorSettings.model_fields["batches_in_flight"].default == capacity.BATCHES_IN_FLIGHT


def test_trained_tokens_are_the_benchs() -> None:
    from bench.inner_loop_workload import RECIPE, self_edit_workload

    work = self_edit_workload(1_500)
    mean = sum(len(lesson.ids) for one in work for step in one.plan.steps for lesson in step) / len(work)
    assert mean == pytest.approx(capacity.TRAINED_TOKENS, rel=0.01)
    assert capacity.TRAINED_TOKENS / RECIPE.epochs == capacity.SELF_EDIT_TOKENS


def test_a_measurement_is_the_best_of_our_arms_with_answers_and_export(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(BENCH))
    assert read_bench(file) == ("7b on cuda, ours_k15", pytest.approx(0.29))


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "1", "[" * 100_000, '{"arms": {}, "details": {"arms": {}}}',
        json.dumps({**BENCH, "arms": {"bare_peft": {"trials_per_second": 1}}}),
        json.dumps({**BENCH, "arms": {"ours_k1": {"trials_per_second": 0}}}),
        json.dumps({**BENCH, "arms": {"ours_k1": {"trials_per_second": -1}}}),
        json.dumps({**BENCH, "arms": {"ours_k1": {"trials_per_second": None}}}),
    ],
)  # fmt: skip
def test_a_file_that_is_no_measurement_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(PreceptorError) as raised:
        read_bench(file)
    assert raised.value.reason == "INVALID_REQUEST"


def test_what_the_bench_really_writes_can_be_read(tmp_path: Path) -> None:
    from bench.inner_loop import main as bench

    file = tmp_path / "bench.json"
    options = "--shape minute --trials 3 --epochs 1 --targets qv --arms ours_k1"
    bench([*options.split(), "--json", str(file)])
    what, seconds = read_bench(file)
    assert what == "minute on cpu, ours_k1"
    assert seconds > 0


def asked(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    code = main(["capacity", *options])
    out, err = capsys.readouterr()
    return code, out, err


DAY = ("--passages", "1000", "--edits", "12", "--seeds", "3")


def test_the_command_estimates_for_a_few_gpus_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = asked(capsys, *DAY, "--student-billions", "14")
    assert code == 0
    assert "36,000 trials a day" in out
    assert "estimate" in out
    assert "measured\n" not in out
    assert "too large" in out
    assert "note: estimates" in out


def test_the_command_takes_a_measurement(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(BENCH))
    code, out, _ = asked(capsys, *DAY, "--bench", str(file), "--json")
    assert code == 0
    (need,) = json.loads(out)["gpus"]
    assert need == {"gpu": "7b on cuda, ours_k15", "seconds_per_trial": pytest.approx(0.29), "gpus": 1,
                    "measured": True}  # fmt: skip
    code, out, _ = asked(capsys, *DAY, "--seconds-per-trial", "38.4")
    assert code == 0
    assert " 20 " in out  # 36,000 x 38.4 s / (0.8 x 86,400 s)
    assert "note: estimates" not in out


def test_the_command_says_what_outgrows_one_evaluator(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = asked(capsys, "--passages", "1000000", "--edits", "15", "--seeds", "3", "--seconds-per-trial", "0.5")
    assert code == 0
    assert "more than one evaluator" in out
    assert "PRECEPTOR_BATCHES_IN_FLIGHT=652" in out


@pytest.mark.parametrize(
    "options",
    [
        ("--seconds-per-trial", "0"),
        ("--seconds-per-trial", "1", "--bench", "x.json"),
        ("--seconds-per-trial", "1", "--peak-share", "0.5"),
        ("--bench", "/nowhere/x.json"),
        ("--peak-share", "2"),
        ("--student-billions", "-1"),
        ("--answered-tokens", "-1"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = asked(capsys, *DAY, *options)
    assert code == 2
    assert not out
    assert err


PAGE = Path(__file__).parents[2] / "docs" / "how-to-scale.md"


def test_the_page_shows_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    block = PAGE.read_text(encoding="utf-8").partition("$ preceptor capacity ")[2].partition("```")[0]
    options, _, shown = block.partition("\n")
    code, out, _ = asked(capsys, *options.split())
    assert code == 0
    said = [line.split() for line in out.splitlines() if not line.startswith("note:")]
    assert said == [line.split() for line in shown.splitlines()]


def test_the_pages_table_is_what_the_formula_says() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text(encoding="utf-8").splitlines() if "B | " in line]
    assert len(rows) == 6
    for row in rows:
        passages, parameters, *shown = (cell.strip() for cell in row)
        work = Work(int(passages.replace(",", "")), 12, 3)
        needs = estimates(work, float(parameters.removesuffix("B")) * 1e9)[:4]  # an H200 computes as an H100 does
        assert [str(need.gpus) for need in needs] == shown, row
