"""What the evaluator promises while workers die, hang and come back; with the clock in hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types
from tests.evaluator_house import FAILED, RUNNING, SUCCEEDED, House
from tests.fake_broker import FakeBroker
from tests.scripted_trials import answer_batch


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path / "evaluator.db", FakeBroker())
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
