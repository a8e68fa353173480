"""Grades and scores evaluations whose trials are all known, and writes and publishes their final state.

What needs nobody else is done at once. What asks a judge is done by a few threads beside, so that a slow judge keeps
nobody from fetching results or looking at leases; until then the evaluation stays RUNNING. What is promised:

* SQL is the truth: what was not finished when the process died is ready again at the next start, and verdicts are kept,
  so nothing is asked for twice.
* A judge that is away is waited for, ``patience`` seconds of one outage; then the evaluation FAILS with
  JUDGE_UNREACHABLE. A judge that talks nonsense or refuses fails it at once. A failure is never a wrong answer.
* An evaluation that is cancelled is not asked about any more after the questions under way.
* However many evaluations wait for a judge, ``MOST_IN_HAND`` are in memory; the others wait in SQL until then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from evaluator.feed import Feed
from evaluator.graders.rack import Graders
from evaluator.overview import Overview
from evaluator.scoring import asks_a_judge, failed, score
from evaluator.sight import Sight
from evaluator.store import EvaluationStore, Sitting
from preceptor.errors import PreceptorError
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import types_pb2 as types

log = logging.getLogger(__name__)

# Evaluations whose answers are read at once.
AT_ONCE = 100
# Evaluations waiting for a judge in memory: far more than are asked about at once, and still nothing.
MOST_IN_HAND = 1000
# Evaluations that ask at the same time; how many questions are under way at once is the judge's own number.
THREADS = 8
# Between two tries while the judge is away; each of them pauses by itself as well.
PAUSE_SECONDS = 2.0


class Marking:
    """May be called from any thread. Times in seconds; ``clock`` is monotonic."""

    def __init__(
        self,
        evaluations: EvaluationStore,
        overview: Overview,
        feed: Feed,
        graders: Graders,
        patience: float = 600.0,
        pause: float = PAUSE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        sight: Sight | None = None,
    ) -> None:
        self._evaluations, self._overview, self._feed, self._graders = evaluations, overview, feed, graders
        self._patience, self._pause, self._clock = patience, pause, clock
        self._sight = sight or Sight()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="marking")
        self._lock = threading.Lock()
        self._under_way: dict[str, bool] = {}  # evaluations in the threads' hands; whether one is ready again meanwhile
        self._left_out = False  # whether evaluations may be ready that are in nobody's hands
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

    def settle_trials(self, trial_ids: Sequence[str]) -> None:
        """These trials became final: finishes the evaluations that waited for nothing else."""
        if trial_ids:
            self._settle(self._evaluations.ready(trial_ids=trial_ids))

    def settle_known(self, evaluation_ids: Sequence[str]) -> None:
        """Finishes those of these evaluations that need no trial any more. Where that fails it is tried again later."""
        try:
            for start in range(0, len(evaluation_ids), AT_ONCE):
                self._settle(self._evaluations.ready(evaluation_ids=evaluation_ids[start : start + AT_ONCE]))
        except Exception:
            self._left_out = True
            raise

    def settle_all(self) -> None:
        """Finishes whatever is ready, as far as hands are free; for a start after a crash between a result and its
        reward."""
        self._left_out, last = False, 0
        while not self._left_out and (page := self._overview.ready_after(last, AT_ONCE)):
            last = page[-1][0]
            with self._lock:
                new = [evaluation_id for _, evaluation_id in page if evaluation_id not in self._under_way]
            self._settle(new)

    def settle_left_out(self) -> None:
        """Takes up what was left out, once half of what is in hand is done."""
        if self._left_out and self.under_way <= MOST_IN_HAND // 2:
            self.settle_all()

    def _settle(self, evaluation_ids: Sequence[str]) -> None:
        """Finishes these evaluations, all of whose trials are known; those that ask a judge later."""
        for start in range(0, len(evaluation_ids), AT_ONCE):
            sittings = self._evaluations.sittings(evaluation_ids[start : start + AT_ONCE])
            now = []
            for sitting in sittings:
                if asks_a_judge(sitting, self._graders):
                    self._hand_over(sitting.evaluation.id)
                else:
                    now.append(self._scored(sitting))
            self._finish(now)

    def _scored(self, sitting: Sitting) -> pb.Evaluation:
        try:
            with self._sight.grading(sitting.evaluation.id):
                return score(sitting, self._graders)
        except PreceptorError:
            raise
        except Exception as error:  # a bug: it must not hold up everybody's rewards, turn after turn
            log.exception(
                "evaluation %s could not be scored", sitting.evaluation.id, extra={"evaluation": sitting.evaluation.id}
            )
            what = f"{type(error).__name__} when it was scored"
            return failed(sitting.evaluation, types.Failure(reason="INTERNAL", message=what, attempts=1))

    def _hand_over(self, evaluation_id: str) -> None:
        with self._lock:
            known = evaluation_id in self._under_way
            if not known and len(self._under_way) >= MOST_IN_HAND:
                self._left_out = True
                return
            self._under_way[evaluation_id] = known
        if not known and not self._stopping.is_set():
            self._threads.submit(self._mark, evaluation_id)

    def _mark(self, evaluation_id: str) -> None:
        again = True
        while again and not self._stopping.is_set():
            try:
                self._mark_patiently(evaluation_id)
            except PreceptorError as error:  # a full disk: what the judge said is asked for again
                log.error("evaluation %s is not marked yet: %s", evaluation_id, error)
                self._stopping.wait(self._pause)
                continue
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
                finished = self._scored(sitting)
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
        if not (evaluations := list(evaluations)):
            return
        finished = self._evaluations.finish(evaluations)
        for evaluation in finished:
            if evaluation.state == pb.EVALUATION_STATE_FAILED:
                failure = evaluation.failure
                text, about = "evaluation %s failed: %s: %s", {"evaluation": evaluation.id}
                log.warning(text, evaluation.id, failure.reason, failure.message, extra=about)
        self._sight.finished(finished)
        self._feed.publish(evaluation.id for evaluation in finished)
