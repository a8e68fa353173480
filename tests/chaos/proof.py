"""Proves from the databases on disk, without any service, that a run has lost nothing and counted nothing twice."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import orchestrator_pb2

SUCCEEDED, FAILED = pb.EVALUATION_STATE_SUCCEEDED, pb.EVALUATION_STATE_FAILED
# What a summary says of when, how fast and under which name.
_VARIES = frozenset(
    {"run", "seconds", "wall_seconds", "time_to_first_reward_seconds", "peak_memory_bytes", "throughput", "cached"}
    | {"worker_seconds", "selection_worker_seconds"}
)


@dataclass
class Proof:
    """What was found. ``facts`` is what holds, with its numbers; the others must be empty."""

    facts: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # under way, though the run is over

    def __bool__(self) -> bool:
        return not (self.lost or self.twice or self.left)


def prove(home: Path, run_id: str) -> Proof:
    """Looks at the databases of a stack that is down."""
    proof = Proof()
    with (
        closing(sqlite3.connect(home / "evaluator.db")) as evaluator,
        closing(sqlite3.connect(home / "orchestrator.db")) as orchestrator,
        closing(sqlite3.connect(home / "teacher.db")) as teacher,
    ):
        for name, database in (("evaluator", evaluator), ("orchestrator", orchestrator), ("teacher", teacher)):
            if (said := database.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
                proof.lost.append(f"{name}.db is damaged: {said}")
        evaluations = _evaluations(evaluator, proof)
        _nothing_under_way(evaluator, orchestrator, teacher, run_id, proof)
        rewards = _ledger(orchestrator, run_id, evaluations, proof)
        _trained_on(orchestrator, teacher, run_id, rewards, proof)
    return proof


def _evaluations(database: sqlite3.Connection, proof: Proof) -> dict[str, pb.Evaluation]:
    """Every evaluation has one final state, and each of its trials counts once."""
    known: dict[str, pb.Evaluation] = {}
    rows = database.execute("SELECT id, state, body, finished FROM evaluations").fetchall()
    trials: dict[str, list[tuple[int, str, str, str]]] = {}
    query = """SELECT e.evaluation_id, e.position, e.trial_id, e.seed, coalesce(t.state, 'none')
               FROM evaluation_trials e LEFT JOIN trials t ON t.id = e.trial_id ORDER BY 1, 2"""
    for evaluation_id, position, trial_id, seed, state in database.execute(query):
        trials.setdefault(evaluation_id, []).append((position, trial_id, seed, state))
    for evaluation_id, state, body, finished in rows:
        evaluation = pb.Evaluation.FromString(body)
        if evaluation_id in known:
            proof.twice.append(f"evaluation {evaluation_id} stands there twice")
        known[evaluation_id] = evaluation
        if state not in ("SUCCEEDED", "FAILED", "CANCELLED") or finished is None:
            proof.lost.append(f"evaluation {evaluation_id} is {state}")
            continue
        if state != "SUCCEEDED":
            proof.lost.append(
                f"evaluation {evaluation_id} {state}: {evaluation.failure.reason} {evaluation.failure.message}"
            )
            continue
        if not evaluation.HasField("reward") or evaluation.HasField("failure"):
            proof.lost.append(f"evaluation {evaluation_id} SUCCEEDED without a reward, or with a failure")
        known_trials = trials.get(evaluation_id, [])
        own = [one for one in known_trials if one[0] >= 0]  # the others are the untouched student's
        seeds = [int(seed) for _, _, seed, _ in own]
        counted = [one.seed for one in evaluation.trials]
        if len({one[1] for one in own}) < len(own) or len(set(counted)) < len(counted):
            proof.twice.append(f"evaluation {evaluation_id} counts a trial twice")
        if sorted(counted) != sorted(seeds) or evaluation.reward.seeds != len(seeds):
            proof.lost.append(f"evaluation {evaluation_id} counts seeds {counted}, its trials are {seeds}")
        if missing := [one[1] for one in known_trials if one[3] != "DONE"]:
            proof.lost.append(f"evaluation {evaluation_id} SUCCEEDED without trials {missing}")
    proof.facts.append(f"{len(rows)} evaluations, each with one final state, all SUCCEEDED")
    proof.facts.append(f"{sum(map(len, trials.values()))} trials of evaluations, each counted once")
    return known


def _nothing_under_way(
    evaluator: sqlite3.Connection,
    orchestrator: sqlite3.Connection,
    teacher: sqlite3.Connection,
    run_id: str,
    proof: Proof,
) -> None:
    questions = [
        (evaluator, "batches", "SELECT count(*) FROM batches WHERE state NOT IN ('FINISHED', 'CANCELLED')"),
        (evaluator, "trials", "SELECT count(*) FROM trials WHERE state = 'PENDING'"),
        (evaluator, "cancellations to be told", "SELECT count(*) FROM cancellations"),
        (teacher, "policies in training", "SELECT count(*) FROM policies WHERE state != 'ready'"),
    ]
    for database, what, query in questions:
        if number := database.execute(query).fetchone()[0]:
            proof.left.append(f"{number} {what}")
    state = orchestrator.execute("SELECT state FROM runs WHERE id = ?", (run_id,)).fetchone()[0]
    if state != orchestrator_pb2.RUN_STATE_SUCCEEDED:
        proof.left.append(f"the run is {orchestrator_pb2.RunState.Name(state)}")
    proof.facts.append("no batch, trial or policy under way")


def _ledger(
    database: sqlite3.Connection, run_id: str, evaluations: dict[str, pb.Evaluation], proof: Proof
) -> dict[str, Counter[tuple[str, str, float]]]:
    """Every line of the ledger says what the evaluator says. Returns each stage's rewards, by what earned them."""
    rewards: dict[str, Counter[tuple[str, str, float]]] = {}
    query = """SELECT s.stage, s.arm, s.task, s.sample_index, s.task_id, s.completion, s.malformed,
                 s.evaluation, m.fresh
               FROM self_edits s LEFT JOIN measurements m ON m.run_id = s.run_id AND m.stage = s.stage
                 AND m.arm = s.arm AND m.task = s.task AND m.sample_index = s.sample_index WHERE s.run_id = ?"""
    lines = database.execute(query, (run_id,)).fetchall()
    for stage, arm, task, index, task_id, completion, malformed, *measured in lines:
        place = f"{stage} {arm} {task}.{index}"
        found = [pb.Evaluation.FromString(data) for data in measured if data is not None]
        if not found and not malformed:
            proof.lost.append(f"ledger line {place} has no evaluation")
        for evaluation in found:
            truth = evaluations.get(evaluation.id)
            if evaluation.state != SUCCEEDED:
                proof.lost.append(f"ledger line {place} is {pb.EvaluationState.Name(evaluation.state)}")
            elif truth is None or truth.reward != evaluation.reward or truth.trials != evaluation.trials:
                proof.lost.append(f"ledger line {place} says another thing than the evaluator of {evaluation.id}")
        if found:
            key = (task_id, completion, found[-1].reward.value)
            rewards.setdefault(stage, Counter())[key] += 1
    proof.facts.append(f"{len(lines)} lines of the ledger, each with what the evaluator says")
    return rewards


