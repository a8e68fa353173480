"""summary.json: the numbers of a run, in the form that other tools read (``preceptor.summary/1``).

Pure functions of the results. What is not known is null, never 0 and never NaN. Keys may be added, not removed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from orchestrator.entries import HELDOUT, SELECTION
from orchestrator.notes import notes
from orchestrator.results import Arm, Heldout, Outcome, Results
from orchestrator.round_summary import counts, label_free, overlap, reliability, round_summary, trials, worker_seconds
from preceptor.arms import NO_EDIT, SHUFFLED, TRAINED, difference_of
from preceptor.names import derived_seed
from preceptor.statistics import Cluster, Estimate, accuracy, needed_passages, needed_questions, paired_difference
from preceptor.v1 import evaluator_pb2 as evaluator

SCHEMA = "preceptor.summary/1"
# Above it a label is a name rather than a group.
MAX_LABEL_VALUES = 8


def differences(arms: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The paired differences that are looked at: the trained teacher's to every other arm, and that of the control."""
    found = {difference_of(TRAINED, arm): (TRAINED, arm) for arm in arms if arm != TRAINED}
    return found | {difference_of(SHUFFLED, NO_EDIT): (SHUFFLED, NO_EDIT)}


def build_summary(results: Results) -> dict[str, Any]:
    """The summary as plain JSON values."""
    plan, config = results.plan, results.plan.config
    rounds = [round_summary(of, config.reward.race, plan.trial_seeds(of.number, 1)[0]) for of in results.rounds]
    heldout = _heldout(results, results.heldout) if results.heldout else None
    summary = {
        "schema": SCHEMA,
        "run": results.run.id,
        "name": results.run.name,
        "seed": config.seed,
        "kind": "few_shot" if plan.few_shot else "passages",
        "config_sha256": results.run.config_sha256,
        "student": {"name": plan.student.name, "commit": plan.student.commit},
        "policies": _policies(results),
        "reward": _how_rewarded(results),
        "label_free": label_free(results.all_entries),
        "questions_written": _written(results),
        "canary": [asdict(look) for look in results.canary] or None,
        "reliability": reliability(of.entries for of in results.rounds),
        "rounds": rounds,
        "heldout": heldout,
        "throughput": _throughput(results),
        "wall_seconds": round(sum(results.seconds.values()), 3),
        "time_to_first_reward_seconds": _rounded(results.first_reward_seconds, 3),
        "peak_memory_bytes": results.peak_memory_bytes,
    }
    return {**summary, "notes": notes(summary, sum(entry.failed for entry in results.all_entries))}


def _policies(results: Results) -> list[str]:
    """The untrained teacher, the one that the rounds began with, and the one after each round."""
    base, start = results.run.base_policy, results.plan.config.teacher.policy
    return [base, *([start] if start not in ("", base) else []), *(of.policy_id for of in results.rounds)]


def _how_rewarded(results: Results) -> dict[str, Any]:
    """What a reward of the rounds is made of: terms with a weight, and how well each is measured."""
    reward = results.plan.config.reward
    weights = {name: getattr(reward, name) for name in evaluator.RewardWeights.DESCRIPTOR.fields_by_name}
    return {
        "weights": {name: weight for name, weight in weights.items() if weight},
        "grader": reward.grader,
        "seeds": reward.seeds,
        "race": reward.race.model_dump() if reward.race else None,
        "fresh_seeds": reward.fresh_seeds,
    }


def to_json(summary: dict[str, Any]) -> str:
    """Strictly valid JSON, for people too. Raises ValueError for NaN and infinities."""
    return json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _heldout(results: Results, heldout: Heldout) -> dict[str, Any]:
    settings = results.plan.config.heldout
    seed = derived_seed(results.plan.config.seed, "bootstrap")
    arms: dict[str, Any] = {}
    for name in results.plan.arms:
        arm = heldout.arms.get(name)
        arms[name] = _arm(arm, seed, settings.bootstrap_resamples) if arm else None
    found = {}
    for name, (first, second) in differences(results.plan.arms).items():
        pairs = paired(heldout, first, second)
        found[name] = _difference(pairs, seed, settings.bootstrap_resamples)
    asked = heldout.arms[NO_EDIT].outcomes if NO_EDIT in heldout.arms else ()
    entries = [
        entry for entry in results.all_entries if entry.key.stage == HELDOUT and entry.key.arm not in heldout.left_out
    ]
    selection = [entry for entry in results.all_entries if entry.key.stage == SELECTION]
    return {
        "passages": len(results.plan.heldout_tasks),
        "tasks": [task.id for task in results.plan.heldout_tasks],
        "questions": sum(outcome.questions for outcome in asked),
        "bank": heldout.bank,
        "banks_made": results.run.request.banks or None,
        "sealed_openings_before": _openings_before(results),
        "arms": arms,
        "differences": found,
        "left_out": {name: asdict(why) for name, why in heldout.left_out.items()},
        "evaluations": counts(entries),
        "fixed_strategy": heldout.fixed.model_dump() if heldout.fixed else None,
        "selection_rewards": list(heldout.selection_rewards),
        "selection_worker_seconds": worker_seconds(selection),
    }


