"""``python -m tests.chaos.scripted_teacher``: the scripted teacher as a process that may be killed.

What it was taught is in the teacher's own store, in the teacher's own form, before it is answered; a new process learns
it again from there. So the proof can read what policies were trained on, as it does with the real teacher.
"""

from __future__ import annotations

import base64
import json
import sys
from datetime import UTC, datetime

import grpc

from preceptor.launch import launch
from preceptor.names import content_id, message_json
from preceptor.server import serve
from preceptor.settings import ServiceSettings
from preceptor.telemetry import Telemetry
from preceptor.testing.scripted_teacher import ScriptedTeacher
from preceptor.v1 import teacher_pb2 as pb
from preceptor.v1 import teacher_pb2_grpc
from teacher.policy_store import Policy, PolicyState, PolicyStore


class DurableTeacher(ScriptedTeacher):
    """A scripted teacher with a memory. What it leaves out answers UNIMPLEMENTED."""

    def __init__(self, store: PolicyStore) -> None:
        super().__init__(group_seconds=0.2, update_seconds=0.5)
        self._store = store
        store.add_base(_policy("base-scripted", ""))
        learnt, _ = store.page(1000)
        for policy in reversed([one for one in learnt if one.parent_id]):
            stored = json.loads(store.update_of(policy.id))
            super().UpdatePolicy(pb.UpdatePolicyRequest.FromString(base64.b64decode(stored["request"])), None)  # type: ignore[arg-type]
        self.finish_updates()

    def UpdatePolicy(self, request: pb.UpdatePolicyRequest, context: grpc.ServicerContext) -> pb.UpdatePolicyResponse:
        body = pb.UpdatePolicyRequest.FromString(request.SerializeToString())
        body.ClearField("request_id")
        body.ClearField("owner")
        policy = _policy(content_id("policy", message_json(body)), request.parent_id)
        examples = [
            {"group": one.group_id, "completion": one.completion, "reward": one.reward} for one in request.examples
        ]
        stored = {"examples": examples, "request": base64.b64encode(request.SerializeToString()).decode()}
        self._store.start_update(
            policy,
            json.dumps(stored).encode(),
            request.request_id,
            body.SerializeToString(),
            owner=request.owner,
            activate=False,
        )
        self._store.finish(policy, activate=False)
        return super().UpdatePolicy(request, context)


def _policy(policy_id: str, parent_id: str) -> Policy:
    return Policy(policy_id, parent_id, "scripted", "scripted", PolicyState.READY, datetime.now(UTC))


def run(settings: ServiceSettings, telemetry: Telemetry) -> None:
    teacher = DurableTeacher(PolicyStore(settings.database("teacher")))  # type: ignore[abstract]
    serve(
        ["preceptor.v1.TeacherService"],
        lambda server: teacher_pb2_grpc.add_TeacherServiceServicer_to_server(teacher, server),
        settings,
        telemetry=telemetry,
    )


if __name__ == "__main__":
    sys.exit(launch("teacher", ServiceSettings, run))
