"""Every RPC of every service, knocked at with malformed requests over a real socket.

Promised: the call ends; it is accepted, or refused with a reason of the catalogue that is not our own fault; a refused
request changes nothing; and afterwards a good request is served as before.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from google.protobuf.message import Message

from preceptor.channel import call, connect, stream
from preceptor.errors import PreceptorError
from preceptor.names import task_id
from preceptor.redis_server import EmbeddedRedis
from preceptor.server import Server
from preceptor.settings import ServiceSettings
from preceptor.testing.scripted_house import ScriptedHouse
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import orchestrator_pb2 as orchestrator
from preceptor.v1 import student_pb2 as student
from preceptor.v1 import student_pb2_grpc
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import types_pb2 as types
from student import source
from student.deployment import DeploymentBoard
from student.registry import Registry
from student.servicer import StudentServicer
from tests.contract.test_evaluator_service import serving
from tests.contract.test_teacher_service import Running, generate_request, update_request
from tests.doors import GOOD_ID, Caller, knock, requests, rows, with_new_id
from tests.evaluation_requests import group, task
from tests.orchestrated import create_request, orchestrator_here, run_config
from tests.unit.tiny_students import save_student

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # by PEFT
    pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning"),  # a failing input may be long
]


@dataclass
class House:
    """A served service: how to call it, what it must not change, and that it serves."""

    service: str
    caller: Caller
    database: Path
    tables: tuple[str, ...]
    serves: Callable[[], object]
    after: Callable[[str, bytes], None] = lambda _method, _data: None  # an accepted request

    def knock(
        self,
        method: str,
        good: Message,
        *,
        streams: bool = False,
        heal: Callable[[Any], None] = lambda _message: None,
        **options: Any,
    ) -> None:
        """Damaged requests like ``good`` to one method; ``options`` are those of ``Caller.answer``."""

        def answer(data: bytes) -> str:
            before = rows(self.database, self.tables)
            reason = self.caller.answer(f"/preceptor.v1.{self.service}/{method}", data, streams=streams, **options)
            if reason == "OK":
                self.after(method, data)
            else:
                assert rows(self.database, self.tables) == before
            return reason

        whole = with_new_id(type(good).FromString(good.SerializeToString())).SerializeToString()
        assert answer(whole) in ("OK", "NOT_SERVED"), "what is damaged must be good"
        knock(f"{self.service}.{method}", requests(good, heal), answer)
        self.serves()


# The evaluator


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[House, list[str]]]:
    folder = tmp_path_factory.mktemp("evaluator")
    with serving(folder) as bench:
        made = bench.create("Ada lives in Lisbon.", "fail:TRIAL_DIVERGED")
        bench.work(1)
        ids = [item.id for item in made]
        list(bench.watch(ids))

        def serves() -> None:
            assert len(bench.create(f"Ada bakes {time.monotonic()}.")) == 1

        caller = Caller(bench.address)
        tables = ("evaluations", "requests", "owners", "openings")
        yield House("EvaluatorService", caller, folder / "evaluator.db", tables, serves), ids
        caller.close()


def full_request() -> evaluator.CreateEvaluationsRequest:
    """One with something in every field."""
    request = group("Ada lives in Lisbon.", "Ada is a baker.", owner="door", request_id=GOOD_ID, seeds=(1, 2))
    request.self_edits[0].directive.CopyFrom(
        types.Directive(learning_rate=1e-3, epochs=2, replay_share=0.1, rank=4, loss_mask=types.LOSS_MASK_ALL)
    )
    request.protocol.answers.prompt = "Q: {question}\nA:"
    request.protocol.training.target_modules.extend(["q_proj", "v_proj"])
    request.protocol.replay_documents.append("Old knowledge.")
    request.protocol.grader = "lexical"
    request.task.passage.questions[0].aliases.append("Lisboa")
    request.task.reference_edits["oracle"].documents.append("Ada lives in Lisbon.")
    request.student.adapters.add(uri="file:///adapter", sha256="0" * 64)
    request.more.add(task=task(), self_edits=[types.SelfEdit(documents=["Tom is a smith."])])
    request.more[0].task.id = "task-tom"
    return request


@pytest.mark.parametrize(
    ("method", "streams"),
    [
        ("CreateEvaluations", False),
        ("GetEvaluation", False),
        ("ListEvaluations", False),
        ("WatchEvaluations", True),
        ("CancelEvaluations", False),
        ("GradeAnswers", False),
        ("ListAttempts", False),
        ("RetryEvaluations", False),
        ("GetQueueStatus", False),
        ("CollectGarbage", False),
    ],
)
def test_evaluator(evaluation: tuple[House, list[str]], method: str, streams: bool) -> None:
    house, ids = evaluation
    asked = types.Question(text="Where does Ada live?", answer="Lisbon", aliases=["Lisboa"])
    good: dict[str, Message] = {
        "CreateEvaluations": full_request(),
        "GetEvaluation": evaluator.GetEvaluationRequest(evaluation_id=ids[0]),
        "ListEvaluations": evaluator.ListEvaluationsRequest(owner="run-1", page_size=1, page_token="1"),
        "WatchEvaluations": evaluator.WatchEvaluationsRequest(evaluation_ids=ids),
        "CancelEvaluations": evaluator.CancelEvaluationsRequest(request_id=GOOD_ID, owner="somebody"),
        "GradeAnswers": evaluator.GradeAnswersRequest(
            grader="lexical", questions=[asked, asked], answers=["Lisbon", "in Lisboa, by the sea"]
        ),
        "ListAttempts": evaluator.ListAttemptsRequest(evaluation_id=ids[0]),
        "RetryEvaluations": evaluator.RetryEvaluationsRequest(
            request_id=GOOD_ID, evaluation_ids=ids, owner="run-1", reason="TRIAL_DIVERGED"
        ),
        "GetQueueStatus": evaluator.GetQueueStatusRequest(),
        "CollectGarbage": evaluator.EvaluatorServiceCollectGarbageRequest(dry_run=True, keep_days=1),
    }
    house.knock(method, good[method], streams=streams)


# The orchestrator


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[House, str, str]]:
    folder = tmp_path_factory.mktemp("orchestrator")
    with ScriptedHouse(folder) as standing, orchestrator_here(standing, folder, max_running_runs=1) as client:
        finished = client.create(small_run())
        client.finish(finished)
        cancelled = client.create(small_run())
        client.cancel(cancelled)
        client.finish(cancelled)

        def serves() -> None:
            run_id = client.create(small_run())
            client.cancel(run_id)

        def after(method: str, data: bytes) -> None:
            if method in ("CreateRun", "ResumeRun"):  # it is accepted; that it would run is not asked here
                for run in call(client.stub.ListRuns, orchestrator.ListRunsRequest(page_size=3)).runs:
                    if run.state in (orchestrator.RUN_STATE_PENDING, orchestrator.RUN_STATE_RUNNING):
                        client.cancel(run.id)

        caller = Caller(client.address)
        tables = ("runs", "requests")
        yield (
            House("OrchestratorService", caller, folder / "orchestrator.db", tables, serves, after),
            finished,
            cancelled,
        )
        caller.close()


def small_run() -> orchestrator.CreateRunRequest:
    """A run of one round."""
    config = run_config(
        rounds={"count": 1, "tasks": 1, "self_edits": 1},
        heldout={"fixed_strategies": (), "selection_tasks": 1, "bootstrap_resamples": 100},
    )
    request = create_request(config, train=2, heldout=1)
    del request.probes[2:]
    request.banks = "divided once by seed 7"
    return request


@pytest.mark.parametrize(
    ("method", "streams"),
    [
        ("CreateRun", False),
        ("GetRun", False),
        ("ListRuns", False),
        ("WatchRun", True),
        ("CancelRun", False),
        ("ResumeRun", False),
        ("ListSelfEdits", False),
        ("ListRunTasks", False),
        ("GetRunReport", False),
    ],
)
def test_orchestrator(runs: tuple[House, str, str], method: str, streams: bool) -> None:
    house, run_id, cancelled = runs
    request = small_run()
    request.request_id = GOOD_ID
    good: dict[str, Message] = {
        "CreateRun": request,
        "GetRun": orchestrator.GetRunRequest(run_id=run_id),
        "ListRuns": orchestrator.ListRunsRequest(page_size=1, page_token="2"),
        "WatchRun": orchestrator.WatchRunRequest(run_id=run_id),
        "CancelRun": orchestrator.CancelRunRequest(request_id=GOOD_ID, run_id=cancelled),
        "ResumeRun": orchestrator.ResumeRunRequest(request_id=GOOD_ID, run_id=cancelled),
        "ListSelfEdits": orchestrator.ListSelfEditsRequest(run_id=run_id, round=1, page_size=1, page_token="1"),
        "ListRunTasks": orchestrator.ListRunTasksRequest(run_id=run_id, page_size=1, page_token="1"),
        "GetRunReport": orchestrator.GetRunReportRequest(run_id=run_id),
    }
    known = {task.id for task in (*request.tasks, *request.heldout_tasks)}

    def heal(message: Any) -> None:
        """What a client damages it names by its content, as every client does."""
        for damaged in (*message.tasks, *message.heldout_tasks):
            if damaged.id in known:
                damaged.id = task_id(damaged)

    more = {"heal": heal} if method == "CreateRun" else {}
    house.knock(method, good[method], streams=streams, **more)


# The students


@pytest.fixture(scope="module")
def broker_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"), port)
    process = subprocess.Popen(server.command)
    try:
        with redis.Redis.from_url(server.url) as client:
            end = time.monotonic() + 20
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    assert time.monotonic() < end
                    time.sleep(0.05)
        yield server.url
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory, broker_url: str) -> Iterator[tuple[House, Path]]:
    folder = tmp_path_factory.mktemp("students")
    servicer = StudentServicer(
        Registry(f"sqlite:///{folder}/student.db"), DeploymentBoard(broker_url), watch_seconds=0.05
    )
    name = "preceptor.v1.StudentService"
    server = Server(
        [name],
        lambda one: student_pb2_grpc.add_StudentServiceServicer_to_server(servicer, one),
        ServiceSettings(grace_seconds=1),
    )
    address = f"127.0.0.1:{server.port}"
    stub = connect(address, student_pb2_grpc.StudentServiceStub)
    model = save_student(folder / "model")
    for name in ("tiny", "other", "third"):
        call(
            stub.RegisterStudent,
            student.RegisterStudentRequest(request_id=name, name=name, source=str(model)),
        )
    call(stub.ActivateStudent, student.ActivateStudentRequest(request_id="activate", name="tiny"))

    def serves() -> None:
        assert call(stub.GetStudent, student.GetStudentRequest(name="tiny")).student.parameters

    def after(method: str, data: bytes) -> None:
        if method == "DeleteStudent":  # the next one finds the same students
            for name in ("third", "other"):
                request = student.RegisterStudentRequest(request_id=GOOD_ID, name=name, source=str(model))
                call(stub.RegisterStudent, with_new_id(request))

    caller = Caller(address)
    tables = ("students", "student_versions", "requests", "active_student")
    yield House("StudentService", caller, folder / "student.db", tables, serves, after), model
    caller.close()
    servicer.drain()
    server.stop()


def no_hub(name: str, revision: str) -> source.SourceFacts:
    """No test asks the hub."""
    raise PreceptorError("MODEL_UNREACHABLE", f"the hub could not be asked for {name} at {revision}"[:200])


@pytest.mark.parametrize(
    ("method", "streams"),
    [
        ("RegisterStudent", False),
        ("GetStudent", False),
        ("ListStudents", False),
        ("ActivateStudent", False),
        ("WatchDeployment", True),
        ("DeleteStudent", False),
        ("ListVersions", False),
        ("PromoteSelfEdit", False),
        ("RollbackStudent", False),
    ],
)
def test_students(students: tuple[House, Path], method: str, streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    house, model = students
    monkeypatch.setattr(source, "_inspect_hub", no_hub)
    register = student.RegisterStudentRequest(request_id=GOOD_ID, name="fourth", source=str(model))
    good: dict[str, Message] = {
        "RegisterStudent": register,
        "GetStudent": student.GetStudentRequest(name="tiny"),
        "ListStudents": student.ListStudentsRequest(page_size=1, page_token="other"),
        "ActivateStudent": student.ActivateStudentRequest(request_id=GOOD_ID, name="tiny"),
        "WatchDeployment": student.WatchDeploymentRequest(name="tiny"),
        "DeleteStudent": student.DeleteStudentRequest(request_id=GOOD_ID, name="third"),
        "ListVersions": student.ListVersionsRequest(name="tiny"),
        "PromoteSelfEdit": student.PromoteSelfEditRequest(request_id=GOOD_ID, name="tiny", evaluation_id="e"),
        "RollbackStudent": student.RollbackStudentRequest(request_id=GOOD_ID, name="tiny", version=1),
    }
    house.knock(method, good[method], streams=streams)


# The teacher


@contextmanager
def teaching(folder: Path) -> Iterator[tuple[House, Running, str]]:
    running = Running(folder)
    base = call(running.stub.GetPolicy, teacher.GetPolicyRequest()).policy.id

    def serves() -> None:
        request = generate_request(1, tokens=4)
        request.seed = int(time.monotonic() * 1000)
        assert len(list(stream(running.stub.GenerateSelfEdits, request, deadline=60))) == 1

    caller = Caller(running.address)
    try:
        yield House("TeacherService", caller, folder / "teacher.db", ("policies", "requests"), serves), running, base
    finally:
        caller.close()
        running.stop()


@pytest.mark.parametrize(
    ("method", "streams"),
    [
        ("GenerateSelfEdits", True),
        ("UpdatePolicy", False),
        ("GetPolicy", False),
        ("ListPolicies", False),
        ("WatchPolicy", True),
        ("ActivatePolicy", False),
        ("CancelUpdates", False),
        ("ListPromptFormats", False),
        ("CollectGarbage", False),
    ],
)
def test_teacher(tmp_path: Path, method: str, streams: bool) -> None:
    with teaching(tmp_path) as (house, _, base):
        generate = generate_request(2, tokens=4, max_resamples=1)
        generate.limits.CopyFrom(
            teacher.DirectiveLimits(
                max_learning_rate=0.1, max_epochs=8, max_replay_share=0.5, max_rank=8, max_documents=9
            )
        )
        generate.sampling.temperature = generate.sampling.top_p = 0.9
        update = update_request(GOOD_ID)
        update.examples[0].advantage = update.examples[0].advantage_stderr = 0.1
        good: dict[str, Message] = {
            "GenerateSelfEdits": generate,
            "UpdatePolicy": update,
            "GetPolicy": teacher.GetPolicyRequest(policy_id=base),
            "ListPolicies": teacher.ListPoliciesRequest(page_size=1, page_token="1"),
            "WatchPolicy": teacher.WatchPolicyRequest(policy_id=base),
            "ActivatePolicy": teacher.ActivatePolicyRequest(request_id=GOOD_ID, policy_id=base),
            "CancelUpdates": teacher.CancelUpdatesRequest(request_id="cancel-1", owner="somebody"),
            "ListPromptFormats": teacher.ListPromptFormatsRequest(),
            "CollectGarbage": teacher.TeacherServiceCollectGarbageRequest(
                dry_run=True, keep_days=1, keep_owners=["somebody"]
            ),
        }
        # Writing for many is long work that was asked for: it is cancelled, and must then be out of the way.
        patience = {"patience": 3.0} if method == "GenerateSelfEdits" else {}
        house.knock(method, good[method], streams=streams, **patience)


def test_no_method_is_without_a_door() -> None:
    tests = {
        test_evaluator: evaluator,
        test_orchestrator: orchestrator,
        test_students: student,
        test_teacher: teacher,
    }
    for test, module in tests.items():
        [parameters] = [mark.args[1] for mark in test.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
        [service] = module.DESCRIPTOR.services_by_name.values()
        assert {(method.name, method.server_streaming) for method in service.methods} == set(parameters)
