"""TeacherService: translates between the contract and the teacher. Proto in, one call, proto out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import grpc

from preceptor import convert
from preceptor.completions import Limits, parse
from preceptor.errors import PreceptorError
from preceptor.v1 import teacher_pb2 as pb
from preceptor.v1 import teacher_pb2_grpc, types_pb2
from teacher.policies import Policies
from teacher.policy_store import Policy, PolicyState
from teacher.prompts import FORMATS
from teacher.recipe import Rewarded, Update, UpdateSettings
from teacher.rest_em import SelectionSettings
from teacher.sampling import SamplingSettings
from teacher.update import FineTuning
from teacher.writing import TaskText, Writer, WritingRequest, Written, WrittenGroup

_STATES = {
    PolicyState.TRAINING: pb.POLICY_STATE_TRAINING,
    PolicyState.READY: pb.POLICY_STATE_READY,
    PolicyState.FAILED: pb.POLICY_STATE_FAILED,
}
_DEFAULT_PAGE, _LARGEST_PAGE = 100, 1000
_NOT_NEGATIVE = ("min_advantage", "min_reward_z", "min_advantage_z", "alpha", "learning_rate")


class TeacherServicer(teacher_pb2_grpc.TeacherServiceServicer):
    """See teacher.proto; its comments are the documentation of the methods."""

    def __init__(self, policies: Policies, writer: Writer) -> None:
        self._policies = policies
        self._writer = writer

    def GenerateSelfEdits(
        self, request: pb.GenerateSelfEditsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateSelfEditsResponse]:
        wanted = writing_request(request)

        def stopped() -> bool:
            if self._policies.stopping:
                raise PreceptorError("SHUTTING_DOWN", "the teacher is going down")
            return not context.is_active()

        for group in self._writer.write(wanted, stopped):
            yield _group(group, wanted.limits)

    def UpdatePolicy(self, request: pb.UpdatePolicyRequest, context: grpc.ServicerContext) -> pb.UpdatePolicyResponse:
        _need(bool(request.request_id), "request_id", "must not be empty")
        policy = self._policies.update(update(request), request.request_id, _body(request))
        return pb.UpdatePolicyResponse(policy=_policy(policy))

    def GetPolicy(self, request: pb.GetPolicyRequest, context: grpc.ServicerContext) -> pb.GetPolicyResponse:
        return pb.GetPolicyResponse(policy=_policy(self._policies.get(request.policy_id)))

    def ListPolicies(self, request: pb.ListPoliciesRequest, context: grpc.ServicerContext) -> pb.ListPoliciesResponse:
        token = request.page_token
        _need(not token or token.isdecimal(), "page_token", "is none that this service gave")
        size = min(request.page_size or _DEFAULT_PAGE, _LARGEST_PAGE)
        policies, following = self._policies.page(size, int(token or 0))
        return pb.ListPoliciesResponse(
            policies=[_policy(policy) for policy in policies], next_page_token=str(following) if following else ""
        )

    def WatchPolicy(
        self, request: pb.WatchPolicyRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchPolicyResponse]:
        for policy in self._policies.watch(request.policy_id, lambda: not context.is_active()):
            yield pb.WatchPolicyResponse(policy=_policy(policy))

    def ActivatePolicy(
        self, request: pb.ActivatePolicyRequest, context: grpc.ServicerContext
    ) -> pb.ActivatePolicyResponse:
        _need(bool(request.request_id), "request_id", "must not be empty")
        _need(bool(request.policy_id), "policy_id", "must not be empty")
        policy = self._policies.activate(request.policy_id, request.request_id, _body(request))
        return pb.ActivatePolicyResponse(policy=_policy(policy))

    def ListPromptFormats(
        self, request: pb.ListPromptFormatsRequest, context: grpc.ServicerContext
    ) -> pb.ListPromptFormatsResponse:
        formats = [pb.PromptFormat(name=f.name, version=f.version, instruction=f.instruction) for f in FORMATS.values()]
        return pb.ListPromptFormatsResponse(formats=formats)


def writing_request(request: pb.GenerateSelfEditsRequest) -> WritingRequest:
    """The request with its defaults filled in. Raises PreceptorError(INVALID_REQUEST)."""
    sampling, limits, built_in = request.sampling, request.limits, Limits()
    temperature = sampling.temperature or 1.0
    top_p = sampling.top_p or 1.0
    samples = request.samples_per_task or 1
    _need(0 < temperature <= 100, "sampling.temperature", f"is {temperature}, must be in (0, 100]")
    _need(0 < top_p <= 1, "sampling.top_p", f"is {top_p}, must be in (0, 1]")
    _need(sampling.max_new_tokens <= 1 << 17, "sampling.max_new_tokens", "is more than 131072")
    _need(samples <= 1024, "samples_per_task", f"is {samples}, more than 1024")
    _need(request.max_resamples <= 100, "max_resamples", f"is {request.max_resamples}, more than 100")
    return WritingRequest(
        policy_id=request.policy_id,
        tasks=tuple(task_text(task, f"tasks[{i}]") for i, task in enumerate(request.tasks)),
        samples=samples,
        prompt_format=request.prompt_format or "open",
        sampling=SamplingSettings(temperature, top_p, sampling.max_new_tokens or 512),
        seed=request.seed,
        limits=Limits(
            learning_rate=(built_in.learning_rate[0], limits.max_learning_rate or built_in.learning_rate[1]),
            epochs=(built_in.epochs[0], limits.max_epochs or built_in.epochs[1]),
            replay_share=(built_in.replay_share[0], limits.max_replay_share or built_in.replay_share[1]),
            rank=(built_in.rank[0], limits.max_rank or built_in.rank[1]),
            documents=limits.max_documents or built_in.documents,
        ),
        max_resamples=request.max_resamples,
    )


def task_text(task: types_pb2.Task, field: str) -> TaskText:
    """What the teacher may see of a task: title and text, nothing else. Raises PreceptorError(INVALID_REQUEST)."""
    _need(task.HasField("passage"), field, "is no passage; this teacher writes for passages only")
    _need(bool(task.id), field, "has no id")
    _need(bool(task.passage.text.strip()), field, "has no text")
    return TaskText(task.id, task.passage.title, task.passage.text)


def update(request: pb.UpdatePolicyRequest) -> Update:
    """The request with its defaults filled in. Raises PreceptorError(INVALID_REQUEST)."""
    settings = request.settings
    algorithm = settings.algorithm or "rest_em"
    _need(algorithm == "rest_em", "settings.algorithm", f"is {algorithm!r}; there is: rest_em")
    for name in ("min_reward", *_NOT_NEGATIVE):
        _need(math.isfinite(getattr(settings, name)), f"settings.{name}", "is no finite number")
    for name in _NOT_NEGATIVE:
        _need(getattr(settings, name) >= 0, f"settings.{name}", "is negative")
    return Update(
        parent_id=request.parent_id,
        examples=tuple(_rewarded(example, f"examples[{i}]") for i, example in enumerate(request.examples)),
        settings=UpdateSettings(
            SelectionSettings(
                settings.top_k or 2,
                settings.min_reward,
                settings.min_advantage,
                settings.min_reward_z,
                settings.min_advantage_z,
            ),
            FineTuning(settings.learning_rate or 1e-3, settings.epochs or 2, settings.batch_size or 8),
            settings.rank or 16,
            settings.alpha or 32.0,
        ),
        seed=request.seed,
        activate=request.activate,
    )


def _rewarded(example: pb.RewardedSelfEdit, field: str) -> Rewarded:
    _need(math.isfinite(example.reward), f"{field}.reward", "is no finite number; leave failures out")
    _need(bool(example.group_id), f"{field}.group_id", "must not be empty")
    for name in ("reward_stderr", "advantage", "advantage_stderr"):
        _need(math.isfinite(getattr(example, name)), f"{field}.{name}", "is no finite number")
    for name in ("reward_stderr", "advantage_stderr"):
        _need(getattr(example, name) >= 0, f"{field}.{name}", "is negative")
    task = example.task
    _need(task.HasField("passage"), f"{field}.task", "is no passage")
    return Rewarded(
        group=example.group_id,
        title=task.passage.title,
        text=task.passage.text,
        completion=example.completion,
        prompt_format=example.prompt_format or "open",
        reward=example.reward,
        stderr=example.reward_stderr,
        advantage=example.advantage if example.HasField("advantage") else None,
        advantage_stderr=example.advantage_stderr if example.HasField("advantage") else 0.0,
        only_compared=example.only_compared,
    )


def _need(holds: bool, field: str, message: str) -> None:
    if not holds:
        raise PreceptorError("INVALID_REQUEST", f"{field} {message}", field=field)


def _body(request: Any) -> bytes:
    """The request without its id, the same bytes for the same content."""
    body = type(request)()
    body.CopyFrom(request)
    body.request_id = ""
    data: bytes = type(request).__name__.encode() + body.SerializeToString(deterministic=True)
    return data


def _group(group: WrittenGroup, limits: Limits) -> pb.GenerateSelfEditsResponse:
    return pb.GenerateSelfEditsResponse(
        task_id=group.task_id,
        policy_id=group.policy_id,
        self_edits=[_written(index, written, limits) for index, written in enumerate(group.written)],
        seconds=group.seconds,
    )


def _written(index: int, written: Written, limits: Limits) -> pb.WrittenSelfEdit:
    message = pb.WrittenSelfEdit(
        index=index,
        status=pb.SELF_EDIT_STATUS_MALFORMED,
        completion=written.completion,
        malformed_reason=written.malformed_reason,
        draws=written.draws,
        tokens=written.tokens,
    )
    if not written.malformed_reason:
        message.status = pb.SELF_EDIT_STATUS_VALID
        message.self_edit.CopyFrom(convert.self_edit_to_proto(parse(written.completion, limits)))
    return message


def _policy(policy: Policy) -> pb.Policy:
    message = pb.Policy(
        id=policy.id,
        parent_id=policy.parent_id,
        state=_STATES[policy.state],
        active=policy.active,
        base_source=policy.base_source,
        base_commit=policy.base_commit,
        kept=policy.kept,
        offered=policy.offered,
        groups=policy.groups,
        groups_dropped=policy.groups_dropped,
        first_loss=policy.first_loss,
        final_loss=policy.final_loss,
        steps=policy.steps,
        steps_planned=policy.steps_planned,
        seconds=policy.seconds,
    )
    message.create_time.FromDatetime(policy.created)
    if policy.adapter_uri:
        message.adapter.uri = policy.adapter_uri
        message.adapter.sha256 = policy.adapter_sha256
    if policy.failure_reason:  # of one that FAILED; or what keeps one waiting that is in TRAINING
        message.failure.reason = policy.failure_reason
        message.failure.message = policy.failure_message
        message.failure.attempts = 1
    return message
