"""A service's schema on a real PostgreSQL: who may open it, who owns it, what is kept and what is said of failures."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import pytest
from sqlalchemy import Column, MetaData, String, Table, Text, make_url, select, text
from sqlalchemy.exc import DBAPIError

from preceptor.database import DatabaseError, open_database, own_database
from preceptor.errors import PreceptorError
from preceptor.postgres import _connect, _Owner
from preceptor.settings import ServiceSettings
from tests.postgres import Postgres

THINGS = "tests.things"


def until(true: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# Who may open it


@pytest.fixture(scope="session")
def users(postgres_server: Postgres) -> Postgres:
    postgres_server.run("CREATE ROLE stranger LOGIN PASSWORD 'right'")
    postgres_server.run("CREATE ROLE unlisted LOGIN")
    postgres_server.run("CREATE ROLE guest LOGIN")
    return postgres_server


@pytest.mark.parametrize(
    ("user", "database", "options", "reason", "said"),
    [
        ("stranger:wrong", "postgres", "", "DATABASE_REFUSED", "password authentication failed"),
        ("stranger", "postgres", "", "DATABASE_REFUSED", "no password supplied"),
        ("nobody", "postgres", "", "DATABASE_REFUSED", 'role "nobody" does not exist'),
        ("preceptor", "nowhere", "", "DATABASE_REFUSED", 'database "nowhere" does not exist'),
        ("unlisted", "postgres", "", "DATABASE_REFUSED", "pg_hba.conf"),
        ("preceptor", "postgres", "sslmode=require", "DATABASE_REFUSED", "does not support SSL"),
        ("preceptor", "postgres", "sslmode=nonsense", "DATABASE_REFUSED", "sslmode"),
        ("preceptor", "postgres", "nonsense=1", "DATABASE_REFUSED", "nonsense"),
        ("guest", "postgres", "", "DATABASE_REFUSED", 'GRANT CREATE ON DATABASE "postgres" TO "guest"'),
    ],
)
def test_whom_the_server_refuses_is_told_why_in_one_line_without_the_password(
    users: Postgres, user: str, database: str, options: str, reason: str, said: str
) -> None:
    settings = ServiceSettings(database_url=users.url(user, database, options))
    with pytest.raises(PreceptorError) as refused:
        open_database(settings.database("evaluator"), THINGS)
    assert refused.value.reason == reason
    assert said in refused.value.message
    assert f"{user.split(':')[0]}@127.0.0.1" in refused.value.message
    assert "wrong" not in refused.value.message
    assert "\n" not in refused.value.message


def test_the_owner_is_refused_in_the_same_words(users: Postgres) -> None:
    url = users.url("stranger:wrong")
    with pytest.raises(PreceptorError, match="password authentication failed") as refused, own_database(url, 0):
        pass
    assert refused.value.reason == "DATABASE_REFUSED"


@pytest.mark.parametrize("host", ["127.0.0.1:1", "nowhere.invalid:5432"])
def test_a_server_that_is_not_there_is_unreachable_for_who_opens_and_for_who_owns(host: str) -> None:
    url = f"postgresql://preceptor:secret@{host}/x"
    with pytest.raises(PreceptorError) as opened:
        open_database(url, THINGS)
    with pytest.raises(PreceptorError) as owned, own_database(url, 0):
        pass
    for error in (opened.value, owned.value):
        assert error.reason == "DATABASE_UNREACHABLE"
        assert host.split(":")[0] in error.message
        assert "secret" not in error.message


def test_a_schema_that_is_there_may_be_used_by_who_may_not_make_one(users: Postgres) -> None:
    users.run("CREATE SCHEMA IF NOT EXISTS lent AUTHORIZATION guest")
    engine = open_database(users.url("guest", options="options=-csearch_path%3Dlent"), THINGS)
    with engine.begin() as db:
        db.execute(text("INSERT INTO things VALUES (1, NULL)"))
    engine.dispose()
    assert users.run("SELECT n FROM lent.things") == [(1,)]


def test_the_services_of_one_database_have_a_schema_each(postgres: Postgres) -> None:
    url = postgres.new_database()
    settings = ServiceSettings(database_url=url)
    for service in ("teacher", "student", "evaluator", "orchestrator"):
        open_database(settings.database(service), f"{service}.migrations").dispose()
    found = "SELECT table_schema FROM information_schema.tables WHERE table_name = 'requests' ORDER BY 1"
    assert postgres.run(found, url.rpartition("/")[2]) == [
        ("evaluator",),
        ("orchestrator",),
        ("student",),
        ("teacher",),
    ]


def test_options_of_the_operator_s_own_hold_beside_the_schema(postgres: Postgres) -> None:
    settings = ServiceSettings(database_url=postgres.url(options="options=-cstatement_timeout%3D54321"))
    url = settings.database("student")
    with own_database(url, 0):
        engine = open_database(url, THINGS)
        with engine.connect() as db:
            assert db.exec_driver_sql("SHOW statement_timeout").scalar() == "54321ms"
            assert db.exec_driver_sql("SELECT current_schema()").scalar() == "student"
        engine.dispose()


def test_without_its_driver_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(PreceptorError, match=r"pip install 'preceptor\[postgres\]'"):
        open_database("postgresql://x@127.0.0.1:1/x", THINGS)


# What is kept


class Kind(StrEnum):
    ODD = "odd\x10one"


@pytest.mark.parametrize(
    "written", ["a\0b", "\0", "\x10", "\x100", "\x10\0\x10\x100", "end\x10", "é😀\ufffd\r\n\t\x01", "", Kind.ODD]
)
def test_any_text_comes_back_as_it_was_and_is_found_by_it(database_url: str, written: str) -> None:
    table = Table("texts", MetaData(), Column("name", String(64), primary_key=True), Column("text", Text))
    engine = open_database(database_url, THINGS)
    with engine.begin() as db:
        table.create(db)
        db.execute(table.insert(), [{"name": written, "text": written * 2}, {"name": f"{written}.", "text": None}])
    with engine.connect() as db:
        assert db.execute(select(table.c.text).where(table.c.name == written)).all() == [(str(written) * 2,)]
        assert db.execute(select(table.c.name).where(table.c.name.in_([written]))).scalars().all() == [str(written)]
    engine.dispose()


# What is said when it fails


def test_a_server_lets_go_soon_of_what_a_client_held_that_is_gone(postgres: Postgres) -> None:
    url = postgres.new_schema()
    engine = open_database(url, THINGS)
    with engine.connect() as db:
        assert db.exec_driver_sql("SHOW tcp_keepalives_idle").scalar() == "10"
        assert db.exec_driver_sql("SHOW lock_timeout").scalar() == "30s"
    engine.dispose()
    with _connect(make_url(url.replace("postgresql:", "postgresql+psycopg:"))) as owner:
        assert owner.execute("SHOW tcp_keepalives_count").fetchone() == ("3",)


@contextmanager
def opened(url: str) -> Iterator[Callable[[str], object]]:
    engine = open_database(url, THINGS)

    def run(statement: str) -> object:
        with engine.begin() as db:
            return db.exec_driver_sql(statement)

    yield run
    engine.dispose()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("53100", "DISK_FULL"),
        ("53200", "DATABASE_UNREACHABLE"),
        ("57014", "DATABASE_UNREACHABLE"),
        ("40P01", "DATABASE_UNREACHABLE"),
        ("25006", "DATABASE_UNREACHABLE"),
    ],
)
def test_what_waiting_or_an_operator_mends_is_a_database_error(postgres: Postgres, code: str, reason: str) -> None:
    with opened(postgres.new_schema()) as run, pytest.raises(DatabaseError, match="no more blocks") as raised:
        run(f"DO $$ BEGIN RAISE EXCEPTION 'no more blocks' USING ERRCODE = '{code}'; END $$")
    assert raised.value.reason == reason


def test_what_is_a_mistake_of_ours_stays_what_it_is(postgres: Postgres) -> None:
    with opened(postgres.new_schema()) as run, pytest.raises(DBAPIError, match="nowhere"):
        run("SELECT * FROM nowhere")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
def test_a_server_that_is_restarted_is_unreachable_and_then_there_again(
    postgres: Postgres, how: signal.Signals
) -> None:
    engine = open_database(postgres.new_schema(), THINGS)
    with pytest.raises(DatabaseError) as in_the_middle, engine.begin() as db:
        db.exec_driver_sql("INSERT INTO things VALUES (1, NULL)")
        postgres.stop(how)
        try:
            db.exec_driver_sql("INSERT INTO things VALUES (2, NULL)")
        finally:
            with pytest.raises(DatabaseError) as away, engine.begin():
                pass
            postgres.start()
    assert {in_the_middle.value.reason, away.value.reason} == {"DATABASE_UNREACHABLE"}
    with engine.begin() as db:
        assert db.exec_driver_sql("SELECT count(*) FROM things").scalar() == 0
        db.exec_driver_sql("INSERT INTO things VALUES (3, NULL)")
    engine.dispose()


# Who owns it

OWN = """
import sys, time
from preceptor.database import open_database, own_database
with own_database(sys.argv[1], 0):
    engine = open_database(sys.argv[1], "tests.things")
    used = engine.connect()
    used.exec_driver_sql("SELECT 1")
    used.commit()
    print("mine", flush=True)
    time.sleep(60)
