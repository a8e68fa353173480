"""A line of a run's ledger: what was written for a task at one place of the run, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass

from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import types_pb2 as types

SELECTION = "selection"
HELDOUT = "heldout"


def round_stage(number: int) -> str:
    """The stage of a round (from 1)."""
    return f"round-{number:05d}"


@dataclass(frozen=True, slots=True, order=True)
class EditKey:
    """The place of a self-edit in its run."""

    stage: str  # a round, SELECTION or HELDOUT
    arm: str  # "" in rounds; the candidate's number in SELECTION; the arm's name in HELDOUT
    task: int  # position among the stage's tasks
    index: int  # among the self-edits of one task


@dataclass(frozen=True, slots=True)
class Entry:
    """One self-edit. ``malformed`` says why it is none, or is empty; ``evaluation`` is None before it was asked for."""

    key: EditKey
    task_id: str
    policy_id: str
    completion: str
    malformed: str = ""
    self_edit: types.SelfEdit | None = None
    evaluation: evaluator.Evaluation | None = None
    cached: bool = False

    @property
    def state(self) -> evaluator.EvaluationState.ValueType:
        """The evaluation's state; UNSPECIFIED where there is none."""
        return self.evaluation.state if self.evaluation else evaluator.EVALUATION_STATE_UNSPECIFIED

    @property
    def reward(self) -> types.Reward | None:
        """What it earned; None for anything but a success."""
        if self.evaluation is not None and self.state == evaluator.EVALUATION_STATE_SUCCEEDED:
            return self.evaluation.reward
        return None

    @property
    def failed(self) -> bool:
        """Whether its evaluation ended without a result."""
        return self.state in (evaluator.EVALUATION_STATE_FAILED, evaluator.EVALUATION_STATE_CANCELLED)

    @property
    def settled(self) -> bool:
        """Whether nothing more will become known of it."""
        return bool(self.malformed) or self.reward is not None or self.failed
