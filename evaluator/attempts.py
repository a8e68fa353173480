"""The history of the work: every submission of a batch, who was at it, how far they came and why it ended.

One row for each submission, written in the transactions that change the batch anyway. Forgotten ``keep_seconds`` after
it ended; nothing depends on it but people who want to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Integer, Row, String, bindparam, case, delete, func, insert, select, tuple_, update

from evaluator.database import Database, attempts, evaluation_trials, evaluations, origins, trials
from preceptor.errors import PreceptorError
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import types_pb2 as types

# Rows deleted in one transaction, so that it takes milliseconds.
PRUNED_AT_ONCE = 2000


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended, as far as it is known. No reason: with results for all of its trials."""

    reason: str = ""
    message: str = ""
    worker: str = ""
    steps: int = 0


def begin(tx: Connection, batch_id: str, number: int, trials_in_batch: int, now: float) -> None:
    """The attempt is on the queue."""
    empty = {"worker": "", "steps": 0, "reason": "", "message": ""}
    row = {"batch_id": batch_id, "number": number, "trials": trials_in_batch, "submitted": now, **empty}
    tx.execute(_BEGIN, row)


def seen(tx: Connection, batch_id: str, number: int, worker: str, now: float) -> None:
    """A worker holds the attempt."""
    tx.execute(_SEEN, {"of": batch_id, "at": number, "by": worker, "now": now})


def end(tx: Connection, batch_id: str, number: int, ending: Ending, now: float) -> None:
    """The attempt has ended. One that was given up and then brought its results after all ends a second time, well."""
    values = {"why": ending.reason, "text": ending.message, "by": ending.worker, "did": ending.steps}
    tx.execute(_END, {"of": batch_id, "at": number, "now": now, **values})


def give_up(tx: Connection, batch_id: str, number: int, message: str, now: float) -> None:
    """The attempt, if it is still under way, is not wanted any more."""
    tx.execute(_GIVE_UP, {"of": batch_id, "at": number, "text": message, "now": now})


_BEGIN = insert(attempts)
_THIS = (attempts.c.batch_id == bindparam("of"), attempts.c.number == bindparam("at"))
_SEEN = update(attempts).where(*_THIS).values(worker=bindparam("by"), begun=bindparam("now"))
_END = (
    update(attempts)
    .where(*_THIS)
    .values(
        ended=bindparam("now"),
        reason=bindparam("why"),
        message=bindparam("text"),
        worker=case((bindparam("by", type_=String) == "", attempts.c.worker), else_=bindparam("by", type_=String)),
        steps=case(
            (bindparam("did", type_=Integer) < attempts.c.steps, attempts.c.steps),
            else_=bindparam("did", type_=Integer),
        ),
    )
)
_GIVE_UP = (
    update(attempts)
    .where(*_THIS, attempts.c.ended.is_(None))
    .values(ended=bindparam("now"), reason="CANCELLED", message=bindparam("text"))
)


class History:
    """Reading it and forgetting it. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def attempts_at(self, evaluation_id: str) -> list[pb.Attempt]:
        """Every attempt at the batches of an evaluation's trials, oldest first; also those at the batches that these
        were cut from. Raises PreceptorError(EVALUATION_NOT_FOUND)."""
        with self._database.read() as tx:
            if tx.execute(select(evaluations.c.seq).where(evaluations.c.id == evaluation_id)).scalar() is None:
                raise PreceptorError("EVALUATION_NOT_FOUND", f"there is no evaluation {evaluation_id!r}")
            own = (
                select(trials.c.batch_id)
                .join(evaluation_trials, evaluation_trials.c.trial_id == trials.c.id)
                .where(evaluation_trials.c.evaluation_id == evaluation_id)
            )
            found, fresh = set[str](), set(tx.execute(own).scalars())
            while fresh:
                found |= fresh
                earlier = select(origins.c.earlier).where(origins.c.batch_id.in_(fresh))
                fresh = set(tx.execute(earlier).scalars()) - found
            rows = tx.execute(
                select(attempts)
                .where(attempts.c.batch_id.in_(found))
                .order_by(attempts.c.submitted, attempts.c.batch_id, attempts.c.number)
            ).all()
        return [_attempt(row) for row in rows]

    def old(self, before: float) -> tuple[int, float]:
        """Attempts that ended before a time (unix seconds): how many, and when the first ended."""
        query = select(func.count(), func.coalesce(func.min(attempts.c.ended), before))
        with self._database.read() as tx:
            count, first = tx.execute(query.where(attempts.c.ended < before)).one()
        return int(count), float(first)

    def forget(self, before: float) -> int:
        """Forgets attempts that ended before a time (unix seconds), a bounded number of them; how many."""
        old = select(attempts.c.batch_id, attempts.c.number).where(attempts.c.ended < before).limit(PRUNED_AT_ONCE)
        with self._database.read() as tx:
            rows = [tuple(row) for row in tx.execute(old)]
        for start in range(0, len(rows), 500):
            with self._database.write() as tx:
                tx.execute(
                    delete(attempts).where(
                        tuple_(attempts.c.batch_id, attempts.c.number).in_(rows[start : start + 500])
                    )
                )
        return len(rows)


def _attempt(row: Row[Any]) -> pb.Attempt:
    known = dict(row._mapping)
    made = pb.Attempt(
        batch_id=known["batch_id"],
        number=known["number"],
        trials=known["trials"],
        worker=known["worker"],
        steps_done=known["steps"],
    )
    for name, time in (("submit_time", "submitted"), ("begin_time", "begun"), ("end_time", "ended")):
        if known[time] is not None:
            getattr(made, name).FromNanoseconds(int(known[time] * 1e9))
    if known["reason"]:
        made.failure.CopyFrom(types.Failure(reason=known["reason"], message=known["message"], attempts=1))
    return made
