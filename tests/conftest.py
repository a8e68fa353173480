"""What holds for all tests."""

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import Postgres, find_binaries

# A shell starts what it puts into the background with Ctrl-C ignored, and children inherit that: tests that interrupt
# one would wait for ever, depending on how they were started.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL of this session's own."""
    if find_binaries() is None:
        pytest.skip("needs PostgreSQL's binaries (Debian: apt-get install postgresql)")
    with tempfile.TemporaryDirectory(prefix="preceptor-postgres-") as folder:
        Path(folder).chmod(0o755)
        server = Postgres(Path(folder) / "server")
        yield server
        server.stop()


@pytest.fixture
def postgres(postgres_server: Postgres) -> Postgres:
    """The same; a test that stops it starts it again."""
    return postgres_server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of a service, of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/service.db"
    server: Postgres = request.getfixturevalue("postgres_server")
    return server.new_schema()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_setting(request: pytest.FixtureRequest) -> str:
    """PRECEPTOR_DATABASE_URL for services with a database of each kind in turn (empty: SQLite in their home)."""
    if request.param == "sqlite":
        return ""
    server: Postgres = request.getfixturevalue("postgres_server")
    return server.new_database()


@pytest.fixture
def databases(database_setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for all services that read their settings, here or in a child."""
    monkeypatch.setenv("PRECEPTOR_DATABASE_URL", database_setting)
