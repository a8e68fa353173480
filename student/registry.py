"""Which students there are, their lineage, and which one is active: durable, in SQL.

Promises
- A student's source and commit never change after registration; what changes is its current version.
- Every change is one transaction together with the request that asked for it: the same request_id and body get the
  first answer again, also after a crash; another body under the same id is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import DateTime, ForeignKey, LargeBinary, String, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from preceptor.database import INT64, open_database
from preceptor.errors import PreceptorError
from student.source import SourceFacts


class Base(DeclarativeBase):
    """All tables of this service."""


class StudentRow(Base):
    """A registered student."""

    __tablename__ = "students"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    architecture: Mapped[str]
    parameters: Mapped[int] = mapped_column(INT64)
    context_tokens: Mapped[int]
    current_version: Mapped[int]
    create_time: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class VersionRow(Base):
    """A point in a student's lineage; version 1 is the base."""

    __tablename__ = "student_versions"
    name: Mapped[str] = mapped_column(ForeignKey("students.name"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    source: Mapped[str]
    commit: Mapped[str]
    evaluation_id: Mapped[str]  # whose self-edit was promoted; empty for the base
    create_time: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class ActiveRow(Base):
    """The active student: at most one row, with id 1."""

    __tablename__ = "active_student"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(ForeignKey("students.name"))


class RequestRow(Base):
    """A request that was answered, and its answer."""

    __tablename__ = "requests"
    request_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    body_sha256: Mapped[str] = mapped_column(String(64))
    answer: Mapped[bytes] = mapped_column(LargeBinary)


@dataclass(frozen=True, slots=True)
class Version:
    """A point in a student's lineage."""

    version: int
    source: str
    commit: str
    evaluation_id: str
    create_time: datetime


@dataclass(frozen=True, slots=True)
class RegisteredStudent:
    """A student at its current version."""

    name: str
    active: bool
    architecture: str
    parameters: int
    context_tokens: int
    create_time: datetime
    current: Version


class Registry:
    """The tables of one database."""

    def __init__(self, database_url: str) -> None:
        """Raises what ``open_database`` raises."""
        self._engine = open_database(database_url, "student.migrations")

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()

    def once(self, request_id: str, body: bytes, act: Callable[[Session], bytes]) -> bytes:
        """Runs ``act`` in a transaction and keeps its answer, or gives the answer of the first time.

        Raises PreceptorError(INVALID_REQUEST, REQUEST_ID_REUSED), and what ``act`` raises (then nothing is kept).
        """
        if not request_id or len(request_id) > 128:
            message = "a request that changes something needs a request_id of at most 128 characters"
            raise PreceptorError("INVALID_REQUEST", message, field="request_id")
        digest = hashlib.sha256(body).hexdigest()
        for last_try in (False, True):
            try:
                with Session(self._engine) as session, session.begin():
                    if (known := session.get(RequestRow, request_id)) is not None:
                        return _same(known, digest)
                    answer = act(session)
                    session.add(RequestRow(request_id=request_id, body_sha256=digest, answer=answer))
                    return answer
            except IntegrityError:  # the same request, or one for the same name, got in first; now it can be seen
                if last_try:
                    raise
        raise AssertionError("unreachable")

    def register(self, session: Session, name: str, facts: SourceFacts) -> RegisteredStudent:
        """Adds a student; the same source under the same name is the student that is there already.

        Raises PreceptorError(STUDENT_NAME_TAKEN).
        """
        if (row := session.get(StudentRow, name)) is not None:
            base = session.get_one(VersionRow, (name, 1))
            if (base.source, base.commit) != (facts.source, facts.commit):
                theirs = "other files in the same place" if base.source == facts.source else base.source
                message = f"{name} is registered already, from {theirs} ({base.commit[:12]})"
                raise PreceptorError("STUDENT_NAME_TAKEN", message, field="name")
            return _registered(session, row)
        now = datetime.now(UTC)
        row = StudentRow(
            name=name,
            architecture=facts.architecture,
            parameters=facts.parameters,
            context_tokens=facts.context_tokens,
            current_version=1,
            create_time=now,
        )
        session.add(row)
        session.flush()  # the version refers to it
        session.add(
            VersionRow(
                name=name, version=1, source=facts.source, commit=facts.commit, evaluation_id="", create_time=now
            )
        )
        session.flush()
        return _registered(session, row)

    def activate(self, session: Session, name: str) -> RegisteredStudent:
        """Makes a student the active one. Raises PreceptorError(STUDENT_NOT_FOUND)."""
        row = _row(session, name)
        session.merge(ActiveRow(id=1, name=name))
        session.flush()
        return _registered(session, row)

    def delete(self, session: Session, name: str) -> None:
        """Forgets a student; its files stay. Raises PreceptorError(STUDENT_NOT_FOUND, STUDENT_IN_USE)."""
        row = _row(session, name)
        if _active_name(session) == name:
            raise PreceptorError("STUDENT_IN_USE", f"{name} is the active student", field="name")
        for version in session.scalars(select(VersionRow).where(VersionRow.name == name)):
            session.delete(version)
        session.flush()
        session.delete(row)

    def get(self, name: str = "") -> RegisteredStudent:
        """A student, or the active one. Raises PreceptorError(STUDENT_NOT_FOUND, NO_ACTIVE_STUDENT)."""
        with Session(self._engine) as session:
            wanted = name or _active_name(session)
            if wanted is None:
                raise PreceptorError("NO_ACTIVE_STUDENT", "no student is active")
            return _registered(session, _row(session, wanted))

    def active_name(self) -> str | None:
        """The active student's name."""
        with Session(self._engine) as session:
            return _active_name(session)

    def students(self, after: str, limit: int) -> list[RegisteredStudent]:
        """At most ``limit`` students by name, from the one after ``after``."""
        with Session(self._engine) as session:
            rows = session.scalars(
                select(StudentRow).where(StudentRow.name > after).order_by(StudentRow.name).limit(limit)
            )
            return [_registered(session, row) for row in rows]

    def versions(self, name: str) -> list[Version]:
        """A student's lineage, newest first. Raises PreceptorError(STUDENT_NOT_FOUND)."""
        with Session(self._engine) as session:
            _row(session, name)
            rows = session.scalars(
                select(VersionRow).where(VersionRow.name == name).order_by(VersionRow.version.desc())
            )
            return [_version(row) for row in rows]


def _same(known: RequestRow, digest: str) -> bytes:
    if known.body_sha256 != digest:
        message = f"request_id {known.request_id} was used for another request"
        raise PreceptorError("REQUEST_ID_REUSED", message, field="request_id")
    return known.answer


def _row(session: Session, name: str) -> StudentRow:
    if (row := session.get(StudentRow, name)) is None:
        raise PreceptorError("STUDENT_NOT_FOUND", f"no student is named {name!r}", field="name")
    return row


def _active_name(session: Session) -> str | None:
    row = session.get(ActiveRow, 1)
    return row.name if row else None


def _registered(session: Session, row: StudentRow) -> RegisteredStudent:
    return RegisteredStudent(
        row.name,
        _active_name(session) == row.name,
        row.architecture,
        row.parameters,
        row.context_tokens,
        _aware(row.create_time),
        _version(session.get_one(VersionRow, (row.name, row.current_version))),
    )


def _version(row: VersionRow) -> Version:
    return Version(row.version, row.source, row.commit, row.evaluation_id, _aware(row.create_time))


def _aware(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)  # SQLite forgets the zone
