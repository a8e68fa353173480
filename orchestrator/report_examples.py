"""Self-edits that the report shows beside what they earned, and what they have of the questions that measured them."""

from __future__ import annotations

from typing import Any

from orchestrator.entries import Entry
from orchestrator.results import Results
from preceptor.convert import augmentations_from_proto, task_from_proto
from preceptor.few_shot.text import task_text
from preceptor.names import task_title
from preceptor.tasks import FewShotTask
from preceptor.v1 import types_pb2 as types

# So many of the best and of the worst.
EXAMPLES = 3
MAX_SHOWN_CHARACTERS = 4000


def examples(results: Results, *, best: bool) -> list[dict[str, Any]]:
    """The self-edits of the rounds that earned most or least, no two for one passage. What was measured again on fresh
    seeds counts by those; where that was done, the best are among them."""
    tasks = {task.id: task for task in results.plan.tasks}
    rewarded = [
        (entry.earned.value, entry) for of in results.rounds for entry in of.entries if entry.earned is not None
    ]
    if best and any(entry.fresh is not None for _, entry in rewarded):
        rewarded = [(value, entry) for value, entry in rewarded if entry.fresh is not None]
    rewarded.sort(key=lambda pair: (pair[0], pair[1].key), reverse=best)
    shown: list[dict[str, Any]] = []
    seen: set[str] = set()
    for _, entry in rewarded:
        if entry.task_id not in seen and len(shown) < EXAMPLES:
            seen.add(entry.task_id)
            shown.append(_example(entry, tasks[entry.task_id]))
    return shown


def _example(entry: Entry, task: types.Task) -> dict[str, Any]:
    edit, reward, chosen = entry.self_edit, entry.earned, entry.reward
    assert edit is not None  # it has a reward
    assert reward is not None
    graded = "gain" in reward.terms
    audit = entry.evaluation.overlap if entry.evaluation and entry.evaluation.HasField("overlap") else None
    return {
        "title": task_title(task),
        "labels": sorted(dict(task.labels).items()),
        "text": _cut(_text(task)),
        "documents": [_cut(document) for document in edit.documents[:40]],
        "more_documents": max(0, len(edit.documents) - 40),
        "directive": _directive(edit.directive),
        "round": int(entry.key.stage.rpartition("-")[2]),
        "reward": reward.value,
        "stderr": reward.stderr,
        "seeds": reward.seeds,
        "chosen_by": chosen.value if entry.fresh is not None and chosen is not None else None,
        "label_free": reward.label_free,
        "terms": sorted(reward.terms.items()),
        "questions": reward.questions,
        "overlap": audit,
        "accuracy": reward.accuracy if graded else None,
        "baseline": reward.baseline_accuracy if graded else None,
        "retention": reward.retention if reward.HasField("retention") else None,
    }


def _text(task: types.Task) -> str:
    """What the teacher was shown."""
    plain = task_from_proto(task)
    return task_text(plain) if isinstance(plain, FewShotTask) else plain.text


def _directive(directive: types.Directive) -> list[tuple[str, str]]:
    """What the directive says, in its order."""
    return [
        (descriptor.name.replace("_", " "), _said(descriptor.name, value))
        for descriptor, value in directive.ListFields()
    ]


def _said(name: str, value: Any) -> str:
    if name == "loss_mask":
        return str(types.LossMask.Name(value).removeprefix("LOSS_MASK_").lower())
    if name == "fine_tuning":
        return str(types.FineTuning.Name(value).removeprefix("FINE_TUNING_").lower())
    if name == "augmentations":
        asked = augmentations_from_proto(value)
        return ", ".join(of for of in asked.__dataclass_fields__ if getattr(asked, of)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + " …"
