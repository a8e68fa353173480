from __future__ import annotations

import json
import math
from typing import Any

import pytest

from orchestrator.entries import HELDOUT, SELECTION, EditKey, Entry, round_stage
from orchestrator.heldout import best_strategy, selection_rewards
from orchestrator.plan import RunPlan
from orchestrator.results import Results, Round, heldout_results
from orchestrator.run_store import SUCCEEDED, RunRecord
from orchestrator.summary import build_summary, to_json
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import types_pb2 as types
from tests.orchestrated import passage, run_config

HELDOUT_TASKS = tuple(passage(f"river {i}") for i in range(12))
TASKS = tuple(passage(f"town {i}") for i in range(4))
PROBES = (types.Question(text="old?", answer="x"),)


def measured(
    accuracy: float, *, value: float | None = None, questions: int = 4, name: str = ""
) -> evaluator.Evaluation:
    reward = types.Reward(
        value=accuracy if value is None else value,
        stderr=0.1,
        accuracy=accuracy,
        baseline_accuracy=0.25,
        questions=4,
        seeds=1,
        retention=0.8,
        baseline_retention=1.0,
    )
    succeeded = evaluator.EVALUATION_STATE_SUCCEEDED
    return evaluator.Evaluation(id=name, state=succeeded, reward=reward, trials=[evaluator.TrialReport()])


FAILED = evaluator.Evaluation(
    id="f", state=evaluator.EVALUATION_STATE_FAILED, failure=types.Failure(reason="TRIAL_LOST", message="gone")
)


def entry(stage: str, arm: str, task: int, index: int = 0, **fields: Any) -> Entry:
    tasks = TASKS if stage.startswith("round") else HELDOUT_TASKS
    given = {"completion": "text", "self_edit": types.SelfEdit(documents=["a document"]), **fields}
    return Entry(EditKey(stage, arm, task, index), tasks[task].id, "policy", **given)


def arm(name: str, accuracy: float) -> list[Entry]:
    return [
        entry(HELDOUT, name, task, evaluation=measured(accuracy, name=f"{name}{task}"))
        for task in range(len(HELDOUT_TASKS))
    ]


def results(
    heldout: list[Entry], rounds: list[list[Entry]] | None = None, tasks: tuple[types.Task, ...] = HELDOUT_TASKS
) -> Results:
    config = run_config(rounds={"count": len(rounds or [])})
    request = pb.CreateRunRequest(config_json=config.to_json(), tasks=TASKS, heldout_tasks=tasks, probes=PROBES)
    record = RunRecord(
        id="run-1",
        name="test",
        state=SUCCEEDED,
        request=request,
        student=types.PinnedStudent(name="first", commit="c0ffee"),
        config_sha256=config.digest(),
        failure=None,
        resumes=0,
        base_policy="base",
        first_reward_seconds=1.5,
        peak_memory_bytes=10,
        created=0.0,
        finished=None,
    )
    plan = RunPlan.of(record)
    all_entries = [*heldout, *(line for lines in rounds or [] for line in lines)]
    return Results(
        run=record,
        plan=plan,
        rounds=tuple(
            Round(number, tuple(lines), {"generate": 1.0, "evaluate": 2.0}, f"policy-{number}", 1, len(lines))
            for number, lines in enumerate(rounds or [], 1)
        ),
        heldout=heldout_results(plan, all_entries) if tasks else None,
        seconds={("run", "other"): 1.0, ("round-00001", "generate"): 1.0, ("round-00001", "evaluate"): 2.0},
        first_reward_seconds=1.5,
        peak_memory_bytes=10,
        all_entries=tuple(all_entries),
    )


