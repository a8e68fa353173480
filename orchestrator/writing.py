"""Self-edits as they come from the teacher, each in the ledger before anybody uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from orchestrator.entries import EditKey, Entry
from orchestrator.ledger import Ledger
from orchestrator.sight import RunSight
from orchestrator.teacher_client import TeacherClient
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import types_pb2 as types

Adapt = Callable[[types.SelfEdit], types.SelfEdit]


def unchanged(self_edit: types.SelfEdit) -> types.SelfEdit:
    """The self-edit as it was written."""
    return self_edit


class Writer:
    """Has self-edits written, once."""

    def __init__(self, teacher_client: TeacherClient, ledger: Ledger, sight: RunSight | None = None) -> None:
        self._teacher = teacher_client
        self._ledger = ledger
        self._sight = sight or RunSight()

    def groups(
        self, stage: str, request: teacher.GenerateSelfEditsRequest, arms: Mapping[str, Adapt]
    ) -> Iterator[list[Entry]]:
        """The ledger lines of each task in turn, as soon as they are written: what the teacher wrote, for each arm as
        the arm's function makes it.

        Where the ledger has only some of the groups, all are generated again and the known ones skipped: sampling in
        another batch could differ in the last bits, and a resumed run must not.
        """
        known: dict[int, list[Entry]] = {}
        for arm in arms:
            for entry in self._ledger.entries(stage, arm):
                known.setdefault(entry.key.task, []).append(entry)
        if len(known) == len(request.tasks):
            yield from (known[position] for position in sorted(known))
            return
        for position, group in enumerate(self._teacher.generate(request)):
            self._sight.wrote(stage, position, group.seconds)
            if position not in known:
                known[position] = [
                    _entry(EditKey(stage, arm, position, written.index), group, written, adapt)
                    for arm, adapt in arms.items()
                    for written in group.self_edits
                ]
                self._ledger.write(known[position])
            yield known[position]


def _entry(
    key: EditKey, group: teacher.GenerateSelfEditsResponse, written: teacher.WrittenSelfEdit, adapt: Adapt
) -> Entry:
    valid = written.status == teacher.SELF_EDIT_STATUS_VALID
    costly = written.status == teacher.SELF_EDIT_STATUS_TOO_COSTLY
    return Entry(
        key=key,
        task_id=group.task_id,
        policy_id=group.policy_id,
        completion=written.completion,
        malformed="" if valid or costly else written.malformed_reason or "malformed",
        too_costly=(written.malformed_reason or "its training would cost too much") if costly else "",
        self_edit=adapt(written.self_edit) if valid else None,
    )
