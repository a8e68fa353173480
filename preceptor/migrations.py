"""Brings a service's tables to the form that this version works with.

The modules of ``<service>/migrations`` are Alembic's scripts, ``0001``, ``0002`` and so on; nothing else makes tables.
A test compares what they make with the service's models, on SQLite and on PostgreSQL.

Promises
- All steps that a database lacks are taken in one transaction, or none.
- Of several processes that start at once, one migrates; the others wait and find it done.
- A database that a newer version has migrated is left alone: DATABASE_TOO_NEW.
- One that was made before there were migrations (SQLite) loses nothing: the first script makes only what is missing.
- A start that has nothing to migrate writes nothing.
"""

from __future__ import annotations

import importlib
import logging
import threading
import zlib

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from preceptor.errors import PreceptorError

log = logging.getLogger(__name__)

# PostgreSQL's advisory locks are named by two numbers. This one says: who migrates.
_MIGRATION_LOCK = 0x70726D67
# Alembic's ``op`` is one for the whole process.
_ONE_AT_A_TIME = threading.Lock()


def upgrade(engine: Engine, package: str) -> None:
    """Takes the steps that the database lacks. Raises PreceptorError(DATABASE_TOO_NEW), DatabaseError."""
    folder = importlib.import_module(package).__path__[0]
    scripts = ScriptDirectory(folder, version_locations=[folder])
    with engine.connect() as connection:
        if _revision(connection, scripts) == scripts.get_current_head():
            return
    with _ONE_AT_A_TIME, engine.begin() as connection:
        _wait_for_turn(connection)
        before = _revision(connection, scripts)
        if before == scripts.get_current_head():
            return
        context = MigrationContext.configure(
            connection, opts={"fn": lambda heads, _context: scripts._upgrade_revs("head", heads)}
        )
        with Operations.context(context):
            context.run_migrations()
    log.info("the tables of %s are at %s (before: %s)", package, scripts.get_current_head(), before or "none")


def _revision(connection: Connection, scripts: ScriptDirectory) -> str | None:
    """Up to which script the database was migrated; None: it never was. Raises DATABASE_TOO_NEW."""
    revision = MigrationContext.configure(connection).get_current_revision()
    known = [script.revision for script in scripts.walk_revisions()]
    if revision is not None and revision not in known:
        raise PreceptorError(
            "DATABASE_TOO_NEW",
            f"the database {connection.engine.url.database} was migrated to {revision} by a newer version of "
            f"Preceptor; this one knows {known[0]}",
        )
    return revision


def _wait_for_turn(connection: Connection) -> None:
    """Begins a transaction that nobody else who migrates has beside this one."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # its driver begins none before a table is made
    elif connection.dialect.name == "postgresql":
        schema = connection.execute(text("SELECT current_schema()")).scalar() or ""
        of_schema = zlib.crc32(schema.encode()) >> 1
        connection.execute(
            text("SELECT pg_advisory_xact_lock(:this, :schema)"), {"this": _MIGRATION_LOCK, "schema": of_schema}
        )
