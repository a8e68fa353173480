"""The evaluator as an object: what its RPCs do, without gRPC. The servicer only translates to this."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence

from google.protobuf.message import Message

from evaluator.admission import Admission
from evaluator.attempts import History
from evaluator.broker import Broker
from evaluator.database import LIVE, BatchState, Database, State
from evaluator.dead_letters import Chosen, DeadLetters, Progress
from evaluator.dispatch import Dispatcher
from evaluator.feed import Feed
from evaluator.graders.grader import grader_label
from evaluator.graders.rack import WITHOUT_A_JUDGE, Graders
from evaluator.identity import plan
from evaluator.lanes import Lanes, serving_workers
from evaluator.marking import Marking
from evaluator.overview import Overview
from evaluator.request import check_student, read_answers, read_request
from evaluator.sealed import sealed_banks
from evaluator.sight import Sight
from evaluator.store import EvaluationStore, Known, Request, is_final
from preceptor.errors import PreceptorError
from preceptor.leases import WorkerStatus
from preceptor.limits import MAX_EVALUATIONS, MAX_NAME_CHARACTERS, MAX_RETRIED, check_name, page_size, page_token
from preceptor.names import celery_task_id, split_task_id
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import types_pb2 as types

MOST_IN_A_FIELD = 2**32 - 1


class Evaluations:
    """Creates, shows, watches, cancels and retries evaluations.

    ``active_student`` is asked when a new group names no student. It raises PreceptorError as StudentService does.
    """

    def __init__(
        self,
        database: Database,
        store: EvaluationStore,
        dispatcher: Dispatcher,
        marking: Marking,
        broker: Broker,
        feed: Feed,
        active_student: Callable[[], types.PinnedStudent],
        batch_trials: int,
        max_waiting: int,
        graders: Graders = WITHOUT_A_JUDGE,
        lanes: Lanes | None = None,
        sight: Sight | None = None,
    ) -> None:
        self._store, self._dispatcher, self._marking = store, dispatcher, marking
        self._broker, self._feed, self._lanes = broker, feed, lanes or Lanes()
        self._active_student, self._batch_trials, self._graders = active_student, batch_trials, graders
        self._history, self._dead, self._overview = History(database), DeadLetters(database), Overview(database)
        self._admission = Admission(self._overview, max_waiting)
        self._sight = sight or Sight()

    def create(self, message: pb.CreateEvaluationsRequest) -> list[pb.Evaluation]:
        """Evaluates a group; in the order of its self-edits, each as it stands now.

        A repeated request gets the same evaluations again, whatever has become of them. Raises PreceptorError(
        INVALID_REQUEST, GRADER_UNKNOWN, JUDGE_NOT_SET, REQUEST_ID_REUSED, QUEUE_FULL) and what the student service
        raises.
        """
        began = time.time()
        group = read_request(message, self._graders)
        sealed = frozenset(sealed_banks(message).values())
        request = Request(message.request_id, _body_sha256(message), message.owner, sealed)
        known = self._store.reply_to(request)
        if known is None:
            student = message.student if message.HasField("student") else self._active_student()
            check_student(student)
            planned = plan(group, student)
            self._admission.let_in([item.id for item in planned.evaluations])
            known = self._store.create(planned, request, self._batch_trials)
            self._dispatcher.wake()
            # Work that is known under another exam needs no trial, only a score.
            self._marking.settle_known([item.id for item in known])
            self._sight.asked([(item.id, item.cached) for item in known], began)
        return self._as_known(known)

    def openings(self, message: pb.CreateEvaluationsRequest) -> list[pb.SealedOpening]:
        """How often the sealed questions that a request asks for were opened, this request included; nothing where it
        asks for others."""
        banks = sealed_banks(message)
        counts = self._store.openings(banks.values())
        return [pb.SealedOpening(task_id=task, owners=counts[bank]) for task, bank in banks.items() if bank in counts]

    def get(self, evaluation_id: str) -> pb.Evaluation:
        """One evaluation. Raises PreceptorError(EVALUATION_NOT_FOUND)."""
        return self._store.get([evaluation_id])[0]

    def page(self, message: pb.ListEvaluationsRequest) -> tuple[list[pb.Evaluation], str]:
        """A page by age and the token of the next one. Raises PreceptorError(INVALID_REQUEST)."""
        if len(message.owner) > MAX_NAME_CHARACTERS:
            raise PreceptorError("INVALID_REQUEST", "is too long", field="owner")
        if message.state not in pb.EvaluationState.values():
            raise PreceptorError("INVALID_REQUEST", "is not a known state", field="state")
        state = None
        if message.state != pb.EVALUATION_STATE_UNSPECIFIED:
            state = State(pb.EvaluationState.Name(message.state).removeprefix("EVALUATION_STATE_"))
        after = page_token(message.page_token)
        found, last = self._store.page(message.owner, state, after, page_size(message.page_size))
        return found, str(last) if last else ""

    def watch(
        self, evaluation_ids: Sequence[str], on_open: Callable[[Callable[[], None]], object]
    ) -> Iterator[pb.Evaluation]:
        """Yields each of these evaluations once, when it is final.

        ``on_open`` is given a function that ends the waiting; the call's end must lead to it. Raises
        PreceptorError(INVALID_REQUEST, EVALUATION_NOT_FOUND), and SHUTTING_DOWN when the service drains.
        """
        if not 1 <= len(evaluation_ids) <= MAX_EVALUATIONS:
            raise PreceptorError("INVALID_REQUEST", f"must be 1..{MAX_EVALUATIONS}", field="evaluation_ids")
        mailbox = self._feed.open(evaluation_ids)
        try:
            on_open(mailbox.close)
            states = self._overview.states(mailbox.evaluation_ids)
            for evaluation_id in sorted(mailbox.evaluation_ids):
                if evaluation_id not in states:
                    raise PreceptorError("EVALUATION_NOT_FOUND", f"there is no evaluation {evaluation_id!r}")
                if states[evaluation_id] not in LIVE:
                    mailbox.put(evaluation_id)
            while taken := mailbox.take():
                for evaluation in self._store.get(taken):
                    if is_final(evaluation):
                        mailbox.delivered(evaluation.id)
                        yield evaluation
        finally:
            self._feed.forget(mailbox)
        if self._feed.closed:
            raise PreceptorError("SHUTTING_DOWN", "the evaluator is shutting down; what is under way goes on later")

    def cancel(self, message: pb.CancelEvaluationsRequest) -> int:
        """Ends what an owner waits for and nobody else does; how many. Raises PreceptorError(INVALID_REQUEST)."""
        check_name("request_id", message.request_id)
        check_name("owner", message.owner)
        number, ended = self._store.cancel(Request(message.request_id, _body_sha256(message), message.owner))
        if ended:
            self._dispatcher.tell_cancelled()
            self._feed.publish(ended)
            self._sight.cancelled(ended, self._store.get)
        return number

    def grade(self, message: pb.GradeAnswersRequest) -> tuple[list[bool], str]:
        """Which answers are right, and the grader's name and version.

        Raises PreceptorError(INVALID_REQUEST, GRADER_UNKNOWN, JUDGE_NOT_SET) and what a judge raises.
        """
        grader = self._graders.named(message.grader)
        given = read_answers(message)
        return [verdict.right for verdict in grader.grade(given)], grader_label(grader)

    def attempts(self, evaluation_id: str) -> list[pb.Attempt]:
        """How an evaluation was worked on, oldest first. Raises PreceptorError(EVALUATION_NOT_FOUND)."""
        attempts = self._history.attempts_at(evaluation_id)
        under_way = {celery_task_id(one.batch_id, one.number): one for one in attempts if not one.HasField("end_time")}
        try:
            for task_id, lease in self._broker.holders(list(under_way)).items():
                under_way[task_id].worker, under_way[task_id].steps_done = lease.worker, lease.steps_done
        except PreceptorError as error:  # then what is stored must do
            if error.reason != "BROKER_UNREACHABLE":
                raise
        return attempts

    def retry(self, message: pb.RetryEvaluationsRequest) -> int:
        """Puts evaluations that FAILED back to work; how many. A repeated request goes on where the first one ended.

        Raises PreceptorError(INVALID_REQUEST, EVALUATION_NOT_FOUND, REQUEST_ID_REUSED).
        """
        check_name("request_id", message.request_id)
        chosen = read_retry(message)
        known = self._overview.states(chosen.ids)
        for evaluation_id in chosen.ids:
            if evaluation_id not in known:
                raise PreceptorError("EVALUATION_NOT_FOUND", f"there is no evaluation {evaluation_id!r}")
        body, progress = _body_sha256(message), Progress()
        while not progress.done:
            progress, retried = self._dead.retry_some(message.request_id, body, chosen)
            self._admission.note(len(retried))
            self._dispatcher.wake()
            # One whose grading failed needs no trial.
            self._marking.settle_known(retried)
        return progress.retried

    def queue_status(self) -> pb.GetQueueStatusResponse:
        """Queue and workers. Raises PreceptorError(BROKER_UNREACHABLE)."""
        batches, evaluations = self._overview.batches(), self._overview.counts()
        workers = self._broker.workers()
        peaks, serving = [worker.peak_memory_bytes for worker in workers], serving_workers(workers)
        queues = {lane.queue: pb.QueueReport(name=lane.queue, student=lane.student) for lane in self._lanes}
        for (student, state), count in self._overview.batches_by_student().items():
            queue = queues[self._lanes.of(student).queue]
            queue.waiting_batches += count if state is BatchState.WAITING else 0
            queue.submitted_batches += count if state is BatchState.SUBMITTED else 0
            queue.running_batches += count if state is BatchState.RUNNING else 0
        for queue in queues.values():
            queue.workers_alive = serving[queue.name]
        return pb.GetQueueStatusResponse(
            queued_batches=batches.get(BatchState.WAITING, 0) + batches.get(BatchState.SUBMITTED, 0),
            running_batches=batches.get(BatchState.RUNNING, 0),
            workers_alive=len(workers),
            trials_done=self._dispatcher.trials_done,
            worker_peak_memory_bytes=max([*peaks, self._dispatcher.peak_memory_bytes]),
            evaluations_waiting=sum(evaluations.get(state, 0) for state in LIVE),
            evaluations_failed=evaluations.get(State.FAILED, 0),
            workers=[_report(worker) for worker in workers],
            queues=queues.values(),
        )

    def _as_known(self, known: Sequence[Known]) -> list[pb.Evaluation]:
        found = {item.id: item for item in self._store.get(sorted({item.id for item in known}))}
        answer = []
        for item in known:
            evaluation = pb.Evaluation()
            evaluation.CopyFrom(found[item.id])
            evaluation.cached = item.cached
            answer.append(evaluation)
        return answer


def _report(worker: WorkerStatus) -> pb.WorkerReport:
    try:
        batch, attempt = split_task_id(worker.task_id)
    except ValueError:  # it is idle, or says what no worker of ours would say
        batch, attempt = "", 0
    return pb.WorkerReport(
        name=worker.name,
        batch_id=batch,
        attempt=min(max(attempt, 0), MOST_IN_A_FIELD),
        steps_done=min(worker.steps_done, MOST_IN_A_FIELD),
        trials_done=worker.trials_done,
        peak_memory_bytes=worker.peak_memory_bytes,
        students=worker.serves,
        gpu=worker.gpu,
    )


def read_retry(message: pb.RetryEvaluationsRequest) -> Chosen:
    """Which evaluations are meant. Raises PreceptorError(INVALID_REQUEST)."""
    if len(message.evaluation_ids) > MAX_RETRIED:
        raise PreceptorError("INVALID_REQUEST", f"must be at most {MAX_RETRIED}", field="evaluation_ids")
    for field in ("owner", "reason"):
        if getattr(message, field):
            check_name(field, getattr(message, field))
    for evaluation_id in message.evaluation_ids:
        check_name("evaluation_ids", evaluation_id)
    return Chosen(tuple(message.evaluation_ids), message.owner, message.reason)


def _body_sha256(message: Message) -> str:
    bare = type(message)()
    bare.CopyFrom(message)
    bare.ClearField("request_id")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()
