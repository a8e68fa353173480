"""Whatever happens in whatever order, every evaluation ends in one final state and no result is lost.

Hypothesis draws what clients, workers, Redis, the disk and the operator do to a dispatcher (the queue and the clock are
the test's), and looks after each step for what must always hold; at the end everything works again, and all that was
asked for must be final, as it deserves.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import Connection, select

from evaluator.database import OPEN, Database, TrialState, attempts, batches, cancellations, trials
from evaluator.flights import DispatchLimits
from preceptor.errors import PreceptorError
from preceptor.names import split_task_id
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types
from tests.evaluator_house import CANCELLED, FAILED, LIMITS, SUCCEEDED, House
from tests.fake_broker import FakeBroker
from tests.scripted_trials import answer_batch

GOOD = ("Ada lives in Lisbon.", "Ada is a baker.", "Bread.")
BAD = {"fail:TRIAL_DIVERGED": "TRIAL_DIVERGED", "fail:TRIAL_FAILED": "TRIAL_FAILED", "poison": "TRIAL_LOST"}
OWNERS = ("run-1", "run-2")
LEFT = types.Failure(reason="CANCELLED", message="nobody wants it any more")


@dataclass
class Holder:
    """A worker at a task."""

    task_id: str
    batch: trial.TrialBatch
    asleep: bool = False  # does not beat; its lease has expired

    @property
    def deadly(self) -> bool:
        return any("poison" in item.documents for item in self.batch.trials)


class FullDisk(Database):
    """A database whose disk may be full."""

    full = False

    @contextmanager
    def write(self) -> Iterator[Connection]:
        if self.full:
            raise PreceptorError("DISK_FULL", "the disk is full")
        with super().write() as tx:
            yield tx


class DispatchMachine(RuleBasedStateMachine):
    limits: DispatchLimits = replace(LIMITS, max_attempts=3, in_flight=6)

    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.broker = FakeBroker()
        self.broker.alive = 3
        self.house = House(self.folder / "evaluator.db", self.broker, limits=self.limits, database=FullDisk)
        self.holders: list[Holder] = []
        self.made: dict[str, str] = {}  # document by evaluation
        self.cancelled: set[str] = set()  # evaluations that somebody has cancelled
        self.unlucky: set[str] = set()  # trials whose worker died by chance
        self.trained: list[tuple[str, str]] = []  # task and trial, for every training that was finished
        self.let_go: set[str] = set()  # tasks whose holder Redis did not know of for a time: another may get them too
        self.succeeded: dict[str, bytes] = {}
        self.done: dict[str, bytes] = {}
        self.requests = 0

    def teardown(self) -> None:
        if hasattr(self, "house"):
            try:
                self.recover()
            finally:
                self.house.close()
                shutil.rmtree(self.folder)

    # --- clients

    @rule(
        documents=st.lists(st.sampled_from([*GOOD, *BAD]), min_size=1, max_size=4),
        owner=st.sampled_from(OWNERS),
        seeds=st.sampled_from([(1,), (1, 2)]),
    )
    def create(self, documents: list[str], owner: str, seeds: tuple[int, ...]) -> None:
        for item, document in zip(self.house.create(*documents, owner=owner, seeds=seeds), documents, strict=True):
            self.made[item.id] = document

    @rule(owner=st.sampled_from(OWNERS))
    def cancel(self, owner: str) -> None:
        before = self.states()
        self.requests += 1
        self.house.cancel(owner, f"cancel-{self.requests}")
        after = self.states()
        self.cancelled |= {one for one, state in after.items() if state == CANCELLED and before[one] != CANCELLED}

    @rule(owner=st.sampled_from(("", *OWNERS)))
    def retry(self, owner: str) -> None:
        self.requests += 1
        request = pb.RetryEvaluationsRequest(request_id=f"retry-{self.requests}", owner=owner)
        failed = [one for one, state in self.states().items() if state == FAILED]
        retried = self.house.evaluations.retry(request)
        assert retried == len(failed) or (owner and retried <= len(failed))
        assert self.house.evaluations.retry(request) == retried  # and nothing is done again

    # --- the dispatcher

    @rule(seconds=st.sampled_from([0, 1, 1, 6, 70]))
    def step(self, seconds: int) -> None:
        for _ in range(max(seconds, 1)):
            self.beat()
            self.house.now += min(seconds, 1)
            self.house.dispatcher.turn()

    @rule()
    def restart(self) -> None:
        self.house.restart()

    @rule(full=st.booleans())
    def fill_the_disk_for_a_turn(self, full: bool) -> None:
        self.house.database.full = full  # type: ignore[attr-defined]
        self.house.dispatcher.turn()
        self.house.database.full = False  # type: ignore[attr-defined]

    # --- workers

    @precondition(lambda self: self.broker.waiting and not self.broker.down)
    @rule()
    def take(self) -> None:
        task_id = next(iter(self.broker.waiting))
        batch = self.broker.waiting.pop(task_id)
        name, attempt = split_task_id(task_id)
        if task_id in self.broker.done or task_id in self.broker.leased:
            return  # done already, or in another's hands
        for earlier in range(1, attempt):  # the same work, under another attempt
            known = self.broker.done.get(f"{name}.{earlier}")
            if known and not known.HasField("failure") and not any(one.HasField("failure") for one in known.results):
                self.broker.done[task_id] = known
                return
        if self.broker.fences.get(name, 0) > attempt:
            return
        self.broker.fences[name] = attempt
        self.holders.append(Holder(task_id, batch))
        self.beat()

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """Also one that was asleep, and has not heard of anything meanwhile."""
        self.end(data.draw(st.sampled_from(self.holders)))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.unlucky |= {item.id for item in holder.batch.trials}
        self.leave(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def sleep_or_wake(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        holder.asleep = not holder.asleep
        if holder.asleep:
            self.fall_asleep(holder)
        self.beat()

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def oversleep(self, data: st.DataObject) -> None:
        """Until its batch is given to another; then it finishes what it was at."""
        holder = data.draw(st.sampled_from(self.holders))
        holder.asleep = True
        self.fall_asleep(holder)
        self.step(7)
        self.end(holder)

    @precondition(lambda self: self.holders and not self.broker.down)
    @rule(data=st.data())
    def be_told_to_end(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        failure = types.Failure(reason="SHUTTING_DOWN", message="the worker is to end")
        self.broker.done[holder.task_id] = trial.TrialBatchResult(batch_id=holder.batch.id, failure=failure)
        self.leave(holder)

    # --- Redis

    @rule()
    def flush(self) -> None:
        self.broker.flush()
        self.let_go |= {holder.task_id for holder in self.holders} | {task_id for task_id, _ in self.trained}

    @precondition(lambda self: self.broker.waiting)
    @rule(data=st.data())
    def lose_a_job(self, data: st.DataObject) -> None:
        """On its way to a worker whose connection is cut."""
        del self.broker.waiting[data.draw(st.sampled_from(list(self.broker.waiting)))]

    @rule(down=st.booleans())
    def be_away(self, down: bool) -> None:
        self.broker.down = down

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.broker.waiting[holder.task_id] = holder.batch

    # --- what they do

    def beat(self) -> None:
        if self.broker.down:
            return
        for holder in [one for one in self.holders if not one.asleep]:
            name, attempt = split_task_id(holder.task_id)
            if self.broker.fences.setdefault(name, attempt) > attempt:
                self.leave(holder)  # superseded
            else:
                self.broker.leased.add(holder.task_id)

    def fall_asleep(self, holder: Holder) -> None:
        self.unlucky |= {item.id for item in holder.batch.trials}
        self.let_go.add(holder.task_id)
        self.broker.leased.discard(holder.task_id)

    def leave(self, holder: Holder) -> None:
        self.holders.remove(holder)
        self.broker.leased.discard(holder.task_id)

    def end(self, holder: Holder) -> None:
        if self.broker.down:
            return
        self.leave(holder)
        left = self.broker.cancelled.get(holder.task_id, set())
        if holder.deadly and not all(item.id in left for item in holder.batch.trials if "poison" in item.documents):
            return
        result = answer_batch(holder.batch)
        for item in result.results:
            if item.trial_id in left:
                item.CopyFrom(trial.TrialResult(trial_id=item.trial_id, failure=LEFT))
            else:
                self.trained.append((holder.task_id, item.trial_id))
        self.broker.done[holder.task_id] = result

    # --- what must hold

    def states(self) -> dict[str, int]:
        return {one: self.house.evaluations.get(one).state for one in self.made}

    @invariant()
    def what_succeeded_stays_as_it_is(self) -> None:
        for one in getattr(self, "made", ()):
            found = self.house.evaluations.get(one)
            if found.state == SUCCEEDED:
                assert self.made[one] in GOOD
                known = self.succeeded.setdefault(one, found.SerializeToString(deterministic=True))
                assert found.SerializeToString(deterministic=True) == known
            else:
                assert one not in self.succeeded
            if found.state == CANCELLED:
                assert one in self.cancelled

    @invariant()
    def no_result_is_lost(self) -> None:
        if not hasattr(self, "house"):
            return
        with self.house.database.read() as tx:
            rows = tx.execute(select(trials.c.id, trials.c.result).where(trials.c.state == TrialState.DONE)).all()
        found = {row.id: row.result for row in rows}
        assert self.done.items() <= found.items()
        self.done = found

    @invariant()
    def a_trial_is_trained_once_in_an_attempt(self) -> None:
        trained = [one for one in getattr(self, "trained", []) if one[0] not in self.let_go]
        assert len(trained) == len(set(trained))

    def recover(self) -> None:
        """Everything works from now on; only the poison kills."""
        self.broker.down = False
        self.holders = [one for one in self.holders if not one.asleep]
        for _ in range(150):
            self.step(1)
            while self.broker.waiting:
                self.take()
            self.step(1)
            for holder in list(self.holders):
                self.end(holder)
            self.step(6 if self.house.dispatcher._flights else 1)
            if all(state in (SUCCEEDED, FAILED, CANCELLED) for state in self.states().values()):
                break
        self.step(70)
        self.what_succeeded_stays_as_it_is()
        self.no_result_is_lost()
        self.a_trial_is_trained_once_in_an_attempt()
        for one in self.made:
            self.check_end(self.house.evaluations.get(one), self.made[one])
        self.check_nothing_is_left()

    def check_end(self, found: pb.Evaluation, document: str) -> None:
        assert found.state in (SUCCEEDED, FAILED, CANCELLED), found
        if found.state == FAILED and document in GOOD:
            assert found.failure.reason == "TRIAL_LOST", found.failure
            with self.house.database.read() as tx:
                lost = select(trials.c.id).where(trials.c.state == TrialState.FAILED)
                assert self.unlucky.intersection(tx.execute(lost).scalars())
        elif found.state == FAILED:
            assert found.failure.reason in (BAD[document], "TRIAL_LOST")
            assert self.house.evaluations.attempts(found.id)

    def check_nothing_is_left(self) -> None:
        with self.house.database.read() as tx:
            assert not tx.execute(select(batches.c.id).where(batches.c.state.in_(OPEN))).all()
            assert not tx.execute(select(trials.c.id).where(trials.c.state == TrialState.PENDING)).all()
            assert not tx.execute(select(cancellations.c.seq)).all()
            assert not tx.execute(select(attempts).where(attempts.c.ended.is_(None))).all()


TestDispatch = DispatchMachine.TestCase
TestDispatch.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
