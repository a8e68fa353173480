"""What the evaluator promises while workers die, hang and come back; with the clock in hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types
from tests.evaluator_house import FAILED, RUNNING, SUCCEEDED, House
from tests.fake_broker import FakeBroker
from tests.scripted_trials import answer_batch


@pytest.fixture
def house(database_url: str) -> Iterator[House]:
    made = House(database_url, FakeBroker())
    yield made
    made.close()


def test_a_lost_worker_s_batch_is_given_again(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.take()
    house.step(1)
    house.broker.die()
    house.pass_time(4)
    assert len(house.broker.submitted) == 2  # not yet: a beat may be late
    house.pass_time(2)
    assert [task_id.rpartition(".")[2] for task_id in house.broker.submitted] == ["1", "1", "2", "2"]
    house.broker.work()
    house.step()
    assert house.evaluations.get(made[0].id).reward.value == 0.5


def test_a_batch_that_kills_every_worker_is_given_up(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    for _ in range(2):
        house.step()
        house.broker.take()
        house.step(1)
        house.broker.die()
        house.pass_time(6)
    found = house.evaluations.get(made[0].id)
    assert (found.state, found.failure.reason, found.failure.attempts) == (FAILED, "TRIAL_LOST", 2)
    assert not found.HasField("reward")
    assert len(house.broker.submitted) == 4


def test_a_trial_that_kills_its_workers_does_not_take_its_neighbours_along(house: House) -> None:
    documents = ["Ada lives in Lisbon.", "poison", "Bread.", "Ada is a baker.", "Nothing."]
    made = house.create(*documents)
    house.step()
    for _ in range(12):  # every worker that has the poison dies; the others work
        house.broker.take()
        house.step(1)
        deadly = {
            task_id: batch
            for task_id, batch in house.broker.taken.items()
            if any("poison" in item.documents for item in batch.trials)
        }
        house.broker.taken = {task: batch for task, batch in house.broker.taken.items() if task not in deadly}
        house.broker.finish()
        house.broker.leased -= deadly.keys()
        house.pass_time(6)
    found = [house.evaluations.get(item.id) for item in made]
    assert [one.state for one in found] == [SUCCEEDED, FAILED, SUCCEEDED, SUCCEEDED, SUCCEEDED]
    # Together, twice; then in a half, a quarter and alone.
    assert (found[1].failure.reason, found[1].failure.attempts) == ("TRIAL_LOST", 5)
    assert len(house.broker.trained) == len(set(house.broker.trained))  # nobody was trained twice


def test_a_late_result_of_a_lost_attempt_is_taken(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.take()
    house.step(1)
    asleep = dict(house.broker.taken)
    house.broker.die()
    house.pass_time(6)
    for task_id, batch in asleep.items():
        house.broker.done[task_id] = answer_batch(batch)
    house.step()
    assert house.states(made) == [SUCCEEDED]


def test_a_failure_that_an_old_attempt_brings_late_does_not_end_the_new_one(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.take()
    house.step(1)
    asleep = dict(house.broker.taken)
    house.broker.die()
    house.pass_time(6)
    failure = types.Failure(reason="TRIAL_FAILED", message="late")
    for task_id, batch in asleep.items():
        house.broker.done[task_id] = trial.TrialBatchResult(batch_id=batch.id, failure=failure)
    house.broker.take()
    house.step(1)
    assert house.states(made) == [RUNNING]
    house.broker.finish()
    house.step()
    assert house.states(made) == [SUCCEEDED]


def test_a_worker_that_died_while_the_evaluator_was_away_is_noticed(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.take()
    house.step(1)
    house.broker.die()
    house.restart()
    house.pass_time(7)
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]


def test_a_late_result_has_whoever_is_at_a_later_attempt_leave_it(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.take()
    house.step(1)
    asleep = dict(house.broker.taken)
    house.broker.die()
    house.pass_time(6)
    house.broker.take()  # attempt 2
    house.step(1)
    for task_id, batch in asleep.items():
        house.broker.done[task_id] = answer_batch(batch)
    house.step()
    house.step()
    assert house.states(made) == [SUCCEEDED]
    later = {task_id.replace(".1", ".2"): {item.id for item in batch.trials} for task_id, batch in asleep.items()}
    assert house.broker.cancelled == later
    house.broker.finish()  # says CANCELLED, and nobody looks
    house.pass_time(70)
    assert len(house.broker.submitted) == 4
    ends = [(one.number, one.failure.reason) for one in house.evaluations.attempts(made[0].id)]
    assert ends == [(1, ""), (1, ""), (2, "CANCELLED"), (2, "CANCELLED")]


def test_an_old_holder_that_wakes_up_is_no_sign_of_life_for_the_attempt_after_it(house: House) -> None:
    house.create("Ada lives in Lisbon.")
    house.step()
    first = house.broker.take()
    house.step(1)
    house.broker.die()
    house.pass_time(6)
    house.broker.take()
    house.step(1)
    house.broker.die()  # the second, too
    house.broker.leased |= set(first)  # which wakes the first one up
    house.pass_time(6)
    assert {task_id[-1] for task_id in house.broker.submitted} == {"1", "2"}  # two tries, all that there are
    assert house.evaluations.page(pb.ListEvaluationsRequest(state=FAILED))[0]


def test_a_worker_that_beats_and_makes_no_step_loses_its_batch(house: House) -> None:
    house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.work()  # the baseline and the trial
    house.create("Ada is a baker.", owner="run-2")
    house.step()
    (task_id,) = house.broker.take()
    for step in range(1, 6):
        house.broker.steps[task_id] = step
        house.pass_time(100)
    assert len(house.broker.submitted) == 3
    house.pass_time(25)
    assert house.broker.submitted[-1] == task_id.replace(".1", ".2")
    house.broker.taken.clear()  # it stays where it is
    house.broker.work()
    house.step()
    (attempt, second) = house.evaluations.attempts(house.create("Ada is a baker.")[0].id)[-2:]
    assert (attempt.worker, attempt.steps_done, attempt.failure.reason) == ("fake:1", 5, "TRIAL_LOST")
    assert "has got no further for 120 s" in attempt.failure.message
    assert second.number == 2
    assert not second.HasField("failure")


def test_a_worker_that_dies_between_two_looks_is_noticed_though_the_queue_is_never_empty(house: House) -> None:
    made = house.create("Ada lives in Lisbon.", "Ada is a baker.")
    house.step()
    first = next(iter(house.broker.waiting))
    del house.broker.waiting[first]
    house.broker.fences[first.rpartition(".")[0]] = 1  # begun, and its lease is gone again
    house.pass_time(7)
    assert house.broker.submitted[-1] == first.replace(".1", ".2")
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED, SUCCEEDED]


def test_what_redis_forgot_was_not_tried(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    for _ in range(4):  # more than the tries there are
        house.broker.flush()
        house.pass_time(62)
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]


def test_a_worker_that_is_told_to_end_gives_its_batch_back_at_once_and_costs_no_try(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    failure = types.Failure(reason="SHUTTING_DOWN", message="the worker is to end")
    for _ in range(5):
        house.step()
        house.broker.work(lambda batch: trial.TrialBatchResult(batch_id=batch.id, failure=failure))
    house.step()
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]
    assert {task_id[-1] for task_id in house.broker.submitted} == set("123456")
