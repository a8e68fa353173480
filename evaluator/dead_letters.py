"""What FAILED, kept so that it can be run again as it was asked for: `preceptor evaluations retry`.

A trial that FAILED leaves a letter here that names what is left of its batch, without the trials that went well. The
letter goes when the trial succeeds. Retrying puts the failed trials of one old batch into one new batch, so that they
train in the company they had; trials that went well are not trained again, and an evaluation all of whose trials went
well (its grading failed) is only graded again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, bindparam, delete, insert, select, update

from evaluator.database import (
    Database,
    State,
    TrialState,
    dead_batches,
    dead_letters,
    evaluation_trials,
    evaluations,
    owners,
    requests,
    trials,
)
from evaluator.demand import ask_for, part_of
from preceptor.errors import PreceptorError
from preceptor.names import canonical_json
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial

# Evaluations that one transaction looks at: some ten milliseconds, in which nobody else writes.
PAGE = 200
# Whose turns a retry takes where it is nobody's in particular.
NOBODY = "retry"


_LETTERS_OF = select(dead_letters.c.batch_id).where(dead_letters.c.trial_id.in_(bindparam("trial_ids", expanding=True)))


def bury(tx: Connection, batch_id: str, payload: trial.TrialBatch, trial_ids: Collection[str]) -> None:
    """These trials of a batch FAILED."""
    raise_dead(tx, trial_ids)
    others = tx.execute(select(dead_letters.c.trial_id).where(dead_letters.c.batch_id == batch_id)).scalars()
    left = part_of(payload, {*trial_ids, *others})
    tx.execute(delete(dead_batches).where(dead_batches.c.id == batch_id))
    tx.execute(insert(dead_batches).values(id=batch_id, payload=left.SerializeToString()))
    tx.execute(insert(dead_letters), [{"trial_id": one, "batch_id": batch_id} for one in sorted(trial_ids)])


def raise_dead(tx: Connection, trial_ids: Collection[str]) -> None:
    """These trials have succeeded after all, or failed in another batch: their letters go."""
    old = set(tx.execute(_LETTERS_OF, {"trial_ids": list(trial_ids)}).scalars())
    if old:
        tx.execute(delete(dead_letters).where(dead_letters.c.trial_id.in_(trial_ids)))
        used = select(dead_letters.c.batch_id)
        tx.execute(delete(dead_batches).where(dead_batches.c.id.in_(old), dead_batches.c.id.not_in(used)))


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which of the evaluations that FAILED are meant; empty fields mean any."""

    ids: tuple[str, ...] = ()
    owner: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request to retry has come. It is kept with the request, so that a repetition goes on from there."""

    retried: int = 0
    after: int = 0  # the last evaluation that was looked at, by age
    done: bool = False


class DeadLetters:
    """The evaluations that FAILED. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def retry_some(self, request_id: str, body_sha256: str, chosen: Chosen) -> tuple[Progress, list[str]]:
        """Puts the next few of the chosen evaluations back to work; how far the request has come, and which they are.

        Each that FAILED is looked at once in a request, however often it is repeated. One whose failed trials left no
        letter (they failed under an older version) is passed over: a new request evaluates it anew. Raises
        PreceptorError(REQUEST_ID_REUSED).
        """
        with self._database.write() as tx:
            known = tx.execute(select(requests).where(requests.c.id == request_id)).one_or_none()
            if known is not None and known.body_sha256 != body_sha256:
                raise PreceptorError("REQUEST_ID_REUSED", f"the request id {request_id!r} was used for another request")
            progress = Progress(**json.loads(known.reply)) if known is not None else Progress()
            if progress.done:
                return progress, []
            rows = tx.execute(_failed(chosen, progress.after)).all()
            retried = _put_back(tx, rows, chosen)
            progress = Progress(
                progress.retried + len(retried), rows[-1].seq if rows else progress.after, len(rows) < PAGE
            )
            reply = canonical_json(asdict(progress))
            if known is None:
                tx.execute(insert(requests).values(id=request_id, body_sha256=body_sha256, reply=reply))
            else:
                tx.execute(update(requests).where(requests.c.id == request_id).values(reply=reply))
            return progress, retried


def _failed(chosen: Chosen, after: int) -> Select[Any]:
    query = (
        select(evaluations)
        .where(evaluations.c.state == State.FAILED, evaluations.c.seq > after)
        .order_by(evaluations.c.seq)
        .limit(PAGE)
    )
    if chosen.ids:
        query = query.where(evaluations.c.id.in_(chosen.ids))
    elif chosen.owner:
        asked = select(owners.c.owner).where(owners.c.evaluation_id == evaluations.c.id, owners.c.owner == chosen.owner)
        query = query.where(asked.exists())
    return query


def _put_back(tx: Connection, rows: Sequence[Row[Any]], chosen: Chosen) -> list[str]:
    """Puts those of these evaluations back that are meant and can be run; which."""
    bodies = {row.id: pb.Evaluation.FromString(row.body) for row in rows}
    meant = [one for one, body in bodies.items() if not chosen.reason or body.failure.reason == chosen.reason]
    lacking = _lacking(tx, meant)
    letters = _letters(tx, {one for trial_ids in lacking.values() for one in trial_ids})
    retried = [one for one in meant if all(trial_id in letters for trial_id in lacking[one])]
    for one in retried:
        bodies[one].ClearField("failure")
        tx.execute(
            update(evaluations)
            .where(evaluations.c.id == one)
            .values(state=State.QUEUED, finished=None, body=bodies[one].SerializeToString())
        )
    again: dict[str, set[str]] = {}
    for one in retried:
        for trial_id in lacking[one]:
            again.setdefault(letters[trial_id], set()).add(trial_id)
    for batch_id, trial_ids in again.items():
        stored = tx.execute(select(dead_batches.c.payload).where(dead_batches.c.id == batch_id)).scalar_one()
        ask_for(tx, chosen.owner or NOBODY, [part_of(trial.TrialBatch.FromString(stored), trial_ids)])
    return retried


def _lacking(tx: Connection, evaluation_ids: Sequence[str]) -> dict[str, list[str]]:
    """The trials of each evaluation that FAILED or are not there any more (a retry of them was cancelled)."""
    lacking: dict[str, list[str]] = {one: [] for one in evaluation_ids}
    links = (
        select(evaluation_trials.c.evaluation_id, evaluation_trials.c.trial_id, trials.c.state)
        .outerjoin(trials, trials.c.id == evaluation_trials.c.trial_id)
        .where(evaluation_trials.c.evaluation_id.in_(evaluation_ids))
        .order_by(evaluation_trials.c.evaluation_id, evaluation_trials.c.position)
    )
    for row in tx.execute(links):
        if row.state in (None, TrialState.FAILED):
            lacking[row.evaluation_id].append(row.trial_id)
    return lacking


def _letters(tx: Connection, trial_ids: Collection[str]) -> dict[str, str]:
    """The dead batch of each of these trials that has one."""
    found, names = dict[str, str](), sorted(trial_ids)
    for start in range(0, len(names), 500):
        query = select(dead_letters).where(dead_letters.c.trial_id.in_(names[start : start + 500]))
        found |= {row.trial_id: row.batch_id for row in tx.execute(query)}
    return found
