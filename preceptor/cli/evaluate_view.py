"""What ``preceptor evaluate`` shows: progress on stderr while it measures, tables and sentences on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

from preceptor.cli.live import bar, duration
from preceptor.cli.measuring import Progress
from preceptor.cli.output import console, plain, print_table
from preceptor.cli.summary import percent
from preceptor.cli.verdict import NO_EDIT

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

# A log stays readable, and whoever tails it sees that something happens.
PLAIN_SECONDS = 5.0
# In the order in which a reader asks; what is not there was not measured.
_TERMS = {
    "gain": "gain",
    "gold_logprob_gain": "log-prob. (nats)",
    "gold_probability_gain": "probability",
    "certainty_gain": "certainty (nats)",
    "agreement_gain": "agreement",
    "retention_loss": "forgotten",
    "overlap": "overlap",
    "tokens": "1000 tokens",
    "seconds": "seconds",
}


class ProgressView(Protocol):
    """Shows what happens, on stderr: stdout is for results."""

    def say(self, message: str) -> None:
        """One line about the stack or the command itself."""

    def show(self, progress: Progress) -> None:
        """How far it is."""


@contextmanager
def open_progress() -> Iterator[ProgressView]:
    """A bar on a terminal, else lines; the terminal is as it was on the way out."""
    if not sys.stderr.isatty():
        yield PlainProgress()
        return
    from rich.live import Live

    view = BarProgress()
    with Live(view, console=console(stderr=True), refresh_per_second=4, transient=True) as live:
        view.live = live
        yield view


class PlainProgress:
    """Lines for a log: one when the phase changes, then one every few seconds at most."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._next = 0.0
        self._shown = ("", False)

    def say(self, message: str) -> None:
        """One line."""
        print(plain(message), file=sys.stderr, flush=True)

    def show(self, progress: Progress) -> None:
        """A line, if there is news."""
        now, key = time.monotonic(), (progress.phase, progress.done == progress.total)
        if key == self._shown and (now < self._next or key[1]):
            return
        self._shown, self._next = key, now + PLAIN_SECONDS
        print(f"[{duration(now - self._began)}] {_words(progress)}", file=sys.stderr, flush=True)


class BarProgress:
    """A bar that rich draws four times a second."""

    def __init__(self) -> None:
        self.live: Live | None = None
        self._began = time.monotonic()
        self._progress: Progress | None = None

    def say(self, message: str) -> None:
        """Prints it above the bar."""
        from rich.text import Text

        if self.live:
            self.live.console.print(Text(plain(message), style="dim"))

    def show(self, progress: Progress) -> None:
        """Replaces what is drawn."""
        self._progress = progress

    def __rich__(self) -> RenderableType:
        from rich.text import Text

        gone = duration(time.monotonic() - self._began)
        if self._progress is None:
            return Text(f"starting ({gone})", style="dim")
        share = self._progress.done / max(self._progress.total, 1)
        style = "red" if self._progress.workers == 0 else ""
        return Text(f"{bar(share)} {share:4.0%}   {gone} gone   {_words(self._progress)}", style=style)


def _words(progress: Progress) -> str:
    workers = ""
    if progress.workers is not None:
        workers = f"; {progress.workers} worker{'' if progress.workers == 1 else 's'}"
    return f"{progress.phase}: {progress.done} of {progress.total} {progress.what}{workers}"


# -- results -----------------------------------------------------------------------------------------------------------


def print_report(report: dict[str, Any]) -> None:
    """The report for people."""
    task, rows = report["task"], [*report["self_edits"], *report["controls"]]
    seeds = len(report["seeds"])
    questions = f"{task['questions']} {task['bank']} question{'' if task['questions'] == 1 else 's'}"
    print(
        plain(
            f"{task['title']}: {questions}, {task['probes']} retention probes; student {report['student']['name']};"
            f" grader {report['grader']}; {'at most ' if report['race'] else ''}{seeds} seed{'' if seeds == 1 else 's'}"
        )
    )
    for note in report["notes"]:
        print(f"note: {plain(note)}")
    print()
    _print_rewards(rows, report["baseline"])
    rewarded = [one for one in rows if one["reward"]]
    if rewarded:
        print()
        _print_terms(rewarded, report["weights"])
    if report.get("questions"):
        print()
        _print_questions(report)
    print()
    for line in [*sentences(report), *(f"doubt: {one}" for one in report["doubts"])]:
        print(plain(line))


