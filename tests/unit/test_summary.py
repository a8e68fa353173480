from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.entries import HELDOUT, SELECTION, EditKey, Entry, round_stage
from orchestrator.heldout import best_strategy, selection_rewards
from orchestrator.label_store import CanaryLook, WrittenQuestions
from orchestrator.ledger import LeftOut
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
        terms={"gain": accuracy - 0.25, "retention_loss": 0.2},
    )
    succeeded = evaluator.EVALUATION_STATE_SUCCEEDED
    trial = evaluator.TrialReport(trained_tokens=1000)
    return evaluator.Evaluation(id=name, state=succeeded, reward=reward, trials=[trial])


def seeded(values: dict[int, float], name: str, **more: Any) -> evaluator.Evaluation:
    """An evaluation with a trial for each seed, worth so much with it."""
    of = measured(0.5, value=sum(values.values()) / len(values), name=name)
    trials = [evaluator.TrialReport(seed=seed, value=value) for seed, value in sorted(values.items())]
    return evaluator.Evaluation(id=name, state=of.state, reward=of.reward, trials=trials, **more)


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
    heldout: list[Entry],
    /,
    rounds: list[list[Entry]] | None = None,
    tasks: tuple[types.Task, ...] = HELDOUT_TASKS,
    *,
    banks: str = "",
    openings: dict[str, int] | None = None,
    left_out: dict[str, LeftOut] | None = None,
    **config_changes: Any,
) -> Results:
    config = run_config(rounds={"count": len(rounds or [])}, **config_changes)
    request = pb.CreateRunRequest(
        config_json=config.to_json(), tasks=TASKS, heldout_tasks=tasks, probes=PROBES, banks=banks
    )
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
        heldout=heldout_results(plan, all_entries, left_out) if tasks else None,
        seconds={("run", "other"): 1.0, ("round-00001", "generate"): 1.0, ("round-00001", "evaluate"): 2.0},
        first_reward_seconds=1.5,
        peak_memory_bytes=10,
        all_entries=tuple(all_entries),
        openings=openings or {},
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
    assert set(of["evaluations"]) == {"succeeded", "failed", "malformed", "too_costly", "cached"}
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
    assert set(heldout["differences"]["trained_minus_fixed"]) >= {"mean", "ci95", "needed_questions"}
    assert set(summary["throughput"]) == {"trials", "trials_per_second"}


def test_the_numbers_are_those_of_the_ledger() -> None:
    summary = build_summary(full())
    (of,) = summary["rounds"]
    assert of["evaluations"] == {"succeeded": 2, "failed": 1, "malformed": 1, "too_costly": 0, "cached": 1}
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
    assert summary["rounds"][0]["reward"] == {"mean": None, "stderr": None, "count": 0, "of": "all"}
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


def test_every_control_is_compared_with_the_trained_teacher_at_known_tokens() -> None:
    heldout = build_summary(full())["heldout"]
    for control in ("untrained", "fixed", "passage", "no_edit", "shuffled"):
        assert heldout["differences"][f"trained_minus_{control}"]["passages"] == 12
    assert heldout["differences"]["trained_minus_shuffled"]["mean"] == pytest.approx(0.75)
    assert {name: of["trained_tokens"] for name, of in heldout["arms"].items() if name != "no_edit"} == dict.fromkeys(
        ("passage_only", "untrained_teacher", "fixed_strategy", "trained_teacher", "oracle", "shuffled_facts"), 1000
    )
    assert heldout["arms"]["no_edit"]["trained_tokens"] is None  # nothing was trained


def test_arms_with_unequal_tokens_are_named() -> None:
    cheap = arm("fixed_strategy", 0.5)
    for line in cheap:
        assert line.evaluation is not None
        line.evaluation.trials[0].trained_tokens = 400
    notes = build_summary(results([*arm("trained_teacher", 0.5), *cheap]))["notes"]
    assert any("not compared at equal tokens: 1000 and 400" in note for note in notes)
    assert not any("equal tokens" in note for note in build_summary(full())["notes"])


