"""report.html: one self-contained page about a finished run. No script, no request to anywhere.

Texts of tasks and teachers are shown as text (autoescape); the pictures are made here and are the only markup that is
taken as it is.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from orchestrator.entries import HELDOUT, SELECTION, Entry
from orchestrator.report_examples import examples
from orchestrator.results import Results
from orchestrator.round_summary import PHASES, distinct
from orchestrator.round_summary import groups as groups_of
from orchestrator.summary import differences
from orchestrator.timing import RUN
from preceptor import __version__
from preceptor.arms import CONTROL, TRAINED, words
from preceptor.groups import advantages
from preceptor.names import task_title

REWARD_OF = {
    "all": "all self-edits",
    "first_seed": "all self-edits, first seed",
    "survivors": "those left after a look",
}
# Terms that are subtracted from a reward.
COSTS = ("retention_loss", "overlap", "tokens", "seconds")
# What else is drawn by round where the updates say it.
DRIFT = {"diversity": "diversity of a group", "kl": "KL from the untrained teacher, nats a token"}
# Passages in the picture of the last round, and letters of a passage's name there.
MAX_ROWS, MAX_ROW_NAME = 24, 22


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
        self._environment.filters |= {
            "percent": _percent,
            "points": _in_points,
            "signed": _signed,
            "error": _error,
            "seconds": _seconds,
        }

    def render(self, results: Results, summary: Mapping[str, Any]) -> str:
        """The page. ``summary`` is ``build_summary(results)``."""
        with self._lock:
            pictures = _pictures(summary, results)
        return self._environment.get_template("report.html.j2").render(
            summary=summary,
            pictures=pictures,
            arm_words=_arm_words(results),
            difference_words=_difference_words(results),
            control=CONTROL,
            passages="tasks" if results.plan.few_shot else "passages",
            strategy=_strategy(summary),
            reward_of=REWARD_OF[_reward_of(summary)],
            unlabelled=_unlabelled(summary),
            formula=_formula(summary["reward"]["weights"]),
            terms=sorted({name for of in summary["rounds"] for name in of["terms"]}),
            labels=_labels(summary),
            best=examples(results, best=True),
            worst=examples(results, best=False),
            failures=_failures(results.all_entries),
            malformed=_complaints(results.all_entries, "malformed"),
            too_costly=_complaints(results.all_entries, "too_costly"),
            stages=_stages(results),
            phases=PHASES,
            config=json.dumps(results.plan.config.model_dump(mode="json"), indent=2, ensure_ascii=False),
            version=__version__,
            created=datetime.fromtimestamp(results.run.created, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )


def _pictures(summary: Mapping[str, Any], results: Results) -> dict[str, Markup | None]:
    # Imported when the first report is made: it takes a second that no service start should wait for.
    from orchestrator import pictures

    names = ("rewards", "looks", "diversity", "kl", "groups", "arms", "differences")
    drawn: dict[str, Markup | None] = dict.fromkeys(names)
    if lines := _reward_lines(summary, pictures.Line):
        drawn["rewards"] = Markup(
            pictures.by_round(lines, "mean label-free reward" if _unlabelled(summary) else "mean reward")
        )
    if looks := _points(summary, lambda of: of["look"]):
        drawn["looks"] = Markup(pictures.by_round([pictures.Line("all", looks)], "mean first look, nats"))
    for key, words_of in DRIFT.items():
        if points := [(of["round"], of[key], None) for of in summary["rounds"] if of[key] is not None]:
            drawn[key] = Markup(pictures.by_round([pictures.Line("all", points)], words_of, signed=False))
    if groups := _last_groups(results, pictures.Dots):
        drawn["groups"] = Markup(pictures.rewards_by_group(groups))
    if summary["heldout"]:
        named, pairs = _arm_words(results), differences(results.plan.arms)
        arms = [
            (
                named[name] + " (label-free)" * bool(arm["label_free"]),
                arm["accuracy"],
                (arm["ci95"][0], arm["ci95"][1]),
                name == TRAINED,
            )
            for name, arm in summary["heldout"]["arms"].items()
            if arm and arm["accuracy"] is not None
        ]
        if arms:
            drawn["arms"] = Markup(pictures.accuracy_by_arm(arms))
        rows = [
            (_row_name(*pairs[name], named), of["mean"], (of["ci95"][0], of["ci95"][1]), name != CONTROL)
            for name, of in summary["heldout"]["differences"].items()
            if of
        ]
        if rows:
            drawn["differences"] = Markup(pictures.differences(rows))
    drawn["time"] = Markup(pictures.time_by_phase(_stages(results)))
    return drawn


def _arm_words(results: Results) -> dict[str, str]:
    return {arm: words(arm, results.plan.few_shot) for arm in results.plan.arms}


def _difference_words(results: Results) -> dict[str, str]:
    named = _arm_words(results)
    return {
        name: f"{named[first]} − {named[second]}" for name, (first, second) in differences(results.plan.arms).items()
    }


def _row_name(first: str, second: str, named: Mapping[str, str]) -> str:
    """Short, since the picture is narrow and says that they are the trained teacher's."""
    return f"− {named[second]}" if first == TRAINED else f"{named[first]} − {named[second]}"


