"""What evaluations by hand come to: a report as plain values (``--json``, ``--out``), every doubt in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

from preceptor.cli.output import as_json_value
from preceptor.convert import directive_from_proto
from preceptor.errors import CATALOGUE
from preceptor.groups import reliability
from preceptor.paired import LEAST_QUESTIONS, Difference, difference
from preceptor.tasks import Bank
from preceptor.v1 import evaluator_pb2 as pb

if TYPE_CHECKING:
    from preceptor.cli.measuring import EvaluatorAsks, Measured, Plan
    from preceptor.cli.subject import Subject
    from preceptor.config import RunConfig

SCHEMA = "preceptor.evaluate/1"
NO_EDIT, RAW_PASSAGE, SHUFFLED_FACTS = "no edit", "raw passage", "shuffled facts"
# Below, one question is a twelfth of the accuracy or more.
FEW_QUESTIONS = 12
# From this ratio on of trained tokens, more training may be all that makes a difference.
UNEQUAL = 1.5


def report_of(
    plan: Plan, asks: EvaluatorAsks, subject: Subject, config: RunConfig, bank: Bank, questions: bool
) -> dict[str, Any]:
    """The whole report; ``questions``: with their texts."""
    everybody = [*plan.candidates, *plan.controls]
    known = {id(one): one for measured in everybody for one in (measured.look, measured.evaluation, measured.fresh)}
    distinct = {one.id: one for one in known.values() if one is not None}
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "task": {
            "id": asks.task.id,
            "title": subject.passage.title,
            "bank": bank.value,
            "questions": len(subject.passage.questions_of(bank)),
            "probes": len(plan.protocol.probes),
        },
        "student": as_json_value(asks.student),
        "grader": plan.protocol.grader,
        "weights": as_json_value(plan.protocol.weights),
        "seeds": [str(seed) for seed in plan.protocol.seeds],
        "race": None if plan.race is None else asdict(plan.race),
        "config": config.model_dump(mode="json", include={"seed", "training", "answers", "reward"}),
        "baseline": baseline_of(everybody),
        "self_edits": [entry(one) for one in plan.candidates],
        "controls": [entry(one) for one in plan.controls],
        **group(plan.candidates, plan.controls, plan.protocol.weights),
        "sealed_openings": asks.openings or None,
        "evaluations": {
            "cached": asks.cached,
            "failed": sum(one.state != pb.EVALUATION_STATE_SUCCEEDED for one in distinct.values()),
            "trials": sum(len(one.trials) for one in distinct.values()),
        },
    }
    if questions:
        asked = subject.passage.questions_of(bank)
        report["questions"] = [{"text": q.text, "answer": q.answer, "aliases": list(q.aliases)} for q in asked]
    report["doubts"] = doubts(report)
    return report


def failure_of(evaluation: pb.Evaluation) -> dict[str, str]:
    """Why there is no reward: reason, message and what to do."""
    if evaluation.state == pb.EVALUATION_STATE_CANCELLED:
        reason, message = "CANCELLED", "it was cancelled"
    else:
        reason, message = evaluation.failure.reason, evaluation.failure.message
    known = CATALOGUE.get(reason) or CATALOGUE["TRIAL_FAILED"]
    return {"reason": reason, "message": message, "next_step": known.next_step}


def entry(one: Measured) -> dict[str, Any]:
    """What is known of one self-edit; what was not measured is null."""
    directive = directive_from_proto(one.self_edit.directive)
    made: dict[str, Any] = {
        "name": one.name,
        "documents": len(one.self_edit.documents),
        "directive": {name: value for name, value in asdict(directive).items() if value is not None},
        "stopped": one.stopped,
        "evaluation_id": None,
        "cached": None,
        "reward": None,
        "overlap": None,
        "trials": [],
        "look": _reward(one.look),
        "fresh": _reward(one.fresh),
        "failure": failure_of(one.failed) if one.failed else None,
    }
    if one.evaluation is not None:
        made |= {"evaluation_id": one.evaluation.id, "cached": one.evaluation.cached}
        if one.succeeded:
            made |= {
                "reward": _reward(one.evaluation),
                "overlap": as_json_value(one.evaluation.overlap),
                "trials": [_trial(trial) for trial in one.evaluation.trials],
            }
    return made


def baseline_of(some: Sequence[Measured]) -> dict[str, Any] | None:
    """The untouched student's answers; null where nothing succeeded."""
    for one in some:
        if one.succeeded and one.evaluation is not None:
            return _trial(one.evaluation.baseline)
    return None


def group(candidates: Sequence[Measured], controls: Sequence[Measured], weights: pb.RewardWeights) -> dict[str, Any]:
    """What the candidates say together: the best one, how it differs from each other and from the controls."""
    rewarded = [one for one in candidates if one.evaluation is not None and one.succeeded]
    unique = {one.evaluation.id: one.evaluation for one in rewarded if one.evaluation is not None}
    differ = len({one.reward.value for one in unique.values()}) > 1  # else there is no variance to have a share of
    made: dict[str, Any] = {
        "best": None,
        "reliability": reliability(list(unique.values())) if differ else None,
        "differences": [],
    }
    if not rewarded:
        return made
    best = max(rewarded, key=_value)
    made["best"] = best.name
    assert best.evaluation is not None
    reward = best.evaluation.reward
    others = [one for one in (*rewarded, *controls) if one is not best and one.succeeded]
    for other in others:
        assert other.evaluation is not None
        found = difference(best.evaluation, other.evaluation, weights.retention_loss)
        if found is not None and other.evaluation.id != best.evaluation.id:
            made["differences"].append(_difference(best.name, other.name, found))
    untouched = Difference(
        mean=reward.value,
        stderr=reward.stderr,
        seed_stderr=reward.seed_stderr if reward.HasField("seed_stderr") else None,
        questions=reward.questions,
        seeds=reward.seeds,
    )
    made["differences"].append(_difference(best.name, NO_EDIT, untouched))
    return made