"""


class Owner:
    """A process that owns a schema and works with it."""

    def __init__(self, url: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN, url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "mine\n", self.process.communicate()
        self.name = f"preceptor {url.rpartition('%3D')[2]} pid {self.process.pid} %"

    def holds(self, server: Postgres) -> set[object]:
        return {
            pid
            for (pid,) in server.run(
                "SELECT pid FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE locktype = 'advisory' AND "
                f"mode = 'ExclusiveLock' AND application_name LIKE '{self.name}'"
            )
        }

    def cut(self, server: Postgres) -> None:
        """Its owner's connection is ended, and no other."""
        (pid,) = self.holds(server)
        server.run(f"SELECT pg_terminate_backend({pid}, 5000)")


@pytest.fixture
def own(postgres: Postgres) -> Iterator[tuple[str, Owner]]:
    url = postgres.new_schema()
    owner = Owner(url)
    yield url, owner
    owner.process.kill()
    owner.process.communicate(timeout=10)


def test_a_schema_has_one_process_and_the_next_one_waits_for_it_or_names_it(own: tuple[str, Owner]) -> None:
    url, owner = own
    with pytest.raises(PreceptorError) as refused, own_database(url, 0.3):
        pass
    assert refused.value.reason == "DATABASE_UNREACHABLE"
    assert f"pid {owner.process.pid}" in refused.value.message
    with pytest.raises(PreceptorError, match=f"another process has .* pid {owner.process.pid}"):
        open_database(url, THINGS)  # who does not own it does not work with it
    threading.Timer(0.5, owner.process.kill).start()  # however it ends
    with own_database(url, 20), pytest.raises(PreceptorError), own_database(url, 0):
        pass
    with own_database(url, 0), opened(url) as run:
        run("INSERT INTO things VALUES (1, NULL)")


