"""What is shown while a run goes on, in one of three forms with the same three methods.

* on a terminal, one live view (rich): rounds with their rewards, evaluations, workers, phase, time left
* into a file or a pipe, a plain line when the phase changes and every few seconds
* with ``--json``, a line of JSON for every event and every snapshot
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from preceptor.cli.output import as_json_value, console, plain, print_json_line

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from preceptor.v1.orchestrator_pb2 import RunProgress, WatchRunResponse

# A log stays readable, and whoever tails it sees that something happens.
PLAIN_SECONDS = 5.0
BAR_WIDTH = 24


class View(Protocol):
    """Shows what happens."""

    def say(self, message: str) -> None:
        """One line about the stack or the command itself."""

    def show(self, snapshot: WatchRunResponse) -> None:
        """Where the run stands."""


@contextmanager
def open_view(as_json: bool) -> Iterator[View]:
    """The view that suits stdout; closed (the terminal as it was) on the way out."""
    if as_json:
        yield JsonView()
    elif not sys.stdout.isatty():
        yield PlainView()
    else:
        from rich.live import Live

        view = TerminalView()
        with Live(view, console=console(), refresh_per_second=4) as live:
            view.live = live
            yield view


class JsonView:
    """Lines of ``{"event": ...}``."""

    def say(self, message: str) -> None:
        """``{"event": "message", "message": ...}``."""
        print_json_line({"event": "message", "message": message})

    def show(self, snapshot: WatchRunResponse) -> None:
        """``{"event": "progress", "run": ..., "progress": {...}}``."""
        progress: dict[str, Any] = as_json_value(snapshot.progress)
        progress["state"] = _state(snapshot)
        print_json_line({"event": "progress", "run": snapshot.run.id, "progress": progress})


class PlainView:
    """Lines for a log."""

    def __init__(self) -> None:
        self._next = 0.0
        self._shown = ""

    def say(self, message: str) -> None:
        """Prints it as it is."""
        print(plain(message), flush=True)

    def show(self, snapshot: WatchRunResponse) -> None:
        """Prints a line if the phase or the state is new, or the last line is old."""
        progress, now = snapshot.progress, time.monotonic()
        key = f"{_state(snapshot)} {progress.phase}"
        if key == self._shown and now < self._next:
            return
        self._shown, self._next = key, now + PLAIN_SECONDS
        parts = [
            progress.phase or _state(snapshot).lower(),
            evaluations_line(progress),
            *(f"reward of round {r.round}: {r.mean:+.3f} ± {r.stderr:.3f}" for r in progress.rewards[-1:]),
            f"{progress.workers} workers",
        ]
        left = f", {duration(progress.seconds_left)} left" if progress.seconds_left >= 0 else ""
        print(plain(f"[{duration(progress.seconds_elapsed)}{left}] {'; '.join(parts)}"), flush=True)


class TerminalView:
    """The live view; rich draws it four times a second, so clocks go on between snapshots."""

    def __init__(self) -> None:
        self.live: Live | None = None
        self._snapshot: WatchRunResponse | None = None
        self._heard = time.monotonic()
        self._started = time.monotonic()

    def say(self, message: str) -> None:
        """Prints it above the view."""
        from rich.text import Text

        if self.live:
            self.live.console.print(Text(plain(message), style="dim"))

    def show(self, snapshot: WatchRunResponse) -> None:
        """Replaces what is drawn."""
        self._snapshot, self._heard = snapshot, time.monotonic()

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        if self._snapshot is None:
            return Text(f"starting ({duration(time.monotonic() - self._started)})", style="dim")
        run, progress = self._snapshot.run, self._snapshot.progress
        since = time.monotonic() - self._heard
        left = f", about {duration(max(progress.seconds_left - since, 0))} left" if progress.seconds_left >= 0 else ""
        first = progress.first_reward_seconds
        lines = [
            Text.assemble((plain(progress.phase) or _state(self._snapshot).lower(), "bold")),
            Text(
                f"{bar(progress.done_share)} {progress.done_share:4.0%}"
                f"   {duration(progress.seconds_elapsed + since)} gone{left}"
            ),
            Text(
                evaluations_line(progress),
                style="yellow" if progress.evaluations_failed else "",
            ),
            Text(
                f"{progress.workers} worker{'' if progress.workers == 1 else 's'}"
                + (f", first reward after {duration(first)}" if first >= 0 else ", no reward yet"),
                style="" if progress.workers or progress.done_share >= 1 else "red",
            ),
        ]
        if progress.rewards:
            lines.append(Text(""))
        scale = max((abs(reward.mean) for reward in progress.rewards), default=1.0) or 1.0
        for reward in progress.rewards[-8:]:  # the last ones: a long run must not outgrow the screen
            lines.append(
                Text(
                    f"round {reward.round:>2} of {progress.rounds}   reward {reward.mean:+.3f} ± {reward.stderr:.3f}"
                    f"  {bar(max(reward.mean, 0) / scale)}  {reward.count} self-edits"
                )
            )
        student = f", student {run.student.name}" if run.student.name else ""
        return Panel(Group(*lines), title=Text(plain(f"run {run.id}{student}")), title_align="left", expand=False)


def evaluations_line(progress: RunProgress) -> str:
    """The counts of evaluations in words."""
    stopped = f" {progress.self_edits_stopped} stopped early," if progress.self_edits_stopped else ""
    costly = f", {progress.self_edits_too_costly} too costly" if progress.self_edits_too_costly else ""
    return (
        f"evaluations: {progress.evaluations_done} done, {progress.evaluations_running} running,{stopped}"
        f" {progress.evaluations_failed} failed, {progress.evaluations_cached} cached;"
        f" {progress.self_edits_malformed} malformed self-edits{costly}"
    )


def bar(share: float) -> str:
    """A share (0..1) as a bar of fixed width."""
    filled = round(min(max(share, 0.0), 1.0) * BAR_WIDTH)
    return "█" * filled + "░" * (BAR_WIDTH - filled)


def duration(seconds: float) -> str:
    """Seconds for people: ``8s``, ``2m05s``, ``1h02m``."""
    whole = int(max(seconds, 0))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _state(snapshot: WatchRunResponse) -> str:
    from preceptor.v1.orchestrator_pb2 import RunState

    return str(RunState.Name(snapshot.run.state)).removeprefix("RUN_STATE_")
