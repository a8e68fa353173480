"""Opens a service's own database: SQLite with settings that survive a kill, or a schema of its own on PostgreSQL.

Promises
- The database has the tables that this version works with: older ones are migrated at the start, newer ones refused
  (``preceptor/migrations.py``).
- A disk that is full, read-only or away, and a server that is away or was restarted, is a ``DatabaseError`` with its
  reason, wherever it is met; the database stays as it was before the transaction. (Where a connection breaks in the
  very moment of a commit, nobody knows whether it was done. Who tries again finds out: every request is kept with its
  answer.)
- ``own_database``: one process at a time works with a database. The stores rely on it: they keep locks and queues in
  memory, and a run must not be executed twice at once.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sqlalchemy import URL, BigInteger, Engine, Integer, create_engine, event
from sqlalchemy.engine import ExceptionContext, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from preceptor.errors import PreceptorError
from preceptor.migrations import upgrade
from preceptor.storage import storage_error

# Beyond its grace time, a process that was asked to end may still be busy with its last step.
HAND_OVER_SECONDS = 10.0
# A column for numbers that may pass 2**31: bytes, turns, parameters, and whatever a page's token is compared with.
# (SQLite's INTEGER has 64 bits, and only an INTEGER counts up by itself there.)
INT64 = BigInteger().with_variant(Integer, "sqlite")


class DatabaseError(PreceptorError):
    """The process's own database cannot be read or written now; nothing of the transaction was kept.

    The reason is DISK_FULL or DATABASE_UNREACHABLE. Whoever works on something durable waits and tries again.
    """


class Pool(QueuePool):
    """An engine's connections. Who gets none in time, since all others wait for an answer, is told as they are."""

    def _do_get(self) -> ConnectionPoolEntry:
        try:
            return super()._do_get()
        except PoolTimeoutError:
            message = f"all connections have been at work for {self.timeout():g} s: the database is slow, or away"
            raise DatabaseError("DATABASE_UNREACHABLE", message) from None


def open_database(url: str, migrations: str) -> Engine:
    """The engine of a database that has the tables of a package of migrations, like ``evaluator.migrations``.

    Raises DatabaseError(DATABASE_UNREACHABLE, DISK_FULL), as does everything that is done with it later; and
    PreceptorError(DATABASE_REFUSED, DATABASE_TOO_NEW).
    """
    try:
        engine = _engine(_read(url))
        try:
            upgrade(engine, migrations)
        except BaseException:
            engine.dispose()
            raise
    except DatabaseError as error:
        message = f"cannot open the database (PRECEPTOR_DATABASE_URL, PRECEPTOR_HOME): {error.message}"
        raise DatabaseError(error.reason, message, **error.metadata) from None
    except (SQLAlchemyError, OSError) as error:
        reason = getattr(error, "orig", None) or error
        raise PreceptorError(
            "DATABASE_UNREACHABLE", f"cannot open the database (PRECEPTOR_DATABASE_URL, PRECEPTOR_HOME): {reason}"
        ) from None
    return engine


@contextmanager
def own_database(url: str, wait_seconds: float) -> Iterator[None]:
    """Holds a database for this process: nobody else holds it for as long as the context is open.

    An earlier process that is still draining is waited for. Raises DATABASE_UNREACHABLE, naming who has it, and
    DATABASE_REFUSED. On PostgreSQL it is the service's schema that is held; a process that loses it to another, since
    its connection was cut, ends at once (``preceptor/postgres.py``).
    """
    parsed = _read(url)
    if parsed.get_backend_name() == "postgresql":
        from preceptor.postgres import own_schema

        with own_schema(parsed, wait_seconds):
            yield
    elif parsed.database and parsed.database != ":memory:":
        path = Path(parsed.database)
        with _lock(path.with_name(path.name + ".lock"), path, wait_seconds):
            yield
    else:
        yield


def _read(url: str) -> URL:
    unknown = PreceptorError(
        "DATABASE_UNREACHABLE",
        "PRECEPTOR_DATABASE_URL is neither postgresql://user@host/database nor sqlite:////path/of/a.db",
    )
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise unknown from None
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        return parsed
    if parsed.get_backend_name() != "postgresql":
        raise unknown
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise PreceptorError(
            "DATABASE_UNREACHABLE",
            "PRECEPTOR_DATABASE_URL names PostgreSQL, and its driver is not installed: pip install "
            "'preceptor[postgres]'",
        ) from None
    if isinstance(options := parsed.query.get("options", ""), tuple):  # the operator's, and the schema of the settings
        parsed = parsed.update_query_dict({"options": " ".join(options)})
    return parsed.set(drivername="postgresql+psycopg")


def _engine(url: URL) -> Engine:
    """An engine whose errors about disk and server are DatabaseErrors."""
    if url.get_backend_name() == "postgresql":
        from preceptor.postgres import open_schema

        return open_schema(url)
    of_its_own = {"poolclass": Pool} if url.database and url.database != ":memory:" else {}
    engine = create_engine(url, pool_pre_ping=True, hide_parameters=True, **of_its_own)
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "handle_error", _translate)
    return engine


@contextmanager
def _lock(lock: Path, database: Path, wait_seconds: float) -> Iterator[None]:
    # A lock of the system's is gone with its process, however that ends. The file stays: removing it would let two
    # processes hold two files of one name.
    end = time.monotonic() + wait_seconds
    with _open_lock(lock) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    file.seek(0)
                    raise PreceptorError(
                        "DATABASE_UNREACHABLE",
                        f"another process has it ({_holder(file.read())}); end that one, or give this one a home of "
                        "its own (PRECEPTOR_HOME)",
                        file=str(database),
                    ) from None
                time.sleep(0.1)
        _write_pid(file)
        yield


def _write_pid(file: IO[str]) -> None:
    """For the message that the next one gets. Of a fixed length, so that it needs no new room on a full disk."""
    with suppress(OSError):
        os.pwrite(file.fileno(), f"{os.getpid():<10}\n".encode(), 0)


def _open_lock(lock: Path) -> IO[str]:
    try:
        lock.touch(mode=0o600)
        return lock.open("r+")
    except OSError as error:
        if (known := storage_error(error, lock)) is not None:
            raise known from None
        raise PreceptorError("DATABASE_UNREACHABLE", f"cannot be made: {error.strerror}", file=str(lock)) from None


def _holder(said: str) -> str:
    return f"pid {said.strip()}" if said.strip().isdecimal() else "it has not said its pid"


def _translate(context: ExceptionContext) -> None:
    """Raises what a disk has to say in place of what SQLite made of it."""
    engine = context.engine
    place = Path(engine.url.database) if engine is not None and engine.url.database else None
    if (known := storage_error(context.original_exception, place)) is not None:
        raise DatabaseError(known.reason, known.message, **known.metadata) from context.original_exception


def _configure_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    # Readers do not wait for the writer. NORMAL survives the death of the process; what a power cut could take is
    # work that is done again under the same id.
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    # Who else may write: `sqlite3` in an operator's shell, a backup.
    cursor.execute("PRAGMA busy_timeout=30000")
    cursor.close()