def _trained_on(
    orchestrator: sqlite3.Connection,
    teacher: sqlite3.Connection,
    run_id: str,
    rewards: dict[str, Counter[tuple[str, str, float]]],
    proof: Proof,
) -> None:
    """What each policy was trained on is what the ledger has of its round, each line once."""
    rounds = orchestrator.execute(
        "SELECT round, policy_id FROM rounds WHERE run_id = ? ORDER BY round", (run_id,)
    ).fetchall()
    examples = 0
    for number, policy_id in rounds:
        row = teacher.execute("SELECT request FROM policies WHERE id = ?", (policy_id,)).fetchone()
        stored = json.loads(row[0])["examples"] if row and row[0] else []
        trained = Counter((one["group"], one["completion"], one["reward"]) for one in stored)
        ledger = rewards.get(f"round-{number:05d}", Counter())
        examples += trained.total()
        for (_, completion, reward), count in (trained - ledger).items():
            proof.twice.append(f"round {number}: {reward} of {completion[:40]!r} trained on {count} times too often")
        for (_, completion, reward), count in (ledger - trained).items():
            proof.lost.append(f"round {number}: {reward} of {completion[:40]!r} was not trained on ({count})")
    numbers = [number for number, _ in rounds]
    if numbers != list(range(1, len(numbers) + 1)):
        proof.lost.append(f"the rounds are {numbers}")
    updates = teacher.execute("SELECT count(*) FROM policies WHERE parent_id != ''").fetchone()[0]
    if updates > len(rounds):
        proof.twice.append(f"{updates} policies for {len(rounds)} rounds")
    proof.facts.append(f"{len(rounds)} policies, trained on {examples} rewards, each as in the ledger and once")


def what_counts(summary: Any) -> Any:
    """A summary without what may differ between two runs of one config: times, costs, names."""
    if isinstance(summary, dict):
        return {key: what_counts(value) for key, value in summary.items() if key not in _VARIES}
    return [what_counts(value) for value in summary] if isinstance(summary, list) else summary


def differences(expected: Any, found: Any, place: str = "summary") -> list[str]:
    """Where two summaries differ in what counts, a line each."""
    expected, found = what_counts(expected), what_counts(found)
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = sorted(expected.keys() | found.keys())
        return [line for key in keys for line in differences(expected.get(key), found.get(key), f"{place}.{key}")]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [line for number, pair in pairs for line in differences(*pair, f"{place}[{number}]")]
    return [] if expected == found else [f"{place}: {found!r} instead of {expected!r}"]


def work(home: Path) -> dict[str, int]:
    """What the run cost: trials, how often one was trained (scripted: begun; real: to its end), batches, attempts at
    them."""
    with closing(sqlite3.connect(home / "evaluator.db")) as database:
        trials = database.execute("SELECT count(*) FROM trials").fetchone()[0]
        batches, attempts = database.execute("SELECT count(*), sum(attempt) FROM batches").fetchone()
    scripted = home / "trained.log"
    if scripted.exists():
        trainings = len(scripted.read_text().split())
    else:
        logs = "\n".join(path.read_text(errors="replace") for path in (home / "logs").glob("worker-*.log"))
        trainings = sum(int(number) for number in re.findall(r"batch \S+: (\d+) trials in", logs))
    return {"trials": trials, "trainings": trainings, "batches": batches, "attempts": attempts or 0}
