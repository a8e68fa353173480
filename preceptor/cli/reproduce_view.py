"""What is shown while an experiment goes on: its steps, and inside a step the run or the evaluations that go on.

Like ``preceptor.cli.live``, of which it is made: a live view on a terminal, lines into a file, JSON lines with --json.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from preceptor.cli.live import PLAIN_SECONDS, TerminalView, bar, duration, open_view
from preceptor.cli.live import View as RunView
from preceptor.cli.output import plain, print_json_line

if TYPE_CHECKING:
    from rich.console import RenderableType

    from preceptor.cli.measuring import Progress
    from preceptor.reproduce.lab import View
    from preceptor.v1.orchestrator_pb2 import WatchRunResponse


@contextmanager
def open_reproduce_view(as_json: bool) -> Iterator[View]:
    """The view that suits stdout; closed (the terminal as it was) on the way out."""
    with open_view(as_json) as inner:
        if isinstance(inner, TerminalView):
            view = _TerminalSteps(inner)
            if inner.live:
                inner.live.update(view)
            yield view
        elif as_json:
            yield _JsonSteps(inner)
        else:
            yield _PlainSteps(inner)


class _Steps:
    """What all three have in common: runs and lines go to the view of runs."""

    def __init__(self, inner: RunView) -> None:
        self._inner = inner
        self._began = time.monotonic()

    def say(self, message: str) -> None:
        self._inner.say(message)

    def show(self, snapshot: WatchRunResponse) -> None:
        self._inner.show(snapshot)

    def gone(self) -> str:
        return duration(time.monotonic() - self._began)


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f", about {duration(seconds)} left"


class _PlainSteps(_Steps):
    def __init__(self, inner: RunView) -> None:
        super().__init__(inner)
        self._next = 0.0
        self._last: Progress | None = None

    def step(self, number: int, steps: int, words: str, seconds_left: float | None) -> None:
        self.say(f"[{self.gone()}] step {number} of {steps}: {words}{_left(seconds_left)}")

    def progress(self, progress: Progress) -> None:
        now = time.monotonic()
        if now >= self._next or (progress.done == progress.total and progress != self._last):
            self._next, self._last = now + PLAIN_SECONDS, progress
            self.say(f"[{self.gone()}] {progress.phase}: {progress.done} of {progress.total} evaluations")


class _JsonSteps(_Steps):
    def step(self, number: int, steps: int, words: str, seconds_left: float | None) -> None:
        print_json_line({"event": "step", "step": number, "steps": steps, "what": words, "seconds_left": seconds_left})

    def progress(self, progress: Progress) -> None:
        print_json_line(
            {"event": "evaluations", "what": progress.phase, "done": progress.done, "total": progress.total}
        )


class _TerminalSteps(_Steps):
    """Drawn four times a second: the step above what goes on in it."""

    def __init__(self, inner: TerminalView) -> None:
        super().__init__(inner)
        self._terminal = inner
        self._step = (0, 1, "starting")
        self._end: float | None = None
        self._progress: Progress | None = None
        self._shows_run = False

    def step(self, number: int, steps: int, words: str, seconds_left: float | None) -> None:
        self._step = (number, steps, words)
        self._end = None if seconds_left is None else time.monotonic() + seconds_left
        self._progress, self._shows_run = None, False

    def show(self, snapshot: WatchRunResponse) -> None:
        self._shows_run = True
        super().show(snapshot)

    def progress(self, progress: Progress) -> None:
        self._progress, self._shows_run = progress, False

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        number, steps, words = self._step
        left = None if self._end is None else max(self._end - time.monotonic(), 0)
        lines: list[RenderableType] = [
            Text(plain(f"step {number} of {steps}: {words}   {self.gone()} gone{_left(left)}"), style="bold")
        ]
        if self._shows_run:
            lines.append(self._terminal.__rich__())
        elif self._progress is not None:
            of = self._progress
            share = of.done / of.total if of.total else 0.0
            workers = "" if of.workers is None else f", {of.workers} workers"
            lines.append(Text(plain(f"{bar(share)} {of.done} of {of.total} evaluations, {of.phase}{workers}")))
        return Group(*lines)
