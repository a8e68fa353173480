"""CancelEvaluations on its whole way: client, evaluator, Redis, a worker in the middle of a training."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from preceptor.artifacts import folder_sha256
from preceptor.channel import call
from preceptor.leases import LeaseBoard, WorkerStatus
from preceptor.names import split_task_id
from preceptor.queue import fetch_result, make_app
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types
from tests.evaluation_requests import group
from tests.integration.test_evaluator_queue import Stack, wait_until
from tests.unit.tiny_students import save_student

# A machine that is busy with other things imports torch slowly.
START_SECONDS = 120.0
# A beat of 2 s, a step, and a busy machine.
NOTICED_SECONDS = 10.0
# Minutes of training on any machine: what ends within seconds was ended.
ENDLESS = 1024
LONG = tuple(f"Person {number} lives in town {number * 7}." for number in range(200))


class Cancelling:
    """A stack with one real worker on a tiny student."""

    def __init__(self, stack: Stack, student: Path) -> None:
        self.stack = stack
        self.student = types.PinnedStudent(name="tiny", source=str(student), commit=folder_sha256(student))
        self.board = LeaseBoard(stack.server.url)
        self.app = make_app(stack.server.url)
        stack.spawn(sys.executable, "-m", "student.worker", PRECEPTOR_BROKER_URL=stack.server.url)
        wait_until(self.board.workers, START_SECONDS)

    def create(self, *edits: tuple[int, tuple[str, ...]], owner: str = "run-1") -> list[pb.Evaluation]:
        """One evaluation for each (epochs, documents)."""
        request = group(*["" for _ in edits], owner=owner)
        request.student.CopyFrom(self.student)
        request.protocol.training.CopyFrom(trial.TrainingSettings(batch_size=1, rank=2))
        for edit, (epochs, documents) in zip(request.self_edits, edits, strict=True):
            edit.documents[:] = documents
            edit.directive.epochs = epochs
        return list(call(self.stack.stub.CreateEvaluations, request).evaluations)

    def cancel(self, owner: str = "run-1") -> int:
        request = pb.CancelEvaluationsRequest(request_id=f"cancel-{time.monotonic_ns()}", owner=owner)
        return call(self.stack.stub.CancelEvaluations, request).cancelled

    def state(self, evaluation: pb.Evaluation) -> int:
        request = pb.GetEvaluationRequest(evaluation_id=evaluation.id)
        return int(call(self.stack.stub.GetEvaluation, request).evaluation.state)

    def worker(self) -> WorkerStatus:
        (status,) = self.board.workers()
        return status

    def training(self, attempt: int = 1) -> str:
        """The task that the worker is in the middle of."""

        def busy() -> bool:
            status = self.worker()
            return status.steps_done > 20 and split_task_id(status.task_id)[1] == attempt

        wait_until(busy, START_SECONDS)
        return self.worker().task_id

    def failures(self, task_id: str) -> set[str]:
        """The reasons in a task's result; "" for a trial that was answered."""
        result = fetch_result(self.app, task_id)
        assert result is not None
        if result.HasField("failure"):  # of the batch as a whole
            return {result.failure.reason}
        return {one.failure.reason for one in result.results}


@pytest.fixture
def cancelling(tmp_path: Path) -> Iterator[Cancelling]:
    stack = Stack(tmp_path)
    try:
        yield Cancelling(stack, save_student(tmp_path / "student"))
    finally:
        stack.close()


def test_a_cancelled_training_ends_within_seconds_and_can_be_asked_for_again(cancelling: Cancelling) -> None:
    (made,) = cancelling.create((ENDLESS, LONG))
    task_id = cancelling.training()
    begun = time.monotonic()
    assert cancelling.cancel() == 1
    wait_until(lambda: fetch_result(cancelling.app, task_id), NOTICED_SECONDS)
    print(f"the training ended {time.monotonic() - begun:.1f} s after the cancel")
    assert cancelling.failures(task_id) == {"CANCELLED"}
    assert cancelling.state(made) == pb.EVALUATION_STATE_CANCELLED

    (again,) = cancelling.create((ENDLESS, LONG))
    assert (again.id, again.state) == (made.id, pb.EVALUATION_STATE_QUEUED)
    assert cancelling.training(attempt=2) == task_id[:-1] + "2"
    assert cancelling.state(made) == pb.EVALUATION_STATE_RUNNING

    # Asked for once more before the worker has heard of the cancel; a second owner comes and goes.
    cancelling.cancel()
    cancelling.create((ENDLESS, LONG))
    cancelling.training(attempt=3)
    assert cancelling.state(made) == pb.EVALUATION_STATE_RUNNING
    cancelling.create((ENDLESS, LONG), owner="run-2")
    cancelling.cancel("run-2")
    time.sleep(3)  # longer than a beat
    assert cancelling.worker().task_id == task_id[:-1] + "3"
    cancelling.cancel()
    (short,) = cancelling.create((2, ("Ada is in Rome.",)))
    (found,) = cancelling.stack.results([short.id])
    assert found.state == pb.EVALUATION_STATE_SUCCEEDED  # the worker lives on


def test_a_trial_that_somebody_else_wants_goes_on_without_its_cancelled_neighbour(cancelling: Cancelling) -> None:
    wanted = (40, LONG[:50])
    endless, mine = cancelling.create((ENDLESS, LONG), wanted)
    (theirs,) = cancelling.create(wanted, owner="run-2")
    assert theirs.id == mine.id
    task_id = cancelling.training()
    assert cancelling.cancel() == 1
    (found,) = cancelling.stack.results([theirs.id])
    assert found.state == pb.EVALUATION_STATE_SUCCEEDED
    assert cancelling.state(endless) == pb.EVALUATION_STATE_CANCELLED
    assert cancelling.failures(task_id) == {"CANCELLED", ""}
