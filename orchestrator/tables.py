"""The orchestrator's tables: runs, their ledger, their rounds, their seconds, and the requests already answered."""

from __future__ import annotations

from sqlalchemy import Float, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from preceptor.database import INT64


class Base(DeclarativeBase):
    """All tables of this service."""


class RunRow(Base):
    """A run: what was asked for, whole, and where it stands."""

    __tablename__ = "runs"
    id: Mapped[str] = mapped_column(String(96), primary_key=True)
    number: Mapped[int] = mapped_column(INT64, index=True, unique=True)  # in the order of creation
    name: Mapped[str] = mapped_column(String(64))
    state: Mapped[int] = mapped_column(index=True)  # preceptor.v1.RunState
    request: Mapped[bytes] = mapped_column(LargeBinary)  # CreateRunRequest: config, tasks, probes, replay
    student: Mapped[bytes] = mapped_column(LargeBinary)  # PinnedStudent
    config_sha256: Mapped[str] = mapped_column(String(64))
    failure: Mapped[bytes | None] = mapped_column(LargeBinary)  # Failure
    resumes: Mapped[int] = mapped_column(default=0)  # how often it was resumed on request
    base_policy: Mapped[str] = mapped_column(String(128), default="")
    first_reward_seconds: Mapped[float | None] = mapped_column(Float)
    peak_memory_bytes: Mapped[int] = mapped_column(INT64, default=0)
    created: Mapped[float] = mapped_column(Float)  # seconds since the epoch
    finished: Mapped[float | None] = mapped_column(Float)
    summary_json: Mapped[str] = mapped_column(Text, default="")
    report_html: Mapped[str] = mapped_column(Text, default="")


class RoundRow(Base):
    """A finished round."""

    __tablename__ = "rounds"
    run_id: Mapped[str] = mapped_column(String(96), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    policy_id: Mapped[str] = mapped_column(String(128))  # the policy after it
    kept: Mapped[int]
    offered: Mapped[int]


class EntryRow(Base):
    """A line of the ledger (``orchestrator.entries.Entry``)."""

    __tablename__ = "self_edits"
    run_id: Mapped[str] = mapped_column(String(96), primary_key=True)
    stage: Mapped[str] = mapped_column(String(16), primary_key=True)
    arm: Mapped[str] = mapped_column(String(64), primary_key=True)
    task: Mapped[int] = mapped_column(primary_key=True)
    index: Mapped[int] = mapped_column("sample_index", primary_key=True)
    task_id: Mapped[str] = mapped_column(String(64))
    policy_id: Mapped[str] = mapped_column(String(128))
    completion: Mapped[str] = mapped_column(Text)
    malformed: Mapped[str] = mapped_column(Text)
    self_edit: Mapped[bytes | None] = mapped_column(LargeBinary)
    evaluation_id: Mapped[str] = mapped_column(String(64), default="", index=True)
    evaluation: Mapped[bytes | None] = mapped_column(LargeBinary)
    cached: Mapped[bool] = mapped_column(default=False)
    too_costly: Mapped[str] = mapped_column(Text, default="", server_default="")


class MeasuredRow(Base):
    """What was measured of a ledger line beside its evaluation. A line of which nothing was has no row."""

    __tablename__ = "measurements"
    run_id: Mapped[str] = mapped_column(String(96), primary_key=True)
    stage: Mapped[str] = mapped_column(String(16), primary_key=True)
    arm: Mapped[str] = mapped_column(String(64), primary_key=True)
    task: Mapped[int] = mapped_column(primary_key=True)
    index: Mapped[int] = mapped_column("sample_index", primary_key=True)
    look: Mapped[bytes | None] = mapped_column(LargeBinary)
    fresh: Mapped[bytes | None] = mapped_column(LargeBinary)
    stopped: Mapped[bool] = mapped_column(default=False)


class RoundGroupsRow(Base):
    """How many groups a finished round offered to the teacher, and how many of them taught it nothing; how different
    the self-edits of a group were, and how far the policy is from the untrained teacher, where the update says so."""

    __tablename__ = "round_groups"
    run_id: Mapped[str] = mapped_column(String(96), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    groups: Mapped[int]
    dropped: Mapped[int]
    diversity: Mapped[float | None] = mapped_column(Float)
    kl: Mapped[float | None] = mapped_column(Float)  # nats a token


class LeftOutRow(Base):
    """An arm of the held-out measurement that could not be had."""

    __tablename__ = "arms_left_out"
    run_id: Mapped[str] = mapped_column(String(96), primary_key=True)
    arm: Mapped[str] = mapped_column(String(64), primary_key=True)
    reason: Mapped[str] = mapped_column(String(64))
    message: Mapped[str] = mapped_column(Text)


class OpeningRow(Base):
    """How many owners had asked a task's sealed questions when this run had."""

    __tablename__ = "openings"
    run_id: Mapped[str] = mapped_column(String(96), primary_key=True)
    task_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owners: Mapped[int]


class EvaluatorClockRow(Base):
    """How far the evaluator's clock was ahead of the orchestrator's when the run began."""

    __tablename__ = "evaluator_clocks"
    run_id: Mapped[str] = mapped_column(String(96), primary_key=True)
    seconds_ahead: Mapped[float] = mapped_column(Float)


class SecondsRow(Base):
    """Time that a run's stage has spent in a phase, over all its processes."""

    __tablename__ = "seconds"
    run_id: Mapped[str] = mapped_column(String(96), primary_key=True)
    stage: Mapped[str] = mapped_column(String(16), primary_key=True)
    phase: Mapped[str] = mapped_column(String(16), primary_key=True)
    seconds: Mapped[float] = mapped_column(Float)


class RequestRow(Base):
    """A mutating request that was answered; the same id with another body is refused."""

    __tablename__ = "requests"
    request_id: Mapped[str] = mapped_column(String(256), primary_key=True)
    body_sha256: Mapped[str] = mapped_column(String(64))
    run_id: Mapped[str] = mapped_column(String(96))
