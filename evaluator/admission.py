"""How many evaluations may wait. What waits lies in SQL and costs no memory; this keeps it from filling the disk."""

from __future__ import annotations

import threading
from collections.abc import Collection

from evaluator.database import LIVE, State
from evaluator.overview import Overview
from preceptor.errors import PreceptorError


class Admission:
    """Lets in at most ``most`` evaluations that are not final.

    Counting them takes time in proportion to their number, so it is done only when all that were let in since the last
    count could be too many.
    """

    def __init__(self, overview: Overview, most: int) -> None:
        self._overview, self._most = overview, most
        self._lock = threading.Lock()
        self._at_most: int | None = None  # waiting; None: never counted

    def let_in(self, evaluation_ids: Collection[str]) -> None:
        """Whoever asks for these evaluations may. Raises PreceptorError(QUEUE_FULL); known ones are always welcome."""
        asked = set(evaluation_ids)
        with self._lock:
            if self._at_most is None or self._at_most + len(asked) > self._most:
                self._at_most = waiting = self._count()
                states = self._overview.states(asked)
                asked = {one for one in asked if states.get(one) not in (*LIVE, State.SUCCEEDED)}
                if asked and waiting + len(asked) > self._most:
                    raise PreceptorError(
                        "QUEUE_FULL", f"{waiting} evaluations wait, {len(asked)} more would be above {self._most}"
                    )
            self._at_most += len(asked)

    def note(self, number: int) -> None:
        """So many evaluations wait again."""
        with self._lock:
            if self._at_most is not None:
                self._at_most += number

    def _count(self) -> int:
        counts = self._overview.counts()
        return sum(counts.get(state, 0) for state in LIVE)
