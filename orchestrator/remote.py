"""Talks to a service that may die and come back.

A unary call is sent again, a broken stream is opened again, until the service has been away for the patience limit.
That is safe because of the contract: mutating requests carry a ``request_id``, and a stream opened again says the
same things again. A service that answers that it has no room now is not away: it is waited for as long as it says so,
and the run's progress says for what. What the service *refuses* (any reason that waiting does not mend) is raised at
once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc

from orchestrator.stop import Stop
from preceptor import channel
from preceptor.errors import PreceptorError

log = logging.getLogger(__name__)

Request = TypeVar("Request")
Response = TypeVar("Response")

# One try of a unary call. Short, so that a run that is cancelled while a service is stuck ends within seconds.
TRY_SECONDS = 10.0
# Between tries: a restarted service takes a few seconds to listen, and a refused connection costs nothing.
PAUSE_SECONDS = 0.5
# A stream that lived so long was served, even if it had nothing to say (a connection attempt fails after 20 s).
ALIVE_SECONDS = 30.0
# An INTERNAL error is a bug or a connection cut at an odd place; the second goes away when tried again.
INTERNAL_TRIES = 3

# Shorter absences are a restart, and not worth a line.
SHOWN_SECONDS = 3.0
# A service that has no room is asked again less often: each answer costs it work.
BUSY_PAUSE_SECONDS = 2.0

_AWAY = {
    "SERVICE_UNREACHABLE",
    "SHUTTING_DOWN",
    "BROKER_UNREACHABLE",
    "DATABASE_UNREACHABLE",
    "CANCELLED",
    "DEADLINE_EXCEEDED",
}
_BUSY = {
    "QUEUE_FULL",
    "SERVICE_BUSY",
    "RATE_LIMITED",
    "DISK_FULL",
    "ARTIFACT_STORE_UNREACHABLE",
    "ARTIFACT_STORE_REFUSED",
}

# Told which service a run waits for and why; no words: not any more.
Hindered = Callable[[str, str], None]


class Remote:
    """One service, called with patience. Not to be shared by threads: each keeps its own count of time away."""

    def __init__(
        self,
        name: str,
        patience_seconds: float,
        stop: Stop,
        hindered: Hindered = lambda _name, _words: None,
        *,
        needed: bool = True,
    ) -> None:
        """``needed``: False for one that a run can do without, for which it does not wait for ever: without room, or
        silent in a stream until its deadline, it is away too."""
        self._name = name
        self._patience = patience_seconds
        self._stop = stop
        self._hindered = hindered
        self._needed = needed

    def call(self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request) -> Response:
        """Calls a unary method. Raises PreceptorError (SERVICE_UNREACHABLE after the patience limit), Stopped."""
        absence = _Absence(self._name, self._patience, self._hindered, self._needed)
        try:
            while True:
                self._stop.check()
                try:
                    # One try: a run that is cancelled is not to wait for the next ones.
                    return channel.call(method, request, deadline=min(TRY_SECONDS, self._patience), retried=())
                except PreceptorError as error:
                    pause = absence.excuse(error)
                self._stop.wait(pause)
        finally:
            absence.over()

    def follow(
        self,
        method: grpc.UnaryStreamMultiCallable[Request, Response],
        next_request: Callable[[], Request | None],
        *,
        deadline: float,
    ) -> Iterator[Response]:
        """Yields what the stream says, opening it again where it breaks or reaches its deadline (in seconds).

        ``next_request`` gives the request for each opening, or None when there is nothing left to ask. Ends when a
        stream ends by itself. Raises as ``call`` does.
        """
        absence = _Absence(self._name, self._patience, self._hindered, self._needed)
        try:
            while (request := next_request()) is not None:
                self._stop.check()
                opened: list[Any] = []
                start = time.monotonic()
                absence.unknown()
                try:
                    for response in self._open(method, request, deadline, opened):
                        absence.over()
                        yield response
                    self._stop.check()
                    return
                except PreceptorError as error:
                    self._stop.check()
                    served = self._needed or error.reason != "DEADLINE_EXCEEDED"
                    if served and time.monotonic() - start >= min(ALIVE_SECONDS, deadline):
                        absence.over()
                    pause = absence.excuse(error)
                finally:
                    for call in opened:
                        self._stop.closed(call)
                self._stop.wait(pause)
        finally:
            absence.over()

    def _open(
        self,
        method: grpc.UnaryStreamMultiCallable[Request, Response],
        request: Request,
        deadline: float,
        opened: list[Any],
    ) -> Iterator[Response]:
        def register(call: Any) -> None:
            opened.append(call)
            self._stop.opened(call)

        return channel.stream(method, request, deadline=deadline, wait_for_ready=False, opened=register)


class _Absence:
    """How long a service has been away, and whether somebody was told that it is waited for."""

    def __init__(self, name: str, patience: float, hindered: Hindered, needed: bool) -> None:
        self._name = name
        self._needed = needed
        self._patience = patience
        self._hindered = hindered
        self._since: float | None = None
        self._internal = 0
        self._told = False
        self._logged = ""

    def over(self) -> None:
        """The service has answered, or nobody waits for it any more."""
        if self._logged:
            log.info("the %s is waited for no more", self._name)
        self._logged = ""
        self._since = None
        self._internal = 0
        self.unknown()

    def unknown(self) -> None:
        """A stream is opened again: what it does not say, it may have nothing to say of."""
        if self._told:
            self._told = False
            self._hindered(self._name, "")

    def excuse(self, error: PreceptorError) -> float:
        """Seconds after which to ask again, if the error is one that waiting mends and patience is left; raises it
        otherwise."""
        if self._needed and error.reason in _BUSY:
            self._since = None  # it is not away
            self._tell(f"waiting for the {self._name}: {error.message}")
            return BUSY_PAUSE_SECONDS
        if error.reason == "INTERNAL":
            self._internal += 1
            if self._internal >= INTERNAL_TRIES:
                raise error
        elif error.reason not in (_AWAY | _BUSY):
            raise error
        now = time.monotonic()
        if self._since is None:
            self._since = now
            if error.reason != "DEADLINE_EXCEEDED":
                log.info("the %s does not answer: %s", self._name, error)
        if now - self._since >= self._patience:
            raise PreceptorError(
                "SERVICE_UNREACHABLE",
                f"the {self._name} has not answered for {now - self._since:.0f} s: {error.message}",
                service=self._name,
            ) from None
        if now - self._since >= SHOWN_SECONDS:
            self._tell(f"waiting for the {self._name}, which does not answer")
        return PAUSE_SECONDS

    def _tell(self, words: str) -> None:
        if words != self._logged:
            log.warning("%s", words)
        self._logged = words
        self._told = True
        self._hindered(self._name, words)
