"""An evaluator service without models: a student knows what its documents say, and rewards are the real formula's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import grpc

from evaluator.overlap import audit
from evaluator.reward import Marks, Weights, measure
from preceptor.convert import question_from_proto
from preceptor.names import content_id, message_json
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import evaluator_pb2_grpc
from preceptor.v1 import types_pb2 as types


class Evaluator(evaluator_pb2_grpc.EvaluatorServiceServicer):
    """A question is answered where a document has its answer; one that says "shaky" is forgotten by odd seeds, one that
    says "broken" fails. ``holds``: nothing is ever done."""

    def __init__(self) -> None:
        self.created: list[pb.CreateEvaluationsRequest] = []
        self.cancelled: list[str] = []
        self.known: dict[str, pb.Evaluation] = {}
        self.openings: dict[str, set[str]] = {}
        self.holds = False
        self.cuts = 0  # so many watches break before they say anything
        self.watched = threading.Event()

    def CreateEvaluations(
        self, request: pb.CreateEvaluationsRequest, context: grpc.ServicerContext
    ) -> pb.CreateEvaluationsResponse:
        self.created.append(request)
        answer = pb.CreateEvaluationsResponse()
        for task, edits in [(request.task, request.self_edits), *((one.task, one.self_edits) for one in request.more)]:
            for edit in edits:
                key = [task.id, message_json(edit), message_json(request.protocol)]
                identity = content_id("eval", key)
                cached = identity in self.known and not self.holds
                self.known[identity] = self.known.get(identity) or self._evaluation(identity, request, task, edit)
                shown = pb.Evaluation(id=identity, state=pb.EVALUATION_STATE_QUEUED, self_edit=edit)
                if cached:
                    shown.CopyFrom(self.known[identity])
                    shown.cached = True
                answer.evaluations.append(shown)
            if request.protocol.bank == types.QUESTION_BANK_SEALED:
                owners = self.openings.setdefault(task.id, set())
                owners.add(request.owner)
                answer.openings.add(task_id=task.id, owners=len(owners))
        return answer

    def WatchEvaluations(
        self, request: pb.WatchEvaluationsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchEvaluationsResponse]:
        self.watched.set()
        if self.cuts:
            self.cuts -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        while self.holds and context.is_active():
            time.sleep(0.05)
        if not self.holds:
            for identity in request.evaluation_ids:
                yield pb.WatchEvaluationsResponse(evaluation=self.known[identity])

    def CancelEvaluations(
        self, request: pb.CancelEvaluationsRequest, context: grpc.ServicerContext
    ) -> pb.CancelEvaluationsResponse:
        self.cancelled.append(request.owner)
        return pb.CancelEvaluationsResponse(cancelled=1)

    def GetQueueStatus(
        self, request: pb.GetQueueStatusRequest, context: grpc.ServicerContext
    ) -> pb.GetQueueStatusResponse:
        return pb.GetQueueStatusResponse(workers_alive=0 if self.holds else 2)

    def _evaluation(
        self, identity: str, request: pb.CreateEvaluationsRequest, task: types.Task, edit: types.SelfEdit
    ) -> pb.Evaluation:
        made = pb.Evaluation(id=identity, task_id=task.id, self_edit=edit, student=request.student)
        text = " ".join(edit.documents)
        if "broken" in text:
            made.state = pb.EVALUATION_STATE_FAILED
            made.failure.reason, made.failure.message = "TRIAL_DIVERGED", "the loss is not a number"
            return made
        protocol = request.protocol
        asked = [q for q in task.passage.questions if q.bank == (protocol.bank or types.QUESTION_BANK_REWARD)]
        looks = protocol.answers.logprobs_only

        def marks(documents: str, seed: int) -> Marks:
            shaken = "shaky" in documents and seed % 2
            knows = tuple(q.answer in documents and not shaken for q in asked)
            logprobs = tuple(-0.5 if known else -3.0 for known in knows)
            if looks:
                return Marks((), logprobs, tokens=len(documents))
            return Marks(knows, logprobs, tuple(True for _ in protocol.probes), tokens=len(documents))

        baseline = marks("", 0)
        trained = [marks(text, seed) for seed in protocol.seeds]
        audited = audit(edit.documents, task.passage.text, [question_from_proto(q) for q in asked])
        weights = Weights(**{name: getattr(protocol.weights, name) for name in Weights.__dataclass_fields__})
        score = measure(trained, baseline, weights, copied=audited.copied)
        made.state = pb.EVALUATION_STATE_SUCCEEDED
        made.reward.CopyFrom(score.reward)
        made.overlap.CopyFrom(audited)
        made.baseline.CopyFrom(_report(0, baseline))
        for place, seed in enumerate(protocol.seeds):
            made.trials.append(_report(seed, trained[place], score.values_S[place], score.values_S_Q[place]))
        return made


def _report(seed: int, marks: Marks, value: float = 0.0, values: tuple[float, ...] = ()) -> pb.TrialReport:
    return pb.TrialReport(
        seed=seed,
        accuracy=marks.accuracy or 0.0,
        retention=marks.retention or 0.0,
        correct=marks.correct,
        value=value,
        values=values,
        gold_logprobs=marks.gold_logprobs,
        probes_correct=marks.probes_correct,
        trained_tokens=marks.tokens,
    )
