"""What a run without labels keeps beside its ledger lines: questions that were written, and what the canary said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Engine, Float, LargeBinary, String, Text, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from orchestrator.tables import Base
from preceptor.v1 import types_pb2 as types


@dataclass(frozen=True, slots=True)
class WrittenQuestions:
    """What the base teacher wrote for one training task and what the checks of ``orchestrator.questions`` left."""

    task: int  # position among the training tasks
    task_id: str
    questions: tuple[types.Question, ...]  # of the reward bank, and of the gate bank: kept apart from every reward
    dropped: Mapping[str, int]  # questions by reason

    @property
    def rewarded(self) -> int:
        """How many of them give rewards."""
        return sum(question.bank == types.QUESTION_BANK_REWARD for question in self.questions)


@dataclass(frozen=True, slots=True)
class CanaryLook:
    """What the labelled canary tasks said of one round's policy (0: the untrained teacher)."""

    round: int
    policy_id: str
    mean: float | None  # reward of the canary tasks that were measured; None where none was
    stderr: float | None  # over tasks; None with fewer than two
    count: int
    best_round: int  # the best up to here, this one included
    difference: float | None  # mean difference to the best before, over the tasks that both measured
    difference_stderr: float | None
    stopped: bool  # clearly worse than the best: the run goes on with the best round's policy


class WrittenQuestionsRow(Base):
    """The questions written for one training task."""

    __tablename__ = "written_questions"
    run_id: Mapped[str] = mapped_column(String(96), primary_key=True)
    task: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[str] = mapped_column(String(64))
    questions: Mapped[bytes] = mapped_column(LargeBinary)  # Passage with nothing but its questions
    dropped: Mapped[str] = mapped_column(Text)  # JSON


class CanaryRow(Base):
    """One look at the canary tasks."""

    __tablename__ = "canary"
    run_id: Mapped[str] = mapped_column(String(96), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    policy_id: Mapped[str] = mapped_column(String(128))
    mean: Mapped[float | None] = mapped_column(Float)
    stderr: Mapped[float | None] = mapped_column(Float)
    count: Mapped[int]
    best_round: Mapped[int]
    difference: Mapped[float | None] = mapped_column(Float)
    difference_stderr: Mapped[float | None] = mapped_column(Float)
    stopped: Mapped[bool]


class LabelStore:
    """Both tables, for one run. Safe to use from several threads."""

    def __init__(self, engine: Engine, run_id: str) -> None:
        self._engine = engine
        self._run_id = run_id

    def keep_questions(self, written: WrittenQuestions) -> None:
        """Adds one task's questions."""
        with Session(self._engine) as session:
            session.add(
                WrittenQuestionsRow(
                    run_id=self._run_id,
                    task=written.task,
                    task_id=written.task_id,
                    questions=types.Passage(questions=written.questions).SerializeToString(),
                    dropped=json.dumps(dict(written.dropped)),
                )
            )
            session.commit()

    def questions(self) -> list[WrittenQuestions]:
        """All tasks' questions in the order of the tasks; nothing where questions are given."""
        query = select(WrittenQuestionsRow).where(WrittenQuestionsRow.run_id == self._run_id)
        with Session(self._engine) as session:
            return [
                WrittenQuestions(
                    row.task,
                    row.task_id,
                    tuple(types.Passage.FromString(row.questions).questions),
                    json.loads(row.dropped),
                )
                for row in session.scalars(query.order_by(WrittenQuestionsRow.task))
            ]

    def keep_look(self, look: CanaryLook) -> None:
        """Adds what the canary said after a round."""
        fields = {name: getattr(look, name) for name in CanaryLook.__dataclass_fields__}
        with Session(self._engine) as session:
            session.add(CanaryRow(run_id=self._run_id, **fields))
            session.commit()

    def looks(self) -> list[CanaryLook]:
        """What the canary said so far, round by round; nothing where there is none."""
        query = select(CanaryRow).where(CanaryRow.run_id == self._run_id).order_by(CanaryRow.round)
        with Session(self._engine) as session:
            return [
                CanaryLook(**{name: getattr(row, name) for name in CanaryLook.__dataclass_fields__})
                for row in session.scalars(query)
            ]
