"""Promises of the proxy that breaks connections: it passes everything until it is told not to."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from tests.chaos.proxy import Proxy


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(65536):
            self.request.sendall(data)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # connections are reset here on purpose


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    with _Server(("127.0.0.1", 0), _Echo) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_address  # type: ignore[misc]
        server.shutdown()


@pytest.fixture
def proxy(echo: tuple[str, int]) -> Iterator[Proxy]:
    with Proxy(lambda: echo) as proxy:
        yield proxy


def connected(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def echoed(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    received = b""
    while len(received) < len(data):
        chunk = client.recv(65536)
        if not chunk:
            break
        received += chunk
    return received


def is_broken(client: socket.socket) -> bool:
    try:
        client.sendall(b"x")
        return client.recv(1) == b""
    except OSError as error:
        return not isinstance(error, TimeoutError)


def test_bytes_pass_unchanged_in_both_directions_and_so_does_the_end(proxy: Proxy) -> None:
    data = bytes(range(256)) * 4000
    with connected(proxy) as client:
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        received = b""
        while len(received) < len(data):
            received += client.recv(65536)
        sender.join()
        assert received == data
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert proxy.connections == 1


def test_a_stall_holds_everything_back_and_loses_nothing(proxy: Proxy) -> None:
    with connected(proxy) as client:
        assert echoed(client, b"before") == b"before"
        proxy.stall(0.5)
        start = time.monotonic()
        assert echoed(client, b"after") == b"after"
        assert time.monotonic() - start >= 0.4


def test_a_delay_makes_each_chunk_late_until_it_is_healed(proxy: Proxy) -> None:
    with connected(proxy) as client:
        proxy.delay(0.2)
        start = time.monotonic()
        assert echoed(client, b"late") == b"late"
        assert time.monotonic() - start >= 0.4  # there and back
        proxy.heal()
        start = time.monotonic()
        assert echoed(client, b"soon") == b"soon"
        assert time.monotonic() - start < 0.4


def test_dropping_resets_what_is_there_and_lets_new_connections_pass(proxy: Proxy) -> None:
    with connected(proxy) as client:
        assert echoed(client, b"before") == b"before"
        proxy.drop()
        time.sleep(0.1)
        assert is_broken(client)
    with connected(proxy) as client:
        assert echoed(client, b"again") == b"again"


def test_refusing_lasts_as_long_as_it_was_told_to(proxy: Proxy) -> None:
    proxy.refuse(0.5)
    with connected(proxy) as client:
        assert is_broken(client)
    time.sleep(0.6)
    with connected(proxy) as client:
        assert echoed(client, b"back") == b"back"


def test_a_target_that_is_away_is_a_reset_and_the_next_connection_finds_it_where_it_is_then(
    echo: tuple[str, int],
) -> None:
    where = [("127.0.0.1", 1)]
    with Proxy(lambda: where[0]) as proxy:
        with connected(proxy) as client:
            assert is_broken(client)
        where[0] = echo
        with connected(proxy) as client:
            assert echoed(client, b"found") == b"found"
