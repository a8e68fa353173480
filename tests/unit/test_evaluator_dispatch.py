"""What the dispatcher promises while Redis forgets and it is itself restarted; with the clock in hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types
from tests.evaluator_house import FAILED, LIMITS, QUEUED, SUCCEEDED, House
from tests.fake_broker import FakeBroker
from tests.scripted_trials import answer_batch


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path / "evaluator.db", FakeBroker())
    yield made
    made.close()


def test_a_passing_failure_is_tried_again_alone_and_a_bounded_number_of_times(house: House) -> None:
    made = house.create("fail:TRIAL_FAILED", "Ada lives in Lisbon.")
    house.step()
    house.broker.work()
    house.step()
    assert house.states(made) == [QUEUED, SUCCEEDED]
    (batch,) = house.broker.waiting.values()
    assert [list(item.documents) for item in batch.trials] == [["fail:TRIAL_FAILED"]]
    house.broker.work()
    house.step()
    found = house.evaluations.get(made[0].id)
    assert (found.state, found.failure.reason, found.failure.attempts) == (FAILED, "TRIAL_FAILED", 2)
    assert not house.broker.waiting


def test_a_batch_that_fails_as_a_whole_and_then_works_succeeds(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    failure = types.Failure(reason="MODEL_UNREACHABLE", message="hub")
    house.broker.work(lambda batch: trial.TrialBatchResult(batch_id=batch.id, failure=failure))
    house.step()
    assert house.states(made) == [QUEUED]
    house.pass_time(4)
    assert len(house.broker.submitted) == 2  # what passes by itself is given time
    house.pass_time(2)
    assert len(house.broker.submitted) == 4
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]


def test_what_does_not_fit_together_is_tried_in_halves(house: House) -> None:
    made = house.create("a", "b", "Ada lives in Lisbon.")
    house.step()

    def small_memory(batch: trial.TrialBatch) -> trial.TrialBatchResult:
        if len(batch.trials) <= 2:
            return answer_batch(batch)
        failure = types.Failure(reason="TRIAL_OUT_OF_MEMORY", message="3 at once")
        return trial.TrialBatchResult(batch_id=batch.id, failure=failure)

    for _ in range(2):
        house.broker.work(small_memory)
        house.step()
    assert house.states(made) == [SUCCEEDED] * 3


def test_a_batch_waiting_behind_others_is_not_lost(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.pass_time(300)
    assert len(house.broker.submitted) == 2
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]


def test_a_queue_that_lost_its_data_is_filled_again(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.flush()
    house.pass_time(59)
    assert len(house.broker.submitted) == 2
    house.pass_time(3)
    assert len(house.broker.submitted) == 4
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]


def test_while_the_broker_is_away_nothing_is_lost_and_one_line_is_logged(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.take()
    house.step(1)
    house.broker.down = True
    with caplog.at_level("WARNING"):
        pauses = [house.dispatcher.step() for _ in range(8)]
        house.pass_time(100)
    late = house.create("Ada is a baker.", owner="run-2")  # accepted all the same
    assert pauses[:3] == [0.25, 0.5, 1.0]
    assert pauses[-1] == 5.0
    assert len([record for record in caplog.records if "waiting for it" in record.message]) == 1
    house.broker.down = False
    house.step(1)
    house.broker.finish()
    house.step()
    house.broker.work()
    house.step()
    assert house.states([*made, *late]) == [SUCCEEDED, SUCCEEDED]
    assert len(house.broker.submitted) == 3  # nothing counted as lost


@pytest.mark.parametrize("moment", ["before submission", "on the queue", "with a worker", "answered"])
def test_a_killed_evaluator_goes_on_where_it_was(house: House, moment: str) -> None:
    made = house.create("Ada lives in Lisbon.")
    if moment != "before submission":
        house.step()
    if moment in ("with a worker", "answered"):
        house.broker.take()
        house.step(1)
    if moment == "answered":
        house.broker.finish()
    house.restart()
    house.step(1)
    house.broker.work()
    house.step(1)
    assert house.states(made) == [SUCCEEDED]
    assert len(house.broker.trained) == 2


def test_the_queue_holds_a_bounded_number_of_batches(house: House) -> None:
    made = [house.create(f"Document {number}.", seeds=(number,))[0] for number in range(10)]
    house.step()
    assert len(house.broker.waiting) == LIMITS.in_flight
    for _ in range(4):
        house.broker.work()
        house.step()
    assert house.states(made) == [SUCCEEDED] * 10
