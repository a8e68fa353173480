"""Services that the command line can be pointed at: small, with state, no models."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from preceptor.config import parse_config_json
from preceptor.errors import PreceptorError
from preceptor.server import Server
from preceptor.settings import ServiceSettings
from preceptor.v1 import evaluator_pb2_grpc, orchestrator_pb2_grpc, student_pb2_grpc, teacher_pb2_grpc
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import student_pb2 as students
from preceptor.v1 import teacher_pb2 as teacher
from tests.contract.scripted_evaluator import Evaluator

SUMMARY = {
    "schema": "preceptor.summary/1",
    "rounds": [{"round": 1, "evaluations": {"succeeded": 4, "failed": 0, "malformed": 0, "cached": 2}}],
    "heldout": {
        "passages": 3,
        "questions": 24,
        "arms": {"trained_teacher": {"accuracy": 0.5, "ci95": [0.4, 0.6], "retention": 0.9}},
        "differences": {"trained_minus_untrained": {"mean": 0.25, "ci95": [0.1, 0.4]}},
    },
    "throughput": {"trials": 8, "trials_per_second": 1.0},
    "wall_seconds": 60.0,
    "time_to_first_reward_seconds": 5.0,
    "peak_memory_bytes": 1,
}


class Orchestrator(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Runs advance one phase per watched snapshot and then take the state in ``ends`` (None: they go on for ever)."""

    def __init__(self) -> None:
        self.runs: dict[str, pb.Run] = {}
        self.requests: dict[str, str] = {}
        self.created: list[pb.CreateRunRequest] = []
        self.calls: list[str] = []
        self.ends: pb.RunState.ValueType | None = pb.RUN_STATE_SUCCEEDED
        self.failure = ("TOO_MANY_FAILURES", "9 of 10 evaluations failed")
        self.failing: set[str] = set()  # runs that fail whatever the others do
        self.summary: dict[str, Any] = SUMMARY
        self.breaks = 0  # so many watches are cut after their first snapshot
        self.watched = threading.Event()

    def add(self, run_id: str, state: pb.RunState.ValueType) -> None:
        """A run that is there already."""
        self.runs[run_id] = pb.Run(id=run_id, name="old", state=state, config_json="{}")

    def CreateRun(self, request: pb.CreateRunRequest, context: grpc.ServicerContext) -> pb.CreateRunResponse:
        self.calls.append("CreateRun")
        config = parse_config_json(request.config_json)
        if config.student.name == "unknown":
            raise PreceptorError("STUDENT_NOT_FOUND", "there is no student 'unknown'", field="student.name")
        if request.request_id not in self.requests:
            self.created.append(request)
            run_id = f"{config.name}-{len(self.runs) + 1}"
            self.requests[request.request_id] = run_id
            self.runs[run_id] = pb.Run(
                id=run_id,
                name=config.name,
                state=pb.RUN_STATE_RUNNING,
                config_json=request.config_json,
                config_sha256=config.digest(),
            )
        return pb.CreateRunResponse(run=self.runs[self.requests[request.request_id]])

    def GetRun(self, request: pb.GetRunRequest, context: grpc.ServicerContext) -> pb.GetRunResponse:
        return pb.GetRunResponse(run=self._run(request.run_id), progress=pb.RunProgress(phase="round 1: evaluating"))

    def ListRuns(self, request: pb.ListRunsRequest, context: grpc.ServicerContext) -> pb.ListRunsResponse:
        ids = list(reversed(self.runs))
        at = int(request.page_token or 0)  # one run a page
        more = str(at + 1) if at + 1 < len(ids) else ""
        return pb.ListRunsResponse(runs=[self.runs[run_id] for run_id in ids[at : at + 1]], next_page_token=more)

    def WatchRun(self, request: pb.WatchRunRequest, context: grpc.ServicerContext) -> Iterator[pb.WatchRunResponse]:
        run = self._run(request.run_id)
        if run.state in (pb.RUN_STATE_PENDING, pb.RUN_STATE_RUNNING):
            for phase in ("round 1: generating", "round 1: evaluating"):
                progress = pb.RunProgress(phase=phase, rounds=1, seconds_left=-1, first_reward_seconds=5, workers=1)
                yield pb.WatchRunResponse(run=run, progress=progress)
                self.watched.set()
                if self.breaks:
                    self.breaks -= 1
                    raise PreceptorError("SHUTTING_DOWN", "the orchestrator is going down")
            while self.ends is None and context.is_active():
                time.sleep(0.05)
            if self.ends is None:
                return
            run.state = pb.RUN_STATE_FAILED if run.id in self.failing else self.ends
            if run.state == pb.RUN_STATE_FAILED:
                run.failure.reason, run.failure.message = self.failure
        yield pb.WatchRunResponse(run=run, progress=pb.RunProgress(phase="done"))

    def CancelRun(self, request: pb.CancelRunRequest, context: grpc.ServicerContext) -> pb.CancelRunResponse:
        self.calls.append("CancelRun")
        run = self._run(request.run_id)
        run.state = pb.RUN_STATE_CANCELLED
        return pb.CancelRunResponse(run=run)

    def ResumeRun(self, request: pb.ResumeRunRequest, context: grpc.ServicerContext) -> pb.ResumeRunResponse:
        self.calls.append("ResumeRun")
        run = self._run(request.run_id)
        if run.state not in (pb.RUN_STATE_FAILED, pb.RUN_STATE_CANCELLED):
            raise PreceptorError("RUN_NOT_RESUMABLE", "it goes on already")
        run.state = pb.RUN_STATE_PENDING
        return pb.ResumeRunResponse(run=run)

    def GetRunReport(self, request: pb.GetRunReportRequest, context: grpc.ServicerContext) -> pb.GetRunReportResponse:
        run = self._run(request.run_id)
        if run.state != pb.RUN_STATE_SUCCEEDED:
            raise PreceptorError("RUN_NOT_FINISHED", f"run {run.id} has no report")
        return pb.GetRunReportResponse(
            summary_json=json.dumps({**self.summary, "run": run.id}), report_html=f"<title>{run.id}</title>"
        )

    def _run(self, run_id: str) -> pb.Run:
        if run_id not in self.runs:
            raise PreceptorError("RUN_NOT_FOUND", f"there is no run {run_id!r}", field="run_id")
        return self.runs[run_id]


