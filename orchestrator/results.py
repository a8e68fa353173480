"""A finished run as plain values: what summary.json and the report are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.entries import HELDOUT, SELECTION, Entry, round_stage
from orchestrator.heldout import best_strategy, selection_rewards
from orchestrator.label_store import CanaryLook, WrittenQuestions
from orchestrator.ledger import Ledger, LeftOut
from orchestrator.plan import RunPlan, heldout_bank
from orchestrator.run_store import RunRecord
from preceptor.arms import IN_CONTEXT, NO_EDIT
from preceptor.config import FixedStrategy
from preceptor.statistics import Cluster
from preceptor.v1 import types_pb2 as types


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one arm's student knew about one passage. ``accuracy`` is None where the evaluation failed."""

    labels: Mapping[str, str]
    accuracy: float | None
    questions: int
    retention: float | None

    @property
    def cluster(self) -> Cluster | None:
        """The passage as a cluster of answers."""
        return None if self.accuracy is None else Cluster(self.accuracy * self.questions, self.questions)


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm of the held-out measurement; outcomes in the order of the passages, and the self-edits behind them."""

    outcomes: tuple[Outcome, ...]
    entries: tuple[Entry, ...] = field(default=(), repr=False)
    failed: int = 0
    malformed: int = 0
    cached: int = 0
    too_costly: int = 0


@dataclass(frozen=True, slots=True)
class Heldout:
    """The held-out measurement. An arm that was not measured is absent."""

    arms: Mapping[str, Arm]
    bank: str  # "sealed", "reward" or "mixed"; of few-shot tasks "queries"
    fixed: FixedStrategy | None
    selection_rewards: tuple[float | None, ...]  # mean reward of each candidate on the selection passages
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)  # arms that could not be had, and why


@dataclass(frozen=True, slots=True)
class Round:
    """One round's ledger and time."""

    number: int
    entries: tuple[Entry, ...]
    seconds: Mapping[str, float]
    policy_id: str
    kept: int
    offered: int
    groups: int | None = None  # offered to the update, and those of them that taught nothing; None: not said
    groups_dropped: int | None = None
    diversity: float | None = None  # of the self-edits offered; None: the update does not say
    kl: float | None = None  # of the policy after it from the untrained teacher, nats a token


@dataclass(frozen=True, slots=True)
class Results:
    """All that is known of a run whose rounds and measurement are done."""

    run: RunRecord
    plan: RunPlan
    rounds: tuple[Round, ...]
    heldout: Heldout | None
    seconds: Mapping[tuple[str, str], float]
    first_reward_seconds: float | None
    peak_memory_bytes: int
    all_entries: tuple[Entry, ...] = field(repr=False)
    openings: Mapping[str, int] = field(default_factory=dict)  # by task: runs that used its sealed questions, with this
    written: tuple[WrittenQuestions, ...] = ()  # reward questions that a model wrote, by training task
    canary: tuple[CanaryLook, ...] = ()  # of runs without labels


def collect(run: RunRecord, plan: RunPlan, ledger: Ledger, seconds: Mapping[tuple[str, str], float]) -> Results:
    """The results of a run, from its ledger."""
    entries = ledger.entries()
    rounds = []
    for number, row in ledger.finished_rounds().items():  # fewer than planned where a canary stopped the run
        stage = round_stage(number)
        rounds.append(
            Round(
                number=number,
                entries=tuple(entry for entry in entries if entry.key.stage == stage),
                seconds={phase: value for (of, phase), value in seconds.items() if of == stage},
                policy_id=row.policy_id,
                kept=row.kept,
                offered=row.offered,
                groups=row.groups,
                groups_dropped=row.groups_dropped,
                diversity=row.diversity,
                kl=row.kl,
            )
        )
    return Results(
        run=run,
        plan=plan,
        rounds=tuple(rounds),
        heldout=heldout_results(plan, entries, ledger.left_out()) if plan.heldout_tasks else None,
        seconds=seconds,
        first_reward_seconds=run.first_reward_seconds,
        peak_memory_bytes=run.peak_memory_bytes,
        all_entries=tuple(entries),
        openings=ledger.openings(),
        written=tuple(ledger.labels.questions()),
        canary=tuple(ledger.labels.looks()),
    )


