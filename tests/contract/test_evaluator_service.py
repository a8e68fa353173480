"""EvaluatorService over a real socket: what a client may rely on. The queue is a small one in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluator.house import Evaluator
from evaluator.servicer import SERVICE, EvaluatorServicer
from evaluator.settings import EvaluatorSettings
from preceptor.channel import call, open_channel, stream
from preceptor.errors import PreceptorError
from preceptor.leases import WorkerStatus
from preceptor.server import Server
from preceptor.settings import ServiceSettings
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import student_pb2, student_pb2_grpc
from preceptor.v1 import types_pb2 as types
from preceptor.v1.evaluator_pb2_grpc import EvaluatorServiceStub, add_EvaluatorServiceServicer_to_server
from tests.evaluation_requests import STUDENT, group, task
from tests.fake_broker import FakeBroker

SUCCEEDED = pb.EVALUATION_STATE_SUCCEEDED


class Students(student_pb2_grpc.StudentServiceServicer):
    """Knows one active student, or none."""

    active = True

    def GetStudent(self, request: student_pb2.GetStudentRequest, context: Any) -> student_pb2.GetStudentResponse:
        if not self.active:
            raise PreceptorError("NO_ACTIVE_STUDENT", "no student is active")
        return student_pb2.GetStudentResponse(student=student_pb2.Student(name="tiny", pinned=STUDENT))


class Bench:
    """A served evaluator, its queue and its student service."""

    address = ""

    def __init__(
        self, evaluator: Evaluator, broker: FakeBroker, students: Students, stub: EvaluatorServiceStub
    ) -> None:
        self.evaluator, self.broker, self.students, self.stub = evaluator, broker, students, stub

    def wait_until(self, holds: Callable[[], object]) -> None:
        end = time.monotonic() + 10
        while not holds():
            assert time.monotonic() < end, "not within 10 s"
            time.sleep(0.01)

    def work(self, batches: int) -> None:
        """Does the work of so many batches once they are there."""
        self.wait_until(lambda: len(self.broker.waiting) >= batches)
        self.broker.work()

    def create(self, *documents: str, **options: object) -> list[pb.Evaluation]:
        request = group(*documents, **options)  # type: ignore[arg-type]
        return list(call(self.stub.CreateEvaluations, request).evaluations)

    def watch(self, ids: list[str], deadline: float = 10) -> Iterator[pb.Evaluation]:
        request = pb.WatchEvaluationsRequest(evaluation_ids=ids)
        for response in stream(self.stub.WatchEvaluations, request, deadline=deadline):
            yield response.evaluation


@contextmanager
def serving(folder: Path) -> Iterator[Bench]:
    students, broker = Students(), FakeBroker()
    student_server = Server(
        ["preceptor.v1.StudentService"],
        lambda server: student_pb2_grpc.add_StudentServiceServicer_to_server(students, server),
        ServiceSettings(port=0, grace_seconds=1),
    )
    configured = EvaluatorSettings(
        home=folder,
        port=0,
        student_address=f"127.0.0.1:{student_server.port}",
        result_poll_seconds=0.01,
        grace_seconds=1,
    )
    evaluator = Evaluator(configured, broker)
    servicer = EvaluatorServicer(evaluator.evaluations, evaluator.garbage)
    server = Server([SERVICE], lambda one: add_EvaluatorServiceServicer_to_server(servicer, one), configured)
    evaluator.dispatcher.start()
    with open_channel(f"127.0.0.1:{server.port}") as channel:
        bench = Bench(evaluator, broker, students, EvaluatorServiceStub(channel))
        bench.address = f"127.0.0.1:{server.port}"
        yield bench
    evaluator.drain()
    server.stop()
    student_server.stop()
    evaluator.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with serving(tmp_path) as made:
        yield made


def test_a_group_is_answered_at_once_and_watched_to_its_rewards(bench: Bench) -> None:
    made = bench.create("Ada lives in Lisbon.", "Ada lives in Lisbon, a baker.", "fail:TRIAL_DIVERGED")
    assert {item.state for item in made} == {pb.EVALUATION_STATE_QUEUED}
    ids = [item.id for item in made]
    worker = threading.Thread(target=bench.work, args=(2,))
    worker.start()
    found = {item.id: item for item in bench.watch([*ids, ids[0]])}
    worker.join()
    assert [found[one].reward.value for one in ids[:2]] == [0.5, 1.0]
    assert found[ids[2]].failure.reason == "TRIAL_DIVERGED"
    assert not found[ids[2]].HasField("reward")
    assert sorted(item.id for item in bench.watch(ids)) == sorted(ids)  # at once, all are final
    assert call(bench.stub.GetEvaluation, pb.GetEvaluationRequest(evaluation_id=ids[0])).evaluation == found[ids[0]]


def test_retry_with_the_same_request_id_returns_the_first_evaluations(bench: Bench) -> None:
    first = bench.create("a", request_id="once")
    assert [item.id for item in bench.create("a", request_id="once")] == [first[0].id]
    with pytest.raises(PreceptorError) as raised:
        bench.create("b", request_id="once")
    assert raised.value.reason == "REQUEST_ID_REUSED"


def test_a_request_without_student_is_pinned_to_the_active_one(bench: Bench) -> None:
    request = group("a")
    request.ClearField("student")
    made = call(bench.stub.CreateEvaluations, request).evaluations
    assert made[0].student == STUDENT
    bench.students.active = False
    assert call(bench.stub.CreateEvaluations, request).evaluations[0].id == made[0].id  # a repetition asks nobody
    request.request_id = "another"
    with pytest.raises(PreceptorError) as raised:
        call(bench.stub.CreateEvaluations, request)
    assert raised.value.reason == "NO_ACTIVE_STUDENT"


def test_a_bad_request_names_its_place_and_leaves_nothing_behind(bench: Bench) -> None:
    request = group("a")
    request.task.ClearField("kind")
    request.task.few_shot.name = "grid"
    with pytest.raises(PreceptorError, match="needs a demonstration") as raised:
        call(bench.stub.CreateEvaluations, request)
    assert raised.value.metadata["field"] == "task.few_shot.demonstrations"
    assert not call(bench.stub.ListEvaluations, pb.ListEvaluationsRequest()).evaluations
    for unknown in (pb.GetEvaluationRequest(evaluation_id="eval-none"), pb.GetEvaluationRequest()):
        with pytest.raises(PreceptorError) as raised:
            call(bench.stub.GetEvaluation, unknown)
        assert raised.value.reason == "EVALUATION_NOT_FOUND"
    with pytest.raises(PreceptorError) as raised:
        list(bench.watch(["eval-none"]))
    assert raised.value.reason == "EVALUATION_NOT_FOUND"


def test_an_answer_tells_how_often_the_sealed_questions_were_opened(bench: Bench) -> None:
    for owner, owners in (("run-1", 1), ("run-2", 2), ("run-1", 2)):
        request = group("Ada lives in Lisbon.", owner=owner)
        assert not call(bench.stub.CreateEvaluations, request).openings
        request = group("Ada lives in Lisbon.", owner=owner)
        request.task.passage.questions[2].bank = request.protocol.bank = types.QUESTION_BANK_SEALED
        assert list(call(bench.stub.CreateEvaluations, request).openings) == [
            pb.SealedOpening(task_id="task-ada", owners=owners)
        ]


def test_a_watch_ends_with_its_call(bench: Bench) -> None:
    made = bench.create("a")
    with pytest.raises(PreceptorError) as raised:
        list(bench.watch([made[0].id], deadline=0.3))
    assert raised.value.reason == "DEADLINE_EXCEEDED"
    responses: Any = bench.stub.WatchEvaluations(
        pb.WatchEvaluationsRequest(evaluation_ids=[made[0].id]), timeout=30, wait_for_ready=True
    )
    threading.Timer(0.2, responses.cancel).start()
    with pytest.raises(grpc.RpcError):
        list(responses)
    # Nothing of the ended watches is left, in threads or in the feed.
    bench.wait_until(lambda: not bench.evaluator._feed._by_evaluation)


def test_a_drain_ends_a_watch_with_a_reason_to_come_back(bench: Bench) -> None:
    made = bench.create("a")
    threading.Timer(0.3, bench.evaluator.drain).start()
    with pytest.raises(PreceptorError) as raised:
        list(bench.watch([made[0].id]))
    assert raised.value.reason == "SHUTTING_DOWN"


def test_cancelling_reaches_the_watchers(bench: Bench) -> None:
    made = bench.create("a")
    request = pb.CancelEvaluationsRequest(request_id="c", owner="run-1")
    soon = threading.Timer(0.2, lambda: call(bench.stub.CancelEvaluations, request))
    soon.start()
    assert [item.state for item in bench.watch([made[0].id])] == [pb.EVALUATION_STATE_CANCELLED]
    soon.join(10)  # its call ends before the channel does
    bench.wait_until(lambda: bench.broker.cancelled)


def test_pages_go_through_all_evaluations_once(bench: Bench) -> None:
    made = [bench.create(f"Document {number}.")[0].id for number in range(5)]
    bench.create("Of another.", owner="run-2")
    found: list[str] = []
    token, pages = "", 0
    while pages == 0 or token:
        request = pb.ListEvaluationsRequest(owner="run-1", page_size=2, page_token=token)
        page = call(bench.stub.ListEvaluations, request)
        found += [item.id for item in page.evaluations]
        token, pages = page.next_page_token, pages + 1
    assert (found, pages) == (made, 3)
    assert len(call(bench.stub.ListEvaluations, pb.ListEvaluationsRequest()).evaluations) == 6
    done = pb.ListEvaluationsRequest(state=SUCCEEDED)
    assert not call(bench.stub.ListEvaluations, done).evaluations
    bench.broker.alive = 4
    bench.work(7)
    bench.wait_until(lambda: len(call(bench.stub.ListEvaluations, done).evaluations) == 6)
    with pytest.raises(PreceptorError) as raised:
        call(bench.stub.ListEvaluations, pb.ListEvaluationsRequest(page_token="x"))
    assert raised.value.metadata["field"] == "page_token"


def test_answers_are_graded_without_training(bench: Bench) -> None:
    request = pb.GradeAnswersRequest(questions=task().passage.questions[:2], answers=["the lisbon.", "smith"])
    graded = call(bench.stub.GradeAnswers, request)
    assert (list(graded.correct), graded.grader) == ([True, False], "exact/1")
    request.answers.pop()
    with pytest.raises(PreceptorError, match="1 answers to 2 questions"):
        call(bench.stub.GradeAnswers, request)
    with pytest.raises(PreceptorError) as raised:
        call(bench.stub.GradeAnswers, pb.GradeAnswersRequest(grader="oracle"))
    assert raised.value.reason == "GRADER_UNKNOWN"


def test_the_queue_s_status_counts_what_there_is(bench: Bench) -> None:
    bench.create("a")
    bench.wait_until(lambda: len(bench.broker.waiting) == 2)
    status = call(bench.stub.GetQueueStatus, pb.GetQueueStatusRequest())
    assert (status.queued_batches, status.running_batches, status.workers_alive) == (2, 0, 1)
    assert status.worker_peak_memory_bytes == 500
    bench.broker.work()
    bench.wait_until(lambda: call(bench.stub.GetQueueStatus, pb.GetQueueStatusRequest()).trials_done == 2)
    status = call(bench.stub.GetQueueStatus, pb.GetQueueStatusRequest())
    assert (status.queued_batches, status.worker_peak_memory_bytes) == (0, 1000)
    bench.broker.down = True
    with pytest.raises(PreceptorError) as raised:
        call(bench.stub.GetQueueStatus, pb.GetQueueStatusRequest())
    assert raised.value.reason == "BROKER_UNREACHABLE"


def test_many_watchers_wait_without_asking_the_database(bench: Bench) -> None:
    made = bench.create("Ada lives in Lisbon.")
    seen: list[float] = []
    watchers = [
        threading.Thread(target=lambda: seen.extend(item.reward.value for item in bench.watch([made[0].id])))
        for _ in range(20)
    ]
    for watcher in watchers:
        watcher.start()
    bench.wait_until(lambda: len(bench.evaluator._feed._by_evaluation.get(made[0].id, ())) == 20)
    bench.work(2)
    for watcher in watchers:
        watcher.join(10)
    assert seen == [0.5] * 20


def test_what_failed_is_put_back_and_every_attempt_at_it_is_told(bench: Bench) -> None:
    made = bench.create("fail:TRIAL_DIVERGED", "Ada lives in Lisbon.")
    bench.work(2)
    assert len(list(bench.watch([item.id for item in made]))) == 2
    request = pb.RetryEvaluationsRequest(request_id="r", evaluation_ids=[item.id for item in made])
    assert [call(bench.stub.RetryEvaluations, request).retried for _ in range(2)] == [1, 1]
    bench.work(1)
    (found,) = bench.watch([made[0].id])
    assert found.failure.reason == "TRIAL_DIVERGED"
    asked = pb.ListAttemptsRequest(evaluation_id=made[0].id)
    attempts = call(bench.stub.ListAttempts, asked).attempts
    assert sorted((one.trials, one.failure.reason) for one in attempts) == [
        (1, ""),
        (1, "TRIAL_DIVERGED"),
        (2, "TRIAL_DIVERGED"),
    ]
    status = call(bench.stub.GetQueueStatus, pb.GetQueueStatusRequest())
    assert (status.evaluations_waiting, status.evaluations_failed) == (0, 1)
    assert [worker.name for worker in status.workers] == ["fake:1"]
    asked.evaluation_id = "eval-none"
    with pytest.raises(PreceptorError) as raised:
        call(bench.stub.ListAttempts, asked)
    assert raised.value.reason == "EVALUATION_NOT_FOUND"


@pytest.mark.parametrize("task_id", ["", "nonsense", "a.b", "batch.99999999999999", "batch.-1"])
def test_a_worker_that_talks_nonsense_spoils_nobody_s_view(bench: Bench, task_id: str) -> None:
    nonsense = WorkerStatus("odd:1", task_id=task_id, steps_done=2**40)
    bench.broker.workers = lambda: [nonsense]  # type: ignore[method-assign]
    (worker,) = call(bench.stub.GetQueueStatus, pb.GetQueueStatusRequest()).workers
    assert worker.name == "odd:1"


def test_a_watcher_that_reads_nothing_harms_nobody(bench: Bench) -> None:
    """Its stream is full after some answers; everybody else goes on, and it gets the rest when it reads."""
    bench.broker.alive = 100
    long = "Ada lives in Lisbon. " * 20_000  # 400 KB an evaluation, 16 MB together
    ids = [bench.create(f"{number} {long}")[0].id for number in range(40)]
    # Without the probe a client lets no more be on the way than it has asked for and 64 KB.
    with grpc.insecure_channel(bench.address, options=[("grpc.http2.bdp_probe", 0)]) as channel:
        stub = EvaluatorServiceStub(channel)
        slow: Any = stub.WatchEvaluations(pb.WatchEvaluationsRequest(evaluation_ids=ids), timeout=60)
        bench.wait_until(lambda: len(bench.broker.waiting) == 41)
        bench.broker.work()
        assert len(list(bench.watch(ids, deadline=30))) == 40
        boxes = bench.evaluator._feed._by_evaluation.values()
        (box,) = {id(one): one for group in boxes for one in group}.values()
        assert len(box._awaited) > 10  # it holds their ids, and nothing else
        assert {response.evaluation.id for response in slow} == set(ids)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with serving(tmp_path_factory.mktemp("fuzzed")) as made:
        yield made


REQUESTS = {
    "CreateEvaluations": pb.CreateEvaluationsRequest,
    "GetEvaluation": pb.GetEvaluationRequest,
    "ListEvaluations": pb.ListEvaluationsRequest,
    "WatchEvaluations": pb.WatchEvaluationsRequest,
    "CancelEvaluations": pb.CancelEvaluationsRequest,
    "GradeAnswers": pb.GradeAnswersRequest,
}


@settings(max_examples=60, deadline=None)
@given(method=st.sampled_from(sorted(REQUESTS)), data=st.data())
def test_a_damaged_request_gets_a_reason_of_the_catalogue(fuzzed: Bench, method: str, data: st.DataObject) -> None:
    """One field of a good request is replaced by something else of its type."""
    request: Any = REQUESTS[method]()
    if method == "CreateEvaluations":
        request = group("a", "b")
    holder = request
    while True:
        field = data.draw(st.sampled_from(list(holder.DESCRIPTOR.fields)))
        if field.message_type is None or field.is_repeated or field.message_type.GetOptions().map_entry:
            break
        holder = getattr(holder, field.name)
    if field.is_repeated:
        holder.ClearField(field.name)
    elif field.cpp_type == field.CPPTYPE_STRING:
        setattr(holder, field.name, data.draw(st.text(max_size=300)))
    elif field.cpp_type in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        setattr(holder, field.name, data.draw(st.floats()))
    elif field.cpp_type == field.CPPTYPE_BOOL:
        setattr(holder, field.name, data.draw(st.booleans()))
    elif field.cpp_type == field.CPPTYPE_ENUM:
        setattr(holder, field.name, data.draw(st.integers(-1, 99)))
    else:
        setattr(holder, field.name, data.draw(st.integers(0, 2**31 - 1)))
    rpc: Any = getattr(fuzzed.stub, method)
    reason = ""
    try:
        if method == "WatchEvaluations":
            list(stream(rpc, request, deadline=5))
        else:
            call(rpc, request, deadline=5)
    except PreceptorError as error:
        reason = error.reason
    assert reason in ("", "INVALID_REQUEST", "GRADER_UNKNOWN", "EVALUATION_NOT_FOUND", "REQUEST_ID_REUSED")
