"""OrchestratorService: proto in, one call, proto out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import grpc
from sqlalchemy import Engine

from orchestrator.entries import Entry
from orchestrator.execution import Services
from orchestrator.executor import RunExecutor
from orchestrator.ledger import Ledger
from orchestrator.plan import QUESTION_FORMAT
from orchestrator.run_store import FINAL, SUCCEEDED, RunRecord, RunStore
from orchestrator.teacher_client import check_start, root_of
from orchestrator.validation import validated
from preceptor.channel import call
from preceptor.config import RunConfig
from preceptor.errors import PreceptorError
from preceptor.limits import check_name, page_size, page_token
from preceptor.names import task_title
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import orchestrator_pb2_grpc, teacher_pb2
from preceptor.v1 import student_pb2 as student
from preceptor.v1 import types_pb2 as types

SERVICE = "preceptor.v1.OrchestratorService"
# CreateRun answers within this time whether the other services are there or not.
CHECK_DEADLINE_SECONDS = 10.0
# A snapshot at least so often, since time passes even when nothing happens, and at most five a second.
IDLE_SECONDS = 1.0
MIN_INTERVAL_SECONDS = 0.2


class OrchestratorServicer(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Serves runs."""

    def __init__(self, engine: Engine, services: Services, executor: RunExecutor) -> None:
        self._engine = engine
        self._store = RunStore(engine)
        self._services = services
        self._executor = executor

    def CreateRun(self, request: pb.CreateRunRequest, context: grpc.ServicerContext) -> pb.CreateRunResponse:
        config = validated(request)
        body = _body(request)
        record = self._store.find_request(request.request_id, body)
        if record is None:
            tasks = (*request.tasks, *request.heldout_tasks)
            self._check_formats(config, few_shot=any(task.HasField("few_shot") for task in tasks))
            self._check_start(config)
            self._check_external_teacher(config)
            self._check_grader(config)
            get_student = student.GetStudentRequest(name=config.student.name)
            answer = call(self._services.student.GetStudent, get_student, deadline=CHECK_DEADLINE_SECONDS)
            record = self._store.create(request, body, config, answer.student.pinned)
            self._executor.submit(record.id)
        return pb.CreateRunResponse(run=_run(record))

    def GetRun(self, request: pb.GetRunRequest, context: grpc.ServicerContext) -> pb.GetRunResponse:
        record = self._store.get(request.run_id)
        return pb.GetRunResponse(run=_run(record), progress=self._executor.progress(record).snapshot(record.state))

    def ListRuns(self, request: pb.ListRunsRequest, context: grpc.ServicerContext) -> pb.ListRunsResponse:
        records, more = self._store.page(page_size(request.page_size), page_token(request.page_token) or None)
        return pb.ListRunsResponse(runs=map(_run, records), next_page_token="" if more is None else str(more))

    def WatchRun(self, request: pb.WatchRunRequest, context: grpc.ServicerContext) -> Iterator[pb.WatchRunResponse]:
        version = -1
        while context.is_active():
            record = self._store.get(request.run_id)
            progress = self._executor.progress(record)
            yield pb.WatchRunResponse(run=_run(record), progress=progress.snapshot(record.state))
            if record.state in FINAL:
                return
            if self._executor.draining:
                raise PreceptorError("SHUTTING_DOWN", "the orchestrator is going down; the run goes on when it is back")
            time.sleep(MIN_INTERVAL_SECONDS)
            version = progress.wait(version, IDLE_SECONDS)

    def CancelRun(self, request: pb.CancelRunRequest, context: grpc.ServicerContext) -> pb.CancelRunResponse:
        return pb.CancelRunResponse(run=self._change(request, self._executor.cancel))

    def ResumeRun(self, request: pb.ResumeRunRequest, context: grpc.ServicerContext) -> pb.ResumeRunResponse:
        return pb.ResumeRunResponse(run=self._change(request, self._executor.resume))

    def ListSelfEdits(
        self, request: pb.ListSelfEditsRequest, context: grpc.ServicerContext
    ) -> pb.ListSelfEditsResponse:
        record = self._store.get(request.run_id)
        offset, size = page_token(request.page_token), page_size(request.page_size)
        entries = Ledger(self._engine, record.id, record.created).page(request.round, offset, size + 1)
        titles = {task.id: task_title(task) for task in record.request.tasks}
        return pb.ListSelfEditsResponse(
            self_edits=[_line(entry, titles.get(entry.task_id, "")) for entry in entries[:size]],
            next_page_token=str(offset + size) if len(entries) > size else "",
        )

    def ListRunTasks(self, request: pb.ListRunTasksRequest, context: grpc.ServicerContext) -> pb.ListRunTasksResponse:
        tasks = self._store.get(request.run_id).request.tasks
        offset, size = page_token(request.page_token), page_size(request.page_size)
        return pb.ListRunTasksResponse(
            tasks=map(_shown_task, tasks[offset : offset + size]),
            next_page_token=str(offset + size) if len(tasks) > offset + size else "",
        )

    def GetRunReport(self, request: pb.GetRunReportRequest, context: grpc.ServicerContext) -> pb.GetRunReportResponse:
        record = self._store.get(request.run_id)
        if record.state != SUCCEEDED:
            raise PreceptorError(
                "RUN_NOT_FINISHED", f"run {record.id!r} has no report: {pb.RunState.Name(record.state)}"
            )
        summary_json, report_html = self._store.reports(record.id)
        return pb.GetRunReportResponse(summary_json=summary_json, report_html=report_html)

    def _change(self, request: pb.CancelRunRequest | pb.ResumeRunRequest, change: Callable[[str], None]) -> pb.Run:
        check_name("request_id", request.request_id)
        body = _body(request)
        if self._store.find_request(request.request_id, body) is None:
            run_id = self._store.get(request.run_id).id
            change(run_id)
            self._store.note_request(request.request_id, body, run_id)
        return _run(self._store.get(request.run_id))

    def _check_formats(self, config: RunConfig, few_shot: bool) -> None:
        """Asks the teacher now, so that a wrong name, or a format for other tasks, is not found after an hour."""
        request = teacher_pb2.ListPromptFormatsRequest()
        answer = call(self._services.teacher.ListPromptFormats, request, deadline=CHECK_DEADLINE_SECONDS)
        known = {prompt_format.name: prompt_format for prompt_format in answer.formats}
        named = {"teacher.prompt_format": config.teacher.prompt_format}
        if config.tasks.questions == "written":
            named["tasks.questions"] = QUESTION_FORMAT
        for number, strategy in enumerate(config.heldout.fixed_strategies):
            if strategy.prompt_format:
                named[f"heldout.fixed_strategies.{number}.prompt_format"] = strategy.prompt_format
        for number, name in enumerate(config.heldout.formats):
            named[f"heldout.formats.{number}"] = name
        for field, name in named.items():
            if name not in known:
                message = f"no prompt format named {name!r}; there are: {', '.join(known)}"
                raise PreceptorError("UNKNOWN_PROMPT_FORMAT", message, field=field)
            if known[name].kind not in ("", "few_shot" if few_shot else "passage"):
                tasks = "passages" if few_shot else "few-shot tasks"
                message = f"the prompt format {name!r} is for {tasks}, which this run has not"
                raise PreceptorError("BAD_CONFIG", message, field=field)
        if config.teacher.prompt_format == "none" and config.update.algorithm != "none" and config.rounds.count:
            message = (
                "in the format 'none' nobody writes, so there is nothing to learn; set update.algorithm = \"none\""
            )
            raise PreceptorError("BAD_CONFIG", message, field="teacher.prompt_format")

    def _check_start(self, config: RunConfig) -> None:
        """Asks the teacher now whether the rounds can begin with the policy that is named."""
        if not config.teacher.policy:
            return

        def get(policy_id: str) -> teacher_pb2.Policy:
            request = teacher_pb2.GetPolicyRequest(policy_id=policy_id)
            return call(self._services.teacher.GetPolicy, request, deadline=CHECK_DEADLINE_SECONDS).policy

        check_start(config.teacher.policy, root_of(get(""), get).id, get)

    def _check_external_teacher(self, config: RunConfig) -> None:
        """Whether it is there is not asked: one that goes away costs its arm alone."""
        if config.heldout.external_teacher and self._services.external_teacher is None:
            problem = "there is no external teacher: PRECEPTOR_EXTERNAL_TEACHER_ADDRESS is not set"
            raise PreceptorError("EXTERNAL_TEACHER_NOT_SET", problem, field="heldout.external_teacher")

    def _check_grader(self, config: RunConfig) -> None:
        """Asks the evaluator now, so that a judge that is not set is not found after the first self-edits. Whether the
        judge answers is not asked: an outage is waited for when it is there."""
        request = evaluator.GradeAnswersRequest(grader=config.reward.grader)
        try:
            call(self._services.evaluator.GradeAnswers, request, deadline=CHECK_DEADLINE_SECONDS)
        except PreceptorError as error:
            if error.reason not in ("JUDGE_NOT_SET", "GRADER_UNKNOWN"):
                raise
            raise PreceptorError(error.reason, error.message, field="reward.grader") from None


