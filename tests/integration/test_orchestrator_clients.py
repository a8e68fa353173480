"""The orchestrator's clients against scripted services that die, refuse and repeat themselves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from orchestrator.entries import EditKey, Kind
from orchestrator.evaluator_client import FINAL, EvaluatorClient, Reported, Submission
from orchestrator.stop import Stop, Stopped
from orchestrator.teacher_client import TeacherClient
from preceptor.channel import connect
from preceptor.errors import PreceptorError
from preceptor.testing.scripted_evaluator import ScriptedEvaluator
from preceptor.testing.scripted_house import ScriptedHouse
from preceptor.testing.scripted_teacher import ScriptedTeacher
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import evaluator_pb2_grpc, teacher_pb2_grpc
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import types_pb2 as types
from tests.orchestrated import passage


def submission(task: int, documents: list[str]) -> Submission:
    request = evaluator.CreateEvaluationsRequest(
        request_id=f"request-{task}",
        owner="run",
        task=passage(f"town {task}"),
        self_edits=[types.SelfEdit(documents=[document]) for document in documents],
        protocol=evaluator.EvaluationProtocol(seeds=[1]),
    )
    return Submission(tuple(EditKey("round-00001", "", task, i) for i in range(len(documents))), request)


def evaluator_client(house: ScriptedHouse, stop: Stop, patience: float = 10) -> EvaluatorClient:
    stub = connect(house.address("evaluator"), evaluator_pb2_grpc.EvaluatorServiceStub)
    return EvaluatorClient(stub, patience, stop)


def teacher_client(house: ScriptedHouse, stop: Stop, patience: float = 10) -> TeacherClient:
    return TeacherClient(connect(house.address("teacher"), teacher_pb2_grpc.TeacherServiceStub), patience, stop)


def final(reports: Iterable[list[Reported]]) -> list[EditKey]:
    return [key for report in chain.from_iterable(reports) if report.evaluation.state in FINAL for key in report.keys]


def test_every_self_edit_is_reported_final_once_also_where_the_same_was_written_twice(tmp_path: Path) -> None:
    groups = [submission(task, ["good a", "poor b", "good a"]) for task in range(4)]
    with ScriptedHouse(tmp_path, evaluator=ScriptedEvaluator(seconds=0.2)) as house:
        keys = final(evaluator_client(house, Stop()).evaluate(groups))
    assert sorted(keys) == sorted(key for group in groups for key in group.keys)


def test_groups_are_evaluated_while_later_ones_are_still_being_written(tmp_path: Path) -> None:
    written: list[float] = []

    def slowly() -> Iterator[Submission]:
        for task in range(3):
            time.sleep(0.5)
            written.append(time.monotonic())
            yield submission(task, ["good a", "poor b"])

    with ScriptedHouse(tmp_path, evaluator=ScriptedEvaluator(seconds=0.05)) as house:
        for report in chain.from_iterable(evaluator_client(house, Stop()).evaluate(slowly())):
            if report.evaluation.state in FINAL:
                break
    assert len(written) < 3


def test_what_the_writer_raises_reaches_the_caller(tmp_path: Path) -> None:
    def broken() -> Iterator[Submission]:
        yield submission(0, ["good a"])
        raise PreceptorError("POLICY_NOT_FOUND", "gone")

    with (
        ScriptedHouse(tmp_path, evaluator=ScriptedEvaluator(seconds=0.1)) as house,
        pytest.raises(PreceptorError) as caught,
    ):
        final(evaluator_client(house, Stop()).evaluate(broken()))
    assert caught.value.reason == "POLICY_NOT_FOUND"


def test_what_is_submitted_on_a_report_is_reported_too_and_the_flow_ends_by_itself(tmp_path: Path) -> None:
    """Chains of follow-ups, each submitted on the end of the one before, while the feed still gives."""

    def slowly() -> Iterator[Submission]:
        for task in range(3):
            yield submission(task, ["good a", "poor b"])
            time.sleep(0.2)

    followed: list[int] = []
    with ScriptedHouse(tmp_path, evaluator=ScriptedEvaluator(seconds=0.1)) as house:
        client = evaluator_client(house, Stop())
        with client.flow() as flow:
            flow.feed(slowly())
            reported = []
            for report in chain.from_iterable(flow.reports()):
                reported.append(report)
                task = report.keys[0].task
                if report.final and report.keys[0].index == 0 and task < 40:
                    followed.append(task + 10)
                    flow.submit(submission(task + 10, ["good a", "poor b"]))
    assert sorted(followed) == [10 * chain + task for chain in range(1, 5) for task in range(3)]
    ended = sorted(final([reported]))
    assert ended == sorted(key for task in (*range(3), *followed) for key in submission(task, ["a", "b"]).keys)


def test_the_same_evaluation_of_two_submissions_is_reported_to_both(tmp_path: Path) -> None:
    one, two = submission(0, ["good a"]), submission(0, ["good a"])
    two.request.request_id = "another"
    two = Submission((EditKey("round-00002", "", 0, 0),), two.request, Kind.FRESH)
    with ScriptedHouse(tmp_path, evaluator=ScriptedEvaluator(seconds=0.3)) as house:
        known = chain.from_iterable(evaluator_client(house, Stop()).evaluate([one, two]))
        reports = [report for report in known if report.final]
    assert sorted((report.keys, report.kind) for report in reports) == [(one.keys, Kind.FULL), (two.keys, Kind.FRESH)]


def test_what_a_submission_in_the_flow_raises_reaches_its_caller_and_the_threads_end(tmp_path: Path) -> None:
    with ScriptedHouse(tmp_path, evaluator=ScriptedEvaluator(seconds=0.1)) as house:
        client = evaluator_client(house, Stop())
        again = submission(0, ["poor b"])  # another body under the same id
        with pytest.raises(PreceptorError) as caught, client.flow() as flow:
            flow.feed([submission(0, ["good a"])])
            for report in chain.from_iterable(flow.reports()):
                if report.final:
                    flow.submit(again)
        assert caught.value.reason == "REQUEST_ID_REUSED"
        end = time.monotonic() + 5
        while any(thread.name in ("watch", "submit") for thread in threading.enumerate()):
            assert time.monotonic() < end, threading.enumerate()
            time.sleep(0.05)


def test_how_often_sealed_questions_were_opened_is_handed_on(tmp_path: Path) -> None:
    sealed = submission(0, ["good a"])
    sealed.request.protocol.bank = types.QUESTION_BANK_SEALED
    told: list[evaluator.SealedOpening] = []
    with ScriptedHouse(tmp_path) as house:
        stub = connect(house.address("evaluator"), evaluator_pb2_grpc.EvaluatorServiceStub)
        final(EvaluatorClient(stub, 10, Stop(), told.extend).evaluate([sealed, submission(1, ["good a"])]))
    assert [(one.task_id, one.owners) for one in told] == [(passage("town 0").id, 1)]


def test_a_refusal_is_raised_at_once_and_not_waited_out(tmp_path: Path) -> None:
    reused = submission(0, ["poor b"])
    start = time.monotonic()
    with ScriptedHouse(tmp_path) as house:
        client = evaluator_client(house, Stop(), patience=60)
        final(client.evaluate([submission(0, ["good a"])]))
        with pytest.raises(PreceptorError) as caught:
            final(client.evaluate([reused]))
    assert caught.value.reason == "REQUEST_ID_REUSED"
    assert time.monotonic() - start < 10


def test_a_stop_ends_a_wait_in_a_silent_stream(tmp_path: Path) -> None:
    stop = Stop()
    with ScriptedHouse(tmp_path, evaluator=ScriptedEvaluator(seconds=60)) as house:
        threading.Timer(0.5, stop.set).start()
        start = time.monotonic()
        with pytest.raises(Stopped):
            final(evaluator_client(house, stop).evaluate([submission(0, ["good a"])]))
        assert time.monotonic() - start < 5


def test_a_generation_that_breaks_gives_each_group_once_and_in_order(tmp_path: Path) -> None:
    tasks = [types.Task(id=f"task {i}", passage=types.Passage(title=str(i), text="x")) for i in range(6)]
    request = teacher.GenerateSelfEditsRequest(tasks=tasks, samples_per_task=2, prompt_format="open", seed=1)
    with ScriptedHouse(tmp_path, ScriptedTeacher(group_seconds=0.15)) as house:
        client = teacher_client(house, Stop())
        undisturbed = list(client.generate(request))
        groups = []
        for group in client.generate(request):
            groups.append(group)
            if len(groups) in (2, 4):
                house.stop("teacher")
                house.start("teacher")
    assert [group.task_id for group in groups] == [task.id for task in tasks]
    assert groups == undisturbed


def test_patience_ends(tmp_path: Path) -> None:
    with ScriptedHouse(tmp_path) as house:
        house.stop("teacher")
        start = time.monotonic()
        with pytest.raises(PreceptorError) as caught:
            teacher_client(house, Stop(), patience=1.5).base_policy(learns=True)
    assert caught.value.reason == "SERVICE_UNREACHABLE"
    assert "teacher" in caught.value.message
    assert 1 < time.monotonic() - start < 10


class UselessTeacher(ScriptedTeacher):
    """Has no room, or is silent until the deadline of whoever asks."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self._reason = reason
        self.asked = 0
        self.over = threading.Event()

    def GenerateSelfEdits(
        self, request: teacher.GenerateSelfEditsRequest, context: Any
    ) -> Iterator[teacher.GenerateSelfEditsResponse]:
        self.asked += 1
        if self._reason:
            raise PreceptorError(self._reason, "not now")
        self.over.wait(20)
        yield from ()