def full() -> Results:
    first = round_stage(1)
    lines = [
        entry(first, "", 0, 0, evaluation=measured(0.5, name="a")),
        entry(first, "", 0, 1, evaluation=measured(0.0, value=-0.5, name="b"), cached=True),
        entry(first, "", 1, 0, evaluation=FAILED),
        entry(first, "", 1, 1, malformed="no document", self_edit=None),
    ]
    arms = {"passage_only": 0.3, "untrained_teacher": 0.4, "fixed_strategy": 0.5, "trained_teacher": 0.75}
    arms |= {"oracle": 1.0, "shuffled_facts": 0.0}
    return results([line for name, accuracy in arms.items() for line in arm(name, accuracy)], [lines])


def test_every_key_of_the_contract_is_there() -> None:
    summary = json.loads(to_json(build_summary(full())))
    top = "schema run seed config_sha256 rounds heldout throughput wall_seconds time_to_first_reward_seconds"
    assert set(summary) >= {*top.split(), "peak_memory_bytes"}
    assert summary["schema"] == "preceptor.summary/1"
    (of,) = summary["rounds"]
    assert set(of) >= {"round", "tasks", "self_edits", "reward", "evaluations", "seconds"}
    assert set(of["reward"]) >= {"mean", "stderr"}
    assert set(of["evaluations"]) == {"succeeded", "failed", "malformed", "cached"}
    assert set(of["seconds"]) == {"generate", "evaluate", "update", "other"}
    heldout = summary["heldout"]
    assert set(heldout) >= {"passages", "questions", "arms", "differences"}
    assert list(heldout["arms"]) == [
        "no_edit",
        "passage_only",
        "untrained_teacher",
        "fixed_strategy",
        "trained_teacher",
        "oracle",
        "shuffled_facts",
    ]
    for of_arm in heldout["arms"].values():
        assert set(of_arm) >= {"accuracy", "ci95", "retention"}
    assert set(heldout["differences"]) >= {"trained_minus_untrained", "trained_minus_fixed"}
    assert set(heldout["differences"]["trained_minus_fixed"]) >= {"mean", "ci95"}
    assert set(summary["throughput"]) == {"trials", "trials_per_second"}


def test_the_numbers_are_those_of_the_ledger() -> None:
    summary = build_summary(full())
    (of,) = summary["rounds"]
    assert of["evaluations"] == {"succeeded": 2, "failed": 1, "malformed": 1, "cached": 1}
    assert (of["tasks"], of["self_edits"]) == (2, 4)
    assert of["reward"]["mean"] == 0.0  # (0.5 - 0.5) / 2: the failure is not a third value of zero
    assert of["reward"]["count"] == 2
    heldout = summary["heldout"]
    assert (heldout["passages"], heldout["questions"], heldout["bank"]) == (12, 48, "sealed")
    assert heldout["arms"]["no_edit"]["accuracy"] == 0.25
    assert heldout["arms"]["no_edit"]["retention"] == 1.0
    assert heldout["arms"]["trained_teacher"]["accuracy"] == 0.75
    assert heldout["arms"]["trained_teacher"]["retention"] == pytest.approx(0.8)
    assert heldout["differences"]["trained_minus_untrained"]["mean"] == pytest.approx(0.35)
    assert summary["wall_seconds"] == 4.0
    # Trials of this run: 72 held-out, one of the round; what was known before was not done again.
    assert summary["throughput"] == {"trials": 73, "trials_per_second": round(73 / 3, 4)}


def test_a_malformed_heldout_self_edit_counts_as_the_untouched_student() -> None:
    lines = [*arm("untrained_teacher", 0.5), *arm("trained_teacher", 1.0)[1:]]
    lines.append(entry(HELDOUT, "trained_teacher", 0, malformed="cut off", self_edit=None))
    trained = build_summary(results(lines))["heldout"]["arms"]["trained_teacher"]
    assert trained["accuracy"] == pytest.approx((11 * 1.0 + 0.25) / 12)
    assert (trained["malformed"], trained["passages"]) == (1, 12)