def _difference(pairs: Sequence[tuple[Cluster, Cluster]], seed: int, resamples: int) -> dict[str, Any] | None:
    """The paired difference; what would be needed to see it only where it is not seen."""
    ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    estimate = paired_difference(ours, theirs, seed, resamples) if pairs else None
    if estimate is None:
        return None
    unclear = estimate.low <= 0 <= estimate.high
    return {
        "mean": estimate.mean,
        "ci95": [estimate.low, estimate.high],
        "passages": len(pairs),
        "needed_questions": needed_questions(ours, theirs) if unclear else None,
        "needed_passages": needed_passages(ours, theirs) if unclear else None,
    }


def _openings_before(results: Results) -> dict[str, Any] | None:
    """How many runs before this one had asked for the held-out tasks' sealed questions; None where nobody counted."""
    before = [results.openings[task.id] - 1 for task in results.plan.heldout_tasks if task.id in results.openings]
    return {"passages": len(before), "fewest": min(before), "most": max(before)} if before else None


def _arm(arm: Arm, seed: int, resamples: int) -> dict[str, Any]:
    estimate = accuracy([cluster for o in arm.outcomes if (cluster := o.cluster) is not None], seed, resamples)
    retained = [outcome.retention for outcome in arm.outcomes if outcome.retention is not None]
    return {
        "accuracy": estimate.mean if estimate else None,
        "ci95": [estimate.low, estimate.high] if estimate else None,
        "retention": sum(retained) / len(retained) if retained else None,
        "passages": sum(outcome.accuracy is not None for outcome in arm.outcomes),
        "failed": arm.failed,
        "malformed": arm.malformed,
        "too_costly": arm.too_costly,
        "cached": arm.cached,
        "trials": trials(arm.entries)["full"],
        "trained_tokens": _mean_of_trials(arm, "trained_tokens"),
        "worker_seconds": _mean_of_trials(arm, "seconds"),
        "overlap": overlap(arm.entries),
        "label_free": label_free(arm.entries),
        "by_label": _by_label(arm, seed, resamples),
        # By task, in the order of `tasks`: what paired differences are made of, over several runs too.
        "outcomes": [_outcome(outcome) for outcome in arm.outcomes],
    }


def _outcome(outcome: Outcome) -> dict[str, Any] | None:
    """Right answers to one task's questions (a mean over seeds); None where the evaluation failed."""
    if (cluster := outcome.cluster) is None:
        return None
    return {"right": cluster.right, "questions": cluster.questions, "retention": outcome.retention}


def _mean_of_trials(arm: Arm, field: str) -> float | None:
    """Mean of a trial's field; None where nothing was trained."""
    reports = [
        float(getattr(trial, field))
        for entry in arm.entries
        if entry.reward is not None and entry.evaluation is not None
        for trial in entry.evaluation.trials
    ]
    return fmean(reports) if reports else None


def _by_label(arm: Arm, seed: int, resamples: int) -> dict[str, dict[str, Any]]:
    """Accuracy by the tasks' labels, e.g. {"genre": {"narrative": {"accuracy": 0.5, ...}}}; labels that group nothing
    (one value, or nearly one for each passage) are left out."""
    groups: dict[tuple[str, str], list[Cluster]] = {}
    for outcome in arm.outcomes:
        cluster = outcome.cluster
        for label in outcome.labels.items():
            if cluster is not None:
                groups.setdefault(label, []).append(cluster)
    found: dict[str, dict[str, Any]] = {}
    for (key, value), clusters in sorted(groups.items(), key=_in_reading_order):
        estimate = accuracy(clusters, seed, resamples)
        if estimate is not None:
            found.setdefault(key, {})[value] = _estimate(estimate, len(clusters))
    return {key: values for key, values in found.items() if 1 < len(values) <= MAX_LABEL_VALUES}


def _in_reading_order(item: tuple[tuple[str, str], object]) -> tuple[str, int, str]:
    """Numbers by size, words by the alphabet."""
    key, value = item[0]
    return (key, int(value) if value.isdecimal() else -1, value)


def _estimate(estimate: Estimate, passages: int) -> dict[str, Any]:
    return {"accuracy": estimate.mean, "ci95": [estimate.low, estimate.high], "passages": passages}


def paired(heldout: Heldout, first: str, second: str) -> list[tuple[Cluster, Cluster]]:
    """The passages that both arms measured."""
    if first not in heldout.arms or second not in heldout.arms:
        return []
    pairs = []
    for one, other in zip(heldout.arms[first].outcomes, heldout.arms[second].outcomes, strict=True):
        ours, theirs = one.cluster, other.cluster
        if ours is not None and theirs is not None:
            pairs.append((ours, theirs))
    return pairs


def _written(results: Results) -> dict[str, Any] | None:
    """The reward questions that a model wrote for the training tasks; None where people gave them."""
    if not results.written:
        return None
    dropped: Counter[str] = Counter()
    for of in results.written:
        dropped.update(of.dropped)
    return {
        "tasks": len(results.written),
        "asked": sum(of.rewarded for of in results.written),
        "kept_apart": sum(len(of.questions) - of.rewarded for of in results.written),
        "dropped": dict(dropped),
    }


def _throughput(results: Results) -> dict[str, Any]:
    """Trials that this run had done (known evaluations and baselines do not count), and their rate over the time in
    which evaluations could run."""
    count = trials(entry for entry in results.all_entries if not entry.cached)["full"]
    seconds = sum(value for (_, phase), value in results.seconds.items() if phase in ("generate", "evaluate"))
    return {"trials": count, "trials_per_second": round(count / seconds, 4) if count and seconds > 0 else 0.0}


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