@pytest.mark.parametrize(
    ("shuffled", "words"),
    [(0.25, "Shuffled facts stay at chance: 25.0%, the untouched student 25.0%"), (0.5, "Shuffled facts teach someth")],
)
def test_the_control_with_wrong_facts_is_judged_by_its_interval(shuffled: float, words: str) -> None:
    notes = build_summary(results([*arm("trained_teacher", 0.5), *arm("shuffled_facts", shuffled)]))["notes"]
    assert any(words in note for note in notes)


def test_a_control_that_was_not_measured_is_not_called_passed() -> None:
    notes = build_summary(results(arm("trained_teacher", 0.5)))["notes"]
    assert any("shuffled-facts control was not measured" in note for note in notes)
    assert not any("stay at chance" in note for note in notes)


def test_what_would_show_a_difference_is_said_only_where_it_does_not_show() -> None:
    mixed = [
        entry(HELDOUT, "trained_teacher", task, evaluation=measured(1.0 if task % 2 else 0.25, name=f"t{task}"))
        for task in range(12)
    ]
    lines = [*arm("untrained_teacher", 0.5), *mixed, *arm("passage_only", 0.0)]
    differences = build_summary(results(lines))["heldout"]["differences"]
    unclear = differences["trained_minus_untrained"]
    assert unclear["ci95"][0] <= 0 <= unclear["ci95"][1]
    # s^2 = 0.375^2 * 12/11, D = 0.125: 7.849 * s^2 / D^2 passages of four questions
    assert (unclear["needed_passages"], unclear["needed_questions"]) == (78, 312)
    assert differences["trained_minus_passage"]["needed_questions"] is None  # seen already
    same = build_summary(results([*arm("untrained_teacher", 0.5), *arm("trained_teacher", 0.5)]))
    assert same["heldout"]["differences"]["trained_minus_untrained"]["needed_questions"] is None  # no size to see


def test_with_one_seed_reliability_is_unknown_and_not_zero() -> None:
    lines = [entry(round_stage(1), "", 0, i, evaluation=seeded({1: i / 4}, f"e{i}")) for i in range(4)]
    summary = build_summary(results([], [lines]))
    assert summary["rounds"][0]["reliability"]["value"] is None
    assert summary["rounds"][0]["reliability_by_task"] == {}
    assert summary["reliability"] == {"value": None, "signal_variance": None, "noise_variance": None, "groups": 0}
    assert any("not measured: with one seed" in note for note in summary["notes"])


def test_with_more_seeds_reliability_is_the_share_that_is_not_seed_noise() -> None:
    clear = [
        entry(round_stage(1), "", task, i, evaluation=seeded({1: i + 0.1 * task, 2: i - 0.1 * task}, f"{task}-{i}"))
        for task in range(2)
        for i in range(4)
    ]
    noisy = [
        entry(round_stage(1), "", 0, i, evaluation=seeded({1: value, 2: -value}, f"n{i}"))
        for i, value in enumerate((0.5, -0.5, 0.3, -0.3))
    ]
    summary = build_summary(results([], [clear]))
    assert summary["reliability"]["value"] == pytest.approx(1.0)  # what a seed does to all alike is no noise
    assert summary["reliability"]["groups"] == 2
    assert summary["rounds"][0]["reliability_by_task"] == {"0": pytest.approx(1.0), "1": pytest.approx(1.0)}
    of_noise = build_summary(results([], [noisy]))
    assert of_noise["reliability"]["value"] == 0.0
    assert any("most of what the teacher was told apart by was luck" in note for note in of_noise["notes"])


