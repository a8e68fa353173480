"""TeacherService: translates between the contract and the teacher. Proto in, one call, proto out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import grpc

from preceptor import convert
from preceptor.completions import Limits, parse
from preceptor.errors import PreceptorError
from preceptor.limits import (
    MAX_ALPHA,
    MAX_BATCH_SIZE,
    MAX_COMPLETION_TOKENS,
    MAX_DOCUMENTS,
    MAX_EPOCHS,
    MAX_EXAMPLES,
    MAX_KL,
    MAX_NAME_CHARACTERS,
    MAX_OWNERS,
    MAX_RANK,
    MAX_REPLAY_SHARE,
    MAX_RESAMPLES,
    MAX_REWARD,
    MAX_SELF_EDITS,
    MAX_TASKS,
    MAX_TEMPERATURE,
    MAX_TEXT_CHARACTERS,
    MAX_TITLE_CHARACTERS,
    MAX_WEIGHT,
    MIN_TEMPERATURE,
    check_name,
    kept_seconds,
    page_size,
    page_token,
)
from preceptor.v1 import teacher_pb2 as pb
from preceptor.v1 import teacher_pb2_grpc, types_pb2
from teacher.algorithms import ALGORITHMS
from teacher.algorithms.interface import LearningSettings
from teacher.backend import SamplingSettings
from teacher.garbage import TeacherGarbage
from teacher.policies import Policies
from teacher.policy_store import Policy, PolicyState
from teacher.prompts import FORMATS
from teacher.recipe import FineTuning, Rewarded, Update, UpdateSettings
from teacher.writing import TaskText, Writer, WritingRequest, Written, WrittenGroup

_STATES = {
    PolicyState.TRAINING: pb.POLICY_STATE_TRAINING,
    PolicyState.READY: pb.POLICY_STATE_READY,
    PolicyState.FAILED: pb.POLICY_STATE_FAILED,
}
# Of an update's settings, with the most that each may be.
_NOT_NEGATIVE = {
    "min_advantage": MAX_REWARD,
    "min_reward_z": MAX_REWARD,
    "min_advantage_z": MAX_REWARD,
    "alpha": MAX_ALPHA,
    "learning_rate": 1.0,
    "rank": MAX_RANK,
    "epochs": MAX_EPOCHS,
    "batch_size": MAX_BATCH_SIZE,
    "clip": 1.0,
    "kl": MAX_KL,
    "diversity": MAX_WEIGHT,
}
# Of what a directive may ask for. The evaluator takes no more.
_LIMITS = {
    "max_learning_rate": 1.0,
    "max_epochs": MAX_EPOCHS,
    "max_replay_share": MAX_REPLAY_SHARE,
    "max_rank": MAX_RANK,
    "max_documents": MAX_DOCUMENTS,
}


class TeacherServicer(teacher_pb2_grpc.TeacherServiceServicer):
    """See teacher.proto; its comments are the documentation of the methods."""

    def __init__(self, policies: Policies, writer: Writer, garbage: TeacherGarbage) -> None:
        self._policies = policies
        self._writer = writer
        self._garbage = garbage

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
        check_name("request_id", request.request_id)
        if request.owner:
            check_name("owner", request.owner)
        policy = self._policies.update(update(request), request.request_id, _body(request), request.owner)
        return pb.UpdatePolicyResponse(policy=self._policy(policy))

    def CancelUpdates(
        self, request: pb.CancelUpdatesRequest, context: grpc.ServicerContext
    ) -> pb.CancelUpdatesResponse:
        check_name("request_id", request.request_id)
        check_name("owner", request.owner)
        number = self._policies.cancel(request.owner, request.request_id, _body(request))
        return pb.CancelUpdatesResponse(cancelled=number)

    def GetPolicy(self, request: pb.GetPolicyRequest, context: grpc.ServicerContext) -> pb.GetPolicyResponse:
        return pb.GetPolicyResponse(policy=self._policy(self._policies.get(request.policy_id)))

    def ListPolicies(self, request: pb.ListPoliciesRequest, context: grpc.ServicerContext) -> pb.ListPoliciesResponse:
        policies, following = self._policies.page(page_size(request.page_size), page_token(request.page_token))
        return pb.ListPoliciesResponse(
            policies=[self._policy(policy) for policy in policies], next_page_token=str(following) if following else ""
        )

    def WatchPolicy(
        self, request: pb.WatchPolicyRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchPolicyResponse]:
        for policy in self._policies.watch(request.policy_id, lambda: not context.is_active()):
            yield pb.WatchPolicyResponse(policy=self._policy(policy))

    def ActivatePolicy(
        self, request: pb.ActivatePolicyRequest, context: grpc.ServicerContext
    ) -> pb.ActivatePolicyResponse:
        check_name("request_id", request.request_id)
        _need(bool(request.policy_id), "policy_id", "must not be empty")
        policy = self._policies.activate(request.policy_id, request.request_id, _body(request))
        return pb.ActivatePolicyResponse(policy=self._policy(policy))

    def ListPromptFormats(
        self, request: pb.ListPromptFormatsRequest, context: grpc.ServicerContext
    ) -> pb.ListPromptFormatsResponse:
        formats = [pb.PromptFormat(name=f.name, version=f.version, instruction=f.instruction) for f in FORMATS.values()]
        return pb.ListPromptFormatsResponse(formats=formats)

    def CollectGarbage(
        self, request: pb.TeacherServiceCollectGarbageRequest, context: grpc.ServicerContext
    ) -> pb.TeacherServiceCollectGarbageResponse:
        keep = kept_seconds(request.keep_days if request.HasField("keep_days") else None)
        _need(len(request.keep_owners) <= MAX_OWNERS, "keep_owners", f"must be at most {MAX_OWNERS}")
        for owner in request.keep_owners:
            check_name("keep_owners", owner)
        found = self._garbage.collect(keep, request.keep_owners, dry_run=request.dry_run)
        return pb.TeacherServiceCollectGarbageResponse(garbage=found)

    def _policy(self, policy: Policy) -> pb.Policy:
        return _policy(policy, self._policies.fixed)


def writing_request(request: pb.GenerateSelfEditsRequest) -> WritingRequest:
    """The request with its defaults filled in. Raises PreceptorError(INVALID_REQUEST)."""
    sampling, limits, built_in = request.sampling, request.limits, Limits()
    temperature = sampling.temperature or 1.0
    top_p = sampling.top_p or 1.0
    samples = request.samples_per_task or 1
    bounds = f"{MIN_TEMPERATURE:g}..{MAX_TEMPERATURE:g}"
    within = MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE
    _need(within, "sampling.temperature", f"is {temperature}, must be {bounds}")
    _need(0 < top_p <= 1, "sampling.top_p", f"is {top_p}, must be in (0, 1]")
    _at_most(sampling.max_new_tokens, MAX_COMPLETION_TOKENS, "sampling.max_new_tokens")
    _at_most(samples, MAX_SELF_EDITS, "samples_per_task")
    _at_most(request.max_resamples, MAX_RESAMPLES, "max_resamples")
    _at_most(len(request.tasks), MAX_TASKS, "tasks")
    for name, most in _LIMITS.items():
        value = getattr(limits, name)
        _need(0 <= value <= most, f"limits.{name}", f"is {value}, must be 0..{most:g}")
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
    check_name(f"{field}.id", task.id)
    _need(bool(task.passage.text.strip()), field, "has no text")
    _check_passage(task.passage, field)
    return TaskText(task.id, task.passage.title, task.passage.text)


def update(request: pb.UpdatePolicyRequest) -> Update:
    """The request with its defaults filled in. Raises PreceptorError(INVALID_REQUEST)."""
    settings = request.settings
    algorithm = settings.algorithm or "rest_em"
    known = ", ".join(ALGORITHMS)
    _need(algorithm in ALGORITHMS, "settings.algorithm", f"is {algorithm!r}; there are: {known}")
    _number(settings.min_reward, "settings.min_reward")
    for name, most in _NOT_NEGATIVE.items():
        value = getattr(settings, name)
        _need(math.isfinite(value), f"settings.{name}", "is no finite number")
        _need(0 <= value <= most, f"settings.{name}", f"is {value}, must be 0..{most:g}")
    history = ALGORITHMS[algorithm].needs_history
    _need(history or not settings.kl, "settings.kl", f"is {settings.kl:g}, which means nothing to {algorithm}")
    _at_most(len(request.examples), MAX_EXAMPLES, "examples")
    return Update(
        parent_id=request.parent_id,
        examples=tuple(_rewarded(example, f"examples[{i}]") for i, example in enumerate(request.examples)),
        settings=UpdateSettings(
            LearningSettings(
                top_k=settings.top_k or 2,
                min_reward=settings.min_reward,
                min_advantage=settings.min_advantage,
                min_reward_z=settings.min_reward_z,
                min_advantage_z=settings.min_advantage_z,
                clip=settings.clip or LearningSettings().clip,
                kl=settings.kl,
            ),
            FineTuning(settings.learning_rate or 1e-3, settings.epochs or 2, settings.batch_size or 8),
            settings.rank or 16,
            settings.alpha or 32.0,
            algorithm,
            settings.diversity,
        ),
        seed=request.seed,
        activate=request.activate,
    )


def _rewarded(example: pb.RewardedSelfEdit, field: str) -> Rewarded:
    _need(math.isfinite(example.reward), f"{field}.reward", "is no finite number; leave failures out")
    check_name(f"{field}.group_id", example.group_id)
    for name in ("reward", "reward_stderr", "advantage", "advantage_stderr"):
        _number(getattr(example, name), f"{field}.{name}")
    for name in ("reward_stderr", "advantage_stderr"):
        _need(getattr(example, name) >= 0, f"{field}.{name}", "is negative")
    for name in ("policy_id", "student_commit"):
        if getattr(example, name):
            check_name(f"{field}.{name}", getattr(example, name))
    task = example.task
    _need(task.HasField("passage"), f"{field}.task", "is no passage")
    _check_passage(task.passage, f"{field}.task")
    _at_most(len(example.completion), MAX_TEXT_CHARACTERS, f"{field}.completion", "characters")
    _at_most(len(example.prompt_format), MAX_NAME_CHARACTERS, f"{field}.prompt_format", "characters")
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
        policy_id=example.policy_id,
        student_commit=example.student_commit,
    )


def _check_passage(passage: types_pb2.Passage, field: str) -> None:
    _at_most(len(passage.title), MAX_TITLE_CHARACTERS, f"{field}.passage.title", "characters")
    _at_most(len(passage.text), MAX_TEXT_CHARACTERS, f"{field}.passage.text", "characters")


def _number(value: float, field: str) -> None:
    _need(math.isfinite(value), field, "is no finite number")
    _need(abs(value) <= MAX_REWARD, field, f"is {value:g}, beyond {MAX_REWARD:g}")


def _at_most(value: int, most: int, field: str, what: str = "") -> None:
    said = f"has {value} {what}; at most {most} are allowed" if what else f"is {value}, more than {most}"
    _need(value <= most, field, said)


def _need(holds: bool, field: str, message: str) -> None:
    if not holds:
        raise PreceptorError("INVALID_REQUEST", f"{field} {message}", field=field)


def _body(request: Any) -> bytes:
    """The request without its id and its owner, the same bytes for the same content."""
    body = type(request)()
    body.CopyFrom(request)
    body.request_id = ""
    if isinstance(body, pb.UpdatePolicyRequest):
        body.owner = ""
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


def _policy(policy: Policy, fixed: bool) -> pb.Policy:
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
        fixed=fixed,
        diversity=policy.diversity,
        kl=policy.kl,
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
