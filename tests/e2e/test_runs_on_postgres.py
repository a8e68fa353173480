"""A whole run of the embedded stack whose services keep everything in one PostgreSQL."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from preceptor.stack import SERVICES
from tests.e2e.conftest import DEADLINE_SECONDS, SMALL, Preceptor, outcome, read_until, summary_in
from tests.postgres import Postgres

pytestmark = pytest.mark.timeout(900)

AWAY_SECONDS = 5.0


def test_a_run_during_which_the_database_is_restarted_and_crashes_ends_as_one_on_sqlite(
    undisturbed: tuple[Preceptor, dict[str, Any]], preceptor: Preceptor, postgres: Postgres, tmp_path: Path
) -> None:
    url = preceptor.environment["PRECEPTOR_DATABASE_URL"] = postgres.new_database()
    process = preceptor.start("run", str(SMALL), "--out", str(tmp_path / "out"), "--json")
    read_until(process, r'"evaluations_running": [1-9]')
    pids = preceptor.pids()
    for how, then in ((signal.SIGINT, r'"evaluations_done": [1-9]'), (signal.SIGQUIT, r'"round": 2')):
        postgres.stop(how)
        time.sleep(AWAY_SECONDS)
        postgres.start()
        read_until(process, then)
    assert preceptor.pids() == pids  # they waited for it
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, output
    assert outcome(summary_in(tmp_path / "out")) == outcome(undisturbed[1])
    assert not list(preceptor.home.glob("*.db*"))
    schemas = postgres.run("SELECT nspname FROM pg_namespace", url.rpartition("/")[2])
    assert set(SERVICES) <= {name for (name,) in schemas}