def test_another_schema_of_the_same_database_is_nobody_elses(postgres: Postgres, own: tuple[str, Owner]) -> None:
    with own_database(postgres.new_schema(), 0):
        pass


def test_an_owner_whose_connection_was_cut_takes_it_again_and_goes_on(
    postgres: Postgres, own: tuple[str, Owner]
) -> None:
    _, owner = own
    owner.cut(postgres)
    assert not owner.holds(postgres)
    until(lambda: owner.holds(postgres))
    assert owner.process.poll() is None


def test_an_owner_goes_on_after_the_server_was_restarted(postgres: Postgres, own: tuple[str, Owner]) -> None:
    _, owner = own
    postgres.stop()
    time.sleep(1.5)
    postgres.start()
    until(lambda: owner.holds(postgres))
    assert owner.process.poll() is None


def test_an_owner_who_has_lost_it_to_another_ends_before_that_one_begins(
    postgres: Postgres, own: tuple[str, Owner], tmp_path: Path
) -> None:
    url, owner = own
    owner.process.send_signal(signal.SIGSTOP)
    owner.cut(postgres)
    # The next one has the lock now, but the first one's other connection is still there.
    with pytest.raises(PreceptorError, match=f"another process has .* pid {owner.process.pid}"), own_database(url, 1):
        pass
    begun = threading.Event()

    def next_one() -> None:
        with own_database(url, 30):
            assert owner.process.poll() is not None
            begun.set()

    thread = threading.Thread(target=next_one)
    thread.start()
    time.sleep(0.5)
    assert not begun.is_set()
    owner.process.send_signal(signal.SIGCONT)
    assert owner.process.wait(20) == 70
    thread.join(20)
    assert begun.is_set()
    assert owner.process.stderr is not None
    assert "this one ends" in owner.process.stderr.read()


def test_an_owner_whom_the_server_has_not_missed_yet_takes_it_from_itself(postgres: Postgres) -> None:
    """As where the network was cut: the old connection still holds the lock, and nobody is at its other end."""
    url = make_url(postgres.new_schema().replace("postgresql:", "postgresql+psycopg:"))
    forgotten, again = _Owner(url), _Owner(url)
    forgotten.take(0)
    watch = threading.Thread(target=again.watch)
    watch.start()
    until(lambda: again._connection is not None)
    again.stop_watching()
    watch.join(10)
    assert not watch.is_alive()
    again.release()
    forgotten.release()
