"""PostgreSQL: a schema for each service, one process that owns it, any text, and its errors in our words.

Whose schema it is
- The owner holds an exclusive advisory lock, OWNER, on a connection of its own for as long as it lives. PostgreSQL lets
  go of it when that connection ends, however that happens.
- Every other connection holds a shared lock, USER, and is refused while OWNER is another process's. Who takes OWNER
  waits until nobody holds USER any more.
- So no two processes ever work with one schema, also where the owner's connection is cut and another process is
  quicker: that one waits for the connections of the first. The first asks every second, takes OWNER again where it is
  free, and ends itself (exit code 70) where it is not.
These locks belong to sessions: PostgreSQL must be reached directly, or through a pool of sessions, not of transactions.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.string import StrDumperUnknown, TextLoader
from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.engine import ExceptionContext

from preceptor.database import DatabaseError, Pool
from preceptor.errors import PreceptorError

log = logging.getLogger(__name__)

# What others who cannot go on either end with (EX_SOFTWARE): whoever supervises the process starts it again.
LOST_OWNERSHIP = 70
# Advisory locks are named by two numbers: which one it is, and of which schema.
_MAKING, _OWNER, _USER = 0x70726D6D, 0x70726D6F, 0x70726D75
_WATCH_SECONDS = 1.0
_POLL_SECONDS = 0.1
# What a server is told at the beginning of a session. Locks: as long as SQLite waits for another writer. And where a
# client's machine or network is gone, it is to let go of what that one held within half a minute (its own default may
# be hours): the next owner waits for it.
_SESSION = """
    SET lock_timeout = '30s';
    SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3
"""
# Nobody waits for ever for a server whose machine or network is gone. A parameter of the URL goes first.
_LINE: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # milliseconds
}
# Classes of errors, and single ones, that waiting or an operator of the server mends: the connection, transactions in
# each other's way, resources, an operator's hand, its disk.
_PASSING = re.compile(r"08|40|53|57|58|XX|55P03|25006")
_DISK_FULL = "53100"
# What a server says to those it does not know. (There is no code for it: they are not connected yet.)
_REFUSED = re.compile(
    r"authentication failed|no password supplied|does not exist|pg_hba\.conf|permission denied|is not permitted|SSL"
    r"|certificate|sslmode|invalid connection option|invalid value for parameter|option requires",
    re.IGNORECASE,
)
_PROCESS = f"pid {os.getpid()} ({uuid.uuid4().hex[:8]}) on {socket.gethostname()}"
_HOLDERS = """
    SELECT activity.pid, coalesce(activity.application_name, '') FROM pg_locks
    JOIN pg_stat_activity AS activity USING (pid)
    WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND classid = %s AND objid = %s AND granted AND activity.pid <> pg_backend_pid()
