"""The ledger of one run: every step's outcome is here before the next step is taken.

Whoever continues a run reads what is settled and does only the rest. Safe to use from several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from sqlalchemy import Engine, delete, select
from sqlalchemy.orm import Session

from orchestrator.entries import EditKey, Entry, round_stage
from orchestrator.tables import EntryRow, RoundRow
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import types_pb2 as types


class Ledger:
    """What one run has done so far."""

    def __init__(
        self,
        engine: Engine,
        run_id: str,
        created: float,
        on_change: Callable[[Sequence[Entry]], None] = lambda _entries: None,
    ) -> None:
        """``created``: when the run was created, in seconds since the epoch; ``on_change`` is told of every line that
        was added or has changed, once it is durable."""
        self._engine = engine
        self._run_id = run_id
        self._created = created
        self._on_change = on_change

    # What was written

    def write(self, entries: Sequence[Entry]) -> None:
        """Adds new lines, all or none."""
        with Session(self._engine) as session:
            session.add_all(self._row(entry) for entry in entries)
            session.commit()
        self._on_change(entries)

    def record(self, keys: Iterable[EditKey], evaluation: evaluator.Evaluation) -> None:
        """Notes what is known of the evaluation of the self-edits at ``keys``."""
        # Known before: made before this run was. What the run itself asked for, and asks for again after a crash, is
        # not. (An evaluator that gives no time has its word taken.)
        cached = evaluation.cached and evaluation.create_time.ToMicroseconds() / 1e6 < self._created
        changed = []
        with Session(self._engine) as session:
            for key in keys:
                row = session.get_one(EntryRow, (self._run_id, key.stage, key.arm, key.task, key.index))
                row.evaluation_id = evaluation.id
                row.evaluation = evaluation.SerializeToString()
                row.cached = row.cached or cached
                changed.append(_entry(row))
            session.commit()
        self._on_change(changed)

    def entries(self, stage: str | None = None, arm: str | None = None) -> list[Entry]:
        """Lines in the order of their keys."""
        query = select(EntryRow).where(EntryRow.run_id == self._run_id)
        if stage is not None:
            query = query.where(EntryRow.stage == stage)
        if arm is not None:
            query = query.where(EntryRow.arm == arm)
        with Session(self._engine) as session:
            return sorted((_entry(row) for row in session.scalars(query)), key=lambda entry: entry.key)

    def page(self, round_number: int, offset: int, limit: int) -> list[Entry]:
        """Lines of one round, or of all rounds for 0, in the order of their keys."""
        rounds = EntryRow.stage.like("round-%") if round_number == 0 else EntryRow.stage == round_stage(round_number)
        query = select(EntryRow).where(EntryRow.run_id == self._run_id, rounds)
        query = query.order_by(EntryRow.stage, EntryRow.task, EntryRow.index).offset(offset).limit(limit)
        with Session(self._engine) as session:
            return [_entry(row) for row in session.scalars(query)]

    def forget_failures(self, stages_done: Iterable[str]) -> None:
        """Failed evaluations outside the finished stages are to be asked for again (a run resumed on request)."""
        done = set(stages_done)
        again = [entry.key for entry in self.entries() if entry.failed and entry.key.stage not in done]
        with Session(self._engine) as session:
            for key in again:
                row = session.get_one(EntryRow, (self._run_id, key.stage, key.arm, key.task, key.index))
                row.evaluation_id, row.evaluation = "", None
            session.commit()
        self._on_change(self.entries())

    # Rounds

    def finish_round(self, number: int, policy: teacher.Policy) -> None:
        """The round is done and this is the policy after it."""
        with Session(self._engine) as session:
            session.execute(delete(RoundRow).where(RoundRow.run_id == self._run_id, RoundRow.round == number))
            session.add(
                RoundRow(
                    run_id=self._run_id,
                    round=number,
                    policy_id=policy.id,
                    kept=policy.kept,
                    offered=policy.offered,
                )
            )
            session.commit()

    def finished_rounds(self) -> dict[int, RoundRow]:
        """The finished rounds by number."""
        with Session(self._engine, expire_on_commit=False) as session:
            rows = session.scalars(select(RoundRow).where(RoundRow.run_id == self._run_id).order_by(RoundRow.round))
            return {row.round: row for row in rows}

    def _row(self, entry: Entry) -> EntryRow:
        return EntryRow(
            run_id=self._run_id,
            stage=entry.key.stage,
            arm=entry.key.arm,
            task=entry.key.task,
            index=entry.key.index,
            task_id=entry.task_id,
            policy_id=entry.policy_id,
            completion=entry.completion,
            malformed=entry.malformed,
            self_edit=entry.self_edit.SerializeToString() if entry.self_edit is not None else None,
        )


def _entry(row: EntryRow) -> Entry:
    return Entry(
        key=EditKey(row.stage, row.arm, row.task, row.index),
        task_id=row.task_id,
        policy_id=row.policy_id,
        completion=row.completion,
        malformed=row.malformed,
        self_edit=types.SelfEdit.FromString(row.self_edit) if row.self_edit is not None else None,
        evaluation=evaluator.Evaluation.FromString(row.evaluation) if row.evaluation is not None else None,
        cached=row.cached,
    )
