"""The evaluator's tables and its connection to them (SQLite embedded, PostgreSQL elsewhere).

One evaluator process owns one database: writes of its threads are serialised by a lock, every change of a state is a
compare-and-set, and each public operation of the stores is one transaction, so the process may die between any two.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

from preceptor.database import INT64, open_database


class State(StrEnum):
    """Where an evaluation stands; the names are those of the contract."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


LIVE = (State.QUEUED, State.RUNNING)


class TrialState(StrEnum):
    """Where a trial stands. A trial that nobody waits for any more has no row."""

    PENDING = "PENDING"
    DONE = "DONE"
    FAILED = "FAILED"


class BatchState(StrEnum):
    """Where a batch stands."""

    WAITING = "WAITING"  # to be put on the queue
    SUBMITTED = "SUBMITTED"  # on the queue
    RUNNING = "RUNNING"  # a worker's lease was seen
    FINISHED = "FINISHED"
    CANCELLED = "CANCELLED"


UNDER_WAY = (BatchState.SUBMITTED, BatchState.RUNNING)
OPEN = (BatchState.WAITING, *UNDER_WAY)

metadata = MetaData()

evaluations = Table(
    "evaluations",
    metadata,
    Column("seq", INT64, primary_key=True, autoincrement=True),  # the order of pages
    Column("id", String(64), nullable=False, unique=True),
    Column("state", String(16), nullable=False, index=True),
    Column("exam_id", String(64), nullable=False),
    Column("body", LargeBinary, nullable=False),  # preceptor.v1.Evaluation without state and times
    Column("created", Float, nullable=False),  # unix seconds
    Column("finished", Float),
)

# Position 0..S-1: the trials, by ascending seed; BASELINE_POSITION: the untouched student.
BASELINE_POSITION = -1
evaluation_trials = Table(
    "evaluation_trials",
    metadata,
    Column("evaluation_id", String(64), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("trial_id", String(64), nullable=False, index=True),
    Column("seed", String(20), nullable=False),  # uint64 does not fit SQL's integers
)

exams = Table(
    "exams",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("body", Text, nullable=False),  # JSON
)

trials = Table(
    "trials",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("batch_id", String(64), nullable=False, index=True),  # the batch that runs it, or last ran it
    Column("result", LargeBinary, nullable=False),  # preceptor.v1.TrialResult; empty while pending
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("turn", INT64, nullable=False),  # the order of submission, fair between owners (evaluator.demand)
    Column("attempt", Integer, nullable=False),  # only ever grows: part of the Celery task's id
    Column("since", Integer, nullable=False),  # results of attempts before this one are not wanted
    Column("tries", Integer, nullable=False),  # submissions spent on this work under the present request
    # The student's name, which says on which queue the batch goes. (An index that has it finds the next batch of one
    # queue without a look at the rows of another that has a hundred thousand.)
    Column("student", String(256), nullable=False, server_default=""),
    Column("payload", LargeBinary, nullable=False),  # preceptor.v1.TrialBatch; empty once final
    Index("batches_by_state", "state", "turn", "student"),
)

# What was cancelled and is not yet told to those who may be at it. A row is deleted when it is.
cancellations = Table(
    "cancellations",
    metadata,
    Column("seq", INT64, primary_key=True, autoincrement=True),
    Column("task_id", String(96), nullable=False),  # one attempt at a batch
    Column("trial_ids", Text, nullable=False),  # JSON
    Column("whole", Boolean, nullable=False),  # nothing of the batch is wanted any more
)

# Every submission of a batch and what became of it; forgotten after a while (evaluator.attempts).
attempts = Table(
    "attempts",
    metadata,
    Column("batch_id", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("trials", Integer, nullable=False),
    Column("worker", String(256), nullable=False),  # host:pid; empty where none was seen
    Column("submitted", Float, nullable=False),  # unix seconds
    Column("begun", Float),  # when a worker was first seen at it
    Column("ended", Float, index=True),
    Column("steps", Integer, nullable=False),
    Column("reason", String(64), nullable=False),  # of the error catalogue; empty where it ended well
    Column("message", Text, nullable=False),
)

# Which batch a trial was in before it came into this one: halves, tries of what failed.
origins = Table(
    "origins",
    metadata,
    Column("batch_id", String(64), primary_key=True),
    Column("earlier", String(64), primary_key=True),
)

# What it takes to run a FAILED trial again. A batch stays as long as one of its trials is here.
dead_letters = Table(
    "dead_letters",
    metadata,
    Column("trial_id", String(64), primary_key=True),
    Column("batch_id", String(64), nullable=False, index=True),
)
dead_batches = Table(
    "dead_batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("payload", LargeBinary, nullable=False),  # preceptor.v1.TrialBatch of the trials that failed
)

# Up to where the turns of an owner's batches reach (evaluator.demand).
owner_turns = Table(
    "owner_turns",
    metadata,
    Column("owner", String(256), primary_key=True),
    Column("turn", BigInteger, nullable=False),
)

owners = Table(
    "owners",
    metadata,
    Column("owner", String(256), primary_key=True),
    Column("evaluation_id", String(64), primary_key=True, index=True),
)

# Who has asked for a task's sealed questions, and when first.
openings = Table(
    "openings",
    metadata,
    Column("bank_id", String(64), primary_key=True),  # evaluator.sealed
    Column("owner", String(256), primary_key=True),
    Column("first", Float, nullable=False),  # unix seconds
)

requests = Table(
    "requests",
    metadata,
    Column("id", String(256), primary_key=True),
    Column("body_sha256", String(64), nullable=False),
    Column("reply", Text, nullable=False),  # JSON
)

# What a judge said. The id stands for everything the verdict depends on, so a row is never changed.
verdicts = Table(
    "verdicts",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("right", Boolean, nullable=False),
    Column("again", Boolean),  # what it said when it was asked a second time, where it was
    Column("created", Float, nullable=False, index=True),  # unix seconds
)


class Database:
    """A database with the tables above."""

    def __init__(self, url: str) -> None:
        self._engine = open_database(url, "evaluator.migrations")
        self._lock = threading.Lock()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection for reading."""
        with self._engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction: committed at the end, rolled back on an exception. One at a time."""
        with self._lock, self._engine.begin() as connection:
            yield connection

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()
