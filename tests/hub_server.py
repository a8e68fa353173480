"""A simulated model hub: a real HTTP server on this machine that speaks the few routes by which ``huggingface_hub``
asks about a repository and fetches its files. Branches can be moved. It keeps what it was asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


class HubServer:
    """``commits[repo][commit]`` is a folder's files; ``branches[repo]["main"]`` a commit."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.asked: list[str] = []
        self.token = ""  # where set, who does not send it is refused
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            def do_HEAD(self) -> None:
                hub._answer(self)

            def log_message(self, *_arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def push(self, repo: str, folder: Path) -> str:
        """A new commit of these files, to which main moves."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        number = len(self.commits.setdefault(repo, {}))
        commit = hashlib.sha1(f"{repo} {number}".encode(), usedforsecurity=False).hexdigest()
        self.commits[repo][commit] = files
        self.branches.setdefault(repo, {})["main"] = commit
        return commit

    def close(self) -> None:
        """Ends it; its port refuses connections."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlparse(request.path).path).strip("/")
        self.asked.append(f"{request.command} {path}")
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            self._send(request, 401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            return
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            repo, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
            self._describe(request, repo, revision, as_tree=parts[4:5] == ["tree"])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file(request, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._send(request, 404, b"", {})

    def _describe(self, request: BaseHTTPRequestHandler, repo: str, revision: str, as_tree: bool) -> None:
        if repo not in self.commits:
            self._send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        elif (commit := self._commit(repo, revision)) is None:
            self._send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif as_tree:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha256(data).hexdigest()}
                for name, data in sorted(self.commits[repo][commit].items())
            ]
            self._send(request, 200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        else:
            siblings = [{"rfilename": name} for name in sorted(self.commits[repo][commit])]
            known = {"id": repo, "sha": commit, "private": False, "siblings": siblings, "tags": [], "downloads": 0}
            self._send(request, 200, json.dumps(known).encode(), {"Content-Type": "application/json"})

    def _file(self, request: BaseHTTPRequestHandler, repo: str, revision: str, name: str) -> None:
        commit = self._commit(repo, revision) if repo in self.commits else None
        if commit is None or name not in self.commits[repo][commit]:
            self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound" if commit else "RevisionNotFound"})
            return
        data = self.commits[repo][commit][name]
        etag = hashlib.sha256(data).hexdigest()
        self._send(request, 200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def _commit(self, repo: str, revision: str) -> str | None:
        revision = self.branches[repo].get(revision, revision)
        return revision if revision in self.commits[repo] else None

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A hub for as long as the context is open."""
    hub = HubServer()
    try:
        yield hub
    finally:
        hub.close()
