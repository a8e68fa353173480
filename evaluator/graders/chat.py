"""One OpenAI-compatible chat endpoint (vLLM, ollama, a vendor): a body in, the words of the model out.

Not more than ``concurrency`` requests are under way, and not more than ``requests_per_second`` start. What may pass by
itself (timeouts, connections that fail or break, 408, 429, 5xx) is tried again a bounded number of times; while the
endpoint is in trouble everybody waits, twice as long after each failure or as long as Retry-After says. Each request
has a deadline over all of it, from the connection to the last byte.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from dataclasses import dataclass
from typing import Any

import httpx2

from preceptor.errors import PreceptorError

# 425 and 409 are said by gateways whose model is being loaded or moved.
_PASSING = frozenset({408, 409, 425, 429})
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
# Longer than vendors' per-minute limits need; an endpoint that asks for more is as good as away.
LONGEST_RETRY_AFTER_SECONDS = 90.0
# A verdict is a word; an error page can be long.
_MOST_BYTES = 1 << 20
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class ChatLimits:
    """How hard an endpoint may be asked."""

    concurrency: int = 8
    requests_per_second: float = 0.0  # 0: as many as the concurrency gives
    timeout_seconds: float = 60.0
    tries: int = 5


class _Passing(Exception):
    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Chat:
    """The endpoint. All calls belong to one event loop; ``close`` after the last one."""

    def __init__(self, url: str, api_key: str, limits: ChatLimits) -> None:
        self._url = f"{url.rstrip('/').removesuffix('/chat/completions')}/chat/completions"
        self._api_key, self._limits = api_key, limits
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # Redirects are not followed: the key would go along. Deadlines are ours, over the whole request.
        self._client = httpx2.AsyncClient(
            headers=headers,
            timeout=None,
            follow_redirects=False,
            limits=httpx2.Limits(max_connections=limits.concurrency),
        )
        self._room = asyncio.Semaphore(limits.concurrency)
        self._next_start = 0.0  # by the rate
        self._resume_at = 0.0  # after trouble
        self._pause = 0.0

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.aclose()

    async def ask(self, body: dict[str, Any]) -> str:
        """The content of the first choice; empty where the answer is not a chat completion at all.

        Raises PreceptorError(JUDGE_UNREACHABLE) after the last try and PreceptorError(JUDGE_REFUSED) where trying again
        would not help.
        """
        trouble = ""
        for _ in range(self._limits.tries):
            async with self._room:
                await self._wait_for_a_start()
                try:
                    async with asyncio.timeout(self._limits.timeout_seconds):
                        content = await self._post(body)
                except TimeoutError:
                    trouble = f"no answer within {self._limits.timeout_seconds:g} s"
                    self._in_trouble(0.0)
                except httpx2.RequestError as error:
                    trouble = f"{type(error).__name__}: {error}"
                    self._in_trouble(0.0)
                except _Passing as error:
                    trouble = str(error)
                    self._in_trouble(error.retry_after)
                else:
                    self._pause = 0.0
                    return content
        raise PreceptorError(
            "JUDGE_UNREACHABLE", f"{self._url} did not answer {self._limits.tries} times; the last time: {trouble}"
        )

    async def _post(self, body: dict[str, Any]) -> str:
        async with self._client.stream("POST", self._url, json=body) as response:
            taken = bytearray()
            async for chunk in response.aiter_bytes():
                taken += chunk
                if len(taken) > _MOST_BYTES:
                    raise _Passing(f"HTTP {response.status_code} with more than {_MOST_BYTES} bytes")
        status = response.status_code
        if status in _PASSING or status >= 500:
            raise _Passing(f"HTTP {status}", _retry_after(response.headers.get("Retry-After", "")))
        if status != 200:
            raise PreceptorError("JUDGE_REFUSED", f"{self._url} answered HTTP {status}{self._reason(status, taken)}")
        return _content(bytes(taken))

    async def _wait_for_a_start(self) -> None:
        while True:
            now = time.monotonic()
            if (start := max(self._resume_at, self._next_start)) <= now:
                break
            await asyncio.sleep(start - now)
        if self._limits.requests_per_second > 0:
            self._next_start = now + 1 / self._limits.requests_per_second

    def _in_trouble(self, retry_after: float) -> None:
        now = time.monotonic()
        if now >= self._resume_at:  # the others under way fail of the same trouble, which counts once
            self._pause = min(max(2 * self._pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
        self._resume_at = max(self._resume_at, now + max(self._pause, retry_after))

    def _reason(self, status: int, body: bytearray) -> str:
        if status in (401, 403):  # some endpoints repeat the key
            return " (the key in PRECEPTOR_JUDGE_API_KEY is not taken)"
        text = " ".join(body[: 4 * _SHOWN_CHARACTERS].decode("utf-8", "replace").split())
        if self._api_key:
            text = text.replace(self._api_key, "***")
        return f": {text[:_SHOWN_CHARACTERS]}" if text else ""


def _content(body: bytes) -> str:
    try:
        completion = json.loads(body)
        content = completion["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return ""
    return content if isinstance(content, str) else ""


def _retry_after(value: str) -> float:
    """Seconds; a date is not read, the usual pause does."""
    try:
        seconds = float(value)
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_SECONDS) if math.isfinite(seconds) else 0.0