def test_with_one_seed_the_best_that_were_measured_again_tell_of_noise() -> None:
    def line(index: int, chosen: float, fresh: float | None) -> Entry:
        again = None if fresh is None else seeded({9: fresh}, f"{index}-fresh")
        return entry("round-00001", "", 0, index, evaluation=seeded({1: chosen}, str(index)), fresh=again)

    lines = [line(0, 0.8, 0.7), line(1, 0.6, 0.8), line(2, 0.1, None)]
    found = build_summary(results([], [lines], reward={"fresh_seeds": 1}))["reliability"]
    # d = 0.2 when chosen, e = -0.1 on fresh seeds: e (e - d) / 2
    assert found["noise_variance"] == pytest.approx(-0.1 * (-0.1 - 0.2) / 2)
    assert found["groups"] == 1
    assert 0 < found["value"] < 1


def race_round(race: dict[str, Any]) -> Results:
    """Four self-edits of one group: one lucky with the common seed, one stopped after its look."""
    common = results([], [[]]).plan.trial_seeds(1, 1)[0]
    looks = [seeded({common: value}, f"look{i}") for i, value in enumerate((0.1, 0.4, 0.3, -0.4))]
    lines = [
        entry(round_stage(1), "", 0, 0, look=looks[0], evaluation=seeded({common: 0.2}, "a")),
        entry(
            round_stage(1),
            "",
            0,
            1,
            look=looks[1],
            evaluation=seeded({common: 0.9, common + 1: 0.1, common - 1: 0.5}, "b"),
            fresh=seeded({7: 0.4, 8: 0.2}, "b-fresh"),
        ),
        entry(round_stage(1), "", 0, 2, look=looks[2], evaluation=seeded({common: 0.4, common + 1: 0.6}, "c")),
        entry(round_stage(1), "", 0, 3, look=looks[3], stopped=True),
    ]
    if not race.get("look_steps"):
        lines = [
            *lines[:3],
            entry(round_stage(1), "", 0, 3, evaluation=seeded({common: -0.3}, "d"), stopped=True),
        ]
    return results([], [lines], reward={"race": race, "fresh_seeds": 2})


def test_the_mean_of_a_race_without_looks_gives_nobody_more_luck_than_others() -> None:
    (of,) = build_summary(race_round({"max_seeds": 3}))["rounds"]
    assert of["reward"]["of"] == "first_seed"
    assert of["reward"]["mean"] == pytest.approx((0.2 + 0.9 + 0.4 - 0.3) / 4)
    assert of["look"] is None


def test_the_mean_of_survivors_is_called_that_and_the_looks_are_of_all() -> None:
    summary = build_summary(race_round({"look_steps": 5}))
    (of,) = summary["rounds"]
    assert (of["reward"]["of"], of["reward"]["count"]) == ("survivors", 3)
    assert of["reward"]["mean"] == pytest.approx((0.2 + 0.9 + 0.4) / 3)
    assert of["look"]["mean"] == pytest.approx(0.1)
    assert (of["look"]["count"], of["look"]["steps"], of["stopped"]) == (4, 5, 1)
    assert of["trials"] == {"full": 8, "looks": 4}
    assert any("1 of 4 self-edits were stopped after a first look" in note for note in summary["notes"])


def test_the_winner_is_shown_as_chosen_and_on_fresh_seeds() -> None:
    summary = build_summary(race_round({"look_steps": 5}))
    fresh = summary["rounds"][0]["fresh"]
    assert (fresh["count"], fresh["chosen_mean"], fresh["mean"]) == (1, pytest.approx(0.5), pytest.approx(0.3))
    assert fresh["flattery"] == {"mean": pytest.approx(0.2), "stderr": None}
    assert any("+0.500 when they were chosen and +0.300 on fresh seeds" in note for note in summary["notes"])


def test_terms_are_means_over_what_measured_them_and_weights_are_those_that_count() -> None:
    summary = build_summary(full())
    assert summary["reward"]["weights"] == {"gain": 1.0, "retention_loss": 0.3, "overlap": 1.0}
    assert summary["rounds"][0]["terms"] == {"gain": 0.0, "retention_loss": pytest.approx(0.2)}


