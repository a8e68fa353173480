"""Promises about child processes: what one has said is told apart from what others said before it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from preceptor.processes import Child


def test_last_words_are_those_of_this_process_alone(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "evaluator.log"
    first = Child("evaluator", [sys.executable, "-c", "print('one\\ntwo')"], dict(os.environ), "", log)
    assert first.last_words() == []
    first.start()
    assert first.process is not None
    first.process.wait(30)
    assert first.last_words() == ["one", "two"]
    again = Child("evaluator", [sys.executable, "-c", "print('a bad setting')"], dict(os.environ), "", log)
    again.start()
    assert again.process is not None
    again.process.wait(30)
    assert again.last_words() == ["a bad setting"]
    assert log.read_text().splitlines() == ["one", "two", "a bad setting"]
