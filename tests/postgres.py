"""A real PostgreSQL for tests: in a temporary folder, on a free port of loopback, ended with the tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path

import psycopg

PASSWORD = "pass word/@%"
# Debian keeps its binaries out of PATH.
_PLACES = ("/usr/lib/postgresql/*/bin", "/usr/local/pgsql/bin", "/opt/homebrew/opt/postgresql*/bin")
START_SECONDS = 30.0


def find_binaries() -> Path | None:
    """The folder with initdb and postgres of the newest version there is."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    folders = [folder for place in _PLACES for folder in Path("/").glob(place[1:]) if (folder / "initdb").exists()]
    return max(
        folders,
        key=lambda folder: [int(part) for part in folder.parts[-2].split("-")[-1].split(".") if part.isdigit()],
        default=None,
    )


class Postgres:
    """A server that can be killed and started again. Its superuser is ``preceptor``, who needs no password on loopback
    but as ``stranger``."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is made; it must be one that another user can reach (PostgreSQL does not run as root)."""
        binaries = find_binaries()
        assert binaries is not None
        self._binaries, self._folder = binaries, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        folder.mkdir()
        self._data = folder / "data"
        if os.getuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        self._as_user(
            "initdb", "-D", str(self._data), "-U", "preceptor", "-A", "trust", "-E", "UTF8", "--no-sync", "--no-locale"
        )
        (self._data / "pg_hba.conf").write_text(
            "local all all trust\n"
            "host all stranger all scram-sha-256\n"
            "host all unlisted all reject\n"
            "host all all all trust\n"
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Starts it and waits until it answers."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(
                    "postgres",
                    *("-D", str(self._data), "-p", str(self.port), "-k", str(self._folder)),
                    # Speed: nothing of it is to survive the machine.
                    *("-c", "fsync=off", "-c", "full_page_writes=off"),
                    *("-c", "listen_addresses=127.0.0.1", "-c", "max_connections=300", "-c", "shared_buffers=32MB"),
                ),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                psycopg.connect(self.url(), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self._folder / "log").read_text()
                assert time.monotonic() < end, (self._folder / "log").read_text()
                time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: it ends every connection and then itself. SIGQUIT: it ends as in a crash."""
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(30)

    def url(self, user: str = "preceptor", database: str = "postgres", options: str = "") -> str:
        """The URL of a database, as PRECEPTOR_DATABASE_URL takes it."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}{'?' if options else ''}{options}"

    def new_schema(self) -> str:
        """The URL of a schema that nobody else has, as a service gets it from its settings."""
        return self.url(options=f"options=-csearch_path%3Dtest_{uuid.uuid4().hex[:12]}")

    def new_database(self) -> str:
        """The URL of a new database, for services with a schema each."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        self.run(f"CREATE DATABASE {name}")
        return self.url(database=name)

    def run(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """What the superuser gets for a statement."""
        with psycopg.connect(self.url(database=database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def cut(self, what: str) -> int:
        """Ends the connections whose name is like ``what``; how many."""
        ended = self.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '{what}'")
        return len(ended)

    def _as_user(self, *command: str) -> None:
        subprocess.run(self._command(*command), check=True, capture_output=True, timeout=60, cwd=self._folder)

    def _command(self, program: str, *arguments: str) -> list[str]:
        command = [str(self._binaries / program), *arguments]
        if os.getuid() == 0:
            command = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command]
        return command
