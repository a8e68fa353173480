"""A service's own database on a disk that is full, read-only or held; and that one process owns it."""

from __future__ import annotations

import errno
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from sqlalchemy import Column, Integer, LargeBinary, MetaData, Table, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from preceptor.database import DatabaseError, open_database, own_database
from preceptor.errors import PreceptorError
from preceptor.storage import ROOM_SECONDS, free_bytes, mount_of, storage_error, when_there_is_room
from tests.small_disk import small_disk

TABLES = MetaData()
THINGS = Table("things", TABLES, Column("n", Integer, primary_key=True), Column("data", LargeBinary))


def test_a_full_disk_is_said_with_its_name_and_nothing_of_the_transaction_stays(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        engine = open_database(f"sqlite:///{disk.path}/x.db", "tests.things")
        with engine.begin() as db:
            db.execute(THINGS.insert().values(n=0, data=b"x"))
        disk.fill()
        with pytest.raises(DatabaseError) as in_a_statement, Session(engine) as session:
            for n in range(1, 100):
                session.execute(THINGS.insert().values(n=n, data=b"x" * 9000))
            session.commit()
        with pytest.raises(DatabaseError) as at_the_start:
            open_database(f"sqlite:///{disk.path}/y.db", "tests.things")
        for error in (in_a_statement.value, at_the_start.value):
            assert error.reason == "DISK_FULL"
            assert str(disk.path) in error.message
        with engine.connect() as db:  # what is there can still be read
            assert db.execute(select(func.count()).select_from(THINGS)).scalar() == 1
        disk.free()
        with engine.begin() as db:
            db.execute(THINGS.insert().values(n=1, data=b"x"))
        engine.dispose()


def test_who_gets_no_connection_in_time_is_told_as_who_gets_no_answer(database_url: str) -> None:
    """Others wait for a server that does not answer; runs and updates wait with them, instead of failing."""
    engine = open_database(database_url, "tests.things")
    assert isinstance(engine.pool, QueuePool)
    engine.pool._timeout = 0.1
    with ExitStack() as others, pytest.raises(DatabaseError) as raised:
        for _ in range(1000):
            others.enter_context(engine.connect())
    assert raised.value.reason == "DATABASE_UNREACHABLE"
    engine.dispose()


def test_what_is_written_is_in_no_error(database_url: str) -> None:
    """It may be a prompt, and errors are logged."""
    engine = open_database(database_url, "tests.things")
    with pytest.raises(IntegrityError) as raised, engine.begin() as db:
        db.execute(THINGS.insert().values(n=1, data=b"an answer"))
        db.execute(THINGS.insert().values(n=1, data=b"an answer"))
    assert "an answer" not in str(raised.value)
    engine.dispose()


def test_a_database_that_may_not_be_written_is_unreachable(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path}/x.db", "tests.things")
    with engine.begin() as db:
        db.exec_driver_sql("PRAGMA query_only = ON")
        with pytest.raises(DatabaseError) as raised:
            db.execute(THINGS.insert().values(n=1, data=b""))
    assert raised.value.reason == "DATABASE_UNREACHABLE"
    assert str(tmp_path) in str(raised.value)
    engine.dispose()


def test_a_database_that_another_program_holds_too_long_is_unreachable(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path}/x.db", "tests.things")
    other = sqlite3.connect(tmp_path / "x.db")
    other.execute("BEGIN IMMEDIATE")
    with engine.begin() as db:
        db.exec_driver_sql("PRAGMA busy_timeout = 50")
        with pytest.raises(DatabaseError, match="another program has held it"):
            db.execute(THINGS.insert().values(n=1, data=b""))
    other.close()
    engine.dispose()


def test_what_is_no_matter_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path}/x.db", "tests.things")
    with engine.connect() as db, pytest.raises(Exception, match="no such table") as raised:
        db.exec_driver_sql("SELECT * FROM nowhere")
    assert not isinstance(raised.value, PreceptorError)
    engine.dispose()
    for error in (ValueError("(os error 28)"), OSError(errno.ENOENT, "gone"), PreceptorError("INTERNAL", "x")):
        assert storage_error(error) is None


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "DISK_FULL"), (errno.EDQUOT, "DISK_FULL"), (errno.EROFS, "DATABASE_UNREACHABLE")],
)
def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, number: int, reason: str) -> None:
    found = storage_error(OSError(number, "x", str(tmp_path / "file")))
    assert found is not None
    assert found.reason == reason
    assert found.metadata["file"] == str(tmp_path / "file")


def test_a_library_that_only_says_the_number_is_understood(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        disk.fill()
        with pytest.raises(Exception, match="os error 28") as raised:
            save_file({"a": np.zeros(1000)}, str(disk.path / "a.safetensors"))
        found = storage_error(raised.value, disk.path)
        assert found is not None
        assert found.reason == "DISK_FULL"
        assert mount_of(disk.path / "not" / "there") == disk.path
        assert free_bytes(disk.path / "not" / "there") == (0, 2**20)


def test_who_waits_for_room_goes_on_when_there_is_some_and_ends_when_asked_to() -> None:
    tries, heard, waited = [], [], []

    def third_time() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.ENOSPC, "full", "/data/x")
        return "done"

    assert when_there_is_room(third_time, waited.append, heard.append) == "done"
    assert [error.reason for error in heard] == ["DISK_FULL", "DISK_FULL"]
    assert waited == [ROOM_SECONDS, ROOM_SECONDS]

    def end(_seconds: float) -> None:
        raise KeyboardInterrupt

    tries.clear()
    with pytest.raises(KeyboardInterrupt):
        when_there_is_room(third_time, end)
    with pytest.raises(ZeroDivisionError):
        when_there_is_room(lambda: 1 // 0, end)


HOLD = """
import sys, time
from preceptor.database import own_database
with own_database(sys.argv[1], 0):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_a_database_has_one_process_and_the_next_one_waits_for_it_or_names_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, url], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"mine\n"
        began = time.monotonic()
        with pytest.raises(PreceptorError) as refused, own_database(url, 0.3):
            pass
        assert refused.value.reason == "DATABASE_UNREACHABLE"
        assert f"pid {holder.pid}" in refused.value.message
        assert time.monotonic() - began < 5
        threading.Timer(0.5, holder.kill).start()  # however it ends
        with own_database(url, 20), pytest.raises(PreceptorError), own_database(url, 0):
            pass
    finally:
        holder.kill()
        holder.communicate(timeout=10)
    with own_database(url, 0):
        pass


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_what_is_no_file_is_not_locked(url: str) -> None:
    with own_database(url, 0), own_database(url, 0):
        pass


def test_a_lock_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(PreceptorError, match="cannot be made"), own_database(f"sqlite:///{tmp_path}/no/x.db", 0):
        pass
