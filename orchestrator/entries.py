"""A line of a run's ledger: what was written for a task at one place of the run, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import types_pb2 as types

SELECTION = "selection"
HELDOUT = "heldout"
FAILED = (evaluator.EVALUATION_STATE_FAILED, evaluator.EVALUATION_STATE_CANCELLED)


def round_stage(number: int) -> str:
    """The stage of a round (from 1)."""
    return f"round-{number:05d}"


def canary_stage(number: int) -> str:
    """The stage of the look at the canary tasks after a round (0: before the first)."""
    return f"canary-{number:05d}"


@dataclass(frozen=True, slots=True, order=True)
class EditKey:
    """The place of a self-edit in its run."""

    stage: str  # a round, SELECTION or HELDOUT
    arm: str  # "" in rounds; the candidate's number in SELECTION; the arm's name in HELDOUT
    task: int  # position among the stage's tasks
    index: int  # among the self-edits of one task


class Kind(StrEnum):
    """What an evaluation of a self-edit is for."""

    LOOK = "look"  # a race's first look
    FULL = "full"  # its reward
    FRESH = "fresh"  # the reward of one of the best, again, on seeds that no candidate had


@dataclass(frozen=True, slots=True)
class Entry:
    """One self-edit and what was measured of it.

    ``malformed`` says why it is none, or is empty; ``too_costly`` says what its training would cost where that is more
    than the run allows, so that it is never trained. ``evaluation`` is the latest one with all steps and answers, in a
    race the one with most seeds; ``look`` is a race's first look; ``fresh`` is the evaluation of one of the best of its
    group on seeds that had no part in choosing it. Each is None before it was asked for. ``stopped``: others of its
    group were better, so it was measured no further; it may have a reward of fewer seeds, or none.
    """

    key: EditKey
    task_id: str
    policy_id: str
    completion: str
    malformed: str = ""
    self_edit: types.SelfEdit | None = None
    evaluation: evaluator.Evaluation | None = None
    cached: bool = False
    look: evaluator.Evaluation | None = None
    fresh: evaluator.Evaluation | None = None
    stopped: bool = False
    too_costly: str = ""

    @property
    def unusable(self) -> bool:
        """Whether there is nothing to train on, so that the student stays as it is."""
        return bool(self.malformed or self.too_costly)

    @property
    def state(self) -> evaluator.EvaluationState.ValueType:
        """The evaluation's state, or the look's where there is no more; UNSPECIFIED where there is none."""
        shown = self.evaluation or self.look
        return shown.state if shown else evaluator.EVALUATION_STATE_UNSPECIFIED

    @property
    def reward(self) -> types.Reward | None:
        """What it earned when its group was compared; None for anything but a success. A look is no reward."""
        return _reward(self.evaluation)

    @property
    def earned(self) -> types.Reward | None:
        """What is said of it and offered to the teacher: the fresh reward where it was measured again (None if that
        failed: the one that chose it flatters it), else ``reward``."""
        return self.reward if self.fresh is None else _reward(self.fresh)

    @property
    def student_commit(self) -> str:
        """Commit of the student that its reward is about; empty where nothing was measured."""
        measured = self.fresh or self.evaluation or self.look
        return measured.student.commit if measured is not None else ""

    @property
    def failures(self) -> tuple[evaluator.Evaluation, ...]:
        """Its measurements that ended without a result."""
        known = (self.look, self.evaluation, self.fresh)
        return tuple(one for one in known if one is not None and one.state in FAILED)

    @property
    def failed(self) -> bool:
        """Whether a measurement of it ended without a result, so that it has nothing to offer."""
        return bool(self.failures)

    @property
    def settled(self) -> bool:
        """Whether enough is known of it to count it as done; a race may still measure it better."""
        return self.unusable or self.reward is not None or self.failed or self.stopped


def _reward(evaluation: evaluator.Evaluation | None) -> types.Reward | None:
    succeeded = evaluation is not None and evaluation.state == evaluator.EVALUATION_STATE_SUCCEEDED
    return evaluation.reward if evaluation is not None and succeeded else None