def test_overlap_is_unknown_where_nobody_looked_and_counted_where_somebody_did() -> None:
    assert build_summary(full())["rounds"][0]["overlap"] is None
    lines = [
        entry(
            round_stage(1),
            "",
            0,
            i,
            evaluation=seeded({1: 0.1}, f"o{i}", overlap=evaluator.OverlapAudit(copied=2 * i, answers_stated=3)),
        )
        for i in range(2)
    ]
    summary = build_summary(results([], [lines]))
    assert summary["rounds"][0]["overlap"] == {
        "self_edits": 2,
        "with_copied_questions": 1,
        "copied_share": 0.25,
        "exam_form_share": 0.0,
        "answers_stated_share": 0.75,
    }
    assert any("1 of 2 self-edits of the rounds copy a question" in note for note in summary["notes"])


def test_opened_seals_and_the_making_of_banks_are_shown() -> None:
    opened = {task.id: 3 if i else 1 for i, task in enumerate(HELDOUT_TASKS)}
    summary = build_summary(results(arm("trained_teacher", 0.5), banks="divided once by seed 7", openings=opened))
    assert summary["heldout"]["banks_made"] == "divided once by seed 7"
    assert summary["heldout"]["sealed_openings_before"] == {"passages": 12, "fewest": 0, "most": 2}
    assert any("opened by up to 2 runs before" in note for note in summary["notes"])
    unknown = build_summary(full())["heldout"]
    assert (unknown["banks_made"], unknown["sealed_openings_before"]) == (None, None)


def test_what_needed_no_labels_is_marked_from_the_reward_to_the_run() -> None:
    lines = [entry(round_stage(1), "", 0, 0, evaluation=seeded({1: 0.1}, "x"))]
    assert lines[0].evaluation is not None
    lines[0].evaluation.reward.label_free = True
    summary = build_summary(results(arm("trained_teacher", 0.5), [lines]))
    assert summary["label_free"] is True
    assert summary["rounds"][0]["label_free"] is True
    assert summary["heldout"]["arms"]["trained_teacher"]["label_free"] is False
    assert summary["notes"][0].startswith("Label-free")
    assert build_summary(results([], tasks=()))["label_free"] is None


def test_a_heldout_measurement_that_graded_nothing_has_no_accuracy() -> None:
    lines = arm("trained_teacher", 0.0)
    for line in lines:
        assert line.evaluation is not None
        del line.evaluation.reward.terms["gain"]
    arms = build_summary(results(lines))["heldout"]["arms"]
    assert arms["trained_teacher"]["accuracy"] is None
    assert arms["no_edit"] is None


def test_questions_that_a_model_wrote_and_the_canary_are_told() -> None:
    of = results(arm("trained_teacher", 0.5))
    assert build_summary(of)["questions_written"] is None
    assert build_summary(of)["canary"] is None
    reward, gate = types.QUESTION_BANK_REWARD, types.QUESTION_BANK_GATE
    written = tuple(
        WrittenQuestions(
            i,
            TASKS[i].id,
            (types.Question(bank=reward), types.Question(bank=reward), types.Question(bank=gate)),
            {"x": i},
        )
        for i in range(3)
    )
    looks = (
        CanaryLook(0, "base", 0.1, 0.05, 4, 0, None, None, stopped=False),
        CanaryLook(1, "p1", -0.2, 0.05, 4, 0, -0.3, 0.1, stopped=True),
    )
    summary = build_summary(replace(of, written=written, canary=looks))
    assert summary["questions_written"] == {"tasks": 3, "asked": 6, "kept_apart": 3, "dropped": {"x": 3}}
    assert [look["stopped"] for look in summary["canary"]] == [False, True]
    notes = summary["notes"]
    assert any("6 are asked, 3 kept apart, 3 dropped (3 x)" in note for note in notes)
    assert any("stopped the run after round 1" in note and "after round 0" in note for note in notes)
    to_json(summary)


