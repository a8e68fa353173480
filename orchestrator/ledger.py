"""The ledger of one run: every step's outcome is here before the next step is taken.

Whoever continues a run reads what is settled and does only the rest. Safe to use from several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Engine, Select, and_, bindparam, delete, select, tuple_
from sqlalchemy.orm import Session

from orchestrator.entries import EditKey, Entry, Kind, round_stage
from orchestrator.evaluator_client import FINAL, Reported
from orchestrator.label_store import LabelStore
from orchestrator.tables import EntryRow, LeftOutRow, MeasuredRow, OpeningRow, RoundGroupsRow, RoundRow
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import types_pb2 as types

_LINES = select(EntryRow, MeasuredRow).outerjoin(
    MeasuredRow,
    and_(
        *(getattr(MeasuredRow, name) == getattr(EntryRow, name) for name in ("run_id", "stage", "arm", "task", "index"))
    ),
)
# Made once: this is asked for every few evaluations, and to put the question together takes as long as to answer it.
_LINES_AT = _LINES.where(
    EntryRow.run_id == bindparam("run_id"),
    tuple_(EntryRow.stage, EntryRow.arm, EntryRow.task, EntryRow.index).in_(bindparam("places", expanding=True)),
)

# SQLite takes 32,766 values in a statement.
_AT_ONCE = 1_000


@dataclass(frozen=True, slots=True)
class FinishedRound:
    """A round that is done, and the policy after it: how many of its self-edits were offered to the teacher and kept,
    and of how many groups nothing was (None: not counted when the round was made); what the update says of diversity
    and of the divergence from the untrained teacher (None: nothing)."""

    policy_id: str
    kept: int
    offered: int
    groups: int | None = None
    groups_dropped: int | None = None
    diversity: float | None = None
    kl: float | None = None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Why an arm of the held-out measurement could not be had."""

    reason: str
    message: str


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
        self.labels = LabelStore(engine, run_id)

    # What was written

    def write(self, entries: Sequence[Entry]) -> None:
        """Adds new lines, all or none."""
        with Session(self._engine) as session:
            session.add_all(self._row(entry) for entry in entries)
            session.commit()
        self._on_change(entries)

    def record(self, *reports: Reported) -> None:
        """Notes what is known of the evaluations of the self-edits at their keys, all or nothing. What was final before
        stays until what replaces it is: a race measures the same self-edit better and better."""
        keys = list(dict.fromkeys(key for report in reports for key in report.keys))
        with Session(self._engine) as session:
            lines = self._at_keys(session, keys)
            for report in reports:
                data = report.evaluation.SerializeToString()
                for key in report.keys:
                    row, measured = lines[key]
                    if report.kind is Kind.FULL:
                        if report.final or not _is_final(row.evaluation):
                            row.evaluation_id, row.evaluation = report.evaluation.id, data
                            row.cached = row.cached or self._known_before(report.evaluation)
                        continue
                    if measured is None:
                        measured = self._measured(key)
                        session.add(measured)
                        lines[key] = row, measured
                    if report.final or not _is_final(getattr(measured, report.kind)):
                        setattr(measured, report.kind, data)
            changed = [_entry(*lines[key]) for key in keys]
            session.commit()
        self._on_change(changed)

    def stop(self, keys: Iterable[EditKey]) -> None:
        """Notes that these are measured no further, for others of their group were better."""
        keys = list(keys)
        if not keys:
            return
        changed = []
        with Session(self._engine) as session:
            for key, (row, known) in self._at_keys(session, keys).items():
                measured = known or self._measured(key)
                measured.stopped = True
                session.add(measured)
                changed.append(_entry(row, measured))
            session.commit()
        self._on_change(changed)

    def entries(self, stage: str | None = None, arm: str | None = None) -> list[Entry]:
        """Lines in the order of their keys."""
        query = self._lines()
        if stage is not None:
            query = query.where(EntryRow.stage == stage)
        if arm is not None:
            query = query.where(EntryRow.arm == arm)
        with Session(self._engine) as session:
            return sorted((_entry(*row) for row in session.execute(query)), key=lambda entry: entry.key)

    def page(self, round_number: int, offset: int, limit: int) -> list[Entry]:
        """Lines of one round, or of all rounds for 0, in the order of their keys."""
        rounds = EntryRow.stage.like("round-%") if round_number == 0 else EntryRow.stage == round_stage(round_number)
        query = self._lines().where(rounds)
        query = query.order_by(EntryRow.stage, EntryRow.task, EntryRow.index).offset(offset).limit(limit)
        with Session(self._engine) as session:
            return [_entry(*row) for row in session.execute(query)]

    def ask_again(self, stages_done: Iterable[str]) -> None:
        """What failed outside the finished stages is to be asked for again (a run resumed on request), and whatever
        followed from it: a race that had lost somebody may take another course."""
        done = set(stages_done)
        open_ = [entry for entry in self.entries() if entry.key.stage not in done]
        failed = {(entry.key.stage, entry.key.arm, entry.key.task) for entry in open_ if entry.failed}
        again = [entry for entry in open_ if (entry.key.stage, entry.key.arm, entry.key.task) in failed]
        with Session(self._engine) as session:
            session.execute(delete(LeftOutRow).where(LeftOutRow.run_id == self._run_id))
            for entry in again:
                row = session.get_one(EntryRow, self._at(entry.key))
                row.evaluation_id, row.evaluation = "", None
                if (measured := session.get(MeasuredRow, self._at(entry.key))) is not None:
                    session.delete(measured)
            session.commit()
        self._on_change(self.entries())

    # Sealed questions

    def opened(self, openings: Iterable[evaluator.SealedOpening]) -> None:
        """Notes how many owners have asked for tasks' sealed questions so far, this run included."""
        with Session(self._engine) as session:
            for opening in openings:
                row = session.get(OpeningRow, (self._run_id, opening.task_id))
                most = max(opening.owners, row.owners if row else 0)
                session.merge(OpeningRow(run_id=self._run_id, task_id=opening.task_id, owners=most))
            session.commit()

    def openings(self) -> dict[str, int]:
        """By task, the most that was noted."""
        with Session(self._engine) as session:
            rows = session.scalars(select(OpeningRow).where(OpeningRow.run_id == self._run_id))
            return {row.task_id: row.owners for row in rows}

    # Arms

    def leave_out(self, arm: str, why: LeftOut) -> None:
        """Notes that an arm of the held-out measurement could not be had."""
        with Session(self._engine) as session:
            session.merge(LeftOutRow(run_id=self._run_id, arm=arm, reason=why.reason, message=why.message))
            session.commit()

    def left_out(self) -> dict[str, LeftOut]:
        """The arms that could not be had."""
        with Session(self._engine) as session:
            rows = session.scalars(select(LeftOutRow).where(LeftOutRow.run_id == self._run_id).order_by(LeftOutRow.arm))
            return {row.arm: LeftOut(row.reason, row.message) for row in rows}

    # Rounds

    def finish_round(self, number: int, policy: teacher.Policy) -> None:
        """The round is done and this is the policy after it."""
        values = {"run_id": self._run_id, "round": number}
        with Session(self._engine) as session:
            for table in (RoundRow, RoundGroupsRow):
                session.execute(delete(table).where(table.run_id == self._run_id, table.round == number))
            session.add(RoundRow(**values, policy_id=policy.id, kept=policy.kept, offered=policy.offered))
            said = {name: getattr(policy, name) for name in ("diversity", "kl") if policy.HasField(name)}
            session.add(RoundGroupsRow(**values, groups=policy.groups, dropped=policy.groups_dropped, **said))
            session.commit()

    def finished_rounds(self) -> dict[int, FinishedRound]:
        """The finished rounds by number."""
        same = and_(RoundGroupsRow.run_id == RoundRow.run_id, RoundGroupsRow.round == RoundRow.round)
        query = select(RoundRow, RoundGroupsRow).outerjoin(RoundGroupsRow, same)
        query = query.where(RoundRow.run_id == self._run_id).order_by(RoundRow.round)
        with Session(self._engine) as session:
            return {
                row.round: FinishedRound(
                    row.policy_id,
                    row.kept,
                    row.offered,
                    *((groups.groups, groups.dropped, groups.diversity, groups.kl) if groups is not None else ()),
                )
                for row, groups in session.execute(query)
            }

    def _at(self, key: EditKey) -> tuple[str, str, str, int, int]:
        return self._run_id, key.stage, key.arm, key.task, key.index

    def _at_keys(self, session: Session, keys: Sequence[EditKey]) -> dict[EditKey, tuple[EntryRow, MeasuredRow | None]]:
        """The rows of these lines, all of which are there."""
        places = [(key.stage, key.arm, key.task, key.index) for key in keys]
        rows = {
            EditKey(row.stage, row.arm, row.task, row.index): (row, measured)
            for start in range(0, len(places), _AT_ONCE)
            for row, measured in session.execute(
                _LINES_AT, {"run_id": self._run_id, "places": places[start : start + _AT_ONCE]}
            )
        }
        return {key: rows[key] for key in keys}

    def _known_before(self, evaluation: evaluator.Evaluation) -> bool:
        """Whether it was made before this run was. What the run itself asked for, and asks for again after a crash, was
        not. (An evaluator that gives no time has its word taken.)"""
        return evaluation.cached and evaluation.create_time.ToMicroseconds() / 1e6 < self._created

    def _measured(self, key: EditKey) -> MeasuredRow:
        place = dict(zip(("run_id", "stage", "arm", "task", "index"), self._at(key), strict=True))
        return MeasuredRow(**place, stopped=False)

    def _lines(self) -> Select[EntryRow, MeasuredRow]:
        return _LINES.where(EntryRow.run_id == self._run_id)

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
            too_costly=entry.too_costly,
            self_edit=entry.self_edit.SerializeToString() if entry.self_edit is not None else None,
        )


def _entry(row: EntryRow, measured: MeasuredRow | None) -> Entry:
    return Entry(
        key=EditKey(row.stage, row.arm, row.task, row.index),
        task_id=row.task_id,
        policy_id=row.policy_id,
        completion=row.completion,
        malformed=row.malformed,
        too_costly=row.too_costly,
        self_edit=types.SelfEdit.FromString(row.self_edit) if row.self_edit is not None else None,
        evaluation=_evaluation(row.evaluation),
        cached=row.cached,
        look=_evaluation(measured.look) if measured else None,
        fresh=_evaluation(measured.fresh) if measured else None,
        stopped=measured.stopped if measured else False,
    )


def _evaluation(data: bytes | None) -> evaluator.Evaluation | None:
    return None if data is None else evaluator.Evaluation.FromString(data)


def _is_final(data: bytes | None) -> bool:
    known = _evaluation(data)
    return known is not None and known.state in FINAL
