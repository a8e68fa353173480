"""What the dispatcher promises while Redis forgets and it is itself restarted; with the clock in hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from preceptor.errors import PreceptorError
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types
from tests.evaluator_house import FAILED, LIMITS, QUEUED, SUCCEEDED, House
from tests.fake_broker import FakeBroker
from tests.scripted_trials import answer_batch


@pytest.fixture
def house(database_url: str) -> Iterator[House]:
    made = House(database_url, FakeBroker())
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
    house.step(1)
    house.broker.flush()
    house.pass_time(4)
    assert len(house.broker.submitted) == 2  # one of them may be with a worker that is about to beat
    house.pass_time(3)
    assert len(house.broker.submitted) == 4
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]


def test_a_queue_that_lost_its_data_while_the_evaluator_was_away_is_filled_again(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.flush()
    house.restart()
    house.pass_time(7)
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]


def test_a_job_that_is_lost_from_an_empty_queue_is_sent_again(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.waiting.clear()
    house.pass_time(59)
    assert len(house.broker.submitted) == 2
    house.pass_time(3)
    assert len(house.broker.submitted) == 4
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]


@pytest.mark.parametrize("restart", [False, True])
def test_a_job_that_others_have_overtaken_is_lost_though_the_queue_is_never_empty(house: House, restart: bool) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    lost = list(house.broker.waiting)[1]
    del house.broker.waiting[lost]
    if restart:
        house.restart()
    for number in range(40):  # there is always something waiting, and something begun
        house.create(f"Document {number}.", seeds=(number,))
        house.step(2)
        first = next(iter(house.broker.waiting))
        later = {task: batch for task, batch in house.broker.waiting.items() if task != first}
        house.broker.waiting = {first: house.broker.waiting[first]}
        house.broker.work()
        house.broker.waiting = later
        house.step()
        assert later
    house.broker.work()
    house.step()
    assert lost.replace(".1", ".2") in house.broker.submitted
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


@pytest.mark.parametrize("reason", ["TRIAL_OUT_OF_MEMORY", "TRIAL_TIMEOUT"])
def test_halving_goes_on_until_it_fits_whatever_the_tries(house: House, reason: str) -> None:
    made = house.create(*(f"{number}" for number in range(7)), "Ada lives in Lisbon.")

    def small(batch: trial.TrialBatch) -> trial.TrialBatchResult:
        if len(batch.trials) == 1:
            return answer_batch(batch)
        return trial.TrialBatchResult(batch_id=batch.id, failure=types.Failure(reason=reason, message="too much"))

    sizes = []
    for _ in range(8):
        house.step()
        sizes.append(sorted(len(batch.trials) for batch in house.broker.waiting.values()))
        house.broker.work(small)
    house.step()
    assert house.states(made) == [SUCCEEDED] * 8
    assert sizes[:4] == [[1, 8], [4, 4], [2, 2, 2, 2], [1, 1, 1, 1]]


def test_one_trial_that_takes_too_long_is_tried_again_and_does_not_cut_the_others(house: House) -> None:
    made = house.create("fail:TRIAL_TIMEOUT", "Ada lives in Lisbon.")
    house.step()
    house.broker.work()
    house.step()
    assert house.states(made) == [QUEUED, SUCCEEDED]


@pytest.mark.parametrize(
    "reason", ["DEVICE_FAILED", "DISK_FULL", "VERSION_SKEW", "ARTIFACT_STORE_UNREACHABLE", "ARTIFACT_STORE_REFUSED"]
)
def test_what_another_worker_may_do_better_is_tried_again(house: House, reason: str) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    failure = types.Failure(reason=reason, message="scripted")
    house.broker.work(lambda batch: trial.TrialBatchResult(batch_id=batch.id, failure=failure))
    house.pass_time(7)
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]


def test_the_queue_is_as_long_as_the_workers_need(database_url: str) -> None:
    house = House(database_url, FakeBroker(), limits=replace(LIMITS, in_flight=12))
    for number in range(12):
        house.create(f"Document {number}.", seeds=(number,), request_id=f"r{number}")
    longest = []
    for alive in (0, 1, 3, 5, 100):
        house.broker.alive = alive
        house.step(1)
        longest.append(len(house.broker.waiting))
    assert longest == [4, 4, 6, 10, 12]
    house.close()


def test_owners_take_turns_however_much_one_of_them_has_put_up(house: House) -> None:
    for number in range(20):
        house.create(f"Document {number}.", seeds=(1,), owner="greedy")
    house.step()
    for number in range(3):
        house.create(f"Modest {number}.", seeds=(1,), owner="modest")
    order = []
    for _ in range(10):
        order += ["".join(batch.trials[0].documents)[:6] for batch in house.broker.waiting.values()]
        house.broker.work()
        house.step()
    mine = [place for place, name in enumerate(order) if name == "Modest"]
    assert mine[0] <= 5  # the next but one when it came
    assert mine[2] <= 10  # and every other then


def test_who_has_asked_for_nothing_has_saved_up_no_turns(house: House) -> None:
    house.create("Early.", owner="idle")
    for number in range(10):
        house.create(f"Document {number}.", owner="busy")
        house.step()
        house.broker.work()
    house.step()
    for number in range(3):
        house.create(f"idle {number}", owner="idle")
        house.create(f"busy {number}", owner="busy")
    house.step()
    house.broker.work()
    house.step()
    names = ["".join(batch.trials[0].documents)[:4] for batch in house.broker.batches[-6:]]
    assert sorted(names[:4]) == ["busy", "busy", "idle", "idle"]


@pytest.mark.parametrize("fails", ["mark_submitted", "mark_running", "record"])
def test_a_full_disk_stops_nothing_for_good_and_sends_nothing_twice(
    house: House, fails: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = house.create("Ada lives in Lisbon.")

    def full(*_: object) -> None:
        raise PreceptorError("DISK_FULL", "the disk is full")

    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(house.batches, fails, full)
        for _ in range(5):
            house.now += 1
            house.dispatcher.turn()
            house.broker.take()
        house.broker.finish()
        house.dispatcher.turn()
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "the disk is full (DISK_FULL); trying again every 5 s"
    ]
    for _ in range(3):
        house.now += 1
        house.dispatcher.turn()
    assert house.states(made) == [SUCCEEDED]
    assert len(house.broker.submitted) == 2


def test_whatever_a_turn_dies_of_the_thread_lives(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.work()
    with monkeypatch.context() as patch:
        patch.setattr(house.marking, "settle_trials", lambda _: 1 / 0)
        assert house.dispatcher.turn() == 5.0  # recorded, not scored
    assert house.states(made) == [QUEUED]
    house.dispatcher.turn()
    assert house.states(made) == [SUCCEEDED]