@pytest.mark.parametrize("reason", ["DISK_FULL", "SERVICE_BUSY", ""])
def test_a_teacher_that_a_run_can_do_without_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr("orchestrator.teacher_client.GENERATE_SECONDS_PER_TASK", 1.0)
    useless, stop = UselessTeacher(reason), Stop()
    task = types.Task(id="task", passage=types.Passage(title="t", text="x"))
    with ScriptedHouse(tmp_path, useless) as house:
        stub = connect(house.address("teacher"), teacher_pb2_grpc.TeacherServiceStub)
        client = TeacherClient(stub, 0.8, stop, needed=False)
        threading.Timer(15, stop.set).start()
        with pytest.raises(PreceptorError) as caught:
            list(client.generate(teacher.GenerateSelfEditsRequest(tasks=[task], samples_per_task=1)))
        useless.over.set()
    assert caught.value.reason == "SERVICE_UNREACHABLE"
    assert useless.asked > 1  # once is no absence


class FixedTeacher(ScriptedTeacher):
    def GetPolicy(self, request: teacher.GetPolicyRequest, context: Any) -> teacher.GetPolicyResponse:
        response = super().GetPolicy(request, context)
        response.policy.fixed = True
        return response


def test_a_fixed_teacher_is_refused_before_the_first_round_unless_the_run_has_no_updates(tmp_path: Path) -> None:
    with ScriptedHouse(tmp_path, FixedTeacher()) as house:
        client = teacher_client(house, Stop())
        with pytest.raises(PreceptorError) as caught:
            client.base_policy(learns=True)
        assert caught.value.reason == "TEACHER_IS_FIXED"
        assert caught.value.metadata["field"] == "update.algorithm"
        assert client.base_policy(learns=False) == "base-scripted"


