"""TeacherService: translates between the contract and the teacher. Proto in, one call, proto out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import grpc

from preceptor import convert
from preceptor.completions import Limits
from preceptor.errors import PreceptorError
from preceptor.few_shot import text as grids
from preceptor.few_shot.grids import grid_fault
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
from preceptor.prompt_formats import PromptFormat
from preceptor.tasks import TARGETS, FewShotTask
from preceptor.v1 import teacher_pb2 as pb
from preceptor.v1 import teacher_pb2_grpc, types_pb2
from teacher.algorithms import ALGORITHMS
from teacher.algorithms.interface import LearningSettings
from teacher.backend import SamplingSettings
from teacher.garbage import TeacherGarbage
from teacher.policies import Policies
from teacher.policy_store import Policy, PolicyState
from teacher.prompts import Formats
from teacher.recipe import FineTuning, Rewarded, Update, UpdateSettings
from teacher.writing import TaskText, Writer, WritingRequest, Written, WrittenGroup, read

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
    "min_learning_rate": 1.0,
    "min_epochs": MAX_EPOCHS,
    "default_epochs": MAX_EPOCHS,
    "default_replay_share": MAX_REPLAY_SHARE,
}


class TeacherServicer(teacher_pb2_grpc.TeacherServiceServicer):
    """See teacher.proto; its comments are the documentation of the methods."""

    def __init__(
        self, policies: Policies, writer: Writer, garbage: TeacherGarbage, formats: Formats | None = None
    ) -> None:
        self._policies = policies
        self._writer = writer
        self._garbage = garbage
        self._formats = formats or Formats()

    def GenerateSelfEdits(
        self, request: pb.GenerateSelfEditsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateSelfEditsResponse]:
        wanted = writing_request(request, self._formats)
        form = self._formats.find(wanted.prompt_format)

        def stopped() -> bool:
            if self._policies.stopping:
                raise PreceptorError("SHUTTING_DOWN", "the teacher is going down")
            return not context.is_active()

        for task, group in zip(wanted.tasks, self._writer.write(wanted, stopped), strict=True):
            yield _group(group, form, task.title, wanted.limits)

    def UpdatePolicy(self, request: pb.UpdatePolicyRequest, context: grpc.ServicerContext) -> pb.UpdatePolicyResponse:
        check_name("request_id", request.request_id)
        if request.owner:
            check_name("owner", request.owner)
        policy = self._policies.update(
            update(request, self._formats), request.request_id, _body(request), request.owner
        )
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
        return pb.ListPromptFormatsResponse(formats=map(_format, self._formats))

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


def writing_request(request: pb.GenerateSelfEditsRequest, formats: Formats | None = None) -> WritingRequest:
    """The request with its defaults filled in. Raises PreceptorError(INVALID_REQUEST, UNKNOWN_PROMPT_FORMAT)."""
    sampling = request.sampling
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
    few_shot = bool(request.tasks) and all(task.HasField("few_shot") for task in request.tasks)
    form = (formats or Formats()).find(request.prompt_format or ("augmentations" if few_shot else "open"))
    return WritingRequest(
        policy_id=request.policy_id,
        tasks=tuple(task_text(task, f"tasks[{i}]", form) for i, task in enumerate(request.tasks)),
        samples=samples,
        prompt_format=form.name,
        sampling=SamplingSettings(temperature, top_p, sampling.max_new_tokens or 512),
        seed=request.seed,
        limits=_limits(request.limits),
        max_resamples=request.max_resamples,
    )


def _limits(limits: pb.DirectiveLimits) -> Limits:
    for name, most in _LIMITS.items():
        value = getattr(limits, name)
        _need(0 <= value <= most, f"limits.{name}", f"is {value}, must be 0..{most:g}")
    for index, target in enumerate(limits.targets):
        _need(target in TARGETS, f"limits.targets[{index}]", f"is {target!r}; there are: {', '.join(TARGETS)}")
    built_in = Limits()
    made = Limits(
        learning_rate=(
            limits.min_learning_rate or built_in.learning_rate[0],
            limits.max_learning_rate or built_in.learning_rate[1],
        ),
        epochs=(limits.min_epochs or built_in.epochs[0], limits.max_epochs or built_in.epochs[1]),
        replay_share=(built_in.replay_share[0], limits.max_replay_share or built_in.replay_share[1]),
        rank=(built_in.rank[0], limits.max_rank or built_in.rank[1]),
        documents=limits.max_documents or built_in.documents,
        targets=tuple(target for target in TARGETS if target in (limits.targets or TARGETS)),
        allow_full=limits.allow_full,
        trained_characters=limits.max_trained_characters,
        default_epochs=limits.default_epochs or built_in.default_epochs,
        default_replay_share=limits.default_replay_share,
    )
    for name in ("learning_rate", "epochs"):
        low, high = getattr(made, name)
        _need(low <= high, f"limits.min_{name}", f"is {low:g}, above the upper bound {high:g}")
    return made


def task_text(task: types_pb2.Task, field: str, form: PromptFormat | None = None) -> TaskText:
    """What the teacher may see of a task: of a passage title and text, of a few-shot task the demonstrations and the
    inputs of the queries; nothing else. Raises PreceptorError(INVALID_REQUEST)."""
    few_shot = task.HasField("few_shot")
    _need(few_shot or task.HasField("passage"), field, "is neither a passage nor a few-shot task")
    if form is not None:
        _need_kind(few_shot, form, field)
    check_name(f"{field}.id", task.id)
    if few_shot:
        return TaskText(task.id, task.few_shot.name, _grids(task, field, form.separator if form else ""))
    _need(bool(task.passage.text.strip()), field, "has no text")
    _check_passage(task.passage, field)
    return TaskText(task.id, task.passage.title, task.passage.text)


def _need_kind(few_shot: bool, form: PromptFormat, field: str) -> None:
    kinds = {"passage": "passages", "few_shot": "few-shot tasks"}
    task = "few-shot task" if few_shot else "passage"
    wrong = f"is a {task}; the prompt format {form.name!r} is for {kinds[form.kind]}"
    _need(few_shot == (form.kind == "few_shot"), field, f"{wrong} (`preceptor formats list` shows which is for which)")


def _grids(task: types_pb2.Task, field: str, separator: str) -> str:
    _need(bool(task.few_shot.demonstrations), f"{field}.few_shot.demonstrations", "are none")
    _at_most(len(task.few_shot.name), MAX_TITLE_CHARACTERS, f"{field}.few_shot.name", "characters")
    made = convert.task_from_proto(task)
    assert isinstance(made, FewShotTask)
    for name in ("demonstrations", "queries"):
        for index, pair in enumerate(getattr(made, name)):
            for side in ("input", "output"):
                grid = getattr(pair, side)
                # The outputs of queries are not for the teacher: whoever asks should leave them out.
                fault = grid_fault(grid) if grid or side == "input" or name == "demonstrations" else ""
                _need(not fault, f"{field}.few_shot.{name}[{index}].{side}", fault)
    text = grids.task_text(made, separator)
    _at_most(len(text), MAX_TEXT_CHARACTERS, f"{field}.few_shot", "characters")
    return text


def update(request: pb.UpdatePolicyRequest, formats: Formats | None = None) -> Update:
    """The request with its defaults filled in. Raises PreceptorError(INVALID_REQUEST, UNKNOWN_PROMPT_FORMAT)."""
    settings, formats = request.settings, formats or Formats()
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
        examples=tuple(_rewarded(example, f"examples[{i}]", formats) for i, example in enumerate(request.examples)),
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


def _rewarded(example: pb.RewardedSelfEdit, field: str, formats: Formats) -> Rewarded:
    _need(math.isfinite(example.reward), f"{field}.reward", "is no finite number; leave failures out")
    check_name(f"{field}.group_id", example.group_id)
    for name in ("reward", "reward_stderr", "advantage", "advantage_stderr"):
        _number(getattr(example, name), f"{field}.{name}")
    for name in ("reward_stderr", "advantage_stderr"):
        _need(getattr(example, name) >= 0, f"{field}.{name}", "is negative")
    for name in ("policy_id", "student_commit"):
        if getattr(example, name):
            check_name(f"{field}.{name}", getattr(example, name))
    _at_most(len(example.completion), MAX_TEXT_CHARACTERS, f"{field}.completion", "characters")
    _at_most(len(example.prompt_format), MAX_NAME_CHARACTERS, f"{field}.prompt_format", "characters")
    task, few_shot = example.task, example.task.HasField("few_shot")
    form = formats.find(example.prompt_format or ("augmentations" if few_shot else "open"))
    _need(form.asks, f"{field}.prompt_format", f"is {form.name!r}, in which nobody writes: there is nothing to learn")
    _need(few_shot or task.HasField("passage"), f"{field}.task", "is neither a passage nor a few-shot task")
    _need_kind(few_shot, form, f"{field}.task")
    if few_shot:
        title, text = task.few_shot.name, _grids(task, f"{field}.task", form.separator)
    else:
        _check_passage(task.passage, f"{field}.task")
        title, text = task.passage.title, task.passage.text
    return Rewarded(
        group=example.group_id,
        title=title,
        text=text,
        completion=example.completion,
        prompt_format=form.name,
        reward=example.reward,
        stderr=example.reward_stderr,
        advantage=example.advantage if example.HasField("advantage") else None,
        advantage_stderr=example.advantage_stderr if example.HasField("advantage") else 0.0,
        only_compared=example.only_compared,
        # A template may be changed or taken away before the policy is trained again; what ships stays.
        prompt=form.render(title, text) if form.file else "",
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


def _group(group: WrittenGroup, form: PromptFormat, title: str, limits: Limits) -> pb.GenerateSelfEditsResponse:
    return pb.GenerateSelfEditsResponse(
        task_id=group.task_id,
        policy_id=group.policy_id,
        self_edits=[_written(index, written, form, title, limits) for index, written in enumerate(group.written)],
        seconds=group.seconds,
    )


def _written(index: int, written: Written, form: PromptFormat, title: str, limits: Limits) -> pb.WrittenSelfEdit:
    message = pb.WrittenSelfEdit(
        index=index,
        status=pb.SELF_EDIT_STATUS_TOO_COSTLY if written.too_costly else pb.SELF_EDIT_STATUS_MALFORMED,
        completion=written.completion,
        malformed_reason=written.malformed_reason,
        draws=written.draws,
        tokens=written.tokens,
    )
    if not written.malformed_reason:
        message.status = pb.SELF_EDIT_STATUS_VALID
        edit = read(written.completion, form, title, limits, finished=written.finished)
        message.self_edit.CopyFrom(convert.self_edit_to_proto(edit))
    return message


def _format(form: PromptFormat) -> pb.PromptFormat:
    return pb.PromptFormat(
        name=form.name,
        version=form.version,
        instruction=form.instruction,
        splitting=form.splitting,
        file=form.file,
        kind=form.kind,
        titled=form.titled,
        about=form.about,
        template=form.template or form.render("{title}", "{text}"),
        opening=form.opening,
    )


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
