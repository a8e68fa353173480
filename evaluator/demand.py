"""What is wanted: batches put up to be run, and what nobody waits for any more dropped. Inside a caller's transaction.

A trial is wanted while it has a row, and it is run by the batch that its row names. One that nobody waits for any more
loses its row: whatever its batch still brings for it changes nothing, and who asks for it again gets a new batch. A
batch of which nothing is wanted is CANCELLED.

**Turns.** Batches are submitted in the order of ``turn``, a virtual time that is fair between owners (start-time fair
queueing, Goyal, Vin and Chen, 1996): a batch begins where its owner's batch before it ended, or now if that is later,
and lasts as many units as it has trials. So whoever comes takes turns with those who wait already, however much they
have put up, and nobody saves up turns while he asks for nothing. "Now" is the turn of what was submitted last.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from evaluator.database import (
    LIVE,
    OPEN,
    UNDER_WAY,
    BatchState,
    TrialState,
    batches,
    cancellations,
    evaluation_trials,
    evaluations,
    origins,
    owner_turns,
    trials,
)
from evaluator.identity import batch_id as id_of_batch
from preceptor.names import celery_task_id
from preceptor.v1 import trial_pb2 as trial

# SQLite takes 32,766 variables in a statement; more than some hundred at once saves nothing.
AT_ONCE = 500


def ask_for(tx: Connection, owner: str, wanted: Sequence[trial.TrialBatch]) -> None:
    """Batches to run, in the owner's turns."""
    last = tx.execute(_LAST_TURN, {"of": owner}).scalar()
    turn = max(last or 0, _now(tx))
    puts = []
    for batch in wanted:
        puts.append(Put(batch, turn))
        turn += len(batch.trials)
    put_batches(tx, puts)
    if last is None:
        tx.execute(insert(owner_turns).values(owner=owner, turn=turn))
    else:
        tx.execute(_NEXT_TURN, {"of": owner, "reached": turn})


def _now(tx: Connection) -> int:
    for known in (_SUBMITTED_LAST, _WAITING_FIRST, _REACHED):
        if (turn := tx.execute(known).scalar()) is not None:
            return int(turn)
    return 0


# Statements that are not built anew each time are not hashed anew either.
_LAST_TURN = select(owner_turns.c.turn).where(owner_turns.c.owner == bindparam("of"))
_NEXT_TURN = update(owner_turns).where(owner_turns.c.owner == bindparam("of")).values(turn=bindparam("reached"))
_SUBMITTED_LAST = select(func.max(batches.c.turn)).where(batches.c.state.in_(UNDER_WAY))
_WAITING_FIRST = select(func.min(batches.c.turn)).where(batches.c.state == BatchState.WAITING)
_REACHED = select(func.max(owner_turns.c.turn))
_ATTEMPTS = select(batches.c.id, batches.c.attempt).where(batches.c.id.in_(bindparam("ids", expanding=True)))
_BATCH_OF = select(trials.c.id, trials.c.batch_id).where(trials.c.id.in_(bindparam("ids", expanding=True)))
_WANTED = select(trials.c.id, trials.c.batch_id).where(
    trials.c.batch_id.in_(bindparam("batch_ids", expanding=True)), trials.c.state == TrialState.PENDING
)


@dataclass(frozen=True, slots=True)
class Put:
    """A batch to run, after ``tries`` tries of the same work."""

    batch: trial.TrialBatch
    turn: int
    tries: int = 0


def put_batches(tx: Connection, puts: Sequence[Put]) -> None:
    """Batches to run. One that was run before gets an attempt of its own."""
    for start in range(0, len(puts), AT_ONCE):
        _put_batches(tx, puts[start : start + AT_ONCE])


def _put_batches(tx: Connection, puts: Sequence[Put]) -> None:
    ids = [put.batch.id for put in puts]
    rows = tx.execute(_ATTEMPTS, {"ids": ids})
    attempts = {row.id: row.attempt for row in rows}
    new: list[dict[str, object]] = []
    again: list[dict[str, object]] = []
    for put in puts:
        attempt = attempts.get(put.batch.id, 0) + 1
        values = {
            "id": put.batch.id,
            "state": BatchState.WAITING,
            "turn": put.turn,
            "attempt": attempt,
            "since": attempt,
            "tries": put.tries,
            "student": put.batch.student.name,
            "payload": put.batch.SerializeToString(),
        }
        (new if attempt == 1 else again).append(values)
    if new:
        tx.execute(insert(batches), new)
    for values in again:
        tx.execute(update(batches).where(batches.c.id == values["id"]).values(values))
    _put_trials(tx, {item.id: put.batch.id for put in puts for item in put.batch.trials})


