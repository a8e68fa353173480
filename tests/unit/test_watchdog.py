"""The watchdog in a process of its own, which it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from student.watchdog import ENDED_ITSELF

Run = Callable[[str], subprocess.Popen[str]]

BEGIN = """
import ctypes, sys, threading, time
from student import watchdog
from student.watchdog import Watchdog
dog = Watchdog()
dog.start()
print("ready", flush=True)
"""


@pytest.fixture
def run() -> Run:
    def start(script: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", BEGIN + script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    return start


def test_what_gives_no_sign_ends_the_process_and_its_stacks_are_told(run: Run) -> None:
    script = """
def stuck_here(): threading.Event().wait()
threading.Thread(target=stuck_here, daemon=True).start()
dog.expect("a sign of life", 2)
time.sleep(60)
"""
    process = run(script)
    _, said = process.communicate(timeout=30)
    assert process.returncode == ENDED_ITSELF
    assert "no sign of a sign of life for " in said
    assert "stuck_here" in said
    assert said.count("most recent call first") == 3  # main, stuck_here, and the watchdog itself


def test_who_gives_signs_or_is_done_lives_on(run: Run) -> None:
    script = """
dog.expect("what is done", 2)
dog.done("what is done")
dog.done("what was never expected")
for _ in range(50):
    dog.expect("what goes on", 2)
    time.sleep(0.1)
print("lived on")
"""
    process = run(script)
    assert process.communicate(timeout=30)[0] == "lived on\n"
    assert process.returncode == 0


def test_a_paused_process_has_not_stood_still(run: Run) -> None:
    script = """
for _ in range(3):
    dog.expect("the next round", 4)
    time.sleep(2)
print("lived on")
"""
    process = run(script)
    time.sleep(1)
    process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=30)[0] == "lived on\n"


def test_a_process_whose_threads_cannot_even_run_is_ended(run: Run) -> None:
    # PyDLL keeps the interpreter's lock, which CDLL would release.
    process = run("watchdog.LOCKED_SECONDS = 2\ntime.sleep(2)\nctypes.PyDLL(None).sleep(60)")
    begun = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert time.monotonic() - begun < 20
