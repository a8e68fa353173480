"""Watchers get what they wait for, once, without polling; who reads nothing costs nobody anything."""

from __future__ import annotations

import threading
import time

from evaluator.feed import TAKEN_AT_ONCE, Feed, Mailbox


def read(mailbox: Mailbox) -> list[str]:
    found = []
    while taken := mailbox.take():
        for one in taken:
            mailbox.delivered(one)
            found.append(one)
    return found


def test_a_watcher_gets_each_of_its_evaluations_once_and_then_the_end() -> None:
    feed = Feed()
    mailbox = feed.open(["a", "b"])
    feed.publish(["a", "x", "a"])
    mailbox.put("b")
    feed.publish(["b"])
    assert read(mailbox) == ["a", "b"]
    feed.forget(mailbox)
    feed.publish(["a"])  # nobody is harmed


def test_what_was_put_back_to_work_before_it_was_read_comes_again() -> None:
    feed = Feed()
    mailbox = feed.open(["a", "b"])
    feed.publish(["a"])
    assert mailbox.take() == ["a"]  # and it turns out to be under way again
    feed.publish(["b", "a"])
    assert read(mailbox) == ["b", "a"]


def test_a_waiting_watcher_is_woken_at_once() -> None:
    feed = Feed()
    mailbox = feed.open(["a"])
    took: list[float] = []

    def wait() -> None:
        assert mailbox.take() == ["a"]
        took.append(time.monotonic())

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.05)
    sent = time.monotonic()
    feed.publish(["a"])
    waiter.join(5)
    assert took[0] - sent < 0.5


def test_a_mailbox_that_nobody_reads_holds_ids_and_each_once_and_hands_out_a_few() -> None:
    feed = Feed()
    names = [f"eval-{number}" for number in range(1000)]
    mailbox = feed.open(names)
    for _ in range(5):
        feed.publish(names)
    assert list(mailbox._arrived) == names
    assert mailbox.take() == names[:TAKEN_AT_ONCE]


def test_a_drain_ends_every_watch_also_those_opened_later() -> None:
    feed = Feed()
    mailbox, ended = feed.open(["a"]), threading.Event()
    waiter = threading.Thread(target=lambda: mailbox.take() or ended.set())
    waiter.start()
    feed.close()
    assert ended.wait(5)
    waiter.join(5)
    assert feed.open(["b"]).take() == []


def test_two_watchers_of_one_evaluation_go_their_own_ways() -> None:
    feed = Feed()
    one, other = feed.open(["a"]), feed.open(["a", "b"])
    feed.forget(one)
    feed.publish(["a", "b"])
    assert read(other) == ["a", "b"]
    feed.forget(other)
    assert not feed._by_evaluation
