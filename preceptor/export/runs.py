"""A run's self-edits from the orchestrator, group after group: never more than one group of a task in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from preceptor.channel import call
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import types_pb2 as types

if TYPE_CHECKING:
    from preceptor.v1.orchestrator_pb2_grpc import OrchestratorServiceStub

# Self-edits of a page: with completions of real models still far below the cap of a message.
PAGE = 100


@dataclass(frozen=True, slots=True)
class ExportedRun:
    """A run, and what its self-edits have in common."""

    id: str
    name: str
    student: str
    student_commit: str
    prompt_format: str
    planned: int  # self-edits of all its rounds
    questions_written: bool = False  # by a model, so that rewards are not about the tasks' own questions


@dataclass(frozen=True, slots=True)
class Selection:
    """Which self-edits are exported: of those with a reward the best of each group, above a bound."""

    best: int | None = None
    min_reward: float | None = None

    def of(self, group: Sequence[pb.LedgerSelfEdit]) -> list[pb.LedgerSelfEdit]:
        """The chosen ones in the order in which they were written. Of equal rewards the first are the best."""
        earned = [edit for edit in group if edit.HasField("reward") and edit.HasField("self_edit")]
        if self.min_reward is not None:
            earned = [edit for edit in earned if edit.reward.value >= self.min_reward]
        best = sorted(earned, key=lambda edit: -edit.reward.value)[: self.best]
        return sorted(best, key=lambda edit: edit.index)


def find_run(stub: OrchestratorServiceStub, run_id: str) -> ExportedRun:
    """The run. Raises what GetRun raises: RUN_NOT_FOUND."""
    run = call(stub.GetRun, pb.GetRunRequest(run_id=run_id)).run
    config: dict[str, Any] = json.loads(run.config_json or "{}")
    rounds = config.get("rounds", {})
    planned = rounds.get("count", 0) * rounds.get("tasks", 0) * rounds.get("self_edits", 0)
    prompt_format = config.get("teacher", {}).get("prompt_format", "open")
    written = config.get("tasks", {}).get("questions") == "written"
    return ExportedRun(run.id, run.name, run.student.name, run.student.commit, prompt_format, planned, written)


def groups(stub: OrchestratorServiceStub, run_id: str) -> Iterator[list[pb.LedgerSelfEdit]]:
    """The self-edits of a task in a round, one group after the other."""
    for _, group in groupby(_self_edits(stub, run_id), key=lambda edit: (edit.round, edit.task_id)):
        yield list(group)


def _self_edits(stub: OrchestratorServiceStub, run_id: str) -> Iterator[pb.LedgerSelfEdit]:
    token = ""
    while True:
        request = pb.ListSelfEditsRequest(run_id=run_id, page_size=PAGE, page_token=token)
        answer = call(stub.ListSelfEdits, request)
        yield from answer.self_edits
        if not (token := answer.next_page_token):
            return


def tasks(stub: OrchestratorServiceStub, run_id: str) -> Iterator[types.Task]:
    """The tasks that a run trains on, without their sealed questions."""
    token = ""
    while True:
        request = pb.ListRunTasksRequest(run_id=run_id, page_size=PAGE, page_token=token)
        answer = call(stub.ListRunTasks, request)
        yield from answer.tasks
        if not (token := answer.next_page_token):
            return
