"""What an evaluator may forget: how finished work was done, and what judges said, both long ago; and, where it is asked
for by name, what trials have kept (``evaluator.kept_edits``).

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
from evaluator.kept_edits import KeptEdits
from preceptor.artifacts import ArtifactStore
from preceptor.v1 import types_pb2 as types

log = logging.getLogger(__name__)


class EvaluatorGarbage:
    """``clock`` gives unix seconds."""

    def __init__(
        self, database: Database, edits: Callable[[], ArtifactStore], clock: Callable[[], float] = time.time
    ) -> None:
        """``edits``: makes the store that workers keep edits in; called only where somebody asks about them."""
        self._history = History(database)
        self._verdicts = VerdictStore(database)
        self._edits = KeptEdits(database, edits)
        self._clock = clock

    def collect(self, keep_seconds: float, *, dry_run: bool, edits: bool = False) -> list[types.Garbage]:
        """Forgets what is from before ``keep_seconds`` ago, or only says what that would be; kept edits only with
        ``edits``. Raises DatabaseError, and with ``edits`` what the store of artifacts says."""
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
        found = self._edits.collect(before, keep_seconds, dry_run=dry_run) if edits else []
        return found + [
            types.Garbage(kind=kind, count=count, age_seconds=now - first, reason=reason)
            for kind, count, first, reason in told
            if count
        ]
