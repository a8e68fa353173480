"""Questions about many evaluations at once, answered without reading them."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import func, select

from evaluator.database import (
    LIVE,
    OPEN,
    BatchState,
    Database,
    State,
    TrialState,
    batches,
    evaluation_trials,
    evaluations,
    trials,
)
from evaluator.demand import AT_ONCE


class Overview:
    """Every method is one transaction and reads ids, states and counts only."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def states(self, evaluation_ids: Collection[str]) -> dict[str, State]:
        """Where these evaluations stand; those that there are."""
        found, names = dict[str, State](), sorted(set(evaluation_ids))
        with self._database.read() as tx:
            for start in range(0, len(names), AT_ONCE):
                some = evaluations.c.id.in_(names[start : start + AT_ONCE])
                rows = tx.execute(select(evaluations.c.id, evaluations.c.state).where(some))
                found |= {row.id: State(row.state) for row in rows}
        return found

    def counts(self) -> dict[State, int]:
        """How many evaluations are QUEUED, RUNNING and FAILED."""
        asked = evaluations.c.state.in_((*LIVE, State.FAILED))
        query = select(evaluations.c.state, func.count()).where(asked).group_by(evaluations.c.state)
        with self._database.read() as tx:
            return {State(state): count for state, count in tx.execute(query)}

    def batches(self) -> dict[BatchState, int]:
        """How many batches are in each of the states that are not final."""
        query = select(batches.c.state, func.count()).where(batches.c.state.in_(OPEN)).group_by(batches.c.state)
        with self._database.read() as tx:
            return {BatchState(state): count for state, count in tx.execute(query)}

    def batches_by_student(self) -> dict[tuple[str, BatchState], int]:
        """How many batches of each student are in each of the states that are not final."""
        query = (
            select(batches.c.student, batches.c.state, func.count())
            .where(batches.c.state.in_(OPEN))
            .group_by(batches.c.student, batches.c.state)
        )
        with self._database.read() as tx:
            return {(student, BatchState(state)): count for student, state, count in tx.execute(query)}

    def ready_after(self, seq: int, limit: int) -> list[tuple[int, str]]:
        """The live evaluations none of whose trials is pending, by age, from a position on; with their positions."""
        pending = (
            select(evaluation_trials.c.trial_id)
            .outerjoin(trials, trials.c.id == evaluation_trials.c.trial_id)
            .where(
                evaluation_trials.c.evaluation_id == evaluations.c.id,
                func.coalesce(trials.c.state, TrialState.PENDING) == TrialState.PENDING,
            )
        )
        query = (
            select(evaluations.c.seq, evaluations.c.id)
            .where(evaluations.c.state.in_(LIVE), evaluations.c.seq > seq, ~pending.exists())
            .order_by(evaluations.c.seq)
            .limit(limit)
        )
        with self._database.read() as tx:
            return [(int(row.seq), str(row.id)) for row in tx.execute(query)]