def sentences(report: dict[str, Any]) -> list[str]:
    """What may be said of the best."""
    said = []
    for one in report["self_edits"]:
        if (fresh := one["fresh"]) and one["name"] == report["best"]:  # not its twins
            said.append(
                f"{one['name']} on {fresh['seeds']} fresh seed{'' if fresh['seeds'] == 1 else 's'}, which had no part"
                f" in choosing it: {_signed(fresh['value'])} ± {fresh['stderr']:.3f}"
            )
    if report["reliability"] is not None:
        said.append(f"reliability {report['reliability']:.2f}: so much of the variance between them is not seed noise")
    for made in report["differences"]:
        word = "is not told apart from" if not made["clear"] else "beats" if made["mean"] > 0 else "is worse than"
        alone = "" if made["seed_stderr"] is None else f" (seeds alone ± {made['seed_stderr']:.3f})"
        said.append(
            f"{made['self_edit']} {word} {made['other']}: {_signed(made['mean'])} ± {made['stderr']:.3f}{alone}"
        )
    known = report["evaluations"]["cached"]
    said.append(
        f"{report['evaluations']['trials']} trials, {duration(report['seconds'])}"
        + (f"; {known} evaluation{' was' if known == 1 else 's were'} known already" if known else "")
    )
    return said


def print_failures(report: dict[str, Any]) -> int:
    """Says on stderr what failed, why and what to do; returns how many."""
    failed = [one for one in (*report["self_edits"], *report["controls"]) if one["failure"]]
    for one in failed:
        failure = one["failure"]
        print(
            f"error: {plain(one['name'])}: {plain(failure['message'])}\n"
            f"  next: {failure['next_step']} ({plain(failure['reason'])})",
            file=sys.stderr,
        )
    return len(failed)


def _print_rewards(rows: Sequence[dict[str, Any]], baseline: dict[str, Any] | None) -> None:
    cells = [_reward_cells(one) for one in rows]
    if baseline is not None:
        accuracy = percent(baseline["accuracy"]) if baseline["correct"] else "-"
        retention = percent(baseline["retention"]) if baseline["probes_correct"] else "-"
        cells.append([NO_EDIT, "0", "", "", "", accuracy, retention, "", "", ""])
    headers = ["", "reward", "±", "± seeds", "seeds", "accuracy", "retention", "tokens", "copied", "stated"]
    _print_aligned(headers, cells, [5, 6])


def _reward_cells(one: dict[str, Any]) -> list[str]:
    reward, overlap = one["reward"], one["overlap"]
    if one["failure"] and not reward:
        return [one["name"], "failed", *[""] * 3, one["failure"]["reason"], *[""] * 4]
    if not reward:
        return [one["name"], "stopped", *[""] * 3, f"look: {one['look']['value']:+.2f} nats", *[""] * 4]
    return [
        one["name"] + ("*" if reward["label_free"] else ""),
        _signed(reward["value"]),
        f"{reward['stderr']:.3f}",
        "" if reward["seed_stderr"] is None else f"{reward['seed_stderr']:.3f}",
        str(reward["seeds"]),
        _change(reward["baseline_accuracy"], reward["accuracy"]),
        _change(reward["baseline_retention"], reward["retention"]),
        str(reward["trained_tokens"]),
        str(overlap["copied"]),
        str(overlap["answers_stated"]),
    ]


def _print_terms(rows: Sequence[dict[str, Any]], weights: dict[str, float]) -> None:
    names = [name for name in _TERMS if any(name in one["reward"]["terms"] for one in rows)]
    cells = [[one["name"], *(_term(one["reward"]["terms"].get(name)) for name in names)] for one in rows]
    counted = ["x weight", *(f"{_sign(name) * weights[name]:g}" if weights[name] else "" for name in names)]
    _print_aligned(["terms", *(_TERMS[name] for name in names)], [*cells, counted], [])


def _print_questions(report: dict[str, Any]) -> None:
    cells: list[list[str]] = []
    baseline = report["baseline"]
    for place, question in enumerate(report["questions"]):
        rows = [(NO_EDIT, [baseline])] if baseline else []
        rows += [(one["name"], one["trials"]) for one in (*report["self_edits"], *report["controls"]) if one["trials"]]
        for row, (name, trials) in enumerate(rows):
            marks = "".join("+" if trial["correct"][place] else "-" for trial in trials if trial["correct"])
            logprobs = [trial["gold_logprobs"][place] for trial in trials if trial["gold_logprobs"]]
            asked = [question["text"], question["answer"]] if row == 0 else ["", ""]
            cells.append([*asked, name, marks, f"{fmean(logprobs):.2f}" if logprobs else ""])
    _print_aligned(["question", "gold answer", "", "right, by seed", "log-prob."], cells, [1, 2, 3])


def _print_aligned(headers: list[str], rows: Sequence[list[str]], left: Sequence[int]) -> None:
    """A table of which all columns but the first and ``left`` stand right."""
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]

    def padded(row: list[str]) -> list[str]:
        return [c if column in (0, *left) else c.rjust(widths[column]) for column, c in enumerate(row)]

    print_table(padded(headers), [padded(row) for row in rows])


def _change(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{percent(before)} -> {percent(after)}"


def _term(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _sign(name: str) -> int:
    return -1 if name in ("retention_loss", "overlap", "tokens", "seconds") else 1


def _signed(value: float) -> str:
    return f"{value:+.3f}"
