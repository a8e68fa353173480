"""Batches in SQL, from the dispatcher's side: what is to be submitted, what is under way, and what came out.

A batch goes WAITING -> SUBMITTED -> RUNNING -> FINISHED; a lost one goes back to WAITING under its next attempt. Once
it is final nothing changes it any more, and a trial's answers, once recorded, never change. What is wanted at all, and
how a batch comes to be, is ``evaluator.demand``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, delete, select, update

from evaluator import attempts as history
from evaluator.attempts import Ending
from evaluator.database import (
    OPEN,
    UNDER_WAY,
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
from evaluator.dead_letters import bury, raise_dead
from evaluator.demand import Put, leave_word, part_of, put_batches, wanted_trials
from preceptor.names import split_task_id
from preceptor.v1 import trial_pb2 as trial


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A batch that is not final."""

    id: str
    state: BatchState
    attempt: int  # the one to submit, or the last one submitted
    since: int  # results of attempts since..attempt are wanted
    tries: int  # submissions so far that count
    student: str = ""  # its name


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


@dataclass(frozen=True, slots=True)
class End:
    """How a batch ends: with the results of an attempt for some of its trials, and others to run again."""

    batch_id: str
    attempt: int
    results: Sequence[trial.TrialResult]
    ending: Ending
    again: Collection[str] = ()
    halve: bool = False  # what runs again is cut in two
    tries: int = 0  # of what runs again, so far


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the end of a batch has changed."""

    trial_ids: tuple[str, ...] = ()  # final now
    batch_ids: tuple[str, ...] = ()  # that run what is left


class BatchStore:
    """Every method is one transaction. ``clock`` gives unix seconds."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database, self._clock = database, clock

    def waiting(
        self, limit: int, resting: Collection[str] = (), student: str = "", dedicated: Collection[str] = ()
    ) -> list[Waiting]:
        """The next batches to put on the queue of ``student`` (empty: of all that are not ``dedicated``), but for those
        that rest."""
        columns = (batches.c.id, batches.c.state, batches.c.attempt, batches.c.since, batches.c.tries)
        its = [batches.c.student == student] if student else [batches.c.student.not_in(dedicated)] if dedicated else []
        turns = (
            select(*columns, batches.c.student)
            .where(batches.c.state == BatchState.WAITING, *its)
            .order_by(batches.c.turn, batches.c.id)
            .limit(limit + len(resting))
        )
        with self._database.read() as tx:
            found = [_record(row) for row in tx.execute(turns) if row.id not in resting][:limit]
            ids = [record.id for record in found]
            rows = tx.execute(select(batches.c.id, batches.c.payload).where(batches.c.id.in_(ids)))
            payloads = {row.id: trial.TrialBatch.FromString(row.payload) for row in rows}
            wanted = wanted_trials(tx, ids)
        return [
            Waiting(
                record,
                payloads[record.id],
                tuple(item.id for item in payloads[record.id].trials if item.id not in wanted[record.id]),
            )
            for record in found
        ]

    def under_way(self) -> list[BatchRecord]:
        """The batches on the queue or with a worker."""
        with self._database.read() as tx:
            found = tx.execute(select(batches).where(batches.c.state.in_(UNDER_WAY)).order_by(batches.c.turn)).all()
        return [_record(row) for row in found]

    def wanted(self, batch_ids: Sequence[str]) -> dict[str, set[str]]:
        """The trials of each of these batches that somebody waits for; none of a batch that is final."""
        with self._database.read() as tx:
            return wanted_trials(tx, batch_ids)

    def cancellations(self, limit: int) -> list[Cancellation]:
        """What is still to be told, oldest first."""
        with self._database.read() as tx:
            rows = tx.execute(select(cancellations).order_by(cancellations.c.seq).limit(limit)).all()
        return [Cancellation(row.seq, row.task_id, tuple(json.loads(row.trial_ids)), row.whole) for row in rows]

    def told(self, told: Sequence[Cancellation]) -> None:
        """These cancellations, the oldest ones, have been told."""
        with self._database.write() as tx:
            tx.execute(delete(cancellations).where(cancellations.c.seq <= told[-1].seq))
            for one in told:
                if one.whole:
                    history.give_up(tx, *split_task_id(one.task_id), "nobody wants it any more", self._clock())

    def mark_submitted(self, sent: Sequence[Waiting]) -> set[str]:
        """These attempts are on the queue; returns the ids of the batches, but for those that were cancelled
        meanwhile."""
        marked = set()
        with self._database.write() as tx:
            for batch in sent:
                record = batch.record
                changed = tx.execute(_SUBMIT, {"of": record.id, "number": record.attempt})
                if changed.rowcount == 1:
                    number_of_trials = len(batch.payload.trials) - len(batch.unwanted)
                    history.begin(tx, record.id, record.attempt, number_of_trials, self._clock())
                    marked.add(record.id)
        return marked

    def mark_running(self, begun: Sequence[tuple[BatchRecord, str]]) -> None:
        """A worker holds the batch, for each of these: its evaluations are RUNNING."""
        with self._database.write() as tx:
            for record, worker in begun:
                changed = tx.execute(_BEGIN, {"of": record.id, "number": record.attempt})
                if changed.rowcount == 1:
                    history.seen(tx, record.id, record.attempt, worker, self._clock())
                    tx.execute(_RUN, {"batch": record.id})

    def try_again(self, batch_id: str, attempt: int, ending: Ending, *, discard: bool, counts: bool = True) -> bool:
        """The batch goes back to WAITING under its next attempt. ``discard``: this attempt's result is not wanted.
        ``counts``: the attempt was a try.

        False: it is not under way with this attempt any more.
        """
        with self._database.write() as tx:
            changed = tx.execute(
                update(batches)
                .where(batches.c.id == batch_id, batches.c.attempt == attempt, batches.c.state.in_(UNDER_WAY))
                .values(
                    state=BatchState.WAITING,
                    attempt=attempt + 1,
                    since=attempt + 1 if discard else batches.c.since,
                    tries=batches.c.tries if counts else batches.c.tries - 1,
                )
            )
            if changed.rowcount == 1:
                history.end(tx, batch_id, attempt, ending, self._clock())
            return changed.rowcount == 1

    def record(self, ends: Sequence[End]) -> list[Recorded]:
        """These batches are FINISHED, each by the results of an attempt. What is ``again`` runs in further batches, and
        whoever may be at a later attempt is to be told to leave it.

        Of the trials that are still wanted, those with results are DONE, or FAILED where the result is a failure.
        Nothing changes where a batch is final already, or the results of this attempt are not wanted.
        """
        with self._database.write() as tx:
            wanted = wanted_trials(tx, [end.batch_id for end in ends])
            return [self._record(tx, end, wanted[end.batch_id]) for end in ends]

    def _record(self, tx: Connection, end: End, wanted: set[str]) -> Recorded:
        row = tx.execute(_BATCH, {"of": end.batch_id}).one()
        if row.state not in OPEN or end.attempt < row.since:
            return Recorded()
        tx.execute(_FINISH, {"of": end.batch_id})
        results = [result for result in end.results if result.trial_id in wanted]
        failed = {result.trial_id for result in results if result.HasField("failure")}
        _record_results(tx, results)
        raise_dead(tx, {result.trial_id for result in results} - failed)
        history.end(tx, end.batch_id, end.attempt, end.ending, self._clock())
        later = range(end.attempt + 1, row.attempt + (row.state in UNDER_WAY))
        parts: list[trial.TrialBatch] = []
        if failed or end.again or later:
            payload = trial.TrialBatch.FromString(row.payload)
            order = [item.id for item in payload.trials]
            if failed:
                bury(tx, end.batch_id, payload, failed)
            left = [one for one in order if one in wanted and one in end.again]
            middle = (len(left) + 1) // 2 if end.halve else len(left)
            parts = [part_of(payload, half) for half in (left[:middle], left[middle:]) if half]
            # In the old batch's turn: those who wait for it have waited longest.
            put_batches(tx, [Put(part, row.turn, end.tries) for part in parts])
            leave_word(tx, end.batch_id, later, order, whole=True)
            for number in later:
                history.give_up(tx, end.batch_id, number, "another attempt brought the results", self._clock())
        return Recorded(tuple(result.trial_id for result in results), tuple(part.id for part in parts))