def test_outcomes_by_task_are_what_an_arms_accuracy_is_made_of() -> None:
    heldout = build_summary(full())["heldout"]
    arm = heldout["arms"]["trained_teacher"]
    assert len(heldout["tasks"]) == len(arm["outcomes"]) == heldout["passages"]
    known = [of for of in arm["outcomes"] if of is not None]
    assert sum(of["right"] for of in known) / sum(of["questions"] for of in known) == pytest.approx(arm["accuracy"])
    assert {"worker_seconds", "trained_tokens"} <= set(arm)
    assert heldout["selection_worker_seconds"] >= 0


def test_arms_that_are_asked_for_are_compared_and_named_and_cost_what_they_cost() -> None:
    lines = [*arm("trained_teacher", 0.75), *arm("format:lecture", 0.5), *arm("in_context", 1.0)]
    for line in lines:
        assert line.evaluation is not None
        line.evaluation.trials[0].seconds = 0.25
        if line.key.arm == "format:lecture":
            line.evaluation.trials[0].trained_tokens = 500
    settings = {"formats": ["lecture"], "in_context": True, "fixed_strategies": []}
    summary = build_summary(results(lines, heldout=settings))
    heldout = summary["heldout"]
    assert heldout["differences"]["trained_minus_format:lecture"]["mean"] == pytest.approx(0.25)
    assert heldout["differences"]["trained_minus_in_context"]["mean"] == pytest.approx(-0.25)
    lecture = heldout["arms"]["format:lecture"]
    assert (lecture["trained_tokens"], lecture["worker_seconds"], lecture["too_costly"]) == (500, 0.25, 0)
    assert any("better than format lecture" in note for note in summary["notes"])
    assert any("1000 trained tokens a fine-tune: format lecture 500" in note for note in summary["notes"])


def test_the_untouched_student_is_not_the_one_with_the_text_in_its_prompt() -> None:
    inside = arm("in_context", 1.0)
    for line in inside:
        assert line.evaluation is not None
        line.evaluation.reward.baseline_accuracy = 1.0
    summary = build_summary(results([*inside, *arm("trained_teacher", 0.5)], heldout={"in_context": True}))
    assert summary["heldout"]["arms"]["no_edit"]["accuracy"] == 0.25
    assert summary["heldout"]["arms"]["in_context"]["accuracy"] == 1.0


def test_an_arm_that_was_left_out_says_why_and_is_counted_nowhere() -> None:
    lines = [*arm("trained_teacher", 0.5), entry(HELDOUT, "external_teacher", 0, malformed="no", self_edit=None)]
    left_out = {"external_teacher": LeftOut("SERVER_REFUSED", "it answered HTTP 401")}
    summary = build_summary(results(lines, left_out=left_out, heldout={"external_teacher": True}))
    heldout = summary["heldout"]
    assert heldout["arms"]["external_teacher"] is None
    assert heldout["left_out"] == {"external_teacher": {"reason": "SERVER_REFUSED", "message": "it answered HTTP 401"}}
    assert heldout["evaluations"]["malformed"] == 0
    said = [note for note in summary["notes"] if "external teacher" in note]
    assert any("left out: SERVER_REFUSED, it answered HTTP 401" in note for note in said)
    assert not any("bring nothing" in note for note in said)


def test_what_is_too_costly_counts_as_the_untouched_student_apart_from_what_is_malformed() -> None:
    costly = entry(HELDOUT, "trained_teacher", 0, too_costly="64 epochs", self_edit=None)
    first = entry(round_stage(1), "", 0, 0, too_costly="64 epochs", self_edit=None)
    summary = build_summary(results([*arm("trained_teacher", 1.0)[1:], *arm("oracle", 1.0), costly], [[first]]))
    trained = summary["heldout"]["arms"]["trained_teacher"]
    assert trained["accuracy"] == pytest.approx((11 + 0.25) / 12)
    assert (trained["too_costly"], trained["malformed"], trained["passages"]) == (1, 0, 12)
    counted = {"succeeded": 0, "failed": 0, "malformed": 0, "too_costly": 1, "cached": 0}
    assert summary["rounds"][0]["evaluations"] == counted
    assert selection_rewards([entry(SELECTION, "0", 0, too_costly="x", self_edit=None)], 1) == [0.0]