"""
_DLE = "\x10"


def open_schema(url: URL) -> Engine:
    """The engine of the schema that the URL's search path names, which is made where there is none.

    Raises DatabaseError, and PreceptorError(DATABASE_REFUSED).
    """
    _make_schema(url)
    # What is written are prompts and answers, which are not to be in a log.
    engine = create_engine(url, poolclass=Pool, pool_pre_ping=True, hide_parameters=True, connect_args=_arguments(url))

    def set_up(connection: psycopg.Connection[Any], _record: Any) -> None:
        try:
            _join(connection, url)
        except psycopg.Error as error:
            connection.close()
            raise _known(error, url) or error from None
        except BaseException:
            connection.close()
            raise

    def translate(context: ExceptionContext) -> None:
        if not context.is_pre_ping and (known := _known(context.original_exception, url)) is not None:
            raise known from context.original_exception

    event.listen(engine, "connect", set_up)
    event.listen(engine, "handle_error", translate)
    return engine


@contextmanager
def own_schema(url: URL, wait_seconds: float) -> Iterator[None]:
    """Holds the schema for this process. Raises DATABASE_UNREACHABLE, naming who has it, and DATABASE_REFUSED."""
    owner = _Owner(url)
    owner.take(wait_seconds)
    watch = threading.Thread(target=owner.watch, name="database-owner", daemon=True)
    watch.start()
    try:
        yield
    finally:
        owner.stop_watching()
        watch.join(_WATCH_SECONDS)  # it may be asking something, on the connection that is closed then
        owner.release()


class _Owner:
    """The lock OWNER of a schema."""

    def __init__(self, url: URL) -> None:
        self._url = url
        self._schema = _number(url)
        self._ending = threading.Event()
        self._connection: psycopg.Connection[Any] | None = None

    def take(self, wait_seconds: float) -> None:
        """Raises DATABASE_UNREACHABLE, DATABASE_REFUSED."""
        end = time.monotonic() + wait_seconds
        connection = _connect(self._url)
        try:
            owned = False
            while True:
                owned = owned or _try_lock(connection, _OWNER, self._schema)
                if owned and _try_lock(connection, _USER, self._schema):
                    connection.execute("SELECT pg_advisory_unlock(%s, %s)", (_USER, self._schema))
                    self._connection = connection
                    return
                if time.monotonic() >= end:
                    holders = _holders(connection, _USER if owned else _OWNER, self._schema)
                    who = next((name for _, name in holders), "") or "it does not say which"
                    raise PreceptorError(
                        "DATABASE_UNREACHABLE",
                        f"another process has {_place(self._url)} ({who}); end that one, or give this one a database "
                        "of its own (PRECEPTOR_DATABASE_URL)",
                    )
                time.sleep(_POLL_SECONDS)
        except psycopg.Error as error:
            raise _known(error, self._url) or error from None
        finally:
            if self._connection is None:
                connection.close()

    def watch(self) -> None:
        """Looks after the lock until ``stop_watching``. Ends the process where another one has it."""
        while not self._ending.wait(_WATCH_SECONDS):
            try:
                if self._connection is None:
                    self._take_again()
                else:
                    self._connection.execute("SELECT 1")
            except (psycopg.Error, PreceptorError) as error:
                if self._connection is not None and not self._ending.is_set():
                    log.warning("the connection that holds %s is lost: %s", _place(self._url), _words(error))
                    self._connection.close()
                    self._connection = None

    def stop_watching(self) -> None:
        """Has ``watch`` return."""
        self._ending.set()

    def release(self) -> None:
        """Lets go of it."""
        if (connection := self._connection) is not None:
            connection.close()

    def _take_again(self) -> None:
        connection = _connect(self._url)
        try:
            if _try_lock(connection, _OWNER, self._schema):
                self._connection = connection
                log.warning("holds %s again", _place(self._url))
                return
            for pid, name in _holders(connection, _OWNER, self._schema):
                if name == _name(self._url):  # our own, where the server has not noticed yet that its client is gone
                    connection.execute("SELECT pg_terminate_backend(%s)", (pid,))
                elif not self._ending.is_set():
                    log.critical("another process has %s now (%s): this one ends", _place(self._url), name)
                    logging.shutdown()
                    os._exit(LOST_OWNERSHIP)
        finally:
            if self._connection is None or self._ending.is_set():
                connection.close()


class _AnyText(StrDumperUnknown):
    """Text as PostgreSQL can keep it: it takes every character but NUL, which models do write. NUL is DLE and 0 there,
    DLE is DLE twice; both are in hardly any text."""

    def dump(self, text: str) -> Any:
        """As the server gets it."""
        if "\0" in text or _DLE in text:
            text = text.replace(_DLE, _DLE * 2).replace("\0", f"{_DLE}0")
        return super().dump(text)


class _AnyTextLoader(TextLoader):
    """Text as it was given."""

    def load(self, data: Any) -> Any:
        """As the program gets it."""
        text = super().load(data)
        if isinstance(text, str) and _DLE in text:
            text = re.sub(f"{_DLE}([{_DLE}0])", lambda found: "\0" if found[1] == "0" else _DLE, text)
        return text


def _join(connection: psycopg.Connection[Any], url: URL) -> None:
    """Sets a new connection up and takes USER. Raises DatabaseError where another process is the owner."""
    connection.adapters.register_dumper(str, _AnyText)
    for kind in ("text", "varchar"):
        connection.adapters.register_loader(kind, _AnyTextLoader)
    connection.autocommit = True
    schema = _number(url)
    connection.execute(_SESSION)
    connection.execute("SELECT pg_advisory_lock_shared(%s, %s)", (_USER, schema))
    for _, name in _holders(connection, _OWNER, schema):
        if name != _name(url):
            raise DatabaseError("DATABASE_UNREACHABLE", f"another process has {_place(url)} ({name})")
    connection.autocommit = False


def _make_schema(url: URL) -> None:
    """Raises DatabaseError, PreceptorError(DATABASE_REFUSED)."""
    schema = _schema(url)
    try:
        with _connect(url) as connection, connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s, %s)", (_MAKING, _number(url)))
            # Asked first: whoever may not make schemas may use one that is there.
            if connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", (schema,)).fetchone() is None:
                connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
    except psycopg.errors.InsufficientPrivilege:
        raise PreceptorError(
            "DATABASE_REFUSED",
            f"{_place(url)}: user {url.username} may not make the schema {schema}: "
            f'GRANT CREATE ON DATABASE "{url.database}" TO "{url.username}", or make the schema for it',
        ) from None
    except psycopg.Error as error:
        raise _known(error, url) or error from None


def _connect(url: URL) -> psycopg.Connection[Any]:
    """A connection outside any engine, without transactions. Raises DatabaseError, PreceptorError(DATABASE_REFUSED)."""
    positional, options = url.get_dialect()().create_connect_args(url)
    try:
        connection = psycopg.connect(*positional, **{**options, **_arguments(url)}, autocommit=True)
        connection.execute(_SESSION)
        return connection
    except psycopg.Error as error:
        said = _words(error)
        if isinstance(error, psycopg.ProgrammingError) or _REFUSED.search(said):
            raise PreceptorError("DATABASE_REFUSED", f"{_place(url)}: {said}") from None
        raise DatabaseError("DATABASE_UNREACHABLE", f"{_place(url)}: {said}") from None


def server_version(url: URL) -> tuple[str, bool]:
    """The server's version, and whether the connection is encrypted; touches no schema. For who only wants to know.

    Raises DatabaseError, PreceptorError(DATABASE_REFUSED).
    """
    with _connect(url) as connection:
        version = ".".join(map(str, divmod(connection.info.server_version, 10_000)))
        return version, bool(connection.pgconn.ssl_in_use)


def _arguments(url: URL) -> dict[str, Any]:
    return {key: value for key, value in _LINE.items() if key not in url.query} | {"application_name": _name(url)}


def _try_lock(connection: psycopg.Connection[Any], lock: int, schema: int) -> bool:
    answer = connection.execute("SELECT pg_try_advisory_lock(%s, %s)", (lock, schema)).fetchone()
    return bool(answer and answer[0])


def _holders(connection: psycopg.Connection[Any], lock: int, schema: int) -> list[tuple[int, str]]:
    """Backends that hold an advisory lock, but for this one, and what their processes call themselves."""
    return [(int(pid), str(name)) for pid, name in connection.execute(_HOLDERS, (lock, schema))]


def _known(error: BaseException, url: URL) -> DatabaseError | None:
    """What this says about server and disk; None if it is about something else."""
    if not isinstance(error, psycopg.Error):
        return None
    code = error.sqlstate
    if code == _DISK_FULL:
        return DatabaseError("DISK_FULL", f"no room left on the disk of {_place(url)}: {_words(error)}")
    cut = code is None and isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
    if cut or (code is not None and _PASSING.match(code)):
        return DatabaseError("DATABASE_UNREACHABLE", f"{_place(url)}: {_words(error)}")
    return None


def _words(error: BaseException) -> str:
    """An error in one line."""
    with suppress(AttributeError):
        if error.diag.message_primary:  # type: ignore[attr-defined]
            return str(error.diag.message_primary)  # type: ignore[attr-defined]
    return " ".join(str(error).split())


def _place(url: URL) -> str:
    """Which database, for people: without the password."""
    port = f":{url.port}" if url.port else ""
    return f"schema {_schema(url)} of postgresql://{url.username or ''}@{url.host or ''}{port}/{url.database or ''}"


def _name(url: URL) -> str:
    """What this process calls itself towards the server; cut there at 63 bytes."""
    return f"preceptor {_schema(url)} {_PROCESS}".encode(errors="replace")[:63].decode(errors="ignore")


def _schema(url: URL) -> str:
    found = re.findall(r"search_path=([^\s,]+)", str(url.query.get("options", "")))
    return found[-1] if found else "public"


def _number(url: URL) -> int:
    return zlib.crc32(_schema(url).encode()) >> 1
