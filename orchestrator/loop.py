"""The outer loop: write, measure, learn, again (ReST-EM with a separate student; SEAL, arXiv 2506.10943, section 3).

    for each round:
        the policy writes K self-edits for each of the round's tasks
        each group goes to the evaluator as soon as it is written; workers fine-tune the pinned student on each
        self-edit and measure what it then knows; where the run races, the better ones go on (orchestrator/heats.py)
        the rewarded self-edits train the next policy
        where labelled tasks keep watch, a policy that clearly fell ends the rounds (orchestrator/canary.py)

With ``rounds.staleness`` = s, round n is written by the policy after round max(0, n - 1 - s), so that the next s rounds
are written while this one is measured; the update corrects for it where its algorithm asks who wrote.

Promises
- The outcome of every step is in the ledger before the next one; a loop that starts again after any crash asks again
  for what its unfinished round needs, pays only for what is missing, and ends with the same result.
- A failed evaluation or a malformed completion is counted and shown. It has no reward and never reaches the update.
- Nothing here depends on the order or the time in which evaluations finish.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

from orchestrator.canary import Canary
from orchestrator.entries import Entry, round_stage
from orchestrator.evaluator_client import EvaluatorClient, Submission
from orchestrator.heats import Heats
from orchestrator.ledger import Ledger
from orchestrator.plan import RunPlan
from orchestrator.progress import Progress
from orchestrator.sight import RunSight
from orchestrator.teacher_client import TeacherClient
from orchestrator.timing import RUN, RunClock
from orchestrator.writing import Writer, unchanged
from preceptor.errors import PreceptorError
from preceptor.v1 import teacher_pb2 as teacher


class Loop:
    """The rounds of one run."""

    def __init__(
        self,
        plan: RunPlan,
        teacher_client: TeacherClient,
        evaluator_client: EvaluatorClient,
        ledger: Ledger,
        clock: RunClock,
        progress: Progress,
        sight: RunSight | None = None,
    ) -> None:
        self._plan = plan
        self._teacher = teacher_client
        self._evaluator = evaluator_client
        self._ledger = ledger
        self._clock = clock
        self._progress = progress
        self._sight = sight or RunSight()
        self._writer = Writer(teacher_client, ledger, self._sight)
        self._canary = Canary(plan, teacher_client, evaluator_client, ledger, clock, progress)

    def run(self, base_policy: str) -> str:
        """Runs the rounds that are not finished yet; returns the policy after the last one, or the best
        one where the canary has stopped the run.

        Raises PreceptorError (TOO_MANY_FAILURES, SERVICE_UNREACHABLE and what the services refuse), Stopped.
        """
        policies = [base_policy]  # by the number of rounds before
        best = self._canary.look(0, base_policy)
        finished = self._ledger.finished_rounds()
        for number in range(1, self._plan.config.rounds.count + 1):
            if number in finished:
                policies.append(finished[number].policy_id)
            else:
                with self._sight.round(number):
                    policies.append(self._round(number, policies))
            if (best := self._canary.look(number, policies[-1])) is not None:
                break
        self._clock.switch(RUN, "other")
        return best or policies[-1]

    def _round(self, number: int, policies: Sequence[str]) -> str:
        heats = Heats(self._plan, number)
        with self._evaluator.flow() as flow:
            self._enter(number, "generate", "writing and evaluating")
            written = self._written(number, policies)
            flow.feed(chain(heats.start(written), self._write_ahead(number, policies)))
            for reports in flow.reports():
                self._ledger.record(*reports)
                self._sight.reported(number, reports)
                for report in reports:
                    following = heats.take(report)
                    self._ledger.stop(following.stopped)
                    for submission in following.submissions:
                        flow.submit(submission)
        entries = self._ledger.entries(round_stage(number))
        self._refuse_too_many_failures(number, entries)
        policy = self._learn(number, policies[-1], entries)
        self._ledger.finish_round(number, policy)
        return policy.id

    def _written(self, number: int, policies: Sequence[str]) -> Iterator[list[Entry]]:
        """The round's groups as they are written. Runs beside the evaluations that they lead to."""
        request = self._plan.round_generation(number, policies[self._plan.writer_of(number)])
        return self._writer.groups(round_stage(number), request, {"": unchanged})

    def _write_ahead(self, number: int, policies: Sequence[str]) -> Iterator[Submission]:
        """Has the next rounds written whose policies are known, beside the evaluations of this one; they are measured
        when it is their turn, so there is nothing to submit."""
        for later in self._plan.written_ahead(number):
            self._progress.enter(f"round {number}: evaluating, and writing round {later}", number)
            for _ in self._written(later, policies):
                pass
        self._enter(number, "evaluate", "evaluating")
        yield from ()

    def _refuse_too_many_failures(self, number: int, entries: list[Entry]) -> None:
        failed = [entry for entry in entries if entry.failed]
        tried = sum(entry.failed or entry.stopped or entry.reward is not None for entry in entries)
        if tried and len(failed) / tried > self._plan.config.rounds.max_failed_share:
            raise PreceptorError(
                "TOO_MANY_FAILURES",
                f"round {number}: {len(failed)} of {tried} evaluations failed ({most_common_failure(failed)})",
            )

    def _learn(self, number: int, policy_id: str, entries: list[Entry]) -> teacher.Policy:
        """The next policy; the same one where no self-edit of the round has a reward."""
        self._enter(number, "update", "updating the teacher")
        request = self._plan.update(number, policy_id, entries)
        policy = self._teacher.update(request) if request.examples else teacher.Policy(id=policy_id)
        self._enter(number, "other", "done")
        return policy

    def _enter(self, number: int, phase: str, words: str) -> None:
        self._clock.switch(round_stage(number), phase)
        self._progress.enter(f"round {number}: {words}", number)


def most_common_failure(failed: list[Entry]) -> str:
    """Reason and message that most of the failures share."""
    reasons = Counter((one.failure.reason, one.failure.message) for entry in failed for one in entry.failures)
    (reason, message), _ = reasons.most_common(1)[0]
    return f"most: {reason or 'CANCELLED'}, {message or 'cancelled by somebody else'}"
