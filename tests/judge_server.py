"""A real HTTP server that plays an OpenAI-compatible endpoint: it answers as it is told and keeps what it was sent."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What to do with the n-th request (from 0) with this body. A string is what the model says, a pair a status and its
# headers, None a connection that breaks in the middle of the answer.
Script = Callable[[int, dict[str, Any]], str | tuple[int, dict[str, str]] | None]


def honest(_number: int, body: dict[str, Any]) -> str:
    """Judges by what it finds in the quoted material, and by nothing else."""
    material = json.loads(body["messages"][1]["content"])
    return "CORRECT" if any(gold in material["answer"] for gold in material["accepted"]) else "INCORRECT"


class JudgeServer:
    """``url`` is what PRECEPTOR_JUDGE_URL would be. ``script`` may be changed at any time."""

    def __init__(self, script: Script = honest, delay: float = 0.0) -> None:
        self.script, self.delay = script, delay
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()
        self._released = threading.Event()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                judge._answer(self)

            def log_message(self, *_arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_arguments: object) -> None:
                """Clients that give up are part of what is tested."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the server; afterwards its port refuses connections."""
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self.paths.append(handler.path)
            self.times.append(time.monotonic())
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            self._released.wait(self.delay)
            said = self.script(number, body)
        finally:
            with self._lock:
                self.under_way -= 1
        if said is None:
            handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"choices": [{"mess')
            handler.wfile.flush()
            handler.close_connection = True
            handler.connection.close()
            return
        status, headers = said if isinstance(said, tuple) else (200, {})
        completion = {"choices": [{"message": {"role": "assistant", "content": said}}]}
        content = json.dumps(completion if isinstance(said, str) else {"error": "no"}).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)


@contextmanager
def judge_server(script: Script = honest, delay: float = 0.0) -> Iterator[JudgeServer]:
    """A server for as long as the block runs."""
    server = JudgeServer(script, delay)
    try:
        yield server
    finally:
        server.close()