class Teacher(teacher_pb2_grpc.TeacherServiceServicer):
    """A teacher of the user's own that writes the passage, sentence by sentence; a passage with "illegible" in its text
    is malformed."""

    def __init__(self) -> None:
        self.asked: list[teacher.GenerateSelfEditsRequest] = []
        self.base_commit = "c0ffee"

    def GetPolicy(self, request: teacher.GetPolicyRequest, context: grpc.ServicerContext) -> teacher.GetPolicyResponse:
        policy = teacher.Policy(id=request.policy_id or "base-1", state=teacher.POLICY_STATE_READY)
        policy.base_commit = self.base_commit
        policy.seconds = 0.0 if policy.id == "base-1" else 1.0
        return teacher.GetPolicyResponse(policy=policy)

    def GenerateSelfEdits(
        self, request: teacher.GenerateSelfEditsRequest, context: grpc.ServicerContext
    ) -> Iterator[teacher.GenerateSelfEditsResponse]:
        self.asked.append(request)
        for task in request.tasks:
            group = teacher.GenerateSelfEditsResponse(task_id=task.id, policy_id=request.policy_id or "base-1")
            for index in range(request.samples_per_task or 1):
                written = group.self_edits.add(index=index, status=teacher.SELF_EDIT_STATUS_VALID, draws=1)
                if "illegible" in task.passage.text:
                    written.status, written.malformed_reason = teacher.SELF_EDIT_STATUS_MALFORMED, "illegible"
                else:
                    written.self_edit.documents.extend(task.passage.text.split(". "))
            yield group


