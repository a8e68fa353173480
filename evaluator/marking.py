"""Grades and scores evaluations whose trials are all known, and writes and publishes their final state.

What needs nobody else is done at once. What asks a judge is done by a few threads beside, so that a slow judge keeps
nobody from fetching results or looking at leases; until then the evaluation stays RUNNING. What is promised:

* SQL is the truth: what was not finished when the process died is ready again at the next start, and verdicts are kept,
  so nothing is asked for twice.
* A judge that is away is waited for, ``patience`` seconds of one outage; then the evaluation FAILS with
  JUDGE_UNREACHABLE. A judge that talks nonsense or refuses fails it at once. A failure is never a wrong answer.
* An evaluation that is cancelled is not asked about any more after the questions under way.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from evaluator.feed import Feed
from evaluator.graders.rack import Graders
from evaluator.scoring import asks_a_judge, failed, score
from evaluator.store import EvaluationStore
from preceptor.errors import PreceptorError
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import types_pb2 as types

log = logging.getLogger(__name__)

AT_ONCE = 500
# Evaluations that ask at the same time; how many questions are under way at once is the judge's own number.
THREADS = 8
# Between two tries while the judge is away; each of them pauses by itself as well.
PAUSE_SECONDS = 2.0


class Marking:
    """``settle`` may be called from any thread. Times in seconds; ``clock`` is monotonic."""

    def __init__(
        self,
        evaluations: EvaluationStore,
        feed: Feed,
        graders: Graders,
        patience: float = 600.0,
        pause: float = PAUSE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._evaluations, self._feed, self._graders = evaluations, feed, graders
        self._patience, self._pause, self._clock = patience, pause, clock
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="marking")
        self._lock = threading.Lock()
        self._under_way: dict[str, bool] = {}  # evaluations in the threads' hands; whether one is ready again meanwhile
        self._away_since: float | None = None  # when the judge was first not there
        self._stopping = threading.Event()

    def close(self) -> None:
        """Waits for the threads; what they have not finished is ready again at the next start.

        A judge must be closed before, so that nobody waits for it.
        """
        self.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def stop(self) -> None:
        """No further tries."""
        self._stopping.set()

    @property
    def under_way(self) -> int:
        """How many evaluations wait for a judge."""
        with self._lock:
            return len(self._under_way)

    def settle(self, evaluation_ids: Sequence[str]) -> None:
        """Finishes these evaluations, all of whose trials are known; those that ask a judge later."""
        for start in range(0, len(evaluation_ids), AT_ONCE):
            sittings = self._evaluations.sittings(evaluation_ids[start : start + AT_ONCE])
            now = []
            for sitting in sittings:
                if asks_a_judge(sitting, self._graders):
                    self._hand_over(sitting.evaluation.id)
                else:
                    now.append(score(sitting, self._graders))
            self._finish(now)

    def _hand_over(self, evaluation_id: str) -> None:
        with self._lock:
            known = evaluation_id in self._under_way
            self._under_way[evaluation_id] = known
        if not known and not self._stopping.is_set():
            self._threads.submit(self._mark, evaluation_id)

    def _mark(self, evaluation_id: str) -> None:
        again = True
        while again and not self._stopping.is_set():
            try:
                self._mark_patiently(evaluation_id)
            except Exception:  # like a turn of the dispatcher: SQL has it all, and the next start tries again
                log.exception("evaluation %s could not be marked", evaluation_id)
            with self._lock:
                again = self._under_way[evaluation_id]
                self._under_way[evaluation_id] = False
                if not again:
                    del self._under_way[evaluation_id]

    def _mark_patiently(self, evaluation_id: str) -> None:
        while not self._stopping.is_set() and self._evaluations.ready(evaluation_ids=[evaluation_id]):
            (sitting,) = self._evaluations.sittings([evaluation_id])
            try:
                finished = score(sitting, self._graders)
                self._away_since = None
            except PreceptorError as error:
                if error.reason == "SHUTTING_DOWN":
                    return
                if error.reason == "JUDGE_UNREACHABLE" and self._waits_on(error):
                    self._stopping.wait(self._pause)
                    continue
                finished = failed(
                    sitting.evaluation, types.Failure(reason=error.reason, message=error.message, attempts=1)
                )
            self._finish([finished])
            return

    def _waits_on(self, error: PreceptorError) -> bool:
        now = self._clock()
        if self._away_since is None:
            self._away_since = now
            log.warning("%s; waiting for it, at most %.0f s", error, self._patience)
        return now - self._away_since < self._patience

    def _finish(self, evaluations: Iterable[pb.Evaluation]) -> None:
        finished = self._evaluations.finish(list(evaluations))
        for evaluation in finished:
            if evaluation.state == pb.EVALUATION_STATE_FAILED:
                failure = evaluation.failure
                log.warning("evaluation %s failed: %s: %s", evaluation.id, failure.reason, failure.message)
        self._feed.publish(finished)
