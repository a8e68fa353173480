"""report.html: one self-contained page about a finished run. No script, no request to anywhere.

Texts of tasks and teachers are shown as text (autoescape); the pictures are made here and are the only markup that is
taken as it is.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from orchestrator.entries import HELDOUT, SELECTION, Entry
from orchestrator.heldout import TRAINED
from orchestrator.results import Results
from orchestrator.round_summary import PHASES
from orchestrator.summary import DIFFERENCES
from orchestrator.timing import RUN
from preceptor import __version__
from preceptor.v1 import types_pb2 as types

ARM_WORDS = {
    "no_edit": "no edit",
    "passage_only": "raw passage only",
    "untrained_teacher": "untrained teacher",
    "fixed_strategy": "best fixed strategy",
    "trained_teacher": "trained teacher",
    "oracle": "oracle",
    "shuffled_facts": "shuffled facts",
}
# So many of the best and of the worst self-edits are shown.
EXAMPLES = 3
MAX_SHOWN_CHARACTERS = 4000


class ReportRenderer:
    """Renders reports, one at a time (matplotlib's settings are the process's)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._environment = Environment(
            loader=PackageLoader("orchestrator"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters |= {"percent": _percent, "points": _points, "signed": _signed, "seconds": _seconds}

    def render(self, results: Results, summary: Mapping[str, Any]) -> str:
        """The page. ``summary`` is ``build_summary(results)``."""
        with self._lock:
            pictures = _pictures(summary, results)
        return self._environment.get_template("report.html.j2").render(
            summary=summary,
            pictures=pictures,
            arm_words=ARM_WORDS,
            difference_words={
                name: f"{ARM_WORDS[first]} − {ARM_WORDS[second]}" for name, (first, second) in DIFFERENCES.items()
            },
            labels=_labels(summary),
            best=_examples(results, best=True),
            worst=_examples(results, best=False),
            failures=_failures(results.all_entries),
            malformed=_malformed(results.all_entries),
            stages=_stages(results),
            phases=PHASES,
            config=json.dumps(results.plan.config.model_dump(mode="json"), indent=2, ensure_ascii=False),
            version=__version__,
            created=datetime.fromtimestamp(results.run.created, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )


def _pictures(summary: Mapping[str, Any], results: Results) -> dict[str, Markup | None]:
    # Imported when the first report is made: it takes a second that no service start should wait for.
    from orchestrator import pictures

    drawn: dict[str, Markup | None] = {"rewards": None, "arms": None}
    rewards = [
        (of["round"], of["reward"]["mean"], of["reward"]["stderr"])
        for of in summary["rounds"]
        if of["reward"]["mean"] is not None
    ]
    if rewards:
        drawn["rewards"] = Markup(pictures.reward_by_round(rewards))
    if summary["heldout"]:
        arms = [
            (ARM_WORDS[name], arm["accuracy"], (arm["ci95"][0], arm["ci95"][1]), name == TRAINED)
            for name, arm in summary["heldout"]["arms"].items()
            if arm and arm["accuracy"] is not None
        ]
        if arms:
            drawn["arms"] = Markup(pictures.accuracy_by_arm(arms))
    drawn["time"] = Markup(pictures.time_by_phase(_stages(results)))
    return drawn


def _stages(results: Results) -> list[tuple[str, dict[str, float]]]:
    """Seconds by phase of every round, of the measurement and of the rest."""
    stages = [(f"round {of.number}", dict(of.seconds)) for of in results.rounds]
    for stage, words in ((HELDOUT, "held-out"), (RUN, "start, end")):
        seconds = {phase: value for (of, phase), value in results.seconds.items() if of == stage}
        if seconds:
            stages.append((words, seconds))
    return stages


def _labels(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each label: its values, and the accuracy of each arm on them."""
    if not summary["heldout"]:
        return []
    arms = {name: arm for name, arm in summary["heldout"]["arms"].items() if arm}
    keys = sorted({key for arm in arms.values() for key in arm["by_label"]})
    tables = []
    for key in keys:
        values = list(dict.fromkeys(value for arm in arms.values() for value in arm["by_label"].get(key, {})))
        rows = [
            {
                "value": value,
                "passages": max(
                    arm["by_label"].get(key, {}).get(value, {}).get("passages", 0) for arm in arms.values()
                ),
                "cells": [arm["by_label"].get(key, {}).get(value) for arm in arms.values()],
            }
            for value in values
        ]
        tables.append({"label": key, "arms": list(arms), "rows": rows})
    return tables


def _examples(results: Results, *, best: bool) -> list[dict[str, Any]]:
    """The self-edits of the rounds that earned most or least, no two for one passage."""
    tasks = {task.id: task for task in results.plan.tasks}
    rewarded = [entry for of in results.rounds for entry in of.entries if entry.reward is not None]
    rewarded.sort(key=lambda entry: (entry.reward.value if entry.reward else 0.0, entry.key), reverse=best)
    shown: list[dict[str, Any]] = []
    seen: set[str] = set()
    for entry in rewarded:
        if entry.task_id not in seen and len(shown) < EXAMPLES:
            seen.add(entry.task_id)
            shown.append(_example(entry, tasks[entry.task_id]))
    return shown


def _example(entry: Entry, task: types.Task) -> dict[str, Any]:
    edit, reward = entry.self_edit, entry.reward
    assert edit is not None  # it has a reward
    assert reward is not None
    return {
        "title": task.passage.title,
        "labels": sorted(dict(task.labels).items()),
        "text": _cut(task.passage.text),
        "documents": [_cut(document) for document in edit.documents[:40]],
        "more_documents": max(0, len(edit.documents) - 40),
        "directive": _directive(edit.directive),
        "round": int(entry.key.stage.rpartition("-")[2]),
        "reward": reward.value,
        "stderr": reward.stderr,
        "accuracy": reward.accuracy,
        "baseline": reward.baseline_accuracy,
        "retention": reward.retention if reward.HasField("retention") else None,
    }


def _directive(directive: types.Directive) -> list[tuple[str, str]]:
    """What the directive says, in its order."""
    said = []
    for descriptor, value in directive.ListFields():
        if descriptor.name == "loss_mask":
            value = types.LossMask.Name(value).removeprefix("LOSS_MASK_").lower()
        said.append((descriptor.name.replace("_", " "), f"{value:g}" if isinstance(value, float) else str(value)))
    return said


def _failures(entries: Sequence[Entry]) -> list[tuple[str, str, int]]:
    """Reason, an example of the message, and how often."""
    count: Counter[str] = Counter()
    messages: dict[str, str] = {}
    for entry in entries:
        if entry.failed and entry.evaluation is not None:
            reason = entry.evaluation.failure.reason or "CANCELLED"
            count[reason] += 1
            messages.setdefault(reason, entry.evaluation.failure.message[:300])
    return [(reason, messages[reason], number) for reason, number in count.most_common()]


def _malformed(entries: Sequence[Entry]) -> list[tuple[str, int]]:
    """The usual complaints, and how often. Selection uses one completion under several directives; counted once."""
    written = {
        (
            entry.key.stage,
            entry.task_id,
            entry.completion,
            entry.key.index if entry.key.stage != SELECTION else 0,
        ): entry
        for entry in entries
        if entry.malformed
    }
    return Counter(entry.malformed for entry in written.values()).most_common(10)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + " …"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f}%"


def _points(value: float | None) -> str:
    """A difference of shares in percentage points."""
    return "–" if value is None else f"{value * 100:+.1f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f} s" if value < 60 else f"{int(value // 60)} min {int(value % 60)} s"