def heldout_results(plan: RunPlan, entries: Sequence[Entry], left_out: Mapping[str, LeftOut] | None = None) -> Heldout:
    """The held-out measurement in a run's ledger lines. What is known of an arm that was left out is not counted."""
    left_out = left_out or {}
    measured = [entry for entry in entries if entry.key.stage == HELDOUT]
    untouched = _untouched(plan, measured)
    arms = {}
    if any(outcome.accuracy is not None for outcome in untouched):
        arms[NO_EDIT] = Arm(tuple(untouched), failed=sum(outcome.accuracy is None for outcome in untouched))
    for name in plan.arms[1:]:
        by_task = {entry.key.task: entry for entry in measured if entry.key.arm == name}
        if by_task and name not in left_out:
            arms[name] = _arm(plan, by_task, untouched)
    strategies = plan.config.heldout.fixed_strategies
    selection = [entry for entry in entries if entry.key.stage == SELECTION]
    rewards = selection_rewards(selection, len(strategies))
    chosen = best_strategy(rewards)
    banks = {heldout_bank(task) for task in plan.heldout_tasks}
    only = next(iter(banks)) if len(banks) == 1 else None
    bank = {types.QUESTION_BANK_SEALED: "sealed", types.QUESTION_BANK_REWARD: "reward", None: "mixed"}[only]
    return Heldout(
        arms=arms,
        bank="queries" if plan.few_shot else bank,
        fixed=None if chosen is None else strategies[chosen],
        selection_rewards=tuple(rewards),
        left_out=left_out,
    )


def _untouched(plan: RunPlan, measured: Sequence[Entry]) -> list[Outcome]:
    """The untouched student, by passage: the baseline that any arm's evaluation of the passage carries, but for the one
    in which the text stands in the prompt."""
    baselines: dict[int, types.Reward] = {}
    for entry in measured:
        if entry.key.arm != IN_CONTEXT and (reward := entry.reward) is not None:
            baselines.setdefault(entry.key.task, reward)
    outcomes = []
    for position, task in enumerate(plan.heldout_tasks):
        reward = baselines.get(position)
        if reward is None:
            outcomes.append(Outcome(dict(task.labels), None, 0, None))
        else:
            retention = reward.baseline_retention if reward.HasField("baseline_retention") else None
            known = None if _share(reward) is None else reward.baseline_accuracy
            outcomes.append(Outcome(dict(task.labels), known, reward.questions, retention))
    return outcomes


def _arm(plan: RunPlan, by_task: Mapping[int, Entry], untouched: Sequence[Outcome]) -> Arm:
    outcomes = []
    for position, task in enumerate(plan.heldout_tasks):
        entry = by_task.get(position)
        base = untouched[position]
        if entry is not None and entry.unusable:
            outcomes.append(Outcome(base.labels, base.accuracy, base.questions, base.retention))
        elif entry is not None and (reward := entry.reward) is not None:
            retention = reward.retention if reward.HasField("retention") else None
            outcomes.append(Outcome(dict(task.labels), _share(reward), reward.questions, retention))
        else:
            outcomes.append(Outcome(dict(task.labels), None, 0, None))
    return Arm(
        tuple(outcomes),
        tuple(by_task[position] for position in sorted(by_task)),
        failed=sum(entry.failed for entry in by_task.values()),
        malformed=sum(bool(entry.malformed) for entry in by_task.values()),
        cached=sum(entry.cached for entry in by_task.values()),
        too_costly=sum(bool(entry.too_costly) for entry in by_task.values()),
    )


def _share(reward: types.Reward) -> float | None:
    """Share of right answers; None where nothing was graded (questions without gold answers)."""
    return reward.accuracy if "gain" in reward.terms else None
