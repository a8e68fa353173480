"""What trials have kept (``TrainingSettings.keep``), and letting go of it where somebody asks for that by name.

An edit cannot be made again from itself: whoever stands on it, a lineage that lies in somebody's folder among them,
is lost without it. So nothing here happens by itself. What goes is old, no evaluation that is younger or under way has
learnt it or stands on it, and the evaluations that learnt it are forgotten with it: asked for again, they are trained
again. Edits that no evaluation here has ever heard of may be another house's, and stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from sqlalchemy import delete, select

from evaluator.database import LIVE, Database, State, evaluation_trials, evaluations, owners, requests, trials
from preceptor.artifacts import ArtifactStore, Stored
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import types_pb2 as types

# Whoever wrote it would have finished by now.
LEFTOVER_SECONDS = 3600.0
_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class _Learnt:
    """An evaluation that has kept something."""

    id: str
    edits: tuple[types.Artifact, ...]


class KeptEdits:
    """``store`` is where workers keep edits; it is made when it is first asked, which may be never."""

    def __init__(self, database: Database, store: Callable[[], ArtifactStore]) -> None:
        self._database, self._store = database, store

    def collect(self, before: float, keep_seconds: float, *, dry_run: bool) -> list[types.Garbage]:
        """Removes edits of evaluations that finished before a time (unix seconds) and what killed writers left, or only
        says what that would be. Raises what the store and the database say that cannot be read or written now."""
        store = self._store()
        learnt, needed = self._read(before)
        old = {_name(edit): edit.sha256 for one in learnt for edit in one.edits}
        found = []
        for stored in store.list():
            if not stored.whole:
                if stored.age_seconds > LEFTOVER_SECONDS:
                    found.append(_garbage(stored, "leftover", "left by a writer that was killed"))
            elif stored.name in old and old[stored.name] not in needed and stored.age_seconds >= keep_seconds:
                found.append(_garbage(stored, "edit", "old; nothing here stands on it; learnt again when asked for"))
        if not dry_run:
            gone = {item.name for item in found}
            # First: killed in between, an edit is left of which nobody knows, and not an evaluation without its edit.
            self._forget([one.id for one in learnt if any(_name(edit) in gone for edit in one.edits)])
            for name in sorted(gone):
                store.remove(name)
        return found

    def _read(self, before: float) -> tuple[list[_Learnt], set[str]]:
        """Old evaluations that have kept something, and the hashes of the edits that others need."""
        awaited = self._awaited()
        learnt: list[_Learnt] = []
        needed: set[str] = set()
        for state, finished, evaluation in self._evaluations():
            edits = tuple(one.adapter for one in evaluation.trials if one.HasField("adapter"))
            if state in LIVE or finished is None or finished >= before:
                needed.update(edit.sha256 for edit in (*edits, *evaluation.student.adapters))
            elif edits and evaluation.id not in awaited:
                learnt.append(_Learnt(evaluation.id, edits))
        return learnt, needed

    def _awaited(self) -> set[str]:
        """Evaluations whose trials one under way has, too: it does not say yet what they have learnt, and would wait
        for ever for one that is gone."""
        under_way = (
            select(evaluation_trials.c.trial_id)
            .join(evaluations, evaluations.c.id == evaluation_trials.c.evaluation_id)
            .where(evaluations.c.state.in_(LIVE), evaluation_trials.c.position >= 0)
        )
        with self._database.read() as tx:
            others = select(evaluation_trials.c.evaluation_id).where(evaluation_trials.c.trial_id.in_(under_way))
            return set(tx.execute(others).scalars())

    def _evaluations(self) -> Iterator[tuple[State, float | None, pb.Evaluation]]:
        after = 0
        while True:
            query = select(evaluations).where(evaluations.c.seq > after).order_by(evaluations.c.seq).limit(_AT_ONCE)
            with self._database.read() as tx:
                rows = tx.execute(query).all()
            for row in rows:
                yield State(row.state), row.finished, pb.Evaluation.FromString(row.body)
            if len(rows) < _AT_ONCE:
                return
            after = rows[-1].seq

    def _forget(self, ids: Collection[str]) -> None:
        """Forgets these evaluations with what their trials learnt, and that they were asked for."""
        for one in ids:
            with self._database.write() as tx:
                of = select(evaluation_trials.c.trial_id).where(
                    evaluation_trials.c.evaluation_id == one, evaluation_trials.c.position >= 0
                )
                tx.execute(delete(trials).where(trials.c.id.in_(of)))
                # another evaluation of the same trials has the same edits, and goes too
                tx.execute(delete(evaluation_trials).where(evaluation_trials.c.evaluation_id == one))
                tx.execute(delete(owners).where(owners.c.evaluation_id == one))
                tx.execute(delete(requests).where(requests.c.reply.contains(f'"{one}"', autoescape=True)))
                tx.execute(delete(evaluations).where(evaluations.c.id == one, evaluations.c.state.not_in(LIVE)))


def _name(edit: types.Artifact) -> str:
    return edit.uri.rpartition("/")[2]


def _garbage(stored: Stored, kind: str, reason: str) -> types.Garbage:
    return types.Garbage(
        kind=kind, name=stored.name, count=1, bytes=stored.bytes, age_seconds=stored.age_seconds, reason=reason
    )