def test_a_failed_heldout_evaluation_is_left_out_of_the_arm_and_of_its_pairs() -> None:
    lines = [*arm("untrained_teacher", 0.5), *arm("trained_teacher", 1.0)[1:]]
    lines.append(entry(HELDOUT, "trained_teacher", 0, evaluation=FAILED))
    heldout = build_summary(results(lines))["heldout"]
    assert heldout["arms"]["trained_teacher"]["accuracy"] == 1.0
    assert heldout["arms"]["trained_teacher"]["failed"] == 1
    assert heldout["differences"]["trained_minus_untrained"]["passages"] == 11
    assert heldout["arms"]["no_edit"]["passages"] == 12


def test_an_arm_that_was_not_measured_is_null_and_so_is_its_difference() -> None:
    summary = build_summary(results([*arm("untrained_teacher", 0.5), *arm("trained_teacher", 0.5)]))
    assert summary["heldout"]["arms"]["oracle"] is None
    assert summary["heldout"]["differences"]["trained_minus_fixed"] is None
    assert any("Not measured" in note and "oracle" in note for note in summary["notes"])


def test_an_arm_in_which_everything_failed_has_no_accuracy() -> None:
    failures = [entry(HELDOUT, "oracle", task, evaluation=FAILED) for task in range(12)]
    oracle = build_summary(results([*arm("trained_teacher", 0.5), *failures]))["heldout"]["arms"]["oracle"]
    assert (oracle["accuracy"], oracle["ci95"], oracle["retention"], oracle["failed"]) == (None, None, None, 12)


def test_a_round_without_rewards_has_no_mean() -> None:
    lines = [entry(round_stage(1), "", 0, 0, evaluation=FAILED)]
    summary = build_summary(results(arm("trained_teacher", 0.5), [lines]))
    assert summary["rounds"][0]["reward"] == {"mean": None, "stderr": None, "count": 0}
    assert any("Round 1 gave no reward" in note for note in summary["notes"])


@pytest.mark.parametrize(
    ("trained", "words"),
    [(0.5, "Nothing was gained over the untrained teacher"), (0.75, "is better than"), (0.25, "is worse than")],
)
def test_the_notes_claim_only_what_the_interval_allows(trained: float, words: str) -> None:
    notes = build_summary(results([*arm("untrained_teacher", 0.5), *arm("trained_teacher", trained)]))["notes"]
    assert words in notes[0]


def test_a_measurement_with_reward_questions_and_few_passages_says_so() -> None:
    tasks = tuple(passage(f"river {i}", sealed=False, references=False) for i in range(3))
    lines = [
        Entry(EditKey(HELDOUT, "trained_teacher", i, 0), tasks[i].id, "p", "text", evaluation=measured(0.5))
        for i in range(3)
    ]
    summary = build_summary(results(lines, tasks=tasks))
    assert summary["heldout"]["bank"] == "reward"
    assert any("no sealed questions" in note for note in summary["notes"])
    assert any("mean little" in note for note in summary["notes"])


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"x": math.nan})


def test_labels_group_accuracy_and_names_do_not() -> None:
    by_label = build_summary(full())["heldout"]["arms"]["trained_teacher"]["by_label"]
    assert set(by_label) == {"genre"}
    assert sum(group["passages"] for group in by_label["genre"].values()) == 12


def test_the_fixed_strategy_is_chosen_by_mean_reward_and_malformed_is_worth_nothing() -> None:
    lines = [
        entry(SELECTION, "0", 0, evaluation=measured(0.5, value=0.4)),
        entry(SELECTION, "0", 1, malformed="bad", self_edit=None),
        entry(SELECTION, "1", 0, evaluation=measured(0.5, value=0.3)),
        entry(SELECTION, "1", 1, evaluation=FAILED),
        entry(SELECTION, "2", 0, evaluation=FAILED),
        entry(SELECTION, "2", 1, evaluation=FAILED),
    ]
    assert selection_rewards(lines, 3) == [0.2, 0.3, None]
    assert best_strategy([0.2, 0.3, None]) == 1
    assert best_strategy([0.3, 0.3]) == 0
    assert best_strategy([None]) is None