def _body(request: pb.CreateRunRequest | pb.CancelRunRequest | pb.ResumeRunRequest) -> bytes:
    """What a request asks for, as bytes that equal requests share. Its type counts: one id is for one kind."""
    return request.DESCRIPTOR.name.encode() + b"\0" + request.SerializeToString(deterministic=True)


def _run(record: RunRecord) -> pb.Run:
    run = pb.Run(
        id=record.id,
        name=record.name,
        state=record.state,
        student=record.student,
        config_json=record.request.config_json,
        config_sha256=record.config_sha256,
    )
    if record.failure is not None:
        run.failure.CopyFrom(record.failure)
    run.create_time.FromMicroseconds(int(record.created * 1e6))
    if record.finished is not None:
        run.finish_time.FromMicroseconds(int(record.finished * 1e6))
    return run


def _shown_task(task: types.Task) -> types.Task:
    """A task without what nobody may see before the end: questions of the other banks, and reference edits."""
    shown = types.Task()
    shown.CopyFrom(task)
    shown.reference_edits.clear()
    if shown.HasField("passage"):
        del shown.passage.questions[:]
        shown.passage.questions.extend(
            question
            for question in task.passage.questions
            if question.bank in (types.QUESTION_BANK_REWARD, types.QUESTION_BANK_UNSPECIFIED)
        )
    return shown


