"""A signal may arrive at any moment, also while the thread it interrupts is about to wait for it."""

from __future__ import annotations

import subprocess
import sys

PROCESS = """
import os, signal, time
from preceptor.server import stop_signal
stopping = stop_signal()
with stopping._cond:  # as Event.wait does for a moment
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
print(stopping.wait(10))
"""


def test_a_signal_in_the_moment_in_which_a_process_begins_to_wait_for_it_ends_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, timeout=20, check=False)
    assert done.stdout == "True\n", done.stderr