def doubts(report: dict[str, Any]) -> list[str]:
    """What a reader of the numbers should know before believing them, a sentence each."""
    found: list[str] = []
    rewarded = [one for one in report["self_edits"] if one["reward"]]
    if not rewarded:
        return found
    best = next(one for one in rewarded if one["name"] == report["best"])
    if min(one["reward"]["seeds"] for one in rewarded) == 1:
        remedy = "--set reward.race.z=2 lets the race ask for more" if report["race"] else "--seeds 3 or more does"
        found.append(
            "one seed: an error says how far other questions would move a value, and nothing about another seed;"
            f" {remedy}"
        )
    questions = best["reward"]["questions"]
    if questions < FEW_QUESTIONS:
        none = f", and fewer than {LEAST_QUESTIONS} tell nothing apart" if questions < LEAST_QUESTIONS else ""
        count = f"{questions} question{'' if questions == 1 else 's'}"
        found.append(f"{count}: a single one is worth {1 / questions:.3f} of accuracy{none}")
    found += _unclear(report["differences"])
    if report["reliability"] is not None and report["reliability"] < 0.5:
        found.append(
            f"{1 - report['reliability']:.0%} of the variance between these self-edits is noise of seeds;"
            " more seeds (--seeds) separate them"
        )
    if len({one["reward"]["value"] for one in rewarded}) > 1 and not best["fresh"]:
        found.append(
            f"{best['name']} was chosen on the seeds that measured it, so its value is a little too good;"
            " --set reward.fresh_seeds=3 measures it again on others"
        )
    for one in rewarded:
        if copied := one["overlap"]["copied"]:
            exam = one["overlap"]["exam_form"]
            answered = f", {exam} with the answer behind it" if exam else ""
            found.append(
                f"{one['name']} has {copied} of {questions} questions nearly word for word{answered}:"
                " what it gains there is learnt for the exam"
            )
    for one in report["controls"]:
        if one["name"] == RAW_PASSAGE and one["reward"]:
            less, most = sorted((best, one), key=lambda each: each["reward"]["trained_tokens"])
            times = most["reward"]["trained_tokens"] / max(less["reward"]["trained_tokens"], 1)
            if times >= UNEQUAL:
                found.append(
                    f"{most['name']} had {times:.1f} times the training of {less['name']} (in tokens);"
                    " --set training.max_train_tokens=N gives all at most N"
                )
    if any(one["reward"]["label_free"] for one in rewarded):
        found.append("part of the reward was measured without labels made by people")
    if report["weights"]["retention_loss"] and best["reward"]["retention"] is None:
        found.append("no retention probes were asked: what the student forgot is not known (tasks.probes_path)")
    if report["sealed_openings"]:
        times = report["sealed_openings"]
        found.append(
            f"the sealed questions of this task have been opened {times} time{'s' if times > 1 else ''};"
            " each look makes them a little less of a test"
        )
    return found


def _unclear(differences: Sequence[dict[str, Any]]) -> list[str]:
    found, alike = [], []
    for made in differences:
        what, needed = f"{made['self_edit']} is not told apart from {made['other']}", made["questions_needed"]
        if made["clear_on_these"] and needed:
            found.append(f"{what}, but for these very questions: it would take about {needed:,} like them to say more")
        elif needed:
            found.append(f"{what}: it would take about {needed:,} questions like these, or more seeds")
        elif not made["clear"]:
            alike.append(made["other"])
    if alike:
        name = differences[0]["self_edit"]
        found.append(f"{name} is not told apart from {', '.join(alike)}: no difference was seen on these questions")
    return found


def _difference(name: str, other: str, found: Difference) -> dict[str, Any]:
    return {
        "self_edit": name,
        "other": other,
        "mean": found.mean,
        "stderr": found.stderr,
        "seed_stderr": found.seed_stderr,
        "seeds": found.seeds,
        "clear": found.clear,
        "clear_on_these": found.clear_on_these,
        "questions_needed": found.questions_needed,
    }


def _reward(evaluation: pb.Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None or evaluation.state != pb.EVALUATION_STATE_SUCCEEDED:
        return None
    reward = evaluation.reward
    optional = {
        name: getattr(reward, name) if reward.HasField(name) else None
        for name in ("retention", "baseline_retention", "seed_stderr")
    }
    measured = bool(evaluation.trials and evaluation.trials[0].correct)
    return {
        "value": reward.value,
        "stderr": reward.stderr,
        "seed_stderr": optional["seed_stderr"],
        "terms": dict(sorted(reward.terms.items())),
        "accuracy": reward.accuracy if measured else None,
        "baseline_accuracy": reward.baseline_accuracy if measured else None,
        "retention": optional["retention"],
        "baseline_retention": optional["baseline_retention"],
        "questions": reward.questions,
        "seeds": reward.seeds,
        "trained_tokens": round(fmean(trial.trained_tokens for trial in evaluation.trials)),
        "label_free": reward.label_free,
    }


def _trial(trial: pb.TrialReport) -> dict[str, Any]:
    # 64-bit numbers are strings in proto JSON; tokens are a count that fits, a seed's digits must survive any reader.
    return {**as_json_value(trial), "trained_tokens": trial.trained_tokens}


def _value(one: Measured) -> float:
    assert one.evaluation is not None
    return one.evaluation.reward.value