def _line(entry: Entry, title: str) -> pb.LedgerSelfEdit:
    line = pb.LedgerSelfEdit(
        round=int(entry.key.stage.rpartition("-")[2]),
        task_id=entry.task_id,
        task_title=title,
        index=entry.key.index,
        policy_id=entry.policy_id,
        completion=entry.completion,
        state=entry.state,
        malformed=bool(entry.malformed),
        malformed_reason=entry.malformed,
        too_costly=entry.too_costly,
    )
    if entry.evaluation is not None:
        line.evaluation_id = entry.evaluation.id
    if (of := entry.evaluation or entry.look) is not None:
        line.student_commit = of.student.commit
    if (reward := entry.reward) is not None:
        line.reward.CopyFrom(reward)
    if entry.failures:
        line.failure.CopyFrom(entry.failures[0].failure)
    if entry.self_edit is not None:
        line.self_edit.CopyFrom(entry.self_edit)
    line.stopped = entry.stopped
    for field, found in (("look", entry.look), ("fresh", entry.fresh)):
        if found is not None and found.state == evaluator.EVALUATION_STATE_SUCCEEDED:
            getattr(line, field).CopyFrom(found.reward)
    if (measured := entry.evaluation or entry.look) is not None and measured.HasField("overlap"):
        line.overlap.CopyFrom(measured.overlap)
    return line
