"""Batches and trials in SQL: what is to be run, what is under way, and what came out.

A batch goes WAITING -> SUBMITTED -> RUNNING -> FINISHED; a lost one goes back to WAITING under its next attempt. A
trial's answers, once recorded, never change.

A trial is wanted while it has a row, and it is run by the batch that its row names. One that nobody waits for any more
loses its row: whatever its batch still brings for it changes nothing, and who asks for it again gets a new batch. A
batch of which nothing is wanted is CANCELLED.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from evaluator.database import (
    LIVE,
    BatchState,
    Database,
    State,
    TrialState,
    batches,
    cancellations,
    evaluation_trials,
    evaluations,
    trials,
)
from evaluator.identity import batch_id as id_of_batch
from preceptor.names import celery_task_id
from preceptor.v1 import trial_pb2 as trial

_UNDER_WAY = (BatchState.SUBMITTED, BatchState.RUNNING)
_OPEN = (BatchState.WAITING, *_UNDER_WAY)


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A batch that is not final."""

    id: str
    state: BatchState
    attempt: int  # the one to submit, or the last one submitted
    since: int  # results of attempts since..attempt are wanted
    tries: int  # submissions so far


@dataclass(frozen=True, slots=True)
class Waiting:
    """A batch to put on the queue."""

    record: BatchRecord
    payload: trial.TrialBatch
    unwanted: tuple[str, ...]  # those of its trials that nobody waits for any more


@dataclass(frozen=True, slots=True)
class Cancellation:
    """Trials of one attempt at a batch that whoever may be at it is to be told to leave."""

    seq: int
    task_id: str
    trial_ids: tuple[str, ...]
    whole: bool  # nothing of the batch is wanted any more


