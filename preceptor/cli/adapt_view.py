"""What ``preceptor adapt`` shows: progress on stderr, what will be done, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from preceptor.cli.live import duration
from preceptor.cli.output import console, plain, print_json, print_table
from preceptor.cli.run_request import dry_run_text
from preceptor.cli.summary import interval, percent
from preceptor.task_sources import RunTasks
from preceptor.tasks import Bank

if TYPE_CHECKING:
    from preceptor.adapt.adaptation import Wish
    from preceptor.cli.evaluate_view import ProgressView
    from preceptor.cli.measuring import Progress
    from preceptor.v1.orchestrator_pb2 import WatchRunResponse

# A table stays readable; lineage.json has all.
SHOWN_PASSAGES = 40


class LabProgress:
    """What a lab tells, as one line of progress."""

    def __init__(self, view: ProgressView) -> None:
        self._view = view

    def say(self, message: str) -> None:
        """One line."""
        self._view.say(message)

    def step(self, number: int, steps: int, words: str, seconds_left: float | None) -> None:
        """There are no steps."""

    def show(self, snapshot: WatchRunResponse) -> None:
        """There are no runs."""

    def progress(self, progress: Progress) -> None:
        """How far it is."""
        self._view.show(progress)


def print_dry_run(wish: Wish, as_json: bool) -> None:
    """What would be done."""
    config, subject = wish.config, wish.subject
    if as_json:
        print_json(
            {
                "config": config.model_dump(mode="json"),
                "joint_training": wish.joint.training.model_dump(mode="json"),
                "student": wish.student or None,
                "policy": wish.policy or None,
                "passages": [passage.title for passage in subject.passages],
                "self_edits": len(subject.passages) * config.rounds.self_edits,
                "sealed_questions": sum(len(passage.questions_of(Bank.SEALED)) for passage in subject.passages),
                "probes": len(subject.probes),
                "replay_documents": len(subject.replay_documents),
                "notes": list(subject.notes),
            }
        )
        return
    tasks = RunTasks((), subject.passages, subject.probes, subject.replay_documents, "as in the file", subject.notes)
    _, _, settings = dry_run_text(config, tasks).partition("\n\n")
    print(f"# {len(subject.passages)} passages, {config.rounds.self_edits} self-edits each")
    sealed = sum(len(passage.questions_of(Bank.SEALED)) for passage in subject.passages)
    print(f"# asked before and after: {sealed} sealed questions, {len(subject.probes)} probes")
    for note in subject.notes:
        print(plain(f"# note: {note}"))
    changed = wish.joint.training.model_dump()
    differs = {name: value for name, value in changed.items() if value != getattr(config.training, name)}
    print(plain("# the joint update has " + ", ".join(f"{name} = {value}" for name, value in differs.items())))
    print(plain(settings))


def print_results(record: dict[str, Any], folder: Path) -> None:
    """The record for people."""
    passages, kept = record["passages"], sum(one["kept"] for one in record["passages"])
    shown = passages[:SHOWN_PASSAGES]
    print_table(
        ["passage", "written", "best reward", "kept", "before", "after"],
        [
            [
                one["title"],
                len(one["candidates"]),
                _reward(one["fresh"]),
                "yes" if one["kept"] else f"no: {one['refused']}",
                percent(one["before"]),
                percent(one["after"]),
            ]
            for one in shown
        ],
        title=f"{kept} of {len(passages)} passages have a self-edit that helps",
    )
    if len(passages) > len(shown):
        _print(f"... and {len(passages) - len(shown)} more (lineage.json has all)")
    if record["results"]:
        print_table(
            ["", "questions", "before", "after", "difference", "95% interval"],
            [
                [
                    row["name"],
                    row["questions"],
                    percent(row["before"]["mean"]),
                    percent(row["after"]["mean"]),
                    f"{row['difference']['mean'] * 100:+.1f}",
                    interval([row["difference"]["low"], row["difference"]["high"]], signed=True),
                ]
                for row in record["results"]
            ],
        )
    if joint := record["joint"]:
        _print(
            f"one update: {joint['documents']} documents, {joint['trained_tokens']} tokens,"
            f" {joint['steps']} steps; student {record['student'].get('name', '')}, policy {record['policy']['id']}"
        )
    for note in record["notes"]:
        _print(f"note: {note}")
    if record["outcome"] == "adapted":
        _print(f"adapter: {folder / 'adapter'}")
    if "merged_sha256" in record:
        _print(f"merged:  {folder / 'merged'}")
    _print(f"lineage: {folder / 'lineage.json'} ({duration(record['seconds'])})")


def _reward(fresh: dict[str, Any] | None) -> str:
    return f"{fresh['reward']:+.3f} ± {fresh['stderr']:.3f}" if fresh and "reward" in fresh else "-"


def _print(line: str) -> None:
    console().print(plain(line), markup=False)
