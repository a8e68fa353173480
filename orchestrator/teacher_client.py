"""The teacher as the loop sees it: generations that survive its death, updates that are waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from orchestrator.remote import Hindered, Remote
from orchestrator.stop import Stop
from preceptor.errors import CATALOGUE, PreceptorError
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import teacher_pb2_grpc

# A large teacher on a slow machine; the stream as a whole gets so many seconds per task.
GENERATE_SECONDS_PER_TASK = 600.0
WATCH_SECONDS = 600.0


class TeacherClient:
    """Calls the teacher with patience on behalf of one run."""

    def __init__(
        self,
        stub: teacher_pb2_grpc.TeacherServiceStub,
        patience_seconds: float,
        stop: Stop,
        hindered: Hindered = lambda _name, _words: None,
        name: str = "teacher service",
        *,
        needed: bool = True,
    ) -> None:
        """``name``: what it is called in errors and progress. ``needed``: see Remote."""
        self._needed = needed
        self._name = name
        self._stub = stub
        self._patience = patience_seconds
        self._stop = stop
        self._hindered = hindered

    def base_policy(self, learns: bool) -> str:
        """The id of the untouched teacher: the root of the active policy. Every run starts from it, so that an
        earlier run's policy cannot change this run's result.

        Raises PreceptorError: TEACHER_IS_FIXED where it ``learns`` in this run and cannot, and what the call raises.
        """
        policy = root_of(self._get(""), self._get)
        if learns and policy.fixed:
            raise PreceptorError(
                "TEACHER_IS_FIXED",
                f"{policy.base_source} is a fixed teacher; it does not learn",
                field="update.algorithm",
            )
        return policy.id

    def check_start(self, policy_id: str, base_id: str) -> None:
        """Raises what ``check_start`` raises."""
        check_start(policy_id, base_id, self._get)

    def _get(self, policy_id: str) -> teacher.Policy:
        return self._remote().call(self._stub.GetPolicy, teacher.GetPolicyRequest(policy_id=policy_id)).policy

    def generate(self, request: teacher.GenerateSelfEditsRequest) -> Iterator[teacher.GenerateSelfEditsResponse]:
        """Each task's group once, in the order of the tasks, however often the stream breaks."""
        expected = [task.id for task in request.tasks]
        received = 0  # groups seen since the start; a stream opened again begins at the first group
        skip = 0

        def next_request() -> teacher.GenerateSelfEditsRequest | None:
            nonlocal skip
            skip = received
            return request if received < len(expected) else None

        deadline = GENERATE_SECONDS_PER_TASK * max(1, len(expected))
        for group in self._remote().follow(self._stub.GenerateSelfEdits, next_request, deadline=deadline):
            if skip:
                skip -= 1
                continue
            if received >= len(expected) or group.task_id != expected[received]:
                raise PreceptorError("INTERNAL", f"the teacher answered for task {group.task_id!r} out of turn")
            received += 1
            yield group
        if received < len(expected):
            raise PreceptorError("INTERNAL", f"the teacher wrote {received} of {len(expected)} groups and ended")

    def update(self, request: teacher.UpdatePolicyRequest) -> teacher.Policy:
        """The READY policy that the update gave. Raises PreceptorError where training it failed."""
        policy = self._remote().call(self._stub.UpdatePolicy, request).policy
        watch = teacher.WatchPolicyRequest(policy_id=policy.id)
        final = (teacher.POLICY_STATE_READY, teacher.POLICY_STATE_FAILED)
        while policy.state not in final:
            stream = self._remote().follow(self._stub.WatchPolicy, lambda: watch, deadline=WATCH_SECONDS)
            for response in stream:
                policy = response.policy
                if policy.state not in final:  # it may wait itself, for room on its disk
                    self._hindered("teacher", policy.failure.message and f"the teacher waits: {policy.failure.message}")
        self._hindered("teacher", "")
        if policy.state == teacher.POLICY_STATE_FAILED:
            reason = policy.failure.reason if policy.failure.reason in CATALOGUE else "INTERNAL"
            raise PreceptorError(reason, f"the teacher's update failed: {policy.failure.message}")
        return policy

    def activate(self, policy_id: str, request_id: str) -> None:
        """Makes the policy the one that others get who name none."""
        request = teacher.ActivatePolicyRequest(request_id=request_id, policy_id=policy_id)
        self._remote().call(self._stub.ActivatePolicy, request)

    def _remote(self) -> Remote:
        return Remote(self._name, self._patience, self._stop, self._hindered, needed=self._needed)


def root_of(policy: teacher.Policy, get: Callable[[str], teacher.Policy]) -> teacher.Policy:
    """The untouched teacher that a policy comes from; ``get`` gives a policy by its id."""
    while policy.parent_id:
        policy = get(policy.parent_id)
    return policy


def check_start(policy_id: str, base_id: str, get: Callable[[str], teacher.Policy]) -> None:
    """Raises PreceptorError where rounds cannot begin with this policy: POLICY_NOT_FOUND, POLICY_NOT_READY (it trains,
    or has failed), POLICY_OF_ANOTHER_BASE."""
    field = "teacher.policy"
    try:
        policy = get(policy_id)
    except PreceptorError as error:
        if error.reason != "POLICY_NOT_FOUND":
            raise
        raise PreceptorError(error.reason, error.message, field=field) from None
    if policy.state != teacher.POLICY_STATE_READY:
        state = teacher.PolicyState.Name(policy.state).removeprefix("POLICY_STATE_")
        raise PreceptorError("POLICY_NOT_READY", f"policy {policy_id} is {state}", field=field)
    if (root := root_of(policy, get).id) != base_id:
        problem = f"policy {policy_id} comes from {root}; the teacher is {base_id} now"
        raise PreceptorError("POLICY_OF_ANOTHER_BASE", problem, field=field)
