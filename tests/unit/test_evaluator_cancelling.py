"""Cancelling: what nobody waits for is left, and what is asked for again is run, in any order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from evaluator.attempts import Ending
from evaluator.batch_store import End
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types
from tests.evaluator_house import CANCELLED, QUEUED, SUCCEEDED, House
from tests.fake_broker import FakeBroker
from tests.scripted_trials import answer_batch


@pytest.fixture
def house(database_url: str) -> Iterator[House]:
    made = House(database_url, FakeBroker())
    yield made
    made.close()


def test_cancelling_ends_what_nobody_else_waits_for(house: House) -> None:
    mine = house.create("a", "b")
    shared = house.create("b", owner="run-2")
    house.step()
    assert house.cancel() == 1
    assert house.states(mine) == [CANCELLED, QUEUED]
    assert house.cancel() == 1  # the same answer
    assert house.cancel(request_id="c2") == 0
    house.step()
    assert house.told() == {"a"}  # neither the other trial nor the baseline
    house.broker.work()
    house.step()
    assert house.states(shared) == [SUCCEEDED]
    assert house.states(mine) == [CANCELLED, SUCCEEDED]
    assert len(house.broker.trained) == 2


def test_whoever_has_cancelled_does_not_wait_for_what_another_asks_for_again(house: House) -> None:
    made = house.create("a")
    house.step()
    assert house.cancel() == 1
    house.create("a", owner="run-2")
    house.step()
    assert house.cancel(owner="run-2", request_id="c2") == 1
    assert house.states(made) == [CANCELLED]


def test_a_trial_that_another_evaluation_wants_is_not_cancelled(house: House) -> None:
    mine = house.create("a", seeds=(1, 2))
    other = house.create("a", seeds=(1,), owner="run-2")
    house.step()
    house.broker.take()
    house.step(1)
    house.cancel()
    house.step()
    (left,) = house.broker.cancelled.values()
    assert left == {item.id for batch in house.broker.batches for item in batch.trials if item.seed == 2}
    house.broker.finish()
    house.step()
    assert house.states([*mine, *other]) == [CANCELLED, SUCCEEDED]


def test_batches_of_cancelled_evaluations_do_not_run(house: House) -> None:
    made = house.create("a")
    house.step()
    house.cancel()
    house.step()
    assert sorted(house.broker.cancelled) == sorted(house.broker.submitted)
    again = house.create("a")
    assert again[0].state == QUEUED
    house.step()
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]
    assert [task_id[-2:] for task_id in house.broker.submitted] == [
        ".1",
        ".1",
        ".2",
        ".2",
    ]  # never a cancelled id again
    assert len(house.broker.trained) == 2


@pytest.mark.parametrize("told", [True, False])
def test_what_is_asked_for_again_after_a_cancel_is_run_anew_and_never_failed(house: House, told: bool) -> None:
    """The worker is at the old attempt, and hears of the cancel before or after the same is asked for again."""
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.take()
    house.step(1)
    house.cancel()
    if told:
        house.step()
    house.create("Ada lives in Lisbon.")
    assert house.states(made) == [QUEUED]
    house.step()
    house.broker.finish()  # the old attempt says CANCELLED
    house.pass_time(10)
    assert house.states(made) == [QUEUED]
    house.broker.work()
    house.step()
    assert house.evaluations.get(made[0].id).reward.value == 0.5
    assert [task_id[-2:] for task_id in house.broker.submitted] == [".1", ".1", ".2", ".2"]


def test_a_trial_asked_for_again_while_its_batch_goes_on_for_others_is_run_in_another(house: House) -> None:
    mine = house.create("Ada lives in Lisbon.", "b")
    house.create("b", owner="run-2")
    house.step()
    house.broker.take()
    house.step(1)
    house.cancel()
    house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.finish()
    house.step()
    assert house.states(mine) == [QUEUED, SUCCEEDED]
    (batch,) = house.broker.waiting.values()
    assert [list(item.documents) for item in batch.trials] == [["Ada lives in Lisbon."]]
    house.broker.work()
    house.step()
    assert house.evaluations.get(mine[0].id).reward.value == 0.5
    assert sorted(house.broker.trained) == sorted(set(house.broker.trained))


def test_a_result_that_comes_after_the_cancel_changes_nothing(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.take()
    house.step(1)
    house.cancel()
    for task_id, batch in house.broker.taken.items():
        house.broker.done[task_id] = answer_batch(batch)  # it was done before it heard
    house.step(1)
    assert house.states(made) == [CANCELLED]
    house.create("Ada lives in Lisbon.")
    house.step(1)
    assert house.states(made) == [QUEUED]
    assert len(house.broker.submitted) == 4


@pytest.mark.parametrize("moment", ["the evaluator is killed", "the broker is away"])
def test_a_cancel_reaches_the_worker_whatever_dies_in_between(house: House, moment: str) -> None:
    house.create("a")
    house.step()
    house.broker.take()
    house.step(1)
    house.broker.down = moment == "the broker is away"
    house.cancel()
    if moment == "the evaluator is killed":
        house.restart()
    else:
        house.step()
    house.broker.down = False
    house.step(1)
    assert house.told() == {"a", ""}  # the baseline, too
    house.broker.cancelled.clear()
    house.pass_time(10)
    assert not house.broker.cancelled  # once


@pytest.mark.parametrize("moment", ["before submission", "its worker dies"])
def test_a_batch_that_is_sent_later_says_what_of_it_was_cancelled(house: House, moment: str) -> None:
    mine = house.create("a", "b")
    shared = house.create("b", owner="run-2")
    if moment == "its worker dies":
        house.step()
        house.broker.take()
        house.step(1)
    house.cancel()
    if moment == "its worker dies":
        house.broker.die()
        house.pass_time(7)
    house.step()
    assert house.told() == {"a"}
    if moment == "its worker dies":
        assert sorted(task_id[-2:] for task_id in house.broker.cancelled) == [".1", ".2"]
    house.broker.work()
    house.step()
    assert house.states([*mine, *shared]) == [CANCELLED, SUCCEEDED, SUCCEEDED]
    assert len(house.broker.trained) == 2


@pytest.mark.parametrize("reason", ["TRIAL_FAILED", "TRIAL_OUT_OF_MEMORY"])
def test_what_was_cancelled_is_not_tried_again(house: House, reason: str) -> None:
    mine = house.create("a", "b", "c")
    shared = house.create("b", "c", owner="run-2")
    house.step()
    house.broker.take()
    house.step(1)
    house.cancel()  # the worker does not hear of it in time
    failure = types.Failure(reason=reason, message="all of them")
    house.broker.finish(lambda batch: trial.TrialBatchResult(batch_id=batch.id, failure=failure))
    house.broker.trained.clear()
    house.step()
    house.step()
    house.broker.work()
    house.step()
    assert house.states([*mine, *shared]) == [CANCELLED, SUCCEEDED, SUCCEEDED, SUCCEEDED, SUCCEEDED]
    assert len(house.broker.trained) == 3  # b, c and the baseline


def test_a_cancel_between_a_result_and_its_record_counts(house: House) -> None:
    """The dispatcher has read what is wanted when the cancel comes, and the same is asked for again."""
    house.create("Ada lives in Lisbon.", "b")
    house.create("b", owner="run-2")
    house.step()
    _, batch = house.broker.batches
    ada, b = (item.id for item in batch.trials)
    house.cancel()
    late = End(batch.id, 1, answer_batch(batch).results[:1], Ending(), again=[ada, b], tries=1)
    assert [recorded.trial_ids for recorded in house.batches.record([late])] == [()]
    (again,) = house.batches.waiting(9)
    assert [item.id for item in again.payload.trials] == [b]
    house.create("Ada lives in Lisbon.")
    (recorded,) = house.batches.record([End(again.payload.id, 1, answer_batch(batch).results, Ending())])
    assert recorded.trial_ids == (b,)
    assert [[item.id for item in one.payload.trials] for one in house.batches.waiting(9)] == [[ada]]


def test_a_result_of_a_discarded_attempt_is_not_recorded(house: House) -> None:
    house.create("Ada lives in Lisbon.")
    house.step()
    house.cancel()
    house.create("Ada lives in Lisbon.")
    _, batch = house.broker.batches
    ends = [End(batch.id, attempt, answer_batch(batch).results, Ending()) for attempt in (1, 2)]
    assert [recorded.trial_ids for recorded in house.batches.record(ends)] == [(), (batch.trials[0].id,)]


def test_a_wanted_trial_that_comes_back_cancelled_is_tried_again(house: House) -> None:
    """It cannot happen; if it does, it is no reason to fail."""
    made = house.create("Ada lives in Lisbon.")
    house.step()
    cancelled = types.Failure(reason="CANCELLED", message="nobody wants it any more")
    house.broker.work(lambda batch: trial.TrialBatchResult(batch_id=batch.id, failure=cancelled))
    house.step()
    assert house.states(made) == [QUEUED]
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]
