"""What summary.json says of one round, and how much each number can be trusted. Pure functions of the ledger's lines.

**What the mean reward is of** (``reward.of``). It is there to show the teacher's progress, so it must be about all that
the teacher wrote, and nobody may have had more luck than others:

* ``all``: every measured self-edit was fine-tuned with the same seeds; the mean of their rewards.
* ``first_seed``: a race without looks. Near-ties have more seeds than others, and who has them was chosen by results;
  so the mean is over what each was worth with the seed that all of them have.
* ``survivors``: a race with looks. The self-edits that were stopped after the look have no reward, so this mean, over
  the first seed too, is of the better part of each group and too high. ``look.mean`` is of all (in nats).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from orchestrator.entries import Entry
from orchestrator.results import Round
from preceptor.config import RaceConfig
from preceptor.groups import pooled, spread
from preceptor.statistics import clustered_mean
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import types_pb2 as types

PHASES = ("generate", "evaluate", "update", "other")


def round_summary(of: Round, race: RaceConfig | None, common_seed: int) -> dict[str, Any]:
    """One round. ``common_seed``: the trial seed that all its self-edits share."""
    return {
        "round": of.number,
        "tasks": len({entry.key.task for entry in of.entries}),
        "self_edits": len(of.entries),
        "reward": _reward(of.entries, race, common_seed),
        "look": _look(of.entries, race),
        "terms": terms(entry.reward for entry in of.entries if entry.reward is not None),
        "reliability": reliability([of.entries]),
        "reliability_by_task": {
            str(task): found.reliability
            for task, group in sorted(groups(of.entries).items())
            if (found := spread(distinct(group))) is not None
        },
        "fresh": _fresh(of.entries),
        "overlap": overlap(of.entries),
        "label_free": label_free(of.entries),
        "trials": trials(of.entries),
        "stopped": sum(entry.stopped for entry in of.entries),
        "groups": {"offered": of.groups, "dropped": of.groups_dropped},
        "evaluations": counts(of.entries),
        "worker_seconds": worker_seconds(of.entries),
        "seconds": {phase: round(of.seconds.get(phase, 0.0), 3) for phase in PHASES},
        "update": {"kept": of.kept, "offered": of.offered},
        "policy": of.policy_id,
        "diversity": of.diversity,
        "kl": of.kl,
    }


def counts(entries: Sequence[Entry]) -> dict[str, int]:
    """How the evaluations of these self-edits ended; ``cached`` are those of them that were known before."""
    return {
        "succeeded": sum(entry.reward is not None for entry in entries),
        "failed": sum(entry.failed for entry in entries),
        "malformed": sum(bool(entry.malformed) for entry in entries),
        "too_costly": sum(bool(entry.too_costly) for entry in entries),
        "cached": sum(entry.cached for entry in entries),
    }


def worker_seconds(entries: Iterable[Entry]) -> float:
    """Of all trials of these self-edits, looks and fresh seeds too, whenever they were made."""
    evaluations = {
        evaluation.id: evaluation
        for entry in entries
        for evaluation in (entry.look, entry.evaluation, entry.fresh)
        if evaluation is not None
    }
    return round(sum(trial.seconds for evaluation in evaluations.values() for trial in evaluation.trials), 3)


def terms(rewards: Iterable[types.Reward]) -> dict[str, float]:
    """Mean of each term before weighting, over the rewards that have it. What was not measured is absent."""
    found: dict[str, list[float]] = {}
    for reward in rewards:
        for name, value in reward.terms.items():
            found.setdefault(name, []).append(value)
    return {name: fmean(values) for name, values in sorted(found.items())}


def overlap(entries: Iterable[Entry]) -> dict[str, Any] | None:
    """What the self-edits have of the questions that measured them; None where that was not looked at. The shares are
    of all questions."""
    audited = [
        (measured.overlap, measured.reward.questions)
        for entry in entries
        if (measured := _first_succeeded(entry.evaluation, entry.look)) is not None and measured.HasField("overlap")
    ]
    questions = sum(asked for _, asked in audited)
    if not questions:
        return None
    return {
        "self_edits": len(audited),
        "with_copied_questions": sum(audit.copied > 0 for audit, _ in audited),
        "copied_share": sum(audit.copied for audit, _ in audited) / questions,
        "exam_form_share": sum(audit.exam_form for audit, _ in audited) / questions,
        "answers_stated_share": sum(audit.answers_stated for audit, _ in audited) / questions,
    }


def label_free(entries: Iterable[Entry]) -> bool | None:
    """Whether anything of it was measured without labels made by people; None where nothing was measured."""
    marks = [reward.label_free for entry in entries if (reward := entry.earned or entry.reward) is not None]
    return any(marks) if marks else None


def groups(entries: Iterable[Entry]) -> Mapping[int, list[Entry]]:
    """The measured self-edits by task."""
    found: dict[int, list[Entry]] = {}
    for entry in entries:
        if entry.reward is not None:
            found.setdefault(entry.key.task, []).append(entry)
    return found


def reliability(stages: Iterable[Sequence[Entry]]) -> dict[str, Any]:
    """Share of the variance between a passage's fully measured self-edits that is not seed noise, pooled over the
    groups of which seeds are known, be it from the best that were measured again; ``value`` is None where none is (one
    seed)."""
    spreads = [
        found
        for entries in stages
        for group in groups(entries).values()
        if (found := spread(*_with_fresh(group))) is not None
    ]
    total = pooled(spreads)
    return {
        "value": total.reliability if total else None,
        "signal_variance": total.signal if total else None,
        "noise_variance": total.noise if total else None,
        "groups": len(spreads),
    }


def _with_fresh(group: Sequence[Entry]) -> tuple[list[evaluator.Evaluation], list[evaluator.Evaluation | None]]:
    """The evaluations of a group, and those on fresh seeds, each once."""
    evaluations = distinct(group)
    fresh = {
        entry.evaluation.id: entry.fresh
        for entry in group
        if entry.evaluation is not None and entry.fresh is not None and entry.earned is not None
    }
    return evaluations, [fresh.get(one.id) for one in evaluations]


def distinct(group: Iterable[Entry]) -> list[evaluator.Evaluation]:
    """The evaluations of a group; a self-edit that was written twice has one, and says nothing about noise."""
    return list({one.evaluation.id: one.evaluation for one in group if one.evaluation is not None}.values())


def trials(entries: Iterable[Entry]) -> dict[str, int]:
    """Fine-tunes that the rewards stand on, and looks; repeated self-edits share theirs."""
    full: dict[str, int] = {}
    looks = set()
    for entry in entries:
        for evaluation in (entry.evaluation, entry.fresh):
            if evaluation is not None and evaluation.state == evaluator.EVALUATION_STATE_SUCCEEDED:
                full[evaluation.id] = len(evaluation.trials) or evaluation.reward.seeds
        if entry.look is not None and entry.look.state == evaluator.EVALUATION_STATE_SUCCEEDED:
            looks.add(entry.look.id)
    return {"full": sum(full.values()), "looks": len(looks)}


def _reward(entries: Sequence[Entry], race: RaceConfig | None, common_seed: int) -> dict[str, Any]:
    measured = [entry for entry in entries if entry.evaluation is not None and entry.reward is not None]
    if race is None:
        what, values = "all", [(entry.key.task, entry.reward.value) for entry in measured if entry.reward]
    else:
        what = "survivors" if race.look_steps else "first_seed"
        values = [
            (entry.key.task, trial.value)
            for entry in measured
            for trial in (entry.evaluation.trials if entry.evaluation else ())
            if trial.seed == common_seed
        ]
    return {**_mean(values), "of": what}


def _look(entries: Sequence[Entry], race: RaceConfig | None) -> dict[str, Any] | None:
    """The mean gain in log-probability of the gold answers (nats per question) after the first look, over all."""
    values = [
        (entry.key.task, entry.look.reward.value)
        for entry in entries
        if entry.look is not None and entry.look.state == evaluator.EVALUATION_STATE_SUCCEEDED
    ]
    return {**_mean(values), "steps": race.look_steps} if race is not None and race.look_steps else None


def _fresh(entries: Sequence[Entry]) -> dict[str, Any] | None:
    """The best of each group when they were chosen and on seeds that had no part in it: the difference is what
    choosing flattered them by (the winner's curse). None where nothing was measured again."""
    pairs = [
        (entry.key.task, entry.reward.value, entry.earned.value)
        for entry in entries
        if entry.fresh is not None and entry.reward is not None and entry.earned is not None
    ]
    if not pairs:
        return None
    flattery = _mean([(task, chosen - fresh) for task, chosen, fresh in pairs])
    return {
        "count": len(pairs),
        "chosen_mean": fmean(chosen for _, chosen, _ in pairs),
        "mean": fmean(fresh for _, _, fresh in pairs),
        "stderr": _mean([(task, fresh) for task, _, fresh in pairs])["stderr"],
        "flattery": {"mean": flattery["mean"], "stderr": flattery["stderr"]},
    }


def _first_succeeded(*evaluations: evaluator.Evaluation | None) -> evaluator.Evaluation | None:
    succeeded = evaluator.EVALUATION_STATE_SUCCEEDED
    return next((one for one in evaluations if one is not None and one.state == succeeded), None)


def _mean(values: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Mean, its error (values of one task being dependent) and how many."""
    mean: float | None = None
    stderr: float | None = None
    if values:
        mean, stderr = clustered_mean([value for _, value in values], [task for task, _ in values])
    return {"mean": mean, "stderr": stderr, "count": len(values)}
