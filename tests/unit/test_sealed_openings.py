"""Promises about sealed questions: every owner who asks for them is counted once, whatever was known already."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from evaluator.sealed import sealed_banks
from preceptor.errors import PreceptorError
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import types_pb2 as types
from tests.evaluation_requests import group
from tests.evaluator_house import House
from tests.fake_broker import FakeBroker

SEALED = types.QUESTION_BANK_SEALED


@pytest.fixture
def house(database_url: str) -> Iterator[House]:
    made = House(database_url, FakeBroker())
    yield made
    made.close()


def sealed(owner: str = "run-1", request_id: str = "", document: str = "Ada lives.") -> pb.CreateEvaluationsRequest:
    """A request for the sealed bank of one task."""
    request = group(document, owner=owner, request_id=request_id)
    request.protocol.bank = SEALED
    request.task.passage.questions.add(text="Ada's town is which?", answer="Lisbon", bank=SEALED)
    return request


def opened(house: House, request: pb.CreateEvaluationsRequest) -> dict[str, int]:
    """What the answer to a request says about openings."""
    house.evaluations.create(request)
    return {opening.task_id: opening.owners for opening in house.evaluations.openings(request)}


def test_each_owner_counts_once_whatever_it_asks_and_how_often(house: House) -> None:
    assert opened(house, sealed()) == {"task-ada": 1}
    assert opened(house, sealed(document="Another.")) == {"task-ada": 1}
    again = sealed("run-2", request_id="again")
    assert opened(house, again) == {"task-ada": 2}
    assert opened(house, again) == {"task-ada": 2}
    assert opened(house, sealed()) == {"task-ada": 2}


def test_a_look_at_what_is_known_is_a_look(house: House) -> None:
    house.evaluations.create(sealed())
    house.step()
    house.broker.work()
    house.step()
    request = sealed("run-2")
    (found,) = house.evaluations.create(request)
    assert found.cached
    assert [opening.owners for opening in house.evaluations.openings(request)] == [2]


def test_openings_outlive_the_evaluator(house: House) -> None:
    first = sealed(request_id="first")
    opened(house, first)
    house.restart()
    assert opened(house, first) == {"task-ada": 1}
    assert opened(house, sealed("run-2")) == {"task-ada": 2}


def test_other_banks_open_nothing(house: House) -> None:
    request = sealed()
    request.protocol.bank = types.QUESTION_BANK_REWARD
    assert opened(house, request) == {}
    assert opened(house, sealed()) == {"task-ada": 1}


def test_a_request_that_is_refused_opens_nothing(house: House) -> None:
    opened(house, sealed(request_id="once"))
    bad = sealed("run-2", request_id="once")
    with pytest.raises(PreceptorError, match="was used for another request"):
        house.evaluations.create(bad)
    broken = sealed("run-2")
    broken.protocol.ClearField("seeds")
    with pytest.raises(PreceptorError, match="seeds"):
        house.evaluations.create(broken)
    assert opened(house, sealed("run-3")) == {"task-ada": 2}


def test_every_task_of_a_request_is_counted(house: House) -> None:
    request = sealed()
    tom = request.more.add(task=request.task, self_edits=request.self_edits)
    tom.task.id, tom.task.passage.text = "task-tom", "Tom is a smith."
    assert opened(house, request) == {"task-ada": 1, "task-tom": 1}
    assert opened(house, sealed("run-2")) == {"task-ada": 2}


CHANGES: dict[str, tuple[Callable[[types.Task], object], bool]] = {
    "label": (lambda task: task.labels.update({"a": "b"}), True),
    "title": (lambda task: setattr(task.passage, "title", "Other"), True),
    "id": (lambda task: setattr(task, "id", "task-other"), True),
    "reward question": (lambda task: setattr(task.passage.questions[0], "text", "Where is Ada?"), True),
    "alias": (lambda task: task.passage.questions[3].aliases.append("Lisboa"), True),
    "text": (lambda task: setattr(task.passage, "text", "Ada moved to Lisbon."), False),
    "sealed question": (lambda task: setattr(task.passage.questions[3], "text", "Ada's city is which?"), False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_bank_is_its_content(name: str) -> None:
    change, same = CHANGES[name]
    request, other = sealed(), sealed()
    change(other.task)
    assert (list(sealed_banks(request).values()) == list(sealed_banks(other).values())) is same
