"""Watchers get what they wait for, once, without polling."""

import threading
import time

from evaluator.feed import Feed
from preceptor.v1 import evaluator_pb2 as pb


def final(name: str) -> pb.Evaluation:
    return pb.Evaluation(id=name, state=pb.EVALUATION_STATE_SUCCEEDED)


def test_a_watcher_gets_each_of_its_evaluations_once_and_then_the_end() -> None:
    feed = Feed()
    mailbox = feed.open(["a", "b"])
    feed.publish([final("a"), final("x"), final("a")])
    mailbox.put(final("b"))
    feed.publish([final("b")])
    assert [found.id for found in iter(mailbox.get, None)] == ["a", "b"]
    feed.forget(mailbox)
    feed.publish([final("a")])  # nobody is harmed


def test_a_waiting_watcher_is_woken_at_once() -> None:
    feed = Feed()
    mailbox = feed.open(["a"])
    took: list[float] = []

    def wait() -> None:
        assert mailbox.get() == final("a")
        took.append(time.monotonic())

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.05)
    sent = time.monotonic()
    feed.publish([final("a")])
    waiter.join(5)
    assert took[0] - sent < 0.5


def test_a_drain_ends_every_watch_also_those_opened_later() -> None:
    feed = Feed()
    mailbox, ended = feed.open(["a"]), threading.Event()
    waiter = threading.Thread(target=lambda: mailbox.get() or ended.set())
    waiter.start()
    feed.close()
    assert ended.wait(5)
    waiter.join(5)
    assert feed.open(["b"]).get() is None
