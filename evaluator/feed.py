"""Tells waiting watchers what became final. Each watcher has a mailbox; nobody polls, and a slow one harms nobody.

A mailbox takes each of its evaluations at most once, so it is never longer than what its owner asked for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

from preceptor.v1 import evaluator_pb2 as pb


class Mailbox:
    """What became final for one watcher."""

    def __init__(self, evaluation_ids: Iterable[str]) -> None:
        self.evaluation_ids = frozenset(evaluation_ids)
        self._awaited = set(self.evaluation_ids)
        self._arrived: deque[pb.Evaluation] = deque()
        self._closed = False
        self._changed = threading.Condition()

    def put(self, evaluation: pb.Evaluation) -> None:
        """Delivers a final evaluation; a second one under the same id, or one nobody asked for, is dropped."""
        with self._changed:
            if evaluation.id in self._awaited:
                self._awaited.discard(evaluation.id)
                self._arrived.append(evaluation)
                self._changed.notify_all()

    def close(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def get(self) -> pb.Evaluation | None:
        """The next final evaluation, waiting for it; None once closed or when all have been taken.

        Waits as long as the watcher's own call lives: its end closes the mailbox.
        """
        with self._changed:
            while not self._arrived and not self._closed and self._awaited:
                self._changed.wait()
            return self._arrived.popleft() if self._arrived and not self._closed else None


class Feed:
    """All mailboxes that are open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_evaluation: dict[str, list[Mailbox]] = {}
        self._closed = False

    def open(self, evaluation_ids: Iterable[str]) -> Mailbox:
        """A mailbox for these evaluations; open it before looking up where they stand, so that none is missed."""
        mailbox = Mailbox(evaluation_ids)
        with self._lock:
            for evaluation_id in mailbox.evaluation_ids:
                self._by_evaluation.setdefault(evaluation_id, []).append(mailbox)
            if self._closed:
                mailbox.close()
        return mailbox

    def forget(self, mailbox: Mailbox) -> None:
        """Takes a mailbox away."""
        mailbox.close()
        with self._lock:
            for evaluation_id in mailbox.evaluation_ids:
                boxes = self._by_evaluation.get(evaluation_id, [])
                if mailbox in boxes:
                    boxes.remove(mailbox)
                if not boxes:
                    self._by_evaluation.pop(evaluation_id, None)

    def publish(self, evaluations: Iterable[pb.Evaluation]) -> None:
        """Delivers final evaluations."""
        for evaluation in evaluations:
            with self._lock:
                boxes = list(self._by_evaluation.get(evaluation.id, ()))
            for mailbox in boxes:
                mailbox.put(evaluation)

    def close(self) -> None:
        """Ends all waiting, now and later: the service drains."""
        with self._lock:
            self._closed = True
            boxes = {id(box): box for group in self._by_evaluation.values() for box in group}
        for mailbox in boxes.values():
            mailbox.close()

    @property
    def closed(self) -> bool:
        """Whether the service drains."""
        return self._closed
