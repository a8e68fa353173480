"""What an evaluator may forget: how finished work was done, and what judges said, both long ago.

Evaluations stay: they are what a run comes back to. What is forgotten of them is only of interest to people; a verdict
that is needed again is asked for again. Killed in the middle, the next time goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from evaluator.attempts import PRUNED_AT_ONCE, History
from evaluator.database import Database
from evaluator.graders.verdicts import VerdictStore
from preceptor.v1 import types_pb2 as types

log = logging.getLogger(__name__)


class EvaluatorGarbage:
    """``clock`` gives unix seconds."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._history = History(database)
        self._verdicts = VerdictStore(database)
        self._clock = clock

    def collect(self, keep_seconds: float, *, dry_run: bool) -> list[types.Garbage]:
        """Forgets what is from before ``keep_seconds`` ago, or only says what that would be. Raises DatabaseError."""
        now = self._clock()
        before = now - keep_seconds
        attempts, first_attempt = self._history.old(before)
        verdicts, first_verdict = self._verdicts.old(before)
        if not dry_run:
            while self._history.forget(before) == PRUNED_AT_ONCE:
                pass
            self._verdicts.forget(before)
            log.info("garbage: %d attempts, %d verdicts", attempts, verdicts)
        told = (
            ("attempts", attempts, first_attempt, "ended long ago; only a history"),
            ("verdicts", verdicts, first_verdict, "given long ago; the judge is asked again where one is needed"),
        )
        return [
            types.Garbage(kind=kind, count=count, age_seconds=now - first, reason=reason)
            for kind, count, first, reason in told
            if count
        ]
