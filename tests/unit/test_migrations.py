"""What the migration scripts make is what the models have, and no database of before loses anything by them."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, inspect, text

from orchestrator.entries import EditKey, round_stage
from orchestrator.label_store import LabelStore
from orchestrator.ledger import FinishedRound, Ledger
from preceptor.database import open_database
from preceptor.errors import PreceptorError
from scripts.new_migration import MODELS, tables_of
from student.registry import Registry
from teacher.policy_store import PolicyState, PolicyStore
from tests.evaluator_house import QUEUED, RUNNING, House
from tests.fake_broker import FakeBroker
from tests.old_homes import old_home

SERVICES = sorted(MODELS)
REPOSITORY = Path(__file__).parents[2]


def differences(engine: Engine, service: str) -> list[object]:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, tables_of(service)))


def rows(engine: Engine) -> dict[str, int]:
    with engine.connect() as db:
        names = [name for name in inspect(db).get_table_names() if name != "alembic_version"]
        return {name: db.exec_driver_sql(f'SELECT count(*) FROM "{name}"').scalar_one() for name in names}


@pytest.mark.parametrize("service", SERVICES)
def test_a_new_database_has_what_the_models_have(database_url: str, service: str) -> None:
    engine = open_database(database_url, f"{service}.migrations")
    assert differences(engine, service) == []
    engine.dispose()


@pytest.mark.parametrize("service", SERVICES)
def test_a_database_of_before_migrations_has_it_too_and_keeps_every_row(tmp_path: Path, service: str) -> None:
    url = old_home(tmp_path, service)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        before = {name: database.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in names}
    engine = open_database(url, f"{service}.migrations")
    assert differences(engine, service) == []
    after = rows(engine)
    assert after == {**dict.fromkeys(after, 0), **before}  # tables that came later are empty
    assert sum(before.values()) > 2
    engine.dispose()


def test_an_evaluator_goes_on_with_what_it_had_before_migrations(tmp_path: Path) -> None:
    house = House(old_home(tmp_path, "evaluator"), FakeBroker())
    made, _ = house.evaluations._store.page("run-1", None, 0, 10)
    assert house.states(made) == [QUEUED, QUEUED]
    assert len(house.batches.under_way()) == 2
    house.pass_time(130)  # nobody has them any more
    assert len(house.broker.batches) == 2
    assert set(house.states(made)) <= {QUEUED, RUNNING}
    house.close()


def test_the_other_services_have_what_they_had_before_migrations(tmp_path: Path) -> None:
    store = PolicyStore(old_home(tmp_path, "teacher"))
    policy = store.get("p-1")
    assert (policy.state, policy.kept, policy.groups, policy.active) == (PolicyState.TRAINING, 3, 4, False)
    assert store.unfinished() == ["p-1"]
    assert store.update_of("p-1") == b"update"
    assert store.written(["k"]) == {"k": b"\0group"}
    store.close()
    student = Registry(old_home(tmp_path, "student")).get()
    assert (student.name, student.active, student.parameters, student.current.version) == ("tiny", True, 7, 1)
    engine = open_database(old_home(tmp_path, "orchestrator"), "orchestrator.migrations")
    ledger = Ledger(engine, "run", 0.0)
    (line,) = ledger.entries()
    assert line.key == EditKey(round_stage(1), "", 0, 0)
    assert line.earned is not None
    assert line.earned.value == 0.5
    assert ledger.finished_rounds()[1] == FinishedRound("p-1", 1, 1, 0, 0)
    assert LabelStore(engine, "run").looks()[0].mean == 0.5
    engine.dispose()


def test_a_database_that_a_newer_version_has_migrated_is_left_alone(database_url: str) -> None:
    engine = open_database(database_url, "tests.things")
    with engine.begin() as db:
        db.execute(text("UPDATE alembic_version SET version_num = '0042'"))
    with pytest.raises(PreceptorError, match=r"migrated to 0042 by a newer version .* knows 0001") as refused:
        open_database(database_url, "tests.things")
    assert refused.value.reason == "DATABASE_TOO_NEW"
    with engine.connect() as db:
        assert db.execute(text("SELECT version_num FROM alembic_version")).scalar() == "0042"
    engine.dispose()


SECOND = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = "0002", "0001"
def upgrade():
    op.create_table("more", sa.Column("n", sa.Integer, primary_key=True))
    op.execute("INSERT INTO things (n) VALUES (7)")
"""
THIRD = """
from alembic import op
revision, down_revision = "0003", "0002"
def upgrade():
    op.execute("INSERT INTO more (n) VALUES (1)")
    {what}
"""


def steps(folder: Path, name: str, third: str) -> str:
    """A package of three steps."""
    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "m0001.py").write_text((REPOSITORY / "tests" / "things" / "m0001_things.py").read_text())
    (package / "m0002.py").write_text(SECOND)
    (package / "m0003.py").write_text(THIRD.format(what=third))
    return name


def test_all_steps_are_taken_or_none(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    engine = open_database(database_url, "tests.things")
    with pytest.raises(ZeroDivisionError):
        open_database(database_url, steps(tmp_path, "halfway", "1 / 0"))
    with engine.connect() as db:
        assert db.execute(text("SELECT version_num FROM alembic_version")).scalar() == "0001"
        assert "more" not in inspect(db).get_table_names()
        assert db.execute(text("SELECT count(*) FROM things")).scalar() == 0
    whole = open_database(database_url, steps(tmp_path, "whole", "pass"))
    with engine.connect() as db:
        assert db.execute(text("SELECT version_num FROM alembic_version")).scalar() == "0003"
        assert db.execute(text("SELECT n FROM things")).scalars().all() == [7]
    whole.dispose()
    engine.dispose()


def test_of_those_that_start_at_once_one_migrates(database_url: str, tmp_path: Path) -> None:
    package = steps(tmp_path, "slow", "__import__('time').sleep(0.5)")
    code = f"from preceptor.database import open_database; open_database({database_url!r}, {package!r}).dispose()"
    start = [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(REPOSITORY)!r}]; {code}"]
    processes = [subprocess.Popen(start, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said


def test_the_scripts_are_packages_and_so_in_the_wheel() -> None:
    assert all((REPOSITORY / service / "migrations" / "__init__.py").exists() for service in SERVICES)
