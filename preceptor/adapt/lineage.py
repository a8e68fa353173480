"""``lineage.json``: where a set of weights comes from, whole enough to make it again, and to take it back.

A record names the student that was changed (source, commit, edits it stood on), who wrote the study material, every
self-edit with what it earned and the evaluation that says so, the settings and seeds of the update, what it came to,
and the adapter by its hash. ``student`` of the next adaptation is ``result`` of this one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor import __version__
from preceptor.adapt.measure import PassageEdits, Written
from preceptor.errors import PreceptorError
from preceptor.names import content_id, message_json, student_identity
from preceptor.racing import SUCCEEDED
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import types_pb2 as types

SCHEMA = "preceptor.lineage/1"
FILE = "lineage.json"
ADAPTED, NOTHING_HELPED = "adapted", "nothing_helped"


def adaptation_id(student: types.PinnedStudent, joint: evaluator.Evaluation) -> str:
    """Stands for the weights that were changed and for the update."""
    return content_id("adaptation", [student_identity(student), joint.id])


def promoted(student: types.PinnedStudent, adapter: types.Artifact) -> types.PinnedStudent:
    """The student with one more edit on it."""
    result = types.PinnedStudent()
    result.CopyFrom(student)
    result.adapters.append(adapter)
    return result


def record(
    *,
    asked: str,
    student: types.PinnedStudent,
    policy: teacher.Policy,
    prompt_format: str,
    passages: Sequence[PassageEdits],
    places: Mapping[str, str],
    config: Mapping[str, Any],
    joint: evaluator.Evaluation | None,
    joint_training: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    shares: Sequence[tuple[float | None, float | None]],
    time: str,
    seconds: float,
    notes: Sequence[str],
) -> dict[str, Any]:
    """The record; ``joint`` None: nothing helped, and nothing was changed. ``asked``: an id of what was asked for, as
    it was asked; ``time``: when the record was written."""
    adapter = joint.trials[0].adapter if joint is not None else None
    return {
        "schema": SCHEMA,
        "id": adaptation_id(student, joint) if joint is not None else None,
        "asked": asked,
        "outcome": ADAPTED if joint is not None else NOTHING_HELPED,
        "student": message_json(student),
        "result": message_json(promoted(student, adapter)) if adapter is not None else None,
        "adapter": message_json(adapter) if adapter is not None else None,
        "policy": {
            "id": policy.id,
            "parent_id": policy.parent_id,
            "base_source": policy.base_source,
            "base_commit": policy.base_commit,
            "adapter": message_json(policy.adapter) if policy.HasField("adapter") else None,
            "prompt_format": prompt_format,
        },
        "passages": [_passage(one, places, shares[number] if shares else None) for number, one in enumerate(passages)],
        "joint": None if joint is None else _joint(joint, joint_training),
        "results": list(results),
        "config": dict(config),
        "notes": list(notes),
        "preceptor_version": __version__,
        "time": time,
        "seconds": round(seconds, 3),
    }


def read(folder: Path) -> dict[str, Any] | None:
    """The record in ``folder``; None where there is none. Raises PreceptorError(OUTPUT_NOT_WRITABLE) for a file of
    this name that is no record: it is somebody's, and nothing is written over it."""
    file = folder / FILE
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise ValueError(found["schema"])
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise PreceptorError("OUTPUT_NOT_WRITABLE", f"there is a {FILE} that is no record", file=str(file)) from None


def _passage(
    one: PassageEdits, places: Mapping[str, str], share: tuple[float | None, float | None] | None
) -> dict[str, Any]:
    kept = one.kept
    return {
        "task_id": one.task.id,
        "title": one.task.passage.title,
        "place": places.get(one.task.passage.text),
        "kept": kept is not None,
        "refused": one.refused or None,
        "self_edit": None if kept is None else message_json(kept),
        "best": None if one.best is None else one.best.written.index,
        "fresh": _earned(one.fresh),
        "before": share[0] if share else None,
        "after": share[1] if share else None,
        "candidates": [_candidate(written) for written in one.written],
    }


def _candidate(one: Written) -> dict[str, Any]:
    return {
        "index": one.written.index,
        "status": teacher.SelfEditStatus.Name(one.written.status).removeprefix("SELF_EDIT_STATUS_").lower(),
        "reason": one.written.malformed_reason or None,
        "documents": len(one.written.self_edit.documents),
        "stopped": one.stopped,
        "look": _earned(one.look),
        "evaluation": _earned(one.evaluation),
    }


def _earned(evaluation: evaluator.Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    made: dict[str, Any] = {"evaluation_id": evaluation.id, "seeds": [str(trial.seed) for trial in evaluation.trials]}
    if evaluation.state == SUCCEEDED:
        return made | {"reward": evaluation.reward.value, "stderr": evaluation.reward.stderr}
    return made | {"failure": evaluation.failure.reason or "CANCELLED"}


def _joint(joint: evaluator.Evaluation, training: Mapping[str, Any]) -> dict[str, Any]:
    (trial,) = joint.trials
    return {
        "evaluation_id": joint.id,
        "documents": len(joint.self_edit.documents),
        "training": dict(training),
        "seed": str(trial.seed),
        "steps": trial.steps,
        "trained_tokens": trial.trained_tokens,
        "first_loss": trial.first_loss,
        "final_loss": trial.final_loss,
        "worker_seconds": round(trial.seconds, 3),
    }
