"""The command line as a user has it, with homes of its own, and what two runs must have in common."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
SMALL = Path(__file__).parent / "small.toml"
# A small run takes half a minute on two idle cores; shared machines are slow.
DEADLINE_SECONDS = 420.0


class Preceptor:
    """``preceptor ...`` on one home folder."""

    def __init__(self, home: Path) -> None:
        self.home = home
        own = {key: value for key, value in os.environ.items() if not key.startswith("PRECEPTOR_")}
        self.environment = {**own, "PYTHONPATH": str(REPOSITORY), "PRECEPTOR_HOME": str(home)}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The command, running, in a session of its own and with its output in one pipe."""
        return subprocess.Popen(
            [sys.executable, "-m", "preceptor", *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output of the command."""
        process = self.start(*arguments)
        try:
            output, _ = process.communicate(timeout=DEADLINE_SECONDS)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(60)
        return process.returncode, output

    def run(self, out: Path, *overrides: str, config: Path = SMALL) -> dict[str, Any]:
        """The summary of a run that must succeed."""
        sets = [word for override in overrides for word in ("--set", override)]
        code, output = self("run", str(config), "--out", str(out), *sets)
        assert code == 0, output
        return summary_in(out)

    def pids(self) -> dict[str, int]:
        """The stack's children by name."""
        state = json.loads((self.home / "stack.json").read_text())
        return {child["name"]: child["pid"] for child in state["children"]}


def summary_in(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def outcome(summary: dict[str, Any]) -> dict[str, Any]:
    """Everything of a run that must not depend on timing, crashes or what was known before."""
    return {
        "rewards": [
            (r["tasks"], r["self_edits"], r["reward"]["mean"], r["reward"]["stderr"]) for r in summary["rounds"]
        ],
        "malformed": [(r["evaluations"]["malformed"], r["evaluations"]["failed"]) for r in summary["rounds"]],
        "arms": {
            name: arm and (arm["accuracy"], arm["ci95"], arm["retention"])
            for name, arm in summary["heldout"]["arms"].items()
        },
        "differences": summary["heldout"]["differences"],
    }


def read_until(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """The first match in the process's output, which must come."""
    assert process.stdout
    seen = []
    for line in process.stdout:
        seen.append(line)
        if match := re.search(pattern, line):
            return match
    raise AssertionError(f"{pattern!r} was never printed:\n{''.join(seen)}")


def wait_until(true: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


def none_is_left(pids: Sequence[int]) -> bool:
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return False
    return True


@pytest.fixture
def preceptor(tmp_path: Path) -> Iterator[Preceptor]:
    """A fresh home; whatever of its stack is left at the end is killed and fails the test."""
    command = Preceptor(tmp_path / "home")
    yield command
    if (command.home / "stack.json").exists():
        pids = list(command.pids().values())
        try:
            wait_until(lambda: none_is_left(pids), 30, "the stack's processes are gone")
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Preceptor, dict[str, Any]]:
    """A run of the small config that nobody disturbed, and its home."""
    command = Preceptor(tmp_path_factory.mktemp("undisturbed") / "home")
    return command, command.run(tmp_path_factory.mktemp("undisturbed") / "out")
