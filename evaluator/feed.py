"""Tells waiting watchers what became final. Each watcher has a mailbox; nobody polls, and a slow one harms nobody.

A mailbox holds ids, never evaluations, and no more of them than its owner asked for: who reads nothing costs what his
request cost. (How many watches there may be is the server's limit, PRECEPTOR_MAX_STREAMS.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

# Ids handed out at once: the evaluations that a watcher reads and has in memory until they are sent.
TAKEN_AT_ONCE = 16


class Mailbox:
    """What became final for one watcher."""

    def __init__(self, evaluation_ids: Iterable[str]) -> None:
        self.evaluation_ids = frozenset(evaluation_ids)
        self._awaited = set(self.evaluation_ids)
        self._arrived: dict[str, None] = {}  # in this order
        self._closed = False
        self._changed = threading.Condition()

    def put(self, evaluation_id: str) -> None:
        """An evaluation is final; one that was delivered already, or that nobody asked for, is dropped."""
        with self._changed:
            if evaluation_id in self._awaited:
                self._arrived[evaluation_id] = None
                self._changed.notify_all()

    def close(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self) -> list[str]:
        """Some of what has become final, waiting for it; nothing once closed or when all have been delivered.

        One that turns out not to be final any more (it was put back to work) comes again when it is. Waits as long as
        the watcher's own call lives: its end closes the mailbox.
        """
        with self._changed:
            while not self._arrived and not self._closed and self._awaited:
                self._changed.wait()
            if self._closed:
                return []
            taken = list(self._arrived)[:TAKEN_AT_ONCE]
            for evaluation_id in taken:
                del self._arrived[evaluation_id]
            return taken

    def delivered(self, evaluation_id: str) -> None:
        """The watcher has it, and does not want it again."""
        with self._changed:
            self._awaited.discard(evaluation_id)
            self._arrived.pop(evaluation_id, None)


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
        """Takes a mailbox away; to be called once for each that was opened."""
        mailbox.close()
        with self._lock:
            for evaluation_id in mailbox.evaluation_ids:
                boxes = self._by_evaluation[evaluation_id]
                boxes.remove(mailbox)
                if not boxes:
                    del self._by_evaluation[evaluation_id]

    def publish(self, evaluation_ids: Iterable[str]) -> None:
        """These evaluations are final."""
        for evaluation_id in evaluation_ids:
            with self._lock:
                boxes = list(self._by_evaluation.get(evaluation_id, ()))
            for mailbox in boxes:
                mailbox.put(evaluation_id)

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
