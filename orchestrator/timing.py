"""Where a run's wall time went: every second between its start and its end belongs to one phase of one stage.

Phases of a round: ``generate`` (the teacher writes; evaluations already run meanwhile), ``evaluate`` (only
evaluations are waited for), ``update``, ``other``. Sums survive a crash up to the last flush, and a resumed run adds
to them; time in which no process worked on the run does not count.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from orchestrator.tables import SecondsRow

RUN = "run"  # the stage of what belongs to no round
# A crash costs the sums at most so much of the present phase.
FLUSH_SECONDS = 1.0


class RunClock:
    """The stopwatch of one run. Safe to use from several threads."""

    def __init__(self, engine: Engine, run_id: str, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._run_id = run_id
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._totals = stored_seconds(engine, run_id)
        self._current = (RUN, "other")
        self._since = monotonic()
        self._flushed = self._since

    def switch(self, stage: str, phase: str) -> None:
        """What follows belongs to this phase."""
        with self._lock:
            self._add()
            self._current = (stage, phase)

    def flush(self) -> None:
        """Writes the current phase's seconds down."""
        with self._lock:
            self._add()

    def tick(self) -> None:
        """Writes them down if that was not done in the last ``FLUSH_SECONDS``."""
        with self._lock:
            if self._monotonic() - self._flushed >= FLUSH_SECONDS:
                self._add()

    def elapsed(self) -> float:
        """Seconds spent on the run so far."""
        with self._lock:
            return sum(self._totals.values()) + self._monotonic() - self._since

    def totals(self) -> dict[tuple[str, str], float]:
        """Seconds by stage and phase."""
        with self._lock:
            self._add()
            return dict(self._totals)

    def _add(self) -> None:
        now = self._monotonic()
        self._totals[self._current] = self._totals.get(self._current, 0.0) + now - self._since
        self._since = self._flushed = now
        stage, phase = self._current
        with Session(self._engine) as session:
            session.merge(
                SecondsRow(run_id=self._run_id, stage=stage, phase=phase, seconds=self._totals[self._current])
            )
            session.commit()


def stored_seconds(engine: Engine, run_id: str) -> dict[tuple[str, str], float]:
    """Seconds by stage and phase, as far as they are written down."""
    with Session(engine) as session:
        rows = session.scalars(select(SecondsRow).where(SecondsRow.run_id == run_id))
        return {(row.stage, row.phase): row.seconds for row in rows}
