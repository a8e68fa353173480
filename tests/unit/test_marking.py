"""What the evaluator promises while a judge is slow, away, talks nonsense or dies: no reward is wrong, none is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Connection

from evaluator import marking
from evaluator.graders import chat
from evaluator.graders.chat import ChatLimits
from evaluator.graders.judge import JudgeSettings
from preceptor.errors import PreceptorError
from preceptor.v1 import evaluator_pb2 as pb
from tests.evaluation_requests import group
from tests.evaluator_house import CANCELLED, FAILED, RUNNING, SUCCEEDED, House
from tests.fake_broker import FakeBroker
from tests.judge_server import JudgeServer, honest, judge_server

EDIT = "Ada lives in Lisbon."
LIVE = (pb.EVALUATION_STATE_QUEUED, RUNNING)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setattr(chat, "FIRST_PAUSE_SECONDS", 0.01)
    with judge_server() as started:
        yield started


@pytest.fixture
def build(database_url: str) -> Iterator[Callable[..., House]]:
    built = []

    def made(url: str, patience: float = 60.0, timeout: float = 10.0) -> House:
        limits = ChatLimits(timeout_seconds=timeout, tries=2)
        judge = JudgeSettings(url, "tiny", limits=limits)
        built.append(House(database_url, FakeBroker(), judge, patience))
        return built[-1]

    yield made
    for house in built:
        house.close()


def ask(house: House, *documents: str, grader: str = "judge", owner: str = "run-1") -> list[pb.Evaluation]:
    request = group(*documents, owner=owner)
    request.protocol.grader = grader
    return house.evaluations.create(request)


def train(house: House) -> None:
    house.step()
    house.broker.work()
    house.step()


def wait_for(house: House, made: list[pb.Evaluation], *states: int) -> list[pb.Evaluation]:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found = [house.evaluations.get(item.id) for item in made]
        if all(item.state in states for item in found):
            return found
        time.sleep(0.01)
    raise AssertionError(f"still {house.states(made)}")


def test_a_judge_gives_the_reward(build: Callable[..., House], server: JudgeServer) -> None:
    house = build(server.url)
    judged = ask(house, EDIT)
    train(house)
    exact = ask(house, EDIT, grader="exact")
    (found,) = wait_for(house, judged, SUCCEEDED)
    assert found.id != exact[0].id
    assert found.reward == house.evaluations.get(exact[0].id).reward
    # Two questions, two answers each, and two probes with the same answer before and after.
    assert len(server.bodies) == 5


def test_a_cascade_asks_only_what_words_do_not_tell(build: Callable[..., House], server: JudgeServer) -> None:
    house = build(server.url)
    made = ask(house, EDIT, grader="cascade")
    train(house)
    (found,) = wait_for(house, made, SUCCEEDED)
    assert found.reward.value == 0.5
    assert len(server.bodies) < 5


def test_a_slow_judge_keeps_nobody_from_results(build: Callable[..., House], server: JudgeServer) -> None:
    house = build(server.url)
    server.delay = 30.0
    slow = ask(house, EDIT)
    started = time.monotonic()
    train(house)
    assert house.states(slow)[0] in LIVE
    quick = ask(house, "Ada is a baker.", grader="exact")
    train(house)
    assert house.states(quick) == [SUCCEEDED]
    assert time.monotonic() - started < 5
    assert house.states(slow)[0] in LIVE


def test_a_judge_that_is_away_is_waited_for(build: Callable[..., House], server: JudgeServer) -> None:
    house = build(server.url)
    server.script = lambda *_: (503, {})
    made = ask(house, EDIT)
    train(house)
    while len(server.bodies) < 6:
        time.sleep(0.01)
    assert house.states(made)[0] in LIVE
    server.script = honest
    assert wait_for(house, made, SUCCEEDED)[0].reward.value == 0.5


def test_a_judge_that_stays_away_is_a_failure_and_no_reward(build: Callable[..., House], server: JudgeServer) -> None:
    house = build(server.url, patience=0.2)
    server.script = lambda *_: (503, {})
    made = ask(house, EDIT, "Nothing.")
    train(house)
    found = wait_for(house, made, FAILED)
    assert {item.failure.reason for item in found} == {"JUDGE_UNREACHABLE"}
    assert not any(item.HasField("reward") or item.trials for item in found)
    server.script = honest  # asking again grades what was trained
    trained = list(house.broker.trained)
    again = ask(house, EDIT, "Nothing.")
    found = wait_for(house, again, SUCCEEDED)
    assert [item.reward.value for item in found] == [0.5, 0.0]
    assert list(house.broker.trained) == trained


def test_nonsense_is_a_failure_and_no_reward(build: Callable[..., House], server: JudgeServer) -> None:
    house = build(server.url)
    server.script = lambda *_: "Well, it depends."
    made = ask(house, EDIT)
    train(house)
    (found,) = wait_for(house, made, FAILED)
    assert found.failure.reason == "JUDGE_UNREADABLE"
    assert not found.HasField("reward")


def test_a_wrong_key_is_a_failure_at_once(build: Callable[..., House], server: JudgeServer) -> None:
    house = build(server.url)
    server.script = lambda *_: (401, {})
    made = ask(house, EDIT)
    train(house)
    assert wait_for(house, made, FAILED)[0].failure.reason == "JUDGE_REFUSED"


def test_a_restart_goes_on_where_grading_stopped(build: Callable[..., House], server: JudgeServer) -> None:
    house = build(server.url)
    server.script = lambda number, body: honest(number, body) if number < 2 else (503, {})
    made = ask(house, EDIT)
    train(house)
    while len(server.bodies) < 8:
        time.sleep(0.01)
    house.restart()
    assert house.states(made)[0] in LIVE
    server.script, asked = honest, len(server.bodies)
    house.step()
    assert wait_for(house, made, SUCCEEDED)[0].reward.value == 0.5
    assert len(server.bodies) - asked == 3  # two were known


def test_a_cancelled_evaluation_is_not_asked_about_any_more(build: Callable[..., House], server: JudgeServer) -> None:
    house = build(server.url)
    server.script = lambda *_: (503, {})
    made = ask(house, EDIT)
    train(house)
    while len(server.bodies) < 4:
        time.sleep(0.01)
    house.cancel()
    end = time.monotonic() + 10
    while house.marking.under_way and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.2)  # each question under way ends after its own tries
    asked = len(server.bodies)
    time.sleep(0.3)
    assert len(server.bodies) == asked
    assert house.states(made) == [CANCELLED]
    server.script = honest
    again = ask(house, EDIT, owner="run-2")
    train(house)
    assert wait_for(house, again, SUCCEEDED)[0].reward.value == 0.5


def test_many_evaluations_are_graded_and_the_shared_baseline_once(
    build: Callable[..., House], server: JudgeServer
) -> None:
    house = build(server.url)
    made = ask(house, *(f"Ada lives in Lisbon. {number}" for number in range(20)))
    for _ in range(5):
        train(house)
    assert {item.reward.value for item in wait_for(house, made, SUCCEEDED)} == {0.5}
    assert len(server.bodies) == 5


def test_a_judge_that_is_set_differently_after_a_restart_fails_with_the_reason(
    build: Callable[..., House], server: JudgeServer
) -> None:
    house = build(server.url)
    server.script = lambda *_: (503, {})
    made = ask(house, EDIT)
    train(house)
    house.judge_settings = None
    house.restart()
    house.step()
    assert wait_for(house, made, FAILED)[0].failure.reason == "JUDGE_NOT_SET"
    with pytest.raises(PreceptorError) as raised:
        ask(house, "Ada is a baker.")
    assert raised.value.reason == "JUDGE_NOT_SET"


def test_of_many_that_wait_for_a_judge_a_bounded_number_is_in_memory(
    build: Callable[..., House], server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marking, "MOST_IN_HAND", 4)
    house = build(server.url)
    server.script = lambda *_: (503, {})
    made = ask(house, *(f"Ada lives in Lisbon. {number}" for number in range(20)))
    for _ in range(5):
        train(house)
    assert house.marking.under_way == 4
    house.restart()
    house.step()
    assert house.marking.under_way == 4
    server.script = honest
    end = time.monotonic() + 20
    while house.states(made) != [SUCCEEDED] * 20 and time.monotonic() < end:
        house.step()
        time.sleep(0.02)
    assert house.states(made) == [SUCCEEDED] * 20
    assert house.marking.under_way == 0


def test_a_full_disk_between_a_verdict_and_its_reward_loses_neither(
    build: Callable[..., House], server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build(server.url)
    write = house.database.write
    full = [True]

    @contextmanager
    def scarce() -> Iterator[Connection]:
        if full[0]:
            raise PreceptorError("DISK_FULL", "the disk is full")
        with write() as tx:
            yield tx

    made = ask(house, EDIT)
    house.step()
    house.broker.work()
    finish = house.marking._evaluations.finish

    def finish_on_a_full_disk(evaluations: list[pb.Evaluation]) -> list[pb.Evaluation]:
        monkeypatch.setattr(house.database, "write", scarce)
        return finish(evaluations)

    monkeypatch.setattr(house.marking._evaluations, "finish", finish_on_a_full_disk)
    house.step()
    while not server.bodies or not full[0]:
        time.sleep(0.01)
    time.sleep(0.2)
    assert house.states(made)[0] in LIVE
    full[0] = False
    assert wait_for(house, made, SUCCEEDED)[0].reward.value == 0.5


def test_what_could_not_be_scored_when_it_was_asked_for_is_scored_later(
    build: Callable[..., House], server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trials are known, so no result will ever bring it up again."""
    house = build(server.url)
    ask(house, EDIT, grader="exact")
    train(house)

    def full(_: object) -> list[pb.Evaluation]:
        raise PreceptorError("DISK_FULL", "the disk is full")

    request = group(EDIT)
    request.protocol.weights.CopyFrom(pb.RewardWeights(gold_logprob_gain=1.0))
    with monkeypatch.context() as patch:
        patch.setattr(house.marking._evaluations, "finish", full)
        with pytest.raises(PreceptorError, match="disk is full"):
            house.evaluations.create(request)
    (again,) = house.evaluations.create(request)
    assert again.state in LIVE
    house.step()
    assert house.evaluations.get(again.id).reward.value == 1.25
