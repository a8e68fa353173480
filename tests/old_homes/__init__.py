"""SQLite databases of the last version without migrations, with a little of everything in them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

_HERE = Path(__file__).parent


def old_home(folder: Path, service: str, without: Iterable[str] = ()) -> str:
    """The URL of a service's database in a folder, without the tables that came after it."""
    path = folder / f"{service}.db"
    with closing(sqlite3.connect(path)) as database:
        database.executescript((_HERE / f"{service}.sql").read_text())
        for table in without:
            database.execute(f"DROP TABLE {table}")
    return f"sqlite:///{path}"
