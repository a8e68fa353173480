"""Leases on a real Redis: one holder a task, one attempt a batch, and what is told to whoever beats."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import redis

from preceptor import leases
from preceptor.leases import Answer, Claim, Lease, LeaseBoard, WorkerStatus
from tests.integration.worker_house import redis_server, wait_for

GRANTED, HELD, SUPERSEDED = Answer(Claim.GRANTED), Answer(Claim.HELD), Answer(Claim.SUPERSEDED)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def client(url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(url, decode_responses=True) as client:
        client.flushall()
        yield client


@pytest.fixture
def board(url: str, client: redis.Redis) -> LeaseBoard:
    return LeaseBoard(url)


def status(worker: str, task_id: str = "", steps: int = 0) -> WorkerStatus:
    return WorkerStatus(worker, task_id=task_id, steps_done=steps, students=("commit",))


def test_a_task_has_one_holder_until_it_lets_go(board: LeaseBoard) -> None:
    assert board.beat(status("a:1", "batch.1", 3)) == GRANTED
    assert board.beat(status("b:2", "batch.1")) == HELD
    assert board.beat(status("a:1", "batch.1", 5)) == GRANTED  # a renewal is a claim
    assert board.holders(["batch.1", "other.1"]) == {"batch.1": Lease("a:1", 5)}
    board.release("batch.1", "b:2")  # not its own
    assert board.beat(status("b:2", "batch.1")) == HELD
    board.release("batch.1", "a:1")
    assert board.holders(["batch.1"]) == {}
    assert board.beat(status("b:2", "batch.1")) == GRANTED


def test_a_name_that_begins_like_the_holder_s_is_not_the_holder(board: LeaseBoard) -> None:
    assert board.beat(status("host:12", "batch.1")) == GRANTED
    assert board.beat(status("host:1", "batch.1")) == HELD
    assert board.beat(status("host:123", "batch.1")) == HELD
    assert board.beat(status("h.st:12", "batch.1")) == HELD  # no pattern


def test_no_earlier_attempt_begins_or_goes_on_beside_a_later_one(board: LeaseBoard) -> None:
    assert board.beat(status("a:1", "batch.1")) == GRANTED
    assert board.beat(status("b:2", "batch.2")) == GRANTED
    assert board.beat(status("a:1", "batch.1")) == SUPERSEDED
    assert board.beat(status("c:3", "batch.1")) == SUPERSEDED
    assert board.beat(status("b:2", "batch.2")) == GRANTED
    assert board.beat(status("c:3", "batch.10")) == GRANTED  # a number, not a text
    assert board.beat(status("b:2", "batch.2")) == SUPERSEDED
    assert board.begun(["batch", "other"]) == {"batch": 10}
    assert board.begun([]) == {}


def test_a_lease_and_a_worker_that_are_not_renewed_are_gone(
    board: LeaseBoard, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 1)
    board.beat(status("a:1", "batch.1"))
    assert [worker.name for worker in board.workers()] == ["a:1"]
    wait_for(lambda: not board.holders(["batch.1"]), 5)
    wait_for(lambda: not board.workers(), 5)
    assert client.smembers("preceptor:workers") == set()
    # Whoever was away and is not superseded goes on; its fence was kept.
    assert board.begun(["batch"]) == {"batch": 1}
    assert board.beat(status("a:1", "batch.1")) == GRANTED


def test_a_redis_that_lost_everything_learns_it_again_from_the_beats(board: LeaseBoard, client: redis.Redis) -> None:
    board.beat(status("a:1", "batch.1"))
    board.beat(status("b:2", "batch.2"))
    client.flushall()
    assert board.beat(status("a:1", "batch.1")) == GRANTED  # nobody can know better yet
    assert board.beat(status("b:2", "batch.2")) == GRANTED
    assert board.beat(status("a:1", "batch.1")) == SUPERSEDED
    assert len(board.workers()) == 2


def test_of_many_that_claim_at_once_one_is_granted(url: str, board: LeaseBoard) -> None:
    answers: list[Claim] = []
    ready = threading.Barrier(8)

    def claim(number: int) -> None:
        own = LeaseBoard(url)
        ready.wait(10)
        answers.append(own.beat(status(f"w:{number}", "batch.1")).claim)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(answers) == ["GRANTED"] + 7 * ["HELD"]


def test_what_was_cancelled_of_an_attempt_is_told_to_whoever_asks_about_it(board: LeaseBoard) -> None:
    board.cancel("batch.1", ["x", "y"])
    board.cancel("batch.1", ["y"])
    assert board.beat(status("a:1", "batch.1")) == Answer(Claim.GRANTED, frozenset({"x", "y"}))
    assert board.beat(status("b:2", "batch.1")).cancelled == {"x", "y"}
    assert board.beat(status("b:2", "batch.2")) == GRANTED


def test_nothing_is_kept_for_ever(board: LeaseBoard, client: redis.Redis) -> None:
    board.beat(status("a:1", "batch.1"))
    board.cancel("batch.1", ["x"])
    times = {
        key: client.ttl(key) for key in client.scan_iter() if key != "preceptor:workers"
    }  # its names go one by one
    assert len(times) == 4
    assert all(0 < seconds <= leases.REMEMBERED_SECONDS for seconds in times.values())


def test_what_a_worker_says_of_itself(board: LeaseBoard) -> None:
    said = WorkerStatus("a:1", ("one", "two"), "batch.1", 7, 3, 1 << 30, ticks=9)
    board.beat(said)
    assert board.holders(["batch.1"]) == {"batch.1": Lease("a:1", steps_done=7, ticks=9)}
    board.beat(status("b:2"))
    assert board.workers() == [said, status("b:2")]


def test_what_somebody_else_wrote_is_passed_over(board: LeaseBoard, client: redis.Redis) -> None:
    board.beat(status("good:1", "good.1", 2))
    for number, junk in enumerate(("", "{}", "[1]", "null", "not json", '{"name": "x"}', '{"students": 3}', "x y z")):
        client.set(f"preceptor:worker:junk:{number}", junk)
        client.sadd("preceptor:workers", f"junk:{number}")
        client.set(f"preceptor:lease:junk.{number}", f"{junk} steps")
        client.set(f"preceptor:fence:junk{number}", junk)
    assert [worker.name for worker in board.workers()] == ["good:1"]
    names = ["good", *(f"junk{number}" for number in range(8))]
    assert board.holders(["good.1", *(f"junk.{number}" for number in range(8))]) == {"good.1": Lease("good:1", 2)}
    assert board.begun(names) == {"good": 1}
    # One that says more than this version knows is one of ours, later.
    client.set("preceptor:worker:new:1", '{"name": "new:1", "students": [], "colour": "green"}')
    client.sadd("preceptor:workers", "new:1")
    assert [worker.name for worker in board.workers()] == ["good:1", "new:1"]


def test_a_redis_that_is_not_there_is_an_error_within_seconds() -> None:
    board = LeaseBoard("redis://127.0.0.1:1/0")
    for ask in (board.workers, lambda: board.beat(status("a:1", "batch.1")), lambda: board.holders(["batch.1"])):
        with pytest.raises(redis.ConnectionError):
            ask()
