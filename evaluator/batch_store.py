"""Batches and trials in SQL: what is to be run, what is under way, and what came out.

A batch goes WAITING -> SUBMITTED -> RUNNING -> FINISHED; a lost one goes back to WAITING under its next attempt. A
trial's answers, once recorded, never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from evaluator.database import (
    LIVE,
    BatchState,
    Database,
    State,
    TrialState,
    batches,
    evaluation_trials,
    evaluations,
    trials,
)
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


class BatchStore:
    """The dispatcher's side of the database. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def waiting(self, limit: int) -> list[tuple[BatchRecord, trial.TrialBatch]]:
        """The next batches to put on the queue, with their payload."""
        with self._database.read() as tx:
            found = tx.execute(
                select(batches).where(batches.c.state == BatchState.WAITING).order_by(batches.c.turn).limit(limit)
            ).all()
        return [(_record(row), trial.TrialBatch.FromString(row.payload)) for row in found]

    def under_way(self) -> list[BatchRecord]:
        """The batches on the queue or with a worker."""
        with self._database.read() as tx:
            found = tx.execute(select(batches).where(batches.c.state.in_(_UNDER_WAY)).order_by(batches.c.turn)).all()
        return [_record(row) for row in found]

    def payload(self, batch_id: str) -> trial.TrialBatch | None:
        """The payload of a batch; None once it is final."""
        with self._database.read() as tx:
            stored = tx.execute(select(batches.c.payload).where(batches.c.id == batch_id)).scalar()
        return trial.TrialBatch.FromString(stored) if stored else None

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
        results: Sequence[trial.TrialResult],
        successors: Sequence[trial.TrialBatch] = (),
        tries: int = 0,
    ) -> bool:
        """The batch is FINISHED with these results; ``successors`` (after ``tries`` submissions) run what is left.

        False, and nothing changes: it is final already. A result with a failure makes its trial FAILED.
        """
        with self._database.write() as tx:
            changed = tx.execute(
                update(batches)
                .where(batches.c.id == batch_id, batches.c.state.in_(_OPEN))
                .values(state=BatchState.FINISHED, payload=b"")
            )
            if changed.rowcount != 1:
                return False
            for result in results:
                tx.execute(
                    update(trials)
                    .where(trials.c.id == result.trial_id, trials.c.state == TrialState.PENDING)
                    .values(
                        state=TrialState.FAILED if result.HasField("failure") else TrialState.DONE,
                        result=result.SerializeToString(),
                    )
                )
            for batch in successors:
                put_batch(tx, batch, tries)
            return True


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


def drop_unwanted(tx: Connection, evaluation_ids: Sequence[str]) -> list[tuple[str, int]]:
    """Cancels the batches of these evaluations that no worker holds and no live evaluation waits for.

    Returns batch ids with their last attempt.
    """
    candidates = (
        select(batches.c.id)
        .join(trials, trials.c.batch_id == batches.c.id)
        .join(evaluation_trials, evaluation_trials.c.trial_id == trials.c.id)
        .where(
            evaluation_trials.c.evaluation_id.in_(evaluation_ids),
            batches.c.state.in_((BatchState.WAITING, BatchState.SUBMITTED)),
        )
    )
    wanted = (
        select(trials.c.batch_id)
        .join(evaluation_trials, evaluation_trials.c.trial_id == trials.c.id)
        .join(evaluations, evaluations.c.id == evaluation_trials.c.evaluation_id)
        .where(trials.c.state == TrialState.PENDING, evaluations.c.state.in_(LIVE))
    )
    dropped = tx.execute(
        select(batches.c.id, batches.c.attempt)
        .where(batches.c.id.in_(candidates), batches.c.id.not_in(wanted))
        .order_by(batches.c.turn)
    ).all()
    ids = [row.id for row in dropped]
    tx.execute(update(batches).where(batches.c.id.in_(ids)).values(state=BatchState.CANCELLED, payload=b""))
    tx.execute(delete(trials).where(trials.c.batch_id.in_(ids), trials.c.state == TrialState.PENDING))
    return [(row.id, row.attempt) for row in dropped]


def _record(row: Row[tuple[object, ...]]) -> BatchRecord:
    return BatchRecord(row.id, BatchState(row.state), row.attempt, row.since, row.tries)