def _strategy(summary: Mapping[str, Any]) -> str:
    """The fixed strategy in words; empty where none was chosen."""
    chosen = (summary["heldout"] or {}).get("fixed_strategy")
    if not chosen:
        return ""
    said = [f"format {chosen['prompt_format']}"] if chosen["prompt_format"] else []
    said += [
        f"learning rate {chosen['learning_rate']}",
        f"{chosen['epochs']} epochs",
        f"replay {chosen['replay_share']}",
    ]
    said += [f"{name.replace('_', ' ')} {chosen[name]}" for name in ("rank", "targets", "loss_mask") if chosen[name]]
    if asked := chosen["augmentations"]:
        said.append(f"augmentations {', '.join(name for name, wanted in asked.items() if wanted) or 'none'}")
    return ", ".join(said)


def _reward_lines(summary: Mapping[str, Any], line: Callable[..., Any]) -> list[Any]:
    """The mean reward of each round, and where the best of each group were measured again, theirs."""
    found = [
        (words, _points(summary, of))
        for words, of in (
            (REWARD_OF[_reward_of(summary)], lambda of: of["reward"]),
            ("best of each group, on fresh seeds", lambda of: of["fresh"]),
        )
    ]
    return [line(words, points) for words, points in found if points]


def _points(
    summary: Mapping[str, Any], of: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
) -> list[tuple[int, float, float | None]]:
    """Round, mean and its error, of the rounds that have them."""
    return [
        (each["round"], mean["mean"], mean["stderr"])
        for each in summary["rounds"]
        if (mean := of(each)) is not None and mean["mean"] is not None
    ]


def _reward_of(summary: Mapping[str, Any]) -> str:
    """What the rounds' mean rewards are of."""
    return str(summary["rounds"][0]["reward"]["of"]) if summary["rounds"] else "all"


def _unlabelled(summary: Mapping[str, Any]) -> bool:
    return any(of["label_free"] for of in summary["rounds"])


def _last_groups(results: Results, dots: Callable[..., Any]) -> list[Any]:
    """The groups of the last round that has any reward, the best first."""
    tasks = {task.id: task_title(task) for task in results.plan.tasks}
    for of in reversed(results.rounds):
        found = []
        for entries in groups_of(of.entries).values():
            again = {entry.evaluation.id for entry in entries if entry.evaluation and entry.fresh is not None}
            evaluations = distinct(entries)
            rewards = [
                (evaluation.reward.value, error, evaluation.id in again)
                for evaluation, (_, error) in zip(evaluations, advantages(evaluations), strict=True)
            ]
            title = tasks.get(entries[0].task_id) or entries[0].task_id
            found.append(dots(title if len(title) <= MAX_ROW_NAME else title[: MAX_ROW_NAME - 1] + "…", rewards))
        if found:
            return sorted(found, key=lambda group: -max(group.rewards)[0])[:MAX_ROWS]
    return []


def _stages(results: Results) -> list[tuple[str, dict[str, float]]]:
    """Seconds by phase of every round, of the measurement and of the rest."""
    stages = [(f"round {of.number}", dict(of.seconds)) for of in results.rounds]
    for stage, shown in ((HELDOUT, "held-out"), (RUN, "start, end")):
        seconds = {phase: value for (of, phase), value in results.seconds.items() if of == stage}
        if seconds:
            stages.append((shown, seconds))
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


def _formula(weights: Mapping[str, float]) -> str:
    """The reward in words, e.g. "1 × gain − 0.3 × retention loss"."""
    weights = weights or {"gain": 1.0}
    signed = [(-weight if name in COSTS else weight, name.replace("_", " ")) for name, weight in weights.items()]
    first, *rest = [
        f"{'− ' if weight < 0 else '+ '}{abs(weight):g} × {name}" for weight, name in sorted(signed, reverse=True)
    ]
    return " ".join((first.removeprefix("+ "), *rest))


def _failures(entries: Sequence[Entry]) -> list[tuple[str, str, int]]:
    """Reason, an example of the message, and how often."""
    count: Counter[str] = Counter()
    messages: dict[str, str] = {}
    for entry in entries:
        for evaluation in entry.failures:
            reason = evaluation.failure.reason or "CANCELLED"
            count[reason] += 1
            messages.setdefault(reason, evaluation.failure.message[:300])
    return [(reason, messages[reason], number) for reason, number in count.most_common()]


def _complaints(entries: Sequence[Entry], field: str) -> list[tuple[str, int]]:
    """What was usually said in this field of the self-edits that could not be trained on, and how often. Selection uses
    one completion under several directives; counted once."""
    written = {
        (
            entry.key.stage,
            entry.task_id,
            entry.completion,
            entry.key.index if entry.key.stage != SELECTION else 0,
        ): entry
        for entry in entries
        if getattr(entry, field)
    }
    return Counter(str(getattr(entry, field)) for entry in written.values()).most_common(10)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f}%"


def _in_points(value: float | None) -> str:
    """A difference of shares in percentage points."""
    return "–" if value is None else f"{value * 100:+.1f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f} s" if value < 60 else f"{int(value // 60)} min {int(value % 60)} s"
