"""Promises of the embedded Redis: whatever became of its folder, it can be started again."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from preceptor.processes import Child
from preceptor.redis_server import EmbeddedRedis


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[EmbeddedRedis, Child, redis.Redis, Path]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "redis"
    server = EmbeddedRedis(folder, port)
    child = Child("redis", server.command, dict(os.environ), f"127.0.0.1:{port}", tmp_path / "log", server.prepare)
    child.start()
    client = redis.Redis.from_url(server.url, socket_timeout=5)
    wait(lambda: answers(client))
    yield server, child, client, folder
    client.close()
    end(child)


def test_a_kill_in_the_middle_of_a_write_costs_that_write_only(
    started: tuple[EmbeddedRedis, Child, redis.Redis, Path],
) -> None:
    _, child, client, folder = started
    client.set("kept", "1")
    client.set("torn", "2")
    end(child)
    files = [path for path in folder.rglob("appendonly*") if path.is_file() and path.stat().st_size]
    newest = max(files, key=lambda path: path.stat().st_mtime)
    os.truncate(newest, newest.stat().st_size - 3)
    child.start()
    wait(lambda: answers(client))
    assert client.get("kept") == b"1"
    assert client.get("torn") is None


def test_data_that_cannot_be_read_are_set_aside_and_it_starts_without_them(
    started: tuple[EmbeddedRedis, Child, redis.Redis, Path],
) -> None:
    server, child, client, folder = started
    for number in range(20):
        client.set(f"key-{number}", "value")
    assert server.set_data_aside(child.last_words()) is None
    end(child)
    for path in folder.rglob("appendonly*"):
        if path.is_file() and path.stat().st_size > 100:
            data = bytearray(path.read_bytes())
            data[60:90] = b"\0" * 30
            path.write_bytes(data)
    child.start()
    wait(child.ended)
    aside = server.set_data_aside(child.last_words(20))
    assert aside is not None
    assert any(aside.iterdir())
    child.start()
    wait(lambda: answers(client))
    assert client.dbsize() == 0


def test_an_emptied_folder_is_filled_again_under_the_same_password(
    started: tuple[EmbeddedRedis, Child, redis.Redis, Path],
) -> None:
    server, child, client, folder = started
    end(child)
    shutil.rmtree(folder)
    child.start()
    wait(lambda: answers(client))
    assert (folder / "password").stat().st_mode & 0o077 == 0
    assert EmbeddedRedis(folder, 1).url.split("@")[0] == server.url.split("@")[0]


def end(child: Child) -> None:
    child.kill_group()
    assert child.process
    child.process.wait(5)


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except (redis.ConnectionError, redis.TimeoutError):
        return False


def wait(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_starts_on_a_full_disk_where_all_it_needs_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = EmbeddedRedis(tmp_path, 1)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "open", full)
    server.prepare()
    (tmp_path / "redis.conf").unlink()
    with pytest.raises(OSError, match="No space"):
        server.prepare()
