"""The end of a run in a terminal: the table of held-out arms, what may be claimed, and where the files are."""

from __future__ import annotations

from typing import Any

from preceptor.arms import CONTROL, words
from preceptor.cli.follow import Results
from preceptor.cli.live import duration
from preceptor.cli.output import console, plain, print_table


def print_results(results: Results) -> None:
    """Prints the arms, the differences with a verdict, the totals and the paths."""
    summary = results.summary
    heldout = summary.get("heldout") or {}
    if arms := heldout.get("arms"):
        few_shot = summary.get("kind") == "few_shot"
        print_table(
            ["arm", "accuracy", "95% interval", "retention", "tokens", "seconds"],
            [
                [
                    words(name, few_shot),
                    percent((arm or {}).get("accuracy")),
                    interval((arm or {}).get("ci95"), signed=False),
                    percent((arm or {}).get("retention")),
                    _amount((arm or {}).get("trained_tokens"), 0),
                    _amount((arm or {}).get("worker_seconds"), 2),
                ]
                for name, arm in arms.items()  # an arm that was not measured is null
            ],
            title=(
                f"held-out: {heldout.get('passages')} {'tasks' if few_shot else 'passages'},"
                f" {heldout.get('questions')} questions"
                + (f" (bank: {heldout['bank']})" if heldout.get("bank") else "")
            ),
        )
    else:
        _print("no held-out measurement was made")
    for line in verdicts(heldout.get("differences") or {}):
        _print(line)
    for note in summary.get("notes") or ():
        _print(f"note: {note}")
    throughput = summary.get("throughput") or {}
    counted = [*(summary.get("rounds") or ()), heldout]
    cached = sum((entry.get("evaluations") or {}).get("cached", 0) for entry in counted)
    totals = [f"{throughput.get('trials', '?')} trials"]
    if cached:
        totals.append(f"{cached} evaluations were known already")
    if summary.get("wall_seconds") is not None:
        totals.append(f"{duration(summary['wall_seconds'])} in all")
    if (first := summary.get("time_to_first_reward_seconds")) is not None and first >= 0:
        totals.append(f"first reward after {duration(first)}")
    if summary.get("peak_memory_bytes"):
        totals.append(f"peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB")
    _print(", ".join(totals))
    _print(f"summary: {results.summary_path}")
    _print(f"report:  {results.report_path}")


def verdicts(differences: dict[str, Any]) -> list[str]:
    """One sentence for each paired difference; a gain is claimed only where the interval is above zero."""
    lines = []
    for name, difference in differences.items():
        if name == CONTROL:
            continue  # of which no side is better: the notes say what it shows
        first, _, second = name.partition("_minus_")
        mean, ci95 = (difference or {}).get("mean"), (difference or {}).get("ci95")
        if mean is None or not ci95:
            continue
        numbers = f"{mean * 100:+.1f} points, 95% interval {interval(ci95, signed=True)}"
        if ci95[0] > 0:
            word = "better than"
        elif ci95[1] < 0:
            word = "worse than"
        else:
            word = "not told apart from"
        if questions := difference.get("needed_questions"):
            numbers += f"; to see a difference of this size: about {questions} questions"
        lines.append(f"{first} is {word} {second}: {numbers}")
    return lines


def percent(value: float | None) -> str:
    """A share as a percentage; ``-`` where it was not measured."""
    return "-" if value is None else f"{value * 100:.1f}%"


def _amount(value: float | None, digits: int) -> str:
    """A mean of the fine-tunes of an arm; ``-`` where there was none."""
    return "-" if value is None else f"{value:.{digits}f}"


def interval(bounds: list[float] | None, signed: bool) -> str:
    """Bounds in percent (or points)."""
    if not bounds:
        return "-"
    sign = "+" if signed else ""
    return f"[{bounds[0] * 100:{sign}.1f}, {bounds[1] * 100:{sign}.1f}]"


def _print(line: str) -> None:
    console().print(plain(line), markup=False)
