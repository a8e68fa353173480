"""summary.json: the numbers of a run, in the form that other tools read (``preceptor.summary/1``).

Pure functions of the results. What is not known is null, never 0 and never NaN. Keys may be added, not removed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from orchestrator.entries import HELDOUT, Entry
from orchestrator.heldout import FIXED, PASSAGE, TRAINED, UNTRAINED
from orchestrator.results import ARMS, NO_EDIT, Arm, Heldout, Results, Round
from orchestrator.statistics import Cluster, Estimate, accuracy, clustered_mean, paired_difference
from preceptor.names import derived_seed

SCHEMA = "preceptor.summary/1"
PHASES = ("generate", "evaluate", "update", "other")
DIFFERENCES = {
    "trained_minus_untrained": (TRAINED, UNTRAINED),
    "trained_minus_fixed": (TRAINED, FIXED),
    "trained_minus_passage": (TRAINED, PASSAGE),
    "trained_minus_no_edit": (TRAINED, NO_EDIT),
}
# Below this many passages a bootstrap says little.
FEW_PASSAGES = 10
# Above it a label is a name rather than a group.
MAX_LABEL_VALUES = 8


def build_summary(results: Results) -> dict[str, Any]:
    """The summary as plain JSON values."""
    config = results.plan.config
    wall = sum(results.seconds.values())
    rounds = [_round(of) for of in results.rounds]
    heldout = _heldout(results, results.heldout) if results.heldout else None
    return {
        "schema": SCHEMA,
        "run": results.run.id,
        "name": results.run.name,
        "seed": config.seed,
        "config_sha256": results.run.config_sha256,
        "student": {"name": results.plan.student.name, "commit": results.plan.student.commit},
        "policies": [results.run.base_policy, *(of.policy_id for of in results.rounds)],
        "rounds": rounds,
        "heldout": heldout,
        "throughput": _throughput(results),
        "wall_seconds": round(wall, 3),
        "time_to_first_reward_seconds": _rounded(results.first_reward_seconds, 3),
        "peak_memory_bytes": results.peak_memory_bytes,
        "notes": notes(results, heldout),
    }


def to_json(summary: dict[str, Any]) -> str:
    """Strictly valid JSON, for people too. Raises ValueError for NaN and infinities."""
    return json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _round(of: Round) -> dict[str, Any]:
    rewarded = [(entry.key.task, entry.reward.value) for entry in of.entries if entry.reward is not None]
    mean: float | None = None
    stderr: float | None = None
    if rewarded:
        mean, stderr = clustered_mean([value for _, value in rewarded], [task for task, _ in rewarded])
    return {
        "round": of.number,
        "tasks": len({entry.key.task for entry in of.entries}),
        "self_edits": len(of.entries),
        "reward": {"mean": mean, "stderr": stderr, "count": len(rewarded)},
        "evaluations": counts(of.entries),
        "seconds": {phase: round(of.seconds.get(phase, 0.0), 3) for phase in PHASES},
        "update": {"kept": of.kept, "offered": of.offered},
        "policy": of.policy_id,
    }


def counts(entries: Sequence[Entry]) -> dict[str, int]:
    """How the evaluations of these self-edits ended; ``cached`` are those of them that were known before."""
    return {
        "succeeded": sum(entry.reward is not None for entry in entries),
        "failed": sum(entry.failed for entry in entries),
        "malformed": sum(bool(entry.malformed) for entry in entries),
        "cached": sum(entry.cached for entry in entries),
    }


def _heldout(results: Results, heldout: Heldout) -> dict[str, Any]:
    settings = results.plan.config.heldout
    seed = derived_seed(results.plan.config.seed, "bootstrap")
    arms: dict[str, Any] = {}
    for name in ARMS:
        arm = heldout.arms.get(name)
        arms[name] = _arm(arm, seed, settings.bootstrap_resamples) if arm else None
    differences = {}
    for name, (first, second) in DIFFERENCES.items():
        pairs = paired(heldout, first, second)
        estimate = None
        if pairs:
            ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            estimate = paired_difference(ours, theirs, seed, settings.bootstrap_resamples)
        differences[name] = (
            {"mean": estimate.mean, "ci95": [estimate.low, estimate.high], "passages": len(pairs)} if estimate else None
        )
    asked = heldout.arms[NO_EDIT].outcomes if NO_EDIT in heldout.arms else ()
    entries = [entry for entry in results.all_entries if entry.key.stage == HELDOUT]
    return {
        "passages": len(results.plan.heldout_tasks),
        "questions": sum(outcome.questions for outcome in asked),
        "bank": heldout.bank,
        "arms": arms,
        "differences": differences,
        "evaluations": counts(entries),
        "fixed_strategy": heldout.fixed.model_dump() if heldout.fixed else None,
        "selection_rewards": list(heldout.selection_rewards),
    }


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
        "cached": arm.cached,
        "by_label": _by_label(arm, seed, resamples),
    }


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


def _throughput(results: Results) -> dict[str, Any]:
    """Trials that this run had done (known evaluations and baselines do not count), and their rate over the time in
    which evaluations could run."""
    done: dict[str, int] = {}
    for entry in results.all_entries:
        if entry.evaluation is not None and entry.reward is not None and not entry.cached:
            done[entry.evaluation.id] = len(entry.evaluation.trials) or entry.reward.seeds
    trials = sum(done.values())
    seconds = sum(value for (_, phase), value in results.seconds.items() if phase in ("generate", "evaluate"))
    return {"trials": trials, "trials_per_second": round(trials / seconds, 4) if trials and seconds > 0 else 0.0}


def notes(results: Results, heldout: dict[str, Any] | None) -> list[str]:
    """What a reader must know to read the numbers right, in whole sentences."""
    said = []
    if heldout is None:
        said.append("There were no held-out tasks, so nothing was measured on passages the teacher never saw.")
    else:
        said += _comparison_notes(heldout)
        said += _material_notes(heldout)
    for of in results.rounds:
        if not any(entry.reward is not None for entry in of.entries):
            said.append(f"Round {of.number} gave no reward at all, so the teacher did not learn from it.")
        elif of.kept == 0:
            said.append(f"In round {of.number} no self-edit was good enough to learn from.")
    failed = sum(entry.failed for entry in results.all_entries)
    if failed:
        said.append(f"{failed} evaluations failed. They were counted and left out; none was scored as zero.")
    return said


def _comparison_notes(heldout: dict[str, Any]) -> list[str]:
    said = []
    for name, words in (
        ("trained_minus_untrained", "the untrained teacher"),
        ("trained_minus_fixed", "the best fixed strategy"),
    ):
        difference = heldout["differences"][name]
        if difference is None:
            said.append(f"The trained teacher could not be compared with {words}.")
            continue
        low, high = difference["ci95"]
        if low > 0:
            said.append(f"The trained teacher is better than {words}: the interval of the difference is above 0.")
        elif high < 0:
            said.append(f"The trained teacher is worse than {words}: the interval of the difference is below 0.")
        else:
            said.append(f"Nothing was gained over {words}: the interval of the difference includes 0.")
    return said


def _material_notes(heldout: dict[str, Any]) -> list[str]:
    said = []
    if heldout["passages"] < FEW_PASSAGES:
        said.append(f"With {heldout['passages']} held-out passages the intervals mean little.")
    if heldout["bank"] != "sealed":
        of = "The" if heldout["bank"] == "reward" else "Some"
        said.append(
            f"{of} held-out tasks have no sealed questions, so their reward questions were asked. The teacher never "
            "saw those passages, but the questions' wording is that of training."
        )
    missing = [name for name in ARMS if heldout["arms"][name] is None]
    if missing:
        said.append(
            f"Not measured, since the tasks or the config bring nothing for them: {', '.join(map(_words, missing))}."
        )
    malformed = [
        f"{arm['malformed']} of {_words(name)}"
        for name, arm in heldout["arms"].items()
        if arm is not None and arm["malformed"]
    ]
    if malformed:
        said.append(
            f"Malformed held-out self-edits: {', '.join(malformed)}. On those passages the arm counts as the untouched "
            "student."
        )
    return said


def _words(name: str) -> str:
    return name.replace("_", " ")


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
