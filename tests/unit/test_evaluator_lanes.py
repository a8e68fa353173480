"""Students with queues of their own: nobody waits for another's workers, and a change of that setting loses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from evaluator.settings import EvaluatorSettings
from preceptor.queue import queue_of, served_queues, student_of
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import types_pb2 as types
from tests.evaluation_requests import group
from tests.evaluator_house import SUCCEEDED, House
from tests.fake_broker import FakeBroker

LARGE = types.PinnedStudent(name="large", source="/models/large", commit="beef")
OWN, COMMON = "trials.large", "trials"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path / "evaluator.db", FakeBroker(), dedicated=("large",))
    yield made
    made.close()


def create(house: House, *documents: str, student: types.PinnedStudent | None = None) -> list[pb.Evaluation]:
    request = group(*documents)
    if student is not None:
        request.student.CopyFrom(student)
    return house.evaluations.create(request)


def report(house: House) -> dict[str, pb.QueueReport]:
    return {one.name: one for one in house.evaluations.queue_status().queues}


def test_a_dedicated_student_has_a_queue_of_its_own(house: House) -> None:
    create(house, "Ada lives in Lisbon.")
    create(house, "Ada lives in Lisbon.", student=LARGE)
    house.step()
    assert len(house.broker.on(COMMON)) == len(house.broker.on(OWN)) == 2  # a baseline and an edit
    assert {batch.student.name for task, batch in house.broker.waiting.items() if task in house.broker.on(OWN)} == {
        "large"
    }


def test_a_queue_without_a_worker_is_in_nobodys_way(house: House) -> None:
    for number in range(20):  # far more than a queue holds, and all of it before anybody else's
        create(house, *(f"Large fact {number}.{one}" for one in range(10)), student=LARGE)
    made = create(house, *(f"Fact {one}" for one in range(40)))
    for _ in range(12):
        house.step(1)
        house.broker.take(COMMON)
        house.step(1)
        house.broker.finish()
    house.step(1)
    assert house.states(made) == [SUCCEEDED] * 40
    assert len(house.broker.on(OWN)) == house.limits.in_flight
    found = report(house)
    assert (found[OWN].student, found[OWN].submitted_batches, found[OWN].workers_alive) == ("large", 4, 0)
    assert found[OWN].waiting_batches > 20
    assert (found[COMMON].waiting_batches, found[COMMON].workers_alive) == (0, 1)
    assert not [task for task in house.broker.submitted if not task.endswith(".1")]  # and nothing was sent twice


def test_each_queue_holds_what_its_own_workers_need(tmp_path: Path) -> None:
    house = House(tmp_path / "x.db", FakeBroker(), dedicated=("large",))
    house.limits = house.limits.__class__(in_flight=100)
    house.restart()
    house.broker.alive, house.broker.serves = 6, ("large",)
    for number in range(20):
        create(house, *(f"Fact {number}.{one}" for one in range(8)))
        create(house, *(f"Fact {number}.{one}" for one in range(8)), student=LARGE)
    house.step()
    house.step(1)
    assert len(house.broker.on(OWN)) == 12
    assert len(house.broker.on(COMMON)) == 4
    assert report(house)[OWN].workers_alive == 6
    house.close()


def test_a_student_that_is_given_a_queue_keeps_what_is_on_the_old_one(tmp_path: Path) -> None:
    house = House(tmp_path / "x.db", FakeBroker())
    made = create(house, *(f"Fact {one}" for one in range(40)), student=LARGE)
    house.step()
    on_the_old_one = len(house.broker.on(COMMON))
    assert on_the_old_one == 4
    house.dedicated = ("large",)
    house.restart()
    house.step(1)
    assert len(house.broker.on(COMMON)) == 4  # nothing taken back
    for _ in range(10):  # workers of the common queue finish what is there, those of its own the rest
        house.broker.work()
        house.step(1)
    assert house.states(made) == [SUCCEEDED] * 40
    assert house.broker.on(COMMON) == []
    house.close()


@pytest.mark.parametrize(("before", "after"), [((), ("large",)), (("large",), ())])
def test_what_nobody_takes_from_the_old_queue_goes_to_the_new_one(
    tmp_path: Path, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    house = House(tmp_path / "x.db", FakeBroker(), dedicated=before)
    made = create(house, "Ada lives in Lisbon.", student=LARGE)
    house.step()
    old, new = queue_of("large", before), queue_of("large", after)
    assert len(house.broker.on(old)) == 2
    house.dedicated = after
    house.restart()
    for _ in range(70):  # the workers of the old queue are gone
        house.step(1)
    assert len(house.broker.on(new)) == 2
    house.broker.take(new)
    house.step(1)
    house.broker.finish()
    house.step(1)
    assert house.states(made) == [SUCCEEDED]
    # Whoever comes upon the old one later finds the fence.
    assert all(house.broker.fences[task.rpartition(".")[0]] == 2 for task in house.broker.on(old))
    house.close()


def test_halves_and_retries_go_to_the_same_queue(house: House) -> None:
    create(house, "Ada lives in Lisbon.", "Bread.", student=LARGE)
    for _ in range(60):
        house.step(1)
        house.broker.take(OWN)
        house.step(1)
        house.broker.die()
    assert len(house.broker.submitted) == 6  # twice the baseline and the two edits together, then each edit alone
    assert house.evaluations.retry(pb.RetryEvaluationsRequest(request_id="again")) == 2
    house.step(1)
    assert len(house.broker.submitted) > 6
    assert {house.broker.queues[task] for task in house.broker.submitted} == {OWN}


def test_the_names_of_queues() -> None:
    assert queue_of("large") == queue_of("") == COMMON
    assert queue_of("large", ("large",)) == OWN
    assert (student_of(OWN), student_of(COMMON)) == ("large", "")
    assert served_queues(()) == (COMMON,)
    assert served_queues(("small", "large")) == (OWN, "trials.small")


def test_the_setting_takes_names_with_commas_and_refuses_what_is_none() -> None:
    assert EvaluatorSettings(dedicated_students=" large, small,large,").dedicated == ("large", "small")
    assert EvaluatorSettings().dedicated == ()
    with pytest.raises(ValidationError, match="'Large One' is no student's name"):
        EvaluatorSettings(dedicated_students="small,Large One")
