"""Ends the process when something in it stands still: a supervisor starts it again, a stuck one nobody can help.

    watchdog.expect("the heartbeat", 60)   # a sign of it is due within 60 s ...
    watchdog.expect("the heartbeat", 60)   # ... and this is it
    watchdog.done("the heartbeat")         # none is due any more

What stands still may be any thread, so the end is hard: the stacks of all threads go to the log and the process is
gone, without waiting for anybody. Where not even Python's threads get on (something holds the interpreter's lock for
good), a thread of faulthandler's does the same, a little later.

Only time in which the process could run counts: one that was paused has not stood still. (faulthandler's thread cannot
tell; it may end a process that was paused for minutes, whose work is somebody else's by then.)
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from dataclasses import dataclass

log = logging.getLogger(__name__)

# The exit code of a process that ended itself so that it is started again; 2 would mean that starting is no use.
ENDED_ITSELF = 70
LOOK_SECONDS = 1.0
# Until faulthandler takes over: far longer than any call that holds the interpreter's lock and comes back.
LOCKED_SECONDS = 300.0


@dataclass(slots=True)
class _Expected:
    limit: float
    waited: float = 0.0  # seconds since the last sign in which the process could run


class Watchdog:
    """Safe to use from several threads."""

    def __init__(self) -> None:
        self._expected: dict[str, _Expected] = {}
        self._lock = threading.RLock()  # a signal's handler may expect something in the middle of another expect

    def start(self) -> None:
        """Starts looking; until then nothing is ended."""
        threading.Thread(target=self._look_for_ever, name="watchdog", daemon=True).start()

    def expect(self, what: str, seconds: float) -> None:
        """The next sign of ``what`` is due within ``seconds``; this is one."""
        with self._lock:
            self._expected[what] = _Expected(seconds)

    def done(self, what: str) -> None:
        """No sign of ``what`` is due any more."""
        with self._lock:
            self._expected.pop(what, None)

    def _look_for_ever(self) -> None:
        last = time.monotonic()
        while True:
            faulthandler.dump_traceback_later(LOCKED_SECONDS, exit=True)
            time.sleep(LOOK_SECONDS)
            now = time.monotonic()
            passed, last = min(now - last, 2 * LOOK_SECONDS), now
            with self._lock:
                for expected in self._expected.values():
                    expected.waited += passed
                late = next(((what, one) for what, one in self._expected.items() if one.waited > one.limit), None)
            if late is not None:
                end_process(f"no sign of {late[0]} for {late[1].waited:.0f} s")


def end_process(why: str) -> None:
    """Ends this process at once, with the stacks of all its threads in the log."""
    log.critical("this process ends itself: %s. The stacks of its threads follow.", why)
    try:
        faulthandler.dump_traceback(sys.__stderr__ or 2)
    finally:
        os._exit(ENDED_ITSELF)
