"""How a run is asked to end: a flag that its loops look at, and the open calls that its threads are blocked in.

Promise: after ``set()`` no thread of the run stays blocked in a stream, and none opens another.
"""

from __future__ import annotations

import threading
from typing import Protocol


class Stopped(Exception):
    """The run was asked to end; nothing is wrong."""


class Cancellable(Protocol):
    """An open call."""

    def cancel(self) -> object:
        """Ends the call; whoever iterates it gets an error."""


class Stop:
    """The wish that a run ends, for all its threads."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._calls: list[Cancellable] = []

    def set(self) -> None:
        """Asks the run to end and cancels its open calls."""
        with self._lock:
            self._event.set()
            calls, self._calls = self._calls, []
        for call in calls:
            call.cancel()

    def is_set(self) -> bool:
        """Whether the run was asked to end."""
        return self._event.is_set()

    def wait(self, seconds: float) -> None:
        """Waits so long; raises Stopped as soon as the run is asked to end."""
        if self._event.wait(seconds):
            raise Stopped

    def check(self) -> None:
        """Raises Stopped if the run was asked to end."""
        self.wait(0)

    def opened(self, call: Cancellable) -> None:
        """Takes charge of an open call; cancels it at once if the run was already asked to end."""
        with self._lock:
            self._calls.append(call)
            late = self._event.is_set()
        if late:
            call.cancel()

    def closed(self, call: Cancellable) -> None:
        """The call has ended by itself."""
        with self._lock:
            if call in self._calls:
                self._calls.remove(call)
