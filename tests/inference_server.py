"""A real HTTP server that plays an inference server: for what a real one seldom does. It has no model; the words and
numbers it gives are made of the request, so that only plumbing can be tested with it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sesame"
BASE = "base"


@dataclass(frozen=True)
class Reply:
    """``body`` is sent as JSON, bytes as they are; ``cut`` breaks the connection in the middle of it."""

    status: int = 200
    body: Any = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False


# What happens to the n-th request (from 0) of a path; None: what a healthy server does.
Trouble = Callable[[int, str, dict[str, Any]], Reply | None]


class PlayedServer:
    """``url`` answers until ``stop``; ``start`` makes the same address answer again, with everything forgotten."""

    def __init__(self, *, vllm: bool = True, version: str = "0.32.0", delay: float = 0.0) -> None:
        self.vllm, self.version, self.delay = vllm, version, delay
        self.trouble: Trouble = lambda number, path, body: None
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()
        self._port = 0
        self.start()

    def start(self) -> None:
        self.adapters: dict[str, str] = {}
        self.asleep = False
        played = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                played._serve(self)

            def do_POST(self) -> None:
                played._serve(self)

            def log_message(self, *_arguments: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_arguments: object) -> None:
                """Clients that give up are part of what is tested."""

        self._server = Quiet(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def number(self, path: str) -> int:
        """How often a path was asked for."""
        return sum(asked.startswith(path) for asked, _ in self.asked)

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        body = json.loads(raw) if raw else {}
        path = handler.path
        with self._lock:
            number = self.number(path)
            self.asked.append((path, body))
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        time.sleep(self.delay)
        reply = self.trouble(number, path, body)
        if reply is None:
            if path.startswith("/v1") and handler.headers.get("Authorization") != f"Bearer {KEY}":
                reply = Reply(401, {"error": f"Unauthorized: {handler.headers.get('Authorization')}"})
            else:
                reply = self._healthy(path, body)
        with self._lock:
            self.under_way -= 1
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content) + (100 if reply.cut else 0)))
        # Said, not only done: a client that does not know may send its next request into the closing connection.
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(content)
        handler.close_connection = True

    def _healthy(self, path: str, body: dict[str, Any]) -> Reply:
        path, _, _query = path.partition("?")
        answers: dict[str, Callable[[dict[str, Any]], Reply]] = {
            "/v1/models": self._models,
            "/version": lambda _: Reply(body={"version": self.version}),
            "/v1/completions": self._complete,
            "/v1/chat/completions": self._chat,
            "/v1/load_lora_adapter": self._load,
            "/v1/unload_lora_adapter": self._unload,
            "/sleep": lambda _: self._sleep(True),
            "/wake_up": lambda _: self._sleep(False),
            "/is_sleeping": lambda _: Reply(body={"is_sleeping": self.asleep}),
        }
        return answers[path](body) if path in answers else Reply(404, {"detail": "Not Found"})

    def _models(self, _: dict[str, Any]) -> Reply:
        owner = "vllm" if self.vllm else "vendor"
        data = [{"id": BASE, "root": "/models/base", "parent": None, "owned_by": owner, "max_model_len": 64}]
        data += [{"id": name, "root": root, "parent": BASE, "owned_by": owner} for name, root in self.adapters.items()]
        return Reply(body={"object": "list", "data": data})

    def _knows(self, model: str) -> Reply | None:
        if model == BASE or model in self.adapters:
            return None
        message = f"The model `{model}` does not exist."
        return Reply(404, {"error": {"message": message, "type": "NotFoundError", "param": "model", "code": 404}})

    def _complete(self, body: dict[str, Any]) -> Reply:
        if (unknown := self._knows(body["model"])) is not None:
            return unknown
        prompt = body["prompt"]
        choice: dict[str, Any] = {"text": "", "finish_reason": "stop", "stop_reason": None}
        choice["token_ids"] = [body.get("seed") or 7, len(prompt), 1]
        if body.get("prompt_logprobs") is not None:
            off = -1.0 if body["model"] in self.adapters else -2.0
            choice["prompt_logprobs"] = [None, *({str(token): {"logprob": off}} for token in prompt[1:])]
        return Reply(body={"choices": [choice]})

    def _chat(self, body: dict[str, Any]) -> Reply:
        if (unknown := self._knows(body["model"])) is not None:
            return unknown
        said = f"{body.get('seed')}: {body['messages'][-1]['content'][:20]}"
        choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        return Reply(body={"choices": [choice], "usage": {"completion_tokens": 5}})

    def _load(self, body: dict[str, Any]) -> Reply:
        if body["lora_name"] in self.adapters:
            return Reply(400, {"error": {"message": "has already been loaded", "code": 400}})
        self.adapters[body["lora_name"]] = body["lora_path"]
        return Reply(body=b"Success")

    def _unload(self, body: dict[str, Any]) -> Reply:
        if self.adapters.pop(body["lora_name"], None) is None:
            return Reply(404, {"error": {"message": "cannot be found", "code": 404}})
        return Reply(body=b"Success")

    def _sleep(self, asleep: bool) -> Reply:
        self.asleep = asleep
        return Reply(body={"status": "sleeping" if asleep else "awake"})


@contextmanager
def played_server(**changes: Any) -> Iterator[PlayedServer]:
    """A server while it lasts."""
    played = PlayedServer(**changes)
    try:
        yield played
    finally:
        played.stop()
