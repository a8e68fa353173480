"""An EvaluatorService that counts words instead of training. Scripted: plumbing only, no reward of it means anything.

It keeps the contract: evaluations are content-addressed, take a moment, are cancelled by owner, and can fail; a look
(``AnswerSettings.logprobs_only``) has log-probabilities and no answers, and a trial with the same seed is the same. A
student "knows" as many answers as documents begin with ``good`` (or are an oracle's), all of them where the text stands
in the prompt, and of a few-shot task those of a directive with basic augmentations. Its state outlives a restart of
the server that serves it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import grpc

from preceptor.convert import bank_from_proto
from preceptor.errors import PreceptorError
from preceptor.names import content_id, derived_seed, message_json, sha256, student_identity
from preceptor.tasks import Bank
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import evaluator_pb2_grpc
from preceptor.v1 import types_pb2 as types

_OPEN = (pb.EVALUATION_STATE_QUEUED, pb.EVALUATION_STATE_RUNNING)


def never(_task: types.Task, _edit: types.SelfEdit) -> bool:
    """Nothing fails."""
    return False


class ScriptedEvaluator(evaluator_pb2_grpc.EvaluatorServiceServicer):
    """Finishes an evaluation ``seconds`` after its creation; ``fails`` says which of them fail."""

    def __init__(self, *, seconds: float = 0.0, fails: Callable[[types.Task, types.SelfEdit], bool] = never) -> None:
        self.seconds = seconds
        self.fails = fails
        self._changed = threading.Condition()
        self._evaluations: dict[str, pb.Evaluation] = {}
        self._results: dict[str, pb.Evaluation] = {}  # what each will be when its time has come
        self._ends: dict[str, float] = {}
        self._owners: dict[str, set[str]] = {}
        self._asked: dict[str, tuple[pb.CreateEvaluationsRequest, types.Task, types.SelfEdit]] = {}
        self._attempts: dict[str, list[pb.Attempt]] = {}
        self._retried: dict[str, int] = {}  # by request id
        self._answered: dict[str, str] = {}  # request id -> hash of the body
        self._openings: dict[str, set[str]] = {}  # task id -> owners who asked for its sealed questions
        self.graders = {"", "exact", "lexical"}  # those it has
        self.requests: list[pb.CreateEvaluationsRequest] = []
        self.cancelled_owners: list[str] = []

    def CreateEvaluations(
        self, request: pb.CreateEvaluationsRequest, context: grpc.ServicerContext
    ) -> pb.CreateEvaluationsResponse:
        """Known evaluations as they are, new ones queued; failed and cancelled ones are tried again."""
        body = sha256(str(message_json(request)))
        answer = pb.CreateEvaluationsResponse()
        with self._changed:
            again = request.request_id in self._answered
            if self._answered.setdefault(request.request_id, body) != body:
                raise PreceptorError("REQUEST_ID_REUSED", "another body under the same request_id")
            self.requests.append(request)
            self._advance()
            for group in (pb.TaskSelfEdits(task=request.task, self_edits=request.self_edits), *request.more):
                for edit in group.self_edits:
                    self._create(request, again, group.task, edit, answer)
                if bank_from_proto(request.protocol.bank) is Bank.SEALED:
                    owners = self._openings.setdefault(group.task.id, set())
                    owners.add(request.owner)
                    answer.openings.add(task_id=group.task.id, owners=len(owners))
            self._changed.notify_all()
        return answer

    def GetEvaluation(
        self, request: pb.GetEvaluationRequest, context: grpc.ServicerContext
    ) -> pb.GetEvaluationResponse:
        """As it is now."""
        with self._changed:
            self._advance()
            if (found := self._evaluations.get(request.evaluation_id)) is None:
                raise PreceptorError("EVALUATION_NOT_FOUND", f"no evaluation {request.evaluation_id!r}")
            return pb.GetEvaluationResponse(evaluation=found)

    def WatchEvaluations(
        self, request: pb.WatchEvaluationsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchEvaluationsResponse]:
        """Each when it is final."""
        waiting = list(request.evaluation_ids)
        while waiting and context.is_active():
            with self._changed:
                self._advance()
                if missing := [name for name in waiting if name not in self._evaluations]:
                    raise PreceptorError("EVALUATION_NOT_FOUND", f"no evaluation {missing[0]!r}")
                done = [self._evaluations[name] for name in waiting if self._evaluations[name].state not in _OPEN]
            for evaluation in done:
                waiting.remove(evaluation.id)
                yield pb.WatchEvaluationsResponse(evaluation=evaluation)
            if not done:
                time.sleep(0.01)

    def CancelEvaluations(
        self, request: pb.CancelEvaluationsRequest, context: grpc.ServicerContext
    ) -> pb.CancelEvaluationsResponse:
        """Cancels what only this owner waits for."""
        cancelled = 0
        with self._changed:
            self.cancelled_owners.append(request.owner)
            self._advance()
            for name, evaluation in self._evaluations.items():
                self._owners[name].discard(request.owner)
                if evaluation.state in _OPEN and not self._owners[name]:
                    evaluation.state = pb.EVALUATION_STATE_CANCELLED
                    self._attempts[name][-1].end_time.GetCurrentTime()
                    cancelled_here = types.Failure(reason="CANCELLED", message="nobody wants it any more", attempts=1)
                    self._attempts[name][-1].failure.CopyFrom(cancelled_here)
                    cancelled += 1
            self._changed.notify_all()
        return pb.CancelEvaluationsResponse(cancelled=cancelled)

    def GradeAnswers(self, request: pb.GradeAnswersRequest, context: grpc.ServicerContext) -> pb.GradeAnswersResponse:
        """Right is what equals the gold answer. A grader that it does not have needs a judge that is not set."""
        if request.grader not in self.graders:
            raise PreceptorError("JUDGE_NOT_SET", f"no judge for {request.grader!r}", field="grader")
        pairs = zip(request.questions, request.answers, strict=True)
        return pb.GradeAnswersResponse(
            correct=[question.answer == answer for question, answer in pairs], grader=f"{request.grader}/scripted"
        )

    def ListAttempts(self, request: pb.ListAttemptsRequest, context: grpc.ServicerContext) -> pb.ListAttemptsResponse:
        """One for each time that the evaluation was begun; an evaluation is a batch of its own here."""
        with self._changed:
            self._advance()
            if request.evaluation_id not in self._evaluations:
                raise PreceptorError("EVALUATION_NOT_FOUND", f"no evaluation {request.evaluation_id!r}")
            return pb.ListAttemptsResponse(attempts=self._attempts[request.evaluation_id])

    def RetryEvaluations(
        self, request: pb.RetryEvaluationsRequest, context: grpc.ServicerContext
    ) -> pb.RetryEvaluationsResponse:
        """Those that failed are queued again, and end as ``fails`` says now."""
        body = sha256(str(message_json(request)))
        with self._changed:
            self._advance()
            if self._answered.setdefault(request.request_id, body) != body:
                raise PreceptorError("REQUEST_ID_REUSED", "another body under the same request_id")
            if request.request_id not in self._retried:
                meant = [name for name, evaluation in self._evaluations.items() if self._is_meant(evaluation, request)]
                for name in meant:
                    self._queue(name, *self._asked[name])
                self._retried[request.request_id] = len(meant)
                self._changed.notify_all()
            return pb.RetryEvaluationsResponse(retried=self._retried[request.request_id])

    def GetQueueStatus(
        self, request: pb.GetQueueStatusRequest, context: grpc.ServicerContext
    ) -> pb.GetQueueStatusResponse:
        """Two workers that need no memory and are at nothing that could be named."""
        with self._changed:
            self._advance()
            states = [evaluation.state for evaluation in self._evaluations.values()]
        return pb.GetQueueStatusResponse(
            workers_alive=2,
            worker_peak_memory_bytes=1,
            evaluations_waiting=sum(state in _OPEN for state in states),
            evaluations_failed=states.count(pb.EVALUATION_STATE_FAILED),
            workers=[pb.WorkerReport(name=f"scripted:{number}", peak_memory_bytes=1) for number in (1, 2)],
        )

    def _is_meant(self, evaluation: pb.Evaluation, request: pb.RetryEvaluationsRequest) -> bool:
        return (
            evaluation.state == pb.EVALUATION_STATE_FAILED
            and (not request.evaluation_ids or evaluation.id in request.evaluation_ids)
            and (bool(request.evaluation_ids) or request.owner in ("", *self._owners[evaluation.id]))
            and request.reason in ("", evaluation.failure.reason)
        )

    def _create(
        self,
        request: pb.CreateEvaluationsRequest,
        again: bool,
        task: types.Task,
        edit: types.SelfEdit,
        answer: pb.CreateEvaluationsResponse,
    ) -> None:
        evaluation_id = content_id(
            "evaluation",
            [task.id, message_json(edit), message_json(request.protocol), student_identity(request.student)],
        )
        known = self._evaluations.get(evaluation_id)
        ended = (pb.EVALUATION_STATE_FAILED, pb.EVALUATION_STATE_CANCELLED)
        if known is None or (not again and known.state in ended):
            self._queue(evaluation_id, request, task, edit)
        self._owners.setdefault(evaluation_id, set()).add(request.owner)
        evaluation = answer.evaluations.add()
        evaluation.CopyFrom(self._evaluations[evaluation_id])
        evaluation.cached = known is not None and known.state == pb.EVALUATION_STATE_SUCCEEDED

    def _queue(self, name: str, request: pb.CreateEvaluationsRequest, task: types.Task, edit: types.SelfEdit) -> None:
        queued = pb.Evaluation(
            id=name,
            state=pb.EVALUATION_STATE_QUEUED,
            task_id=task.id,
            self_edit=edit,
            student=request.student,
        )
        queued.create_time.GetCurrentTime()
        self._evaluations[name] = queued
        self._asked[name] = (request, task, edit)
        attempts = self._attempts.setdefault(name, [])
        attempts.append(pb.Attempt(batch_id=name, number=len(attempts) + 1, trials=len(request.protocol.seeds)))
        attempts[-1].submit_time.CopyFrom(queued.create_time)
        result = pb.Evaluation.FromString(queued.SerializeToString())
        if self.fails(task, edit):
            result.state = pb.EVALUATION_STATE_FAILED
            result.failure.CopyFrom(types.Failure(reason="TRIAL_LOST", message="the worker vanished", attempts=3))
        else:
            result.state = pb.EVALUATION_STATE_SUCCEEDED
            _measure(result, request, task)
        self._results[name] = result
        self._ends[name] = time.monotonic() + self.seconds * random.Random(name).uniform(0.5, 1.5)

    def _advance(self) -> None:
        """Finishes what is due. The caller holds the lock."""
        now = time.monotonic()
        for name, evaluation in self._evaluations.items():
            if evaluation.state in _OPEN and now >= self._ends[name]:
                evaluation.CopyFrom(self._results[name])
                attempt = self._attempts[name][-1]
                attempt.end_time.GetCurrentTime()
                if evaluation.HasField("failure"):
                    attempt.failure.CopyFrom(evaluation.failure)


def _measure(result: pb.Evaluation, request: pb.CreateEvaluationsRequest, task: types.Task) -> None:
    """One trial's answers depend on task, self-edit and seed alone, so a trial is the same in any evaluation."""
    protocol = request.protocol
    bank = protocol.bank or types.QUESTION_BANK_REWARD
    questions = sum(question.bank == bank for question in task.passage.questions) or len(task.few_shot.queries)
    documents = result.self_edit.documents
    good = sum(document.startswith(("good", "right")) for document in documents) / max(1, len(documents))
    if protocol.in_context or result.self_edit.directive.augmentations.basic:
        good = 1.0
    look = protocol.answers.logprobs_only
    lost = 0.0 if look or not protocol.probes else 0.3 * random.Random(result.task_id + str(result.self_edit)).random()
    for seed in sorted(protocol.seeds):
        dice = random.Random(derived_seed(task.id, message_json(result.self_edit), bank, seed, look))
        correct = [] if look else [dice.random() < 0.9 * good + 0.03 for _ in range(questions)]
        gained = [4 * good + dice.gauss(0, 0.5) for _ in range(questions)]  # nats over the untouched student
        values = [float(right) for right in correct] or gained
        trial = result.trials.add(
            seed=seed,
            correct=correct,
            gold_logprobs=[nats - 5 for nats in gained],
            value=sum(values) / questions - protocol.weights.retention_loss * lost,
            values=values,
            steps=protocol.training.max_steps if look else 10,
            trained_tokens=100 if look else 500 * bool(documents or task.few_shot.queries),
        )
        trial.accuracy = sum(correct) / questions
    result.baseline.CopyFrom(pb.TrialReport(correct=[False] * (0 if look else questions)))
    result.baseline.gold_logprobs.extend([-5.0] * questions)
    trials = result.trials
    accuracy = sum(trial.accuracy for trial in trials) / len(trials)
    value = sum(trial.value for trial in trials) / len(trials)
    reward = types.Reward(value=value, accuracy=accuracy, questions=questions, seeds=len(trials))
    reward.terms["gold_logprob_gain"] = sum(sum(t.gold_logprobs) / questions + 5 for t in trials) / len(trials)
    if not look:
        reward.terms["gain"] = accuracy
    if lost or protocol.probes:
        reward.baseline_retention, reward.retention = 1.0, 1.0 - lost
        reward.terms["retention_loss"] = lost
    reward.stderr = (accuracy * (1 - accuracy) / max(1, questions)) ** 0.5
    result.reward.CopyFrom(reward)