class Refusing(ScriptedEvaluator):
    """Has no room for so many seconds."""

    def __init__(self, reason: str, seconds: float) -> None:
        super().__init__()
        self.reason, self.until = reason, time.monotonic() + seconds

    def CreateEvaluations(self, request: Any, context: Any) -> Any:
        self._refuse()
        return super().CreateEvaluations(request, context)

    def WatchEvaluations(self, request: Any, context: Any) -> Any:
        self._refuse()
        return super().WatchEvaluations(request, context)

    def _refuse(self) -> None:
        if time.monotonic() < self.until:
            raise PreceptorError(self.reason, "there is no room")  # type: ignore[arg-type]


@pytest.mark.parametrize("reason", ["QUEUE_FULL", "SERVICE_BUSY", "DISK_FULL", "ARTIFACT_STORE_UNREACHABLE"])
def test_a_service_without_room_is_waited_for_beyond_any_patience_and_this_is_said(tmp_path: Path, reason: str) -> None:
    told: list[str] = []
    with ScriptedHouse(tmp_path, evaluator=Refusing(reason, 5)) as house:  # type: ignore[abstract]
        stub = connect(house.address("evaluator"), evaluator_pb2_grpc.EvaluatorServiceStub)
        client = EvaluatorClient(stub, 1, Stop(), hindered=lambda name, words: told.append(words))
        one = submission(0, ["good a"])
        assert final(client.evaluate([one])) == list(one.keys)
    assert told[0] == "waiting for the evaluator service: there is no room"
    assert told[-1] == ""


@pytest.mark.parametrize("reason", ["UNAUTHENTICATED", "TLS_FAILED", "VERSION_SKEW", "BROKER_REFUSED"])
def test_what_an_operator_must_mend_is_raised_at_once(tmp_path: Path, reason: str) -> None:
    start = time.monotonic()
    with ScriptedHouse(tmp_path, evaluator=Refusing(reason, 60)) as house, pytest.raises(PreceptorError) as caught:  # type: ignore[abstract]
        final(evaluator_client(house, Stop(), patience=60).evaluate([submission(0, ["good a"])]))
    assert caught.value.reason == reason
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("reason", ["QUEUE_FULL", "SHUTTING_DOWN", ""])
def test_a_stop_ends_the_wait_for_a_service_within_seconds(tmp_path: Path, reason: str) -> None:
    stop = Stop()
    with ScriptedHouse(tmp_path, evaluator=Refusing(reason or "QUEUE_FULL", 60)) as house:  # type: ignore[abstract]
        if not reason:
            house.stop("evaluator")
        threading.Timer(1.0, stop.set).start()
        start = time.monotonic()
        with pytest.raises(Stopped):
            final(evaluator_client(house, stop, patience=60).evaluate([submission(0, ["good a"])]))
        assert time.monotonic() - start < 4


def test_a_service_that_is_away_for_a_while_is_named_until_it_is_back(tmp_path: Path) -> None:
    told: list[str] = []
    with ScriptedHouse(tmp_path) as house:
        house.stop("teacher")
        stub = connect(house.address("teacher"), teacher_pb2_grpc.TeacherServiceStub)
        client = TeacherClient(stub, 60, Stop(), lambda name, words: told.append(words))
        threading.Timer(4.5, house.start, ["teacher"]).start()
        assert client.base_policy(learns=True) == "base-scripted"
    assert set(told[:-1]) == {"waiting for the teacher service, which does not answer"}
    assert told[-1] == ""