class BatchStore:
    """The dispatcher's side of the database. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def waiting(self, limit: int) -> list[Waiting]:
        """The next batches to put on the queue."""
        with self._database.read() as tx:
            found = tx.execute(
                select(batches).where(batches.c.state == BatchState.WAITING).order_by(batches.c.turn).limit(limit)
            ).all()
            wanted = _wanted(tx, [row.id for row in found])
        waiting = []
        for row in found:
            payload = trial.TrialBatch.FromString(row.payload)
            unwanted = tuple(item.id for item in payload.trials if item.id not in wanted[row.id])
            waiting.append(Waiting(_record(row), payload, unwanted))
        return waiting

    def under_way(self) -> list[BatchRecord]:
        """The batches on the queue or with a worker."""
        with self._database.read() as tx:
            found = tx.execute(select(batches).where(batches.c.state.in_(_UNDER_WAY)).order_by(batches.c.turn)).all()
        return [_record(row) for row in found]

    def wanted(self, batch_id: str) -> trial.TrialBatch | None:
        """What somebody still waits for of a batch; None once it is final."""
        with self._database.read() as tx:
            stored = tx.execute(select(batches.c.payload).where(batches.c.id == batch_id)).scalar()
            wanted = _wanted(tx, [batch_id])[batch_id]
        return part_of(trial.TrialBatch.FromString(stored), wanted) if stored else None

    def cancellations(self) -> list[Cancellation]:
        """What is still to be told, oldest first."""
        with self._database.read() as tx:
            rows = tx.execute(select(cancellations).order_by(cancellations.c.seq)).all()
        return [Cancellation(row.seq, row.task_id, tuple(json.loads(row.trial_ids)), row.whole) for row in rows]

    def told(self, last_seq: int) -> None:
        """The cancellations up to this one have been told."""
        with self._database.write() as tx:
            tx.execute(delete(cancellations).where(cancellations.c.seq <= last_seq))

    def counts(self) -> dict[BatchState, int]:
        """How many batches are in each of the states that are not final."""
        with self._database.read() as tx:
            rows = tx.execute(
                select(batches.c.state, func.count()).where(batches.c.state.in_(_OPEN)).group_by(batches.c.state)
            ).all()
        return {BatchState(state): count for state, count in rows}

    def mark_submitted(self, batch_id: str, attempt: int) -> bool:
        """This attempt is on the queue. False: the batch was cancelled meanwhile."""
        with self._database.write() as tx:
            done = tx.execute(
                update(batches)
                .where(batches.c.id == batch_id, batches.c.attempt == attempt, batches.c.state == BatchState.WAITING)
                .values(state=BatchState.SUBMITTED, tries=batches.c.tries + 1)
            )
            return done.rowcount == 1

    def mark_running(self, batch_id: str) -> None:
        """A worker holds the batch: its evaluations are RUNNING."""
        with self._database.write() as tx:
            changed = tx.execute(
                update(batches)
                .where(batches.c.id == batch_id, batches.c.state == BatchState.SUBMITTED)
                .values(state=BatchState.RUNNING)
            )
            if changed.rowcount == 1:
                using = (
                    select(evaluation_trials.c.evaluation_id)
                    .join(trials, trials.c.id == evaluation_trials.c.trial_id)
                    .where(trials.c.batch_id == batch_id, evaluation_trials.c.position >= 0)
                )
                tx.execute(
                    update(evaluations)
                    .where(evaluations.c.id.in_(using), evaluations.c.state == State.QUEUED)
                    .values(state=State.RUNNING)
                )

    def try_again(self, batch_id: str, attempt: int, *, discard: bool) -> bool:
        """The batch goes back to WAITING under its next attempt. ``discard``: this attempt's result is not wanted.

        False: it is not under way with this attempt any more.
        """
        with self._database.write() as tx:
            changed = tx.execute(
                update(batches)
                .where(batches.c.id == batch_id, batches.c.attempt == attempt, batches.c.state.in_(_UNDER_WAY))
                .values(
                    state=BatchState.WAITING,
                    attempt=attempt + 1,
                    since=attempt + 1 if discard else batches.c.since,
                )
            )
            return changed.rowcount == 1

    def record(
        self,
        batch_id: str,
        attempt: int,
        results: Sequence[trial.TrialResult],
        successors: Sequence[trial.TrialBatch] = (),
        tries: int = 0,
    ) -> list[str]:
        """The batch is FINISHED with these results; ``successors`` (after ``tries`` submissions) run what is left.

        Returns the trials that became final: of those still wanted, DONE, or FAILED where the result is a failure.
        None, and nothing changes: the batch is final already, or the results of this attempt are not wanted.
        """
        with self._database.write() as tx:
            changed = tx.execute(
                update(batches)
                .where(batches.c.id == batch_id, batches.c.since <= attempt, batches.c.state.in_(_OPEN))
                .values(state=BatchState.FINISHED, payload=b"")
            )
            if changed.rowcount != 1:
                return []
            wanted = _wanted(tx, [batch_id])[batch_id]
            recorded = [result for result in results if result.trial_id in wanted]
            for result in recorded:
                tx.execute(
                    update(trials)
                    .where(trials.c.id == result.trial_id)
                    .values(
                        state=TrialState.FAILED if result.HasField("failure") else TrialState.DONE,
                        result=result.SerializeToString(),
                    )
                )
            for batch in successors:
                if any(item.id in wanted for item in batch.trials):
                    put_batch(tx, part_of(batch, wanted), tries)
            return [result.trial_id for result in recorded]


def put_batch(tx: Connection, batch: trial.TrialBatch, tries: int = 0) -> None:
    """A batch to run, last in turn. The same work asked for again gets an attempt of its own."""
    turn = (tx.execute(select(func.max(batches.c.turn))).scalar() or 0) + 1
    attempt = tx.execute(select(batches.c.attempt).where(batches.c.id == batch.id)).scalar()
    values = {
        "state": BatchState.WAITING,
        "turn": turn,
        "attempt": (attempt or 0) + 1,
        "since": (attempt or 0) + 1,
        "tries": tries,
        "payload": batch.SerializeToString(),
    }
    if attempt is None:
        tx.execute(insert(batches).values(id=batch.id, **values))
    else:
        tx.execute(update(batches).where(batches.c.id == batch.id).values(values))
    ids = [item.id for item in batch.trials]
    known = set(tx.execute(select(trials.c.id).where(trials.c.id.in_(ids))).scalars())
    pending = {"state": TrialState.PENDING, "batch_id": batch.id, "result": b""}
    if known:
        tx.execute(update(trials).where(trials.c.id.in_(known)).values(pending))
    if new := [{"id": trial_id, **pending} for trial_id in ids if trial_id not in known]:
        tx.execute(insert(trials), new)


def drop_unwanted(tx: Connection, evaluation_ids: Sequence[str]) -> None:
    """Drops the pending trials of these evaluations that no live evaluation waits for, and the batches of which
    nothing is wanted then; leaves word for those who may be at them."""
    used = select(evaluation_trials.c.trial_id).where(evaluation_trials.c.evaluation_id.in_(evaluation_ids))
    wanted = (
        select(evaluation_trials.c.trial_id)
        .join(evaluations, evaluations.c.id == evaluation_trials.c.evaluation_id)
        .where(evaluations.c.state.in_(LIVE))
    )
    rows = tx.execute(
        select(trials.c.id, trials.c.batch_id)
        .where(trials.c.state == TrialState.PENDING, trials.c.id.in_(used), trials.c.id.not_in(wanted))
        .order_by(trials.c.id)
    ).all()
    dropped: dict[str, list[str]] = {}
    for row in rows:
        dropped.setdefault(row.batch_id, []).append(row.id)
    tx.execute(delete(trials).where(trials.c.id.in_([row.id for row in rows])))
    left = _wanted(tx, list(dropped))
    ended = [one for one in dropped if not left[one]]
    attempts = tx.execute(
        select(batches.c.id, batches.c.since, batches.c.attempt)
        .where(batches.c.id.in_(dropped), batches.c.state.in_(_OPEN))
        .order_by(batches.c.turn)
    )
    notes = [
        {
            "task_id": celery_task_id(batch.id, attempt),
            "trial_ids": json.dumps(dropped[batch.id]),
            "whole": batch.id in ended,
        }
        for batch in attempts
        for attempt in range(batch.since, batch.attempt + 1)
    ]
    if notes:
        tx.execute(insert(cancellations), notes)
    tx.execute(update(batches).where(batches.c.id.in_(ended)).values(state=BatchState.CANCELLED, payload=b""))


def part_of(payload: trial.TrialBatch, trial_ids: Collection[str]) -> trial.TrialBatch:
    """The batch of some of a batch's trials, in its order."""
    part = trial.TrialBatch()
    part.CopyFrom(payload)
    del part.trials[:]
    part.trials.extend(item for item in payload.trials if item.id in trial_ids)
    part.id = id_of_batch(item.id for item in part.trials)
    return part


def _wanted(tx: Connection, batch_ids: Sequence[str]) -> dict[str, set[str]]:
    """The trials of each of these batches that it is still to run."""
    wanted: dict[str, set[str]] = {one: set() for one in batch_ids}
    rows = tx.execute(
        select(trials.c.id, trials.c.batch_id).where(
            trials.c.batch_id.in_(wanted), trials.c.state == TrialState.PENDING
        )
    )
    for row in rows:
        wanted[row.batch_id].add(row.id)
    return wanted


def _record(row: Row[tuple[object, ...]]) -> BatchRecord:
    return BatchRecord(row.id, BatchState(row.state), row.attempt, row.since, row.tries)