_BATCH = select(batches).where(batches.c.id == bindparam("of"))
_SUBMIT = (
    update(batches)
    .where(
        batches.c.id == bindparam("of"),
        batches.c.attempt == bindparam("number"),
        batches.c.state == BatchState.WAITING,
    )
    .values(state=BatchState.SUBMITTED, tries=batches.c.tries + 1)
)
_BEGIN = (
    update(batches)
    .where(
        batches.c.id == bindparam("of"),
        batches.c.attempt == bindparam("number"),
        batches.c.state == BatchState.SUBMITTED,
    )
    .values(state=BatchState.RUNNING)
)
_RUN = (
    update(evaluations)
    .where(
        evaluations.c.id.in_(
            select(evaluation_trials.c.evaluation_id)
            .join(trials, trials.c.id == evaluation_trials.c.trial_id)
            .where(trials.c.batch_id == bindparam("batch"), evaluation_trials.c.position >= 0)
        ),
        evaluations.c.state == State.QUEUED,
    )
    .values(state=State.RUNNING)
)
_FINISH = update(batches).where(batches.c.id == bindparam("of")).values(state=BatchState.FINISHED, payload=b"")
_RESULT = (
    update(trials).where(trials.c.id == bindparam("of")).values(state=bindparam("becomes"), result=bindparam("brought"))
)


def _record_results(tx: Connection, results: Sequence[trial.TrialResult]) -> None:
    if results:
        tx.execute(
            _RESULT,
            [
                {
                    "of": result.trial_id,
                    "becomes": TrialState.FAILED if result.HasField("failure") else TrialState.DONE,
                    "brought": result.SerializeToString(),
                }
                for result in results
            ],
        )


def _record(row: Any) -> BatchRecord:
    return BatchRecord(row.id, BatchState(row.state), row.attempt, row.since, row.tries, row.student)