class Students(student_pb2_grpc.StudentServiceServicer):
    """A registry in memory. ``deployments``: the states that a watch shows before it ends (or hangs)."""

    def __init__(self) -> None:
        self.students: dict[str, students.Student] = {}
        self.active = ""
        self.deployments: list[students.DeploymentState.ValueType] = [
            students.DEPLOYMENT_STATE_LOADING,
            students.DEPLOYMENT_STATE_READY,
        ]

    def RegisterStudent(
        self, request: students.RegisterStudentRequest, context: grpc.ServicerContext
    ) -> students.RegisterStudentResponse:
        if request.source.endswith("pickled"):
            raise PreceptorError("UNSAFE_CHECKPOINT", "pytorch_model.bin is a pickle file", file=request.source)
        student = students.Student(name=request.name, architecture="LlamaForCausalLM", parameters=1_500_000)
        student.pinned.source, student.pinned.commit = request.source, "c0ffee" * 5
        self.students[request.name] = student
        return students.RegisterStudentResponse(student=student)

    def GetStudent(
        self, request: students.GetStudentRequest, context: grpc.ServicerContext
    ) -> students.GetStudentResponse:
        name = request.name or self.active
        if not name:
            raise PreceptorError("NO_ACTIVE_STUDENT", "no student is active")
        if name not in self.students:
            raise PreceptorError("STUDENT_NOT_FOUND", f"there is no student {name!r}", field="name")
        return students.GetStudentResponse(student=self.students[name])

    def ListStudents(
        self, request: students.ListStudentsRequest, context: grpc.ServicerContext
    ) -> students.ListStudentsResponse:
        return students.ListStudentsResponse(students=self.students.values())

    def ActivateStudent(
        self, request: students.ActivateStudentRequest, context: grpc.ServicerContext
    ) -> students.ActivateStudentResponse:
        self.GetStudent(students.GetStudentRequest(name=request.name), context)
        self.active = request.name
        self.students[request.name].active = True
        return students.ActivateStudentResponse(deployment=self._deployment(students.DEPLOYMENT_STATE_LOADING))

    def WatchDeployment(
        self, request: students.WatchDeploymentRequest, context: grpc.ServicerContext
    ) -> Iterator[students.WatchDeploymentResponse]:
        for state in self.deployments:
            yield students.WatchDeploymentResponse(deployment=self._deployment(state))
        while self.deployments[-1] == students.DEPLOYMENT_STATE_LOADING and context.is_active():
            time.sleep(0.05)

    def ListVersions(
        self, request: students.ListVersionsRequest, context: grpc.ServicerContext
    ) -> students.ListVersionsResponse:
        pinned = self.students[request.name].pinned
        return students.ListVersionsResponse(versions=[students.StudentVersion(version=1, pinned=pinned)])

    def _deployment(self, state: students.DeploymentState.ValueType) -> students.Deployment:
        made = students.Deployment(name=self.active, state=state, workers_alive=2)
        if state == students.DEPLOYMENT_STATE_FAILED:
            made.failure.reason, made.failure.message = "MODEL_UNREACHABLE", "the folder is gone"
        return made


@dataclass
class Services:
    """The services, behind one port each."""

    orchestrator: Orchestrator = field(default_factory=lambda: Orchestrator())  # type: ignore[abstract]
    students: Students = field(default_factory=lambda: Students())  # type: ignore[abstract]
    teacher: Teacher = field(default_factory=lambda: Teacher())  # type: ignore[abstract]
    evaluator: Evaluator = field(default_factory=lambda: Evaluator())  # type: ignore[abstract]
    environment: dict[str, str] = field(default_factory=dict)
    servers: list[Server] = field(default_factory=list)

    def __enter__(self) -> Services:
        settings = ServiceSettings(host="127.0.0.1", port=0, grace_seconds=0)

        def add_orchestrator(server: grpc.Server) -> None:
            orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(self.orchestrator, server)

        def add_students(server: grpc.Server) -> None:
            student_pb2_grpc.add_StudentServiceServicer_to_server(self.students, server)

        def add_evaluator(server: grpc.Server) -> None:
            evaluator_pb2_grpc.add_EvaluatorServiceServicer_to_server(self.evaluator, server)

        def add_teacher(server: grpc.Server) -> None:
            teacher_pb2_grpc.add_TeacherServiceServicer_to_server(self.teacher, server)

        adders = {
            "orchestrator": add_orchestrator,
            "student": add_students,
            "evaluator": add_evaluator,
            "teacher": add_teacher,
        }
        for name, adder in adders.items():
            server = Server([f"preceptor.v1.{name.capitalize()}Service"], adder, settings)
            self.servers.append(server)
            self.environment[f"PRECEPTOR_{name.upper()}_ADDRESS"] = f"127.0.0.1:{server.port}"
        return self

    def __exit__(self, *_: Any) -> None:
        for server in self.servers:
            server.stop()