def _put_trials(tx: Connection, batch_of: Mapping[str, str]) -> None:
    """These trials are to be run by these batches."""
    names, known = list(batch_of), dict[str, str]()
    for start in range(0, len(names), AT_ONCE):
        rows = tx.execute(_BATCH_OF, {"ids": names[start : start + AT_ONCE]})
        known |= {row.id: row.batch_id for row in rows}
    pending = {"state": TrialState.PENDING, "result": b""}
    if new := [{"id": one, "batch_id": batch_of[one], **pending} for one in names if one not in known]:
        tx.execute(insert(trials), new)
    for one in known:
        tx.execute(update(trials).where(trials.c.id == one).values(batch_id=batch_of[one], **pending))
    _note_origins(tx, {(batch_of[one], earlier) for one, earlier in known.items() if earlier != batch_of[one]})


def _note_origins(tx: Connection, pairs: Collection[tuple[str, str]]) -> None:
    for batch_id, earlier in sorted(pairs):
        here = (origins.c.batch_id == batch_id, origins.c.earlier == earlier)
        if tx.execute(select(origins.c.earlier).where(*here)).first() is None:
            tx.execute(insert(origins).values(batch_id=batch_id, earlier=earlier))


def drop_unwanted(tx: Connection, evaluation_ids: Sequence[str]) -> None:
    """Drops the pending trials of these evaluations that no live evaluation waits for, and the batches of which
    nothing is wanted then; leaves word for those who may be at them."""
    for start in range(0, len(evaluation_ids), AT_ONCE):
        _drop_unwanted(tx, evaluation_ids[start : start + AT_ONCE])


def _drop_unwanted(tx: Connection, evaluation_ids: Sequence[str]) -> None:
    used = select(evaluation_trials.c.trial_id).where(evaluation_trials.c.evaluation_id.in_(evaluation_ids))
    wanted = (
        select(evaluation_trials.c.trial_id)
        .join(evaluations, evaluations.c.id == evaluation_trials.c.evaluation_id)
        .where(evaluation_trials.c.trial_id == trials.c.id, evaluations.c.state.in_(LIVE))
    )
    rows = tx.execute(
        select(trials.c.id, trials.c.batch_id)
        .where(trials.c.state == TrialState.PENDING, trials.c.id.in_(used), ~wanted.exists())
        .order_by(trials.c.id)
    ).all()
    dropped: dict[str, list[str]] = {}
    for row in rows:
        dropped.setdefault(row.batch_id, []).append(row.id)
    for start in range(0, len(rows), AT_ONCE):
        tx.execute(delete(trials).where(trials.c.id.in_([row.id for row in rows[start : start + AT_ONCE]])))
    names = list(dropped)
    for start in range(0, len(names), AT_ONCE):
        _leave_word(tx, {one: dropped[one] for one in names[start : start + AT_ONCE]})


def _leave_word(tx: Connection, dropped: dict[str, list[str]]) -> None:
    left = wanted_trials(tx, list(dropped))
    ended = [one for one in dropped if not left[one]]
    attempts = tx.execute(
        select(batches.c.id, batches.c.since, batches.c.attempt)
        .where(batches.c.id.in_(dropped), batches.c.state.in_(OPEN))
        .order_by(batches.c.turn, batches.c.id)
    )
    for batch in attempts:
        leave_word(tx, batch.id, range(batch.since, batch.attempt + 1), dropped[batch.id], whole=batch.id in ended)
    tx.execute(update(batches).where(batches.c.id.in_(ended)).values(state=BatchState.CANCELLED, payload=b""))


def leave_word(tx: Connection, batch_id: str, numbers: range, trial_ids: Sequence[str], *, whole: bool) -> None:
    """Notes that whoever may be at these attempts of a batch is to be told to leave these trials. ``whole``: nothing of
    the batch is wanted any more."""
    notes = [
        {"task_id": celery_task_id(batch_id, number), "trial_ids": json.dumps(list(trial_ids)), "whole": whole}
        for number in numbers
    ]
    if notes:
        tx.execute(insert(cancellations), notes)


def wanted_trials(tx: Connection, batch_ids: Collection[str]) -> dict[str, set[str]]:
    """The trials of each of these batches that it is still to run."""
    wanted: dict[str, set[str]] = {one: set() for one in batch_ids}
    for row in tx.execute(_WANTED, {"batch_ids": list(batch_ids)}):
        wanted[row.batch_id].add(row.id)
    return wanted


def part_of(payload: trial.TrialBatch, trial_ids: Collection[str]) -> trial.TrialBatch:
    """The batch of some of a batch's trials, in its order."""
    part = trial.TrialBatch()
    part.CopyFrom(payload)
    del part.trials[:]
    part.trials.extend(item for item in payload.trials if item.id in trial_ids)
    part.id = id_of_batch(item.id for item in part.trials)
    return part
