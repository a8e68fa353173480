"""What ``preceptor reproduce --full`` says it would cost, and the steps of every experiment."""

from __future__ import annotations

from pathlib import Path

import pytest

from preceptor.errors import PreceptorError
from preceptor.reproduce import batch, fewshot, knowledge, transfer
from preceptor.reproduce.cost import WRITE_SHARE, estimate, gpu_named
from preceptor.reproduce.experiment import EXPERIMENTS, Options, Step, experiment

REPOSITORY = Path(__file__).parents[2]
SQUAD = """[{"title": "A", "context": "Ada lives in Rome.", "questions": [{"question": "Where?", "answer": "Rome"}]},
{"title": "B", "context": "Bela lives in Bonn.", "questions": [{"question": "Where now?", "answer": "Bonn"}]}]"""


def test_the_estimate_counts_operations_of_student_and_teacher() -> None:
    step = Step("x", trials=100, trained_tokens=1e6, answered_tokens=2e6, written_tokens=1e5, learnt_tokens=3e5)
    gpu = gpu_named("h100")
    cost = estimate([step, step], 7e9, 1e9, gpu, price=2.0)
    rate = gpu.peak * 0.25
    assert cost.trials == 200
    assert cost.student_seconds == pytest.approx(7e9 * (4 * 2e6 + 2 * 4e6) / rate)
    assert cost.teacher_seconds == pytest.approx(1e9 * (4 * 6e5 / rate + 2 * 2e5 / (gpu.peak * WRITE_SHARE)))
    assert cost.dollars(cost.gpu_hours) == pytest.approx(2 * cost.gpu_hours)
    assert cost.published_hours == (pytest.approx(200 * 30 / 3600), pytest.approx(200 * 45 / 3600))
    assert estimate([step], 7e9, 1e9, gpu, price=None).dollars(1.0) is None


@pytest.mark.parametrize(
    ("student", "teacher", "field"),
    [(0.0, 1e9, "student_billions"), (1e9, -1.0, "teacher_billions"), (7e10, 1e9, "gpu")],
)
def test_models_that_are_none_or_do_not_fit_are_refused(student: float, teacher: float, field: str) -> None:
    with pytest.raises(PreceptorError) as refused:
        estimate([Step("x", 1)], student, teacher, gpu_named("H100"), None)
    assert refused.value.metadata["field"] == field
    with pytest.raises(PreceptorError, match="H100"):
        gpu_named("abacus")


def test_a_run_of_a_shipped_world_has_steps_without_a_stack() -> None:
    steps = knowledge.steps(Options(seeds=2))
    assert [step.student for step in steps] == ["almanac", "almanac"]
    assert all(step.trials > 300 for step in steps)
    assert all(step.trained_tokens == pytest.approx(step.trials * 1500, rel=0.01) for step in steps)
    assert len(transfer.steps(Options(seeds=2))) == 8
    assert len(batch.steps(Options(seeds=2))) == 2 + 1 + 2 * (len(batch.SETTINGS) + 1)


def test_the_same_seed_is_the_same_run_for_every_experiment_on_the_world() -> None:
    options = Options()
    config = knowledge.config_for(options, "almanac", 1)
    assert config.seed == 1
    assert config.heldout.in_context
    assert config.heldout.formats == knowledge.FORMATS
    # Whatever else is set, the other's teacher learns nothing more.
    cross = transfer.cross_config(Options(overrides=("rounds.count=3",)), "almanac-qwen2", 1, "policy-abc")
    assert (cross.rounds.count, cross.teacher.policy, cross.student.name) == (0, "policy-abc", "almanac-qwen2")
    # What is compared must be asked in the same way.
    assert (cross.seed, cross.training, cross.answers, cross.heldout.seeds) == (
        config.seed,
        config.training,
        config.answers,
        config.heldout.seeds,
    )


def test_overrides_come_last_and_a_config_of_ones_own_is_taken(tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    own.write_text('name = "mine"\n[tasks]\nworld = "almanac"\ntrain = 4\nheldout = 2\n')
    config = knowledge.config_for(Options(config=own, overrides=("heldout.in_context=false", "seed=9")), "s", 0)
    assert (config.name, config.seed, config.student.name, config.heldout.in_context) == ("mine", 9, "s", False)


def test_full_needs_files_and_students_and_files_need_full(tmp_path: Path) -> None:
    file = tmp_path / "squad.json"
    file.write_text(SQUAD)
    for wrong, field in (
        (Options(full=True), "tasks"),
        (Options(full=True, tasks=file), "students"),
        (Options(tasks=file), "tasks"),
    ):
        for module in (knowledge, transfer, fewshot):
            with pytest.raises(PreceptorError) as refused:
                module.steps(wrong)
            assert refused.value.metadata["field"] == field
    (step,) = knowledge.steps(Options(full=True, tasks=file, students=("q",), seeds=1))
    assert step.student == "q"
    assert step.trained_tokens == pytest.approx(step.trials * 3600, rel=0.01)  # ten epochs of a self-edit, no budget
    with pytest.raises(PreceptorError) as missing:
        knowledge.steps(Options(full=True, tasks=tmp_path / "none.json", students=("q",)))
    assert missing.value.reason == "FILE_NOT_FOUND"


def test_transfer_needs_two_students() -> None:
    for students in (("almanac",), ("almanac", "almanac"), ("a", "b", "c")):
        with pytest.raises(PreceptorError) as refused:
            transfer.steps(Options(students=students))
        assert refused.value.metadata["field"] == "students"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_steps_and_a_measurement(name: str) -> None:
    module = experiment(name)
    assert callable(module.measure)
    assert len(module.steps(Options(seeds=1))) >= 1
