"""Promises about child processes: what one has said is told apart from what others said before it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from preceptor.processes import (
    DEATHS,
    DEATHS_WINDOW_SECONDS,
    PATIENCE_SECONDS,
    PAUSE_SECONDS,
    Child,
    Deaths,
)


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


def test_what_never_came_up_is_given_up_after_a_few_deaths() -> None:
    deaths = Deaths()
    pauses = [deaths.pause_after(float(second), answered=False) for second in range(DEATHS + 1)]
    assert pauses == [0.0] * DEATHS + [None]


def test_what_has_served_is_started_at_once_and_ever_more_slowly_where_it_dies_again_and_again() -> None:
    deaths = Deaths()
    pauses = [deaths.pause_after(100.0 + number, answered=True) for number in range(12)]
    assert pauses[:4] == [0.0, 0.0, 0.0, 1.0]
    assert None not in pauses
    assert pauses[-1] == PAUSE_SECONDS
    # A quiet minute is enough to be trusted again.
    assert deaths.pause_after(100.0 + 12 + DEATHS_WINDOW_SECONDS, answered=True) == 0.0


def test_what_has_served_and_does_not_come_up_again_is_given_up_at_last() -> None:
    deaths = Deaths()
    assert deaths.pause_after(0.0, answered=True) == 0.0
    times = [30.0 * number for number in range(1, int(PATIENCE_SECONDS / 30))]
    assert None not in [deaths.pause_after(time, answered=False) for time in times]
    assert deaths.pause_after(PATIENCE_SECONDS, answered=False) is None


def test_deaths_far_apart_are_never_too_many() -> None:
    deaths = Deaths()
    apart = DEATHS_WINDOW_SECONDS / 2
    assert {deaths.pause_after(apart * number, answered=True) for number in range(1000)} == {0.0}
