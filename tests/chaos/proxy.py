"""A TCP proxy that misbehaves when told to: everything a network can do to a connection except changing its bytes.

    with Proxy(lambda: ("127.0.0.1", 6379)) as proxy:
        client = redis.Redis(port=proxy.port)
        proxy.stall(5)   # nothing passes for five seconds, in neither direction
        proxy.drop()     # every connection is reset

It runs in a thread of its own. The target is asked for at every new connection, so it may move (a server that was
started again on another port). All methods may be called from any thread and return at once.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

Target = Callable[[], tuple[str, int]]

_CHUNK = 64 * 1024
# A target that does not even accept is away; its client is reset, as by a machine that went down.
_CONNECT_SECONDS = 5.0


class Proxy:
    """Listens on a free loopback port for as long as it is entered."""

    def __init__(self, target: Target) -> None:
        """``target`` gives host and port of the real server; what it raises counts as a refused connection."""
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._delay = 0.0
        self._stalled_until = 0.0  # by time.monotonic()
        self._refused_until = 0.0
        self.port = 0
        self.connections = 0  # that were ever made through it

    def __enter__(self) -> Proxy:
        self._thread.start()
        listening = asyncio.run_coroutine_threadsafe(self._listen(), self._loop)
        self.port = listening.result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def address(self) -> str:
        """``host:port`` for clients."""
        return f"127.0.0.1:{self.port}"

    def delay(self, seconds: float) -> None:
        """From now on every chunk comes so much later; 0 ends it."""
        self._delay = seconds

    def stall(self, seconds: float) -> None:
        """Nothing passes and nothing ends for so long: a cable that was pulled and put back. New connections hang."""
        self._stalled_until = time.monotonic() + seconds

    def drop(self) -> None:
        """Resets every connection there is; new ones pass."""
        self._loop.call_soon_threadsafe(self._reset_all)

    def refuse(self, seconds: float) -> None:
        """Resets every connection there is and each new one for so long."""
        self._refused_until = time.monotonic() + seconds
        self.drop()

    def heal(self) -> None:
        """Everything passes again."""
        self._delay = self._stalled_until = self._refused_until = 0.0

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        onward: asyncio.StreamWriter | None = None
        try:
            await self._wait_while_stalled()
            if time.monotonic() < self._refused_until:
                return
            host, port = self._target()
            back, there = await asyncio.wait_for(asyncio.open_connection(host, port), _CONNECT_SECONDS)
            onward = there
            self._writers.add(there)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(reader, there))
                pumps.create_task(self._pump(back, writer))
        except* Exception:  # whatever ended the connection: its client sees a reset and no more
            pass
        finally:
            for one in (writer, onward):
                if one is not None:
                    self._writers.discard(one)
                    one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Passes on what comes, and the end of it: one direction may end before the other."""
        while chunk := await reader.read(_CHUNK):
            if self._delay:
                await asyncio.sleep(self._delay)
            await self._wait_while_stalled()
            writer.write(chunk)
            await writer.drain()
        await self._wait_while_stalled()
        with suppress(OSError):
            writer.write_eof()

    async def _wait_while_stalled(self) -> None:
        while (left := self._stalled_until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.1))

    def _reset_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        self._reset_all()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
