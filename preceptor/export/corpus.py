"""The synthetic corpus of runs: one line for each study document, with where it comes from and what it earned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preceptor.completions import render_directive
from preceptor.convert import directive_from_proto
from preceptor.export.runs import ExportedRun, Selection, groups
from preceptor.export.writers import Write, json_lines, parquet
from preceptor.v1 import orchestrator_pb2 as pb

if TYPE_CHECKING:
    from preceptor.v1.orchestrator_pb2_grpc import OrchestratorServiceStub

SUFFIXES = (".jsonl", ".parquet")
# Of a line, with the types of a Parquet file.
COLUMNS = {
    "text": "string",
    "title": "string",
    "task": "string",
    "run": "string",
    "round": "int32",
    "index": "int32",
    "document": "int32",
    "policy": "string",
    "prompt_format": "string",
    "student": "string",
    "student_commit": "string",
    "reward": "float64",
    "reward_stderr": "float64",
    "label_free": "bool_",
    "directive": "string",
}


@dataclass(slots=True)
class Counts:
    """What became of the self-edits."""

    self_edits: int = 0
    exported: int = 0
    documents: int = 0
    characters: int = 0
    malformed: int = 0
    too_costly: int = 0
    without_reward: int = 0
    not_chosen: int = 0
    without_documents: int = 0  # of few-shot tasks: directives alone


def write_corpus(
    stub: OrchestratorServiceStub,
    runs: Sequence[ExportedRun],
    selection: Selection,
    path: Path,
    on_group: Callable[[int], None] = lambda _self_edits: None,
) -> Counts:
    """Writes the documents of the runs to a ``.jsonl`` or ``.parquet`` file, and tells what was left out.

    ``on_group`` is told how many self-edits have been seen. Raises what ListSelfEdits raises, OUTPUT_NOT_WRITABLE and
    EXTRA_MISSING; then there is no file, or the one that was there.
    """
    counts = Counts()
    opened: AbstractContextManager[Write] = parquet(path, COLUMNS) if path.suffix == ".parquet" else json_lines(path)
    with opened as write:
        for run in runs:
            for group in groups(stub, run.id):
                chosen = selection.of(group)
                _count(counts, group, chosen)
                for edit in chosen:
                    for line in corpus_lines(run, edit):
                        counts.documents += 1
                        counts.characters += len(line["text"])
                        write(line)
                on_group(counts.self_edits)
    return counts


def corpus_lines(run: ExportedRun, edit: pb.LedgerSelfEdit) -> Iterator[dict[str, Any]]:
    """The documents of one self-edit as lines."""
    for number, text in enumerate(edit.self_edit.documents):
        yield {
            "text": text,
            "title": edit.task_title,
            "task": edit.task_id,
            "run": run.id,
            "round": edit.round,
            "index": edit.index,
            "document": number,
            "policy": edit.policy_id,
            "prompt_format": run.prompt_format,
            "student": run.student,
            "student_commit": edit.student_commit or run.student_commit,
            "reward": edit.reward.value,
            "reward_stderr": edit.reward.stderr,
            "label_free": edit.reward.label_free,
            "directive": render_directive(directive_from_proto(edit.self_edit.directive)),
        }


def _count(counts: Counts, group: Sequence[pb.LedgerSelfEdit], chosen: Sequence[pb.LedgerSelfEdit]) -> None:
    earned = sum(edit.HasField("reward") and edit.HasField("self_edit") for edit in group)
    counts.self_edits += len(group)
    counts.exported += len(chosen)
    counts.malformed += sum(edit.malformed for edit in group)
    counts.too_costly += sum(bool(edit.too_costly) for edit in group)
    counts.without_reward += sum(not (edit.malformed or edit.too_costly or edit.HasField("reward")) for edit in group)
    counts.not_chosen += earned - len(chosen)
    counts.without_documents += sum(not edit.self_edit.documents for edit in chosen)
