"""What a judge said, kept in SQL: a restart, another run or another evaluation of the same answer asks nobody again."""

from __future__ import annotations

import time
from collections.abc import Iterable

from sqlalchemy import delete, func, insert, select

from evaluator.database import Database, verdicts

# SQL allows so many parameters in one query (SQLite's old limit is 999).
_AT_ONCE = 500


class VerdictStore:
    """Verdicts by content id. Every method is one transaction or several reads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def known(self, ids: Iterable[str]) -> dict[str, bool]:
        """Those of these that were given, and whether the answer was right."""
        wanted = list(ids)
        found: dict[str, bool] = {}
        with self._database.read() as tx:
            for start in range(0, len(wanted), _AT_ONCE):
                some = verdicts.c.id.in_(wanted[start : start + _AT_ONCE])
                found |= {row.id: row.right for row in tx.execute(select(verdicts.c.id, verdicts.c.right).where(some))}
        return found

    def put(self, verdict_id: str, right: bool, again: bool | None) -> None:
        """Keeps a verdict and, where it was asked for twice, the second one. The first to be kept stays."""
        with self._database.write() as tx:
            if tx.execute(select(verdicts.c.id).where(verdicts.c.id == verdict_id)).first() is None:
                tx.execute(insert(verdicts).values(id=verdict_id, right=right, again=again, created=time.time()))

    def repeated(self) -> tuple[int, int]:
        """How many were asked for twice, and how many of these got two different verdicts."""
        twice = select(func.count()).select_from(verdicts).where(verdicts.c.again.is_not(None))
        with self._database.read() as tx:
            asked = tx.execute(twice).scalar_one()
            differed = tx.execute(twice.where(verdicts.c.again != verdicts.c.right)).scalar_one()
        return int(asked), int(differed)

    def old(self, before: float) -> tuple[int, float]:
        """Verdicts from before a time (unix seconds): how many, and when the first was given."""
        query = select(func.count(), func.coalesce(func.min(verdicts.c.created), before))
        with self._database.read() as tx:
            count, first = tx.execute(query.where(verdicts.c.created < before)).one()
        return int(count), float(first)

    def forget(self, before: float) -> None:
        """Forgets them, a bounded number in each transaction. Who needs one again asks the judge again."""
        some = select(verdicts.c.id).where(verdicts.c.created < before).limit(_AT_ONCE)
        while True:
            with self._database.write() as tx:
                ids = list(tx.execute(some).scalars())
                if not ids:
                    return
                tx.execute(delete(verdicts).where(verdicts.c.id.in_(ids)))
