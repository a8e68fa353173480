"""Opens a service's own database: SQLite with settings that survive a kill, or whatever SQLAlchemy's URL names."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, MetaData, create_engine, event
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from preceptor.errors import PreceptorError


def open_database(url: str, tables: MetaData) -> Engine:
    """The engine of a database that has these tables. Raises DATABASE_UNREACHABLE."""
    try:
        engine = create_engine(url, pool_pre_ping=True)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _configure_sqlite)
        tables.create_all(engine)
    except (ArgumentError, NoSuchModuleError):
        raise PreceptorError(
            "DATABASE_UNREACHABLE", "PRECEPTOR_DATABASE_URL is not a database URL that SQLAlchemy knows"
        ) from None
    except (SQLAlchemyError, OSError) as error:
        reason = getattr(error, "orig", None) or error
        raise PreceptorError(
            "DATABASE_UNREACHABLE", f"cannot open the database (PRECEPTOR_DATABASE_URL, PRECEPTOR_HOME): {reason}"
        ) from None
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    # Readers do not wait for the writer. NORMAL survives the death of the process; what a power cut could take is
    # work that is done again under the same id.
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    # Another process holds the lock for milliseconds, except when an old one is still draining.
    cursor.execute("PRAGMA busy_timeout=30000")
    cursor.close()
