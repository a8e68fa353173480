"""HTTP with a server that may be away: bounded, with deadlines, and patient. JSON in, bytes out.

Promises: not more than ``concurrency`` requests are under way, whoever asks; each has a deadline over all of it, from
the connection to the last byte. What passes by itself (a server that is away, restarts or is too busy: connections that
fail or break, timeouts, 408, 409, 425, 429, 5xx) is tried again, with longer and longer pauses, until it has not passed
for ``patience_seconds``; so is a completion that the server has given up before its end.

Requests run on a thread of the client's own; the methods without ``async`` may be called from any other.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import queue
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import httpx2

from preceptor.errors import PreceptorError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

FIRST_PAUSE_SECONDS = 0.25
# A server that restarts is asked so often; it should not wait long for work.
LONGEST_PAUSE_SECONDS = 5.0
# Longer than vendors' per-minute limits need; a server that asks for more is as good as away.
LONGEST_RETRY_AFTER_SECONDS = 90.0
# 425 and 409 are said by gateways whose model is being loaded or moved.
_PASSING = frozenset({408, 409, 425, 429})
AWAY = (502, 503, 504)  # where 500 is an answer
# Log-probabilities of a prompt of 100,000 tokens are about 10 MB.
_MOST_BYTES = 256 << 20
# What vLLM says, with status 200, of a completion that it was at when it was told to end or to sleep. (In a text of the
# model's these quotes have backslashes.)
_GIVEN_UP = re.compile(rb'"finish_reason":\s*"(abort|error)"')
SHOWN_CHARACTERS = 300
_POLL_SECONDS = 0.1


class _Passing(Exception):
    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class PatientHttp:
    """A client of the server at ``url``, which names it in messages. No message holds the key."""

    def __init__(
        self, url: str, api_key: str, *, concurrency: int, timeout_seconds: float, patience_seconds: float
    ) -> None:
        self.url = url
        self._api_key = api_key
        self._concurrency = concurrency
        self._timeout = timeout_seconds
        self._patience = patience_seconds
        self._start_lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        # all below belong to the loop
        self._client: httpx2.AsyncClient
        self._room: asyncio.Semaphore
        self._resume_at = 0.0  # after trouble, by time.monotonic
        self._pause = 0.0

    def close(self) -> None:
        """Closes all connections; what is under way ends with CANCELLED."""
        with self._start_lock:
            loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            with suppress(Exception):
                asyncio.run_coroutine_threadsafe(self._end(), loop).result(5)
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join(5)

    def wait(self, asked: Coroutine[Any, Any, Result]) -> Result:
        """What it returns, run on the client's thread."""
        return self.wait_for_all([asked], lambda: False, lambda: None)[0]

    def wait_for_all(
        self,
        asked: Sequence[Coroutine[Any, Any, Result]],
        stopped: Callable[[], bool],
        on_done: Callable[[], None],
    ) -> list[Result]:
        """Runs all of them on the client's thread; the first error ends the others.

        ``stopped`` is asked ten times a second, ``on_done`` is called once for each that is done, both in the caller's
        thread; what they raise passes through. Raises PreceptorError(CANCELLED) when ``stopped`` says so.
        """
        loop = self._started()
        done: queue.SimpleQueue[Future[Result]] = queue.SimpleQueue()
        futures = [asyncio.run_coroutine_threadsafe(one, loop) for one in asked]
        try:
            for future in futures:
                future.add_done_callback(done.put)
            for _ in futures:
                while True:
                    if stopped():
                        raise PreceptorError("CANCELLED", f"nobody waits for {self.url} any more")
                    with suppress(queue.Empty):
                        first = done.get(timeout=_POLL_SECONDS)
                        break
                if first.cancelled():
                    raise PreceptorError("CANCELLED", f"the connection to {self.url} was closed")
                first.result()
                on_done()
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    async def ask(
        self,
        method: str,
        url: str,
        body: dict[str, Any] | None = None,
        passing_5xx: Iterable[int] = range(500, 600),
    ) -> tuple[int, bytes]:
        """Status and content, once the server has said something that stays. Raises SERVER_UNREACHABLE, SERVER_REFUSED
        (the key)."""
        in_trouble_since = 0.0
        async with self._room:
            while True:
                while (wait := self._resume_at - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                asked = time.monotonic()
                try:
                    async with asyncio.timeout(self._timeout):
                        status, content, retry_after = await self._send(method, url, body)
                    if status == 200 and _GIVEN_UP.search(content):
                        raise _Passing("it gave the completion up")
                    if status not in _PASSING and status not in passing_5xx:
                        break
                    said = self.shown(str(error_of(content).get("message", "")))
                    raise _Passing(f"HTTP {status}{': ' if said else ''}{said}", retry_after)
                except TimeoutError:
                    trouble = _Passing(f"no answer within {self._timeout:g} s")
                except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
                    raise PreceptorError("SERVER_UNREACHABLE", f"{self.url} is no address: {error}") from None
                except httpx2.RequestError as error:
                    trouble = _Passing(f"{type(error).__name__}: {error}")
                except _Passing as error:
                    trouble = error
                in_trouble_since = in_trouble_since or asked
                if time.monotonic() - in_trouble_since >= self._patience:
                    raise PreceptorError(
                        "SERVER_UNREACHABLE",
                        f"{self.url} has not answered for {time.monotonic() - in_trouble_since:.0f} s; the last time: "
                        f"{trouble}",
                    )
                self._in_trouble(trouble)
        if self._pause:
            self._pause = 0.0
            log.info("%s answers again", self.url)
        if status in (401, 403):  # some servers repeat the key
            given = "the key is not taken" if self._api_key else "it wants a key"
            raise PreceptorError("SERVER_REFUSED", f"{self.url} answered HTTP {status}: {given}")
        return status, content

    async def _send(self, method: str, url: str, body: dict[str, Any] | None) -> tuple[int, bytes, float]:
        async with self._client.stream(method, url, json=body) as response:
            taken = bytearray()
            async for chunk in response.aiter_bytes():
                taken += chunk
                if len(taken) > _MOST_BYTES:
                    raise PreceptorError("SERVER_UNREADABLE", f"{url} answered with more than {_MOST_BYTES} bytes")
        return response.status_code, bytes(taken), _retry_after(response.headers.get("Retry-After", ""))

    def _in_trouble(self, trouble: _Passing) -> None:
        now = time.monotonic()
        if now >= self._resume_at:  # the others under way fail of the same trouble, which counts once
            if not self._pause:
                log.warning("%s: %s; waiting for it", self.url, trouble)
            self._pause = min(max(2 * self._pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
        self._resume_at = max(self._resume_at, now + max(self._pause, trouble.retry_after))

    def shown(self, text: str) -> str:
        """A server's words for a message: on one line, short, without the key."""
        text = " ".join(text.split())
        if self._api_key:
            text = text.replace(self._api_key, "***")
        return text[:SHOWN_CHARACTERS]

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._start_lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._serve, args=(self._loop,), name="inference-client", daemon=True
                )
                self._thread.start()
                asyncio.run_coroutine_threadsafe(self._begin(), self._loop).result()
            return self._loop

    @staticmethod
    def _serve(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            loop.close()

    async def _begin(self) -> None:
        # Redirects are not followed: the key would go along. Deadlines are ours, over the whole request.
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self._api_key}"} if self._api_key else {},
            timeout=None,
            follow_redirects=False,
            limits=httpx2.Limits(max_connections=self._concurrency + 1),
        )
        self._room = asyncio.Semaphore(self._concurrency)

    async def _end(self) -> None:
        mine = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in mine:
            task.cancel()
        await asyncio.gather(*mine, return_exceptions=True)
        await self._client.aclose()


def json_object(content: bytes) -> dict[str, Any]:
    """The JSON object that this is, an empty one where it is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def error_of(content: bytes) -> dict[str, Any]:
    """The error of an answer, empty where it has none of the usual shape."""
    value = json_object(content)
    error = value.get("error", value if "message" in value else {})
    return error if isinstance(error, dict) else {"message": str(error)}


def _retry_after(value: str) -> float:
    """Seconds; a date is not read, the usual pause does."""
    try:
        seconds = float(value)
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_SECONDS) if math.isfinite(seconds) else 0.0
