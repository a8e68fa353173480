"""What the teacher tells of its writing and learning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from preceptor import metrics as m
from preceptor.telemetry import OFF, Telemetry
from preceptor.tracing import Attributes, Place, current

if TYPE_CHECKING:
    from teacher.policy_store import Policy
    from teacher.writing import Written


class TeacherSight:
    """May be called from any thread."""

    def __init__(self, telemetry: Telemetry = OFF) -> None:
        self._metrics, self._traces = telemetry.metrics, telemetry.traces
        telemetry.metrics.at_scrape(m.gpu_memory)
        self._asked: dict[str, Place] = {}  # by policy in training: the call that asked for it

    @contextmanager
    def writing(self, policy_id: str, tasks: int) -> Iterator[Callable[[Sequence[Sequence[Written]]], None]]:
        """A batch is written while the context is open; its groups are given to what it gives."""
        began, told = time.perf_counter(), False

        def wrote(groups: Sequence[Sequence[Written]]) -> None:
            nonlocal told
            told = True
            written = [one for group in groups for one in group]
            malformed = sum(bool(one.malformed_reason) for one in written)
            self._metrics.count(m.TEACHER_TOKENS, sum(one.tokens for one in written))
            self._metrics.count(m.SELF_EDITS, len(written) - malformed, outcome="valid")
            self._metrics.count(m.SELF_EDITS, malformed, outcome="malformed")
            self._metrics.count(m.REDRAWS, sum(one.draws - 1 for one in written))

        with self._traces.span("write a batch", attributes={"policy": policy_id, "tasks": tasks}):
            yield wrote
        if told:
            self._metrics.observe(m.TEACHER_WRITING, time.perf_counter() - began)

    def asked(self, policy_id: str) -> None:
        """The caller's call has asked for this policy's training."""
        if (place := current()) is not None:
            self._asked[policy_id] = place

    def updated(self, policy: Policy) -> None:
        """The training of a policy has ended, READY or FAILED."""
        self._metrics.count(m.UPDATES, state=policy.state.lower())
        self._metrics.observe(m.UPDATE_SECONDS, policy.seconds)
        self._metrics.count(m.UPDATE_EDITS, policy.offered, part="offered")
        self._metrics.count(m.UPDATE_EDITS, policy.kept, part="kept")
        if policy.steps:
            self._metrics.put(m.UPDATE_LOSS, policy.first_loss, step="first")
            self._metrics.put(m.UPDATE_LOSS, policy.final_loss, step="last")
        ended = time.time()
        told: Attributes = {"policy": policy.id, "kept": policy.kept, "steps": policy.steps}
        self._traces.record(
            "update the policy",
            ended - policy.seconds,
            ended,
            within=self._asked.pop(policy.id, None),
            error=policy.failure_reason,
            attributes=told,
        )
