"""Runs in SQL: made once per request, changed only along the allowed states, found again after any crash."""

from __future__ import annotations

import hashlib
import time
import uuid
from dataclasses import dataclass

from sqlalchemy import Engine, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from orchestrator.tables import EvaluatorClockRow, RequestRow, RunRow
from preceptor.config import RunConfig, parse_config_json
from preceptor.errors import PreceptorError
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import types_pb2 as types

PENDING, RUNNING = pb.RUN_STATE_PENDING, pb.RUN_STATE_RUNNING
SUCCEEDED, FAILED, CANCELLED = pb.RUN_STATE_SUCCEEDED, pb.RUN_STATE_FAILED, pb.RUN_STATE_CANCELLED
FINAL = (SUCCEEDED, FAILED, CANCELLED)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as it was asked for, and where it stands."""

    id: str
    name: str
    state: pb.RunState.ValueType
    request: pb.CreateRunRequest
    student: types.PinnedStudent
    config_sha256: str
    failure: types.Failure | None
    resumes: int
    base_policy: str
    first_reward_seconds: float | None
    peak_memory_bytes: int
    created: float
    finished: float | None

    def config(self) -> RunConfig:
        """The resolved config."""
        return parse_config_json(self.request.config_json)


class RunStore:
    """The table of runs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def find_request(self, request_id: str, body: bytes) -> RunRecord | None:
        """The run that an earlier request of this id made or changed. Raises REQUEST_ID_REUSED for another body."""
        with Session(self._engine) as session:
            row = session.get(RequestRow, request_id)
            if row is None:
                return None
            if row.body_sha256 != hashlib.sha256(body).hexdigest():
                raise PreceptorError("REQUEST_ID_REUSED", f"request {request_id!r} was used with another body")
            return _record(session.get_one(RunRow, row.run_id))

    def create(
        self, request: pb.CreateRunRequest, body: bytes, config: RunConfig, student: types.PinnedStudent
    ) -> RunRecord:
        """A new run in PENDING; where another thread was first with the same request, that one's."""
        with Session(self._engine) as session:
            number = (session.scalar(select(func.max(RunRow.number))) or 0) + 1
            row = RunRow(
                id=f"{config.name}-{uuid.uuid4().hex[:8]}",
                number=number,
                name=config.name,
                state=PENDING,
                request=request.SerializeToString(),
                student=student.SerializeToString(),
                config_sha256=config.digest(),
                created=time.time(),
            )
            session.add_all([row, _request_row(request.request_id, body, row.id)])
            try:
                session.commit()
            except IntegrityError:
                session.rollback()
                if (first := self.find_request(request.request_id, body)) is not None:
                    return first
                return self.create(request, body, config, student)  # only the number was taken meanwhile
            return _record(row)

    def note_request(self, request_id: str, body: bytes, run_id: str) -> None:
        """Remembers a request that changed a run."""
        with Session(self._engine) as session:
            session.merge(_request_row(request_id, body, run_id))
            session.commit()

    def get(self, run_id: str) -> RunRecord:
        """Raises RUN_NOT_FOUND."""
        with Session(self._engine) as session:
            row = session.get(RunRow, run_id)
            if row is None:
                raise PreceptorError("RUN_NOT_FOUND", f"there is no run {run_id!r}", field="run_id")
            return _record(row)

    def page(self, limit: int, before: int | None = None) -> tuple[list[RunRecord], int | None]:
        """Runs, newest first; and, where there are more, the number to ask for next."""
        with Session(self._engine) as session:
            query = select(RunRow).order_by(RunRow.number.desc()).limit(limit + 1)
            if before is not None:
                query = query.where(RunRow.number < before)
            rows = list(session.scalars(query))
            return [_record(row) for row in rows[:limit]], rows[limit - 1].number if len(rows) > limit else None

    def unfinished(self) -> list[str]:
        """Ids of the runs that are to go on, oldest first."""
        with Session(self._engine) as session:
            query = select(RunRow.id).where(RunRow.state.in_((PENDING, RUNNING))).order_by(RunRow.number)
            return list(session.scalars(query))

    def move(
        self,
        run_id: str,
        to: pb.RunState.ValueType,
        *,
        only_from: tuple[pb.RunState.ValueType, ...],
        failure: types.Failure | None = None,
        summary_json: str = "",
        report_html: str = "",
    ) -> bool:
        """Changes the state, if it is one of ``only_from``; says whether it did. What belongs to the new state
        (failure, reports) is written in the same transaction."""
        values: dict[str, object] = {
            "state": to,
            "failure": failure.SerializeToString() if failure else None,
            "finished": time.time() if to in FINAL else None,
        }
        if summary_json:
            values |= {"summary_json": summary_json, "report_html": report_html}
        if to == PENDING:
            values["resumes"] = RunRow.resumes + 1
        with Session(self._engine) as session:
            result = session.execute(
                update(RunRow).where(RunRow.id == run_id, RunRow.state.in_(only_from)).values(**values)
            )
            session.commit()
            return bool(result.rowcount)  # type: ignore[attr-defined]

    def set_base_policy(self, run_id: str, policy_id: str) -> None:
        """The policy the run starts from; said once."""
        self._set(run_id, base_policy=policy_id)

    def set_first_reward(self, run_id: str, seconds: float) -> None:
        """When the first reward came, in seconds of the run's own time."""
        self._set(run_id, first_reward_seconds=seconds)

    def evaluator_clock(self, run_id: str) -> float | None:
        """How far the evaluator's clock was ahead when the run began, in seconds; None where it was not noted."""
        with Session(self._engine) as session:
            row = session.get(EvaluatorClockRow, run_id)
            return row.seconds_ahead if row else None

    def note_evaluator_clock(self, run_id: str, seconds_ahead: float) -> None:
        """Said once, before the run asks the evaluator for anything."""
        with Session(self._engine) as session:
            session.merge(EvaluatorClockRow(run_id=run_id, seconds_ahead=seconds_ahead))
            session.commit()

    def raise_peak_memory(self, run_id: str, peak_bytes: int) -> None:
        """The largest memory seen."""
        with Session(self._engine) as session:
            larger = update(RunRow).where(RunRow.id == run_id, RunRow.peak_memory_bytes < peak_bytes)
            session.execute(larger.values(peak_memory_bytes=peak_bytes))
            session.commit()

    def reports(self, run_id: str) -> tuple[str, str]:
        """summary.json and report.html of a run that succeeded; empty before."""
        with Session(self._engine) as session:
            row = session.get_one(RunRow, run_id)
            return row.summary_json, row.report_html

    def _set(self, run_id: str, **values: object) -> None:
        with Session(self._engine) as session:
            session.execute(update(RunRow).where(RunRow.id == run_id).values(**values))
            session.commit()


def _request_row(request_id: str, body: bytes, run_id: str) -> RequestRow:
    return RequestRow(request_id=request_id, body_sha256=hashlib.sha256(body).hexdigest(), run_id=run_id)


def _record(row: RunRow) -> RunRecord:
    return RunRecord(
        id=row.id,
        name=row.name,
        state=row.state,  # type: ignore[arg-type]
        request=pb.CreateRunRequest.FromString(row.request),
        student=types.PinnedStudent.FromString(row.student),
        config_sha256=row.config_sha256,
        failure=types.Failure.FromString(row.failure) if row.failure else None,
        resumes=row.resumes,
        base_policy=row.base_policy,
        first_reward_seconds=row.first_reward_seconds,
        peak_memory_bytes=row.peak_memory_bytes,
        created=row.created,
        finished=row.finished,
    )
