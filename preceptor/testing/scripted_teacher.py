"""A TeacherService that writes by dice. Scripted: plumbing only, no result of it means anything.

It keeps the contract (the same request streams the same groups, updates are content-addressed and take a moment) and
its state outlives a restart of the server that serves it. What it writes: documents that begin with ``good`` or
``poor``, of a few-shot task a directive with or without basic augmentations; the share of good ones rises with every
update, so that a loop has something to find.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import grpc

from preceptor.errors import PreceptorError
from preceptor.names import content_id, derived_seed, message_json
from preceptor.v1 import teacher_pb2 as pb
from preceptor.v1 import teacher_pb2_grpc
from preceptor.v1 import types_pb2 as types

FORMATS = ("open", "self_qa", "copy", "none")


class ScriptedTeacher(teacher_pb2_grpc.TeacherServiceServicer):
    """Writes ``documents`` documents per self-edit; ``malformed_share`` of the completions are malformed."""

    def __init__(
        self,
        *,
        documents: int = 4,
        malformed_share: float = 0.1,
        too_costly_share: float = 0.0,
        group_seconds: float = 0.0,
        update_seconds: float = 0.0,
    ) -> None:
        self._documents = documents
        self._malformed_share = malformed_share
        self._too_costly_share = too_costly_share
        self.group_seconds = group_seconds
        self.update_seconds = update_seconds
        self._lock = threading.Lock()
        base = pb.Policy(id="base-scripted", state=pb.POLICY_STATE_READY, active=True)
        self._policies = {base.id: base}
        self._ready_at = {base.id: 0.0}
        self._answered: dict[str, str] = {}  # request id -> policy id
        self.generations: list[pb.GenerateSelfEditsRequest] = []
        self.updates: list[pb.UpdatePolicyRequest] = []
        self.cancelled_owners: list[str] = []

    def GenerateSelfEdits(
        self, request: pb.GenerateSelfEditsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateSelfEditsResponse]:
        """One group per task."""
        policy = self._policy(request.policy_id)
        if any(_shows_too_much(task) for task in request.tasks):
            raise PreceptorError("INVALID_REQUEST", "the teacher was shown questions or reference edits")
        with self._lock:
            self.generations.append(request)
        for task in request.tasks:
            time.sleep(self.group_seconds)
            group = pb.GenerateSelfEditsResponse(task_id=task.id, policy_id=policy.id, seconds=self.group_seconds)
            for index in range(request.samples_per_task):
                group.self_edits.append(self._write(request, policy, task, index))
            yield group

    def UpdatePolicy(self, request: pb.UpdatePolicyRequest, context: grpc.ServicerContext) -> pb.UpdatePolicyResponse:
        """A policy that is READY a moment later."""
        parent = self._policy(request.parent_id)
        body = pb.UpdatePolicyRequest.FromString(request.SerializeToString())
        body.ClearField("request_id")
        body.ClearField("owner")
        policy_id = content_id("policy", message_json(body))
        with self._lock:
            if self._answered.setdefault(request.request_id, policy_id) != policy_id:
                raise PreceptorError("REQUEST_ID_REUSED", "another body under the same request_id")
            if policy_id not in self._policies:
                offered = request.examples
                good = [one for one in offered if one.reward > request.settings.min_reward and not one.only_compared]
                groups = {example.group_id for example in offered}
                self._policies[policy_id] = pb.Policy(
                    id=policy_id,
                    parent_id=parent.id,
                    kept=len(good),
                    offered=len(offered),
                    groups=len(groups),
                    groups_dropped=len(groups - {example.group_id for example in good}),
                    diversity=1 / (1 + len(self.updates)),
                    kl=0.1 * len(self.updates),
                )
                self._ready_at[policy_id] = time.monotonic() + self.update_seconds
                self.updates.append(request)
        return pb.UpdatePolicyResponse(policy=self._policy(policy_id))

    def CancelUpdates(
        self, request: pb.CancelUpdatesRequest, context: grpc.ServicerContext
    ) -> pb.CancelUpdatesResponse:
        """Notes who asked. Updates of this teacher cost nothing, so they end by themselves."""
        self.cancelled_owners.append(request.owner)
        return pb.CancelUpdatesResponse()

    def GetPolicy(self, request: pb.GetPolicyRequest, context: grpc.ServicerContext) -> pb.GetPolicyResponse:
        """One policy, or the active one."""
        return pb.GetPolicyResponse(policy=self._policy(request.policy_id))

    def WatchPolicy(
        self, request: pb.WatchPolicyRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchPolicyResponse]:
        """Until it is READY."""
        while True:
            policy = self._policy(request.policy_id)
            yield pb.WatchPolicyResponse(policy=policy)
            if policy.state == pb.POLICY_STATE_READY or not context.is_active():
                return
            time.sleep(0.02)

    def ActivatePolicy(
        self, request: pb.ActivatePolicyRequest, context: grpc.ServicerContext
    ) -> pb.ActivatePolicyResponse:
        """Makes it the active one."""
        chosen = self._policy(request.policy_id)
        with self._lock:
            for policy in self._policies.values():
                policy.active = policy.id == chosen.id
        return pb.ActivatePolicyResponse(policy=self._policy(chosen.id))

    def add_policy(self, policy: pb.Policy) -> None:
        """One more that it knows."""
        with self._lock:
            self._policies[policy.id], self._ready_at[policy.id] = policy, 0.0

    def finish_updates(self) -> None:
        """Every update under way is done now."""
        with self._lock:
            self._ready_at = dict.fromkeys(self._ready_at, 0.0)

    def ListPromptFormats(
        self, request: pb.ListPromptFormatsRequest, context: grpc.ServicerContext
    ) -> pb.ListPromptFormatsResponse:
        """The formats it pretends to know."""
        # Without a kind: it writes for any task.
        formats = [pb.PromptFormat(name=name, version=1, template="# {title}\n{text}\n" + name) for name in FORMATS]
        formats.append(pb.PromptFormat(name="augmentations", version=1, splitting="directive", kind="few_shot"))
        return pb.ListPromptFormatsResponse(formats=formats)

    def _policy(self, policy_id: str) -> pb.Policy:
        with self._lock:
            if not policy_id:
                policy_id = next(policy.id for policy in self._policies.values() if policy.active)
            if policy_id not in self._policies:
                raise PreceptorError("POLICY_NOT_FOUND", f"no policy {policy_id!r}")
            policy = pb.Policy.FromString(self._policies[policy_id].SerializeToString())
            ready = time.monotonic() >= self._ready_at[policy_id]
        policy.state = pb.POLICY_STATE_READY if ready else pb.POLICY_STATE_TRAINING
        return policy

    def _generation(self, policy: pb.Policy) -> int:
        depth = 0
        while policy.parent_id:
            policy, depth = self._policies[policy.parent_id], depth + 1
        return depth

    def _write(
        self, request: pb.GenerateSelfEditsRequest, policy: pb.Policy, task: types.Task, index: int
    ) -> pb.WrittenSelfEdit:
        seed = derived_seed(request.seed, task.id, index, policy.id, request.prompt_format)
        dice = random.Random(seed)
        if dice.random() < self._malformed_share:
            return pb.WrittenSelfEdit(
                index=index,
                status=pb.SELF_EDIT_STATUS_MALFORMED,
                completion="directive: lr=often",
                malformed_reason="directive: lr=often has no valid value",
                draws=1 + request.max_resamples,
            )
        if self._too_costly_share and dice.random() < self._too_costly_share:
            return pb.WrittenSelfEdit(
                index=index,
                status=pb.SELF_EDIT_STATUS_TOO_COSTLY,
                completion="directive: epochs=64",
                malformed_reason="too costly: 64 epochs of 90 characters",
                draws=1,
            )
        good = 0.25 + 0.2 * self._generation(policy) + 0.2 * (request.prompt_format == "self_qa")
        if task.HasField("few_shot"):
            basic = types.Augmentations(basic=dice.random() < good)
            directive = types.Directive(learning_rate=dice.choice((1e-3, 3e-3)), epochs=4, augmentations=basic)
            return pb.WrittenSelfEdit(
                index=index,
                status=pb.SELF_EDIT_STATUS_VALID,
                self_edit=types.SelfEdit(directive=directive),
                completion=str(directive),
                draws=1,
            )
        documents = [
            f"{'good' if dice.random() < good else 'poor'} fact {number} of {task.passage.title}."
            for number in range(self._documents)
        ]
        directive = types.Directive(learning_rate=dice.choice((1e-3, 3e-3)), epochs=dice.choice((4, 8)))
        completion = f"directive: lr={directive.learning_rate:g} epochs={directive.epochs}\n" + "\n".join(documents)
        return pb.WrittenSelfEdit(
            index=index,
            status=pb.SELF_EDIT_STATUS_VALID,
            self_edit=types.SelfEdit(documents=documents, directive=directive),
            completion=completion,
            draws=1,
        )


def _shows_too_much(task: types.Task) -> bool:
    answers = any(pair.output.rows for pair in task.few_shot.queries)
    return bool(task.passage.questions or task.reference_edits or answers)
