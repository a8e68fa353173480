"""EvaluatorService on the wire: proto in, one call, proto out."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from evaluator.evaluations import Evaluations
from evaluator.garbage import EvaluatorGarbage
from preceptor.errors import PreceptorError
from preceptor.limits import kept_seconds
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1.evaluator_pb2_grpc import EvaluatorServiceServicer

SERVICE = "preceptor.v1.EvaluatorService"


class EvaluatorServicer(EvaluatorServiceServicer):
    """Translates; everything happens in Evaluations."""

    def __init__(self, evaluations: Evaluations, garbage: EvaluatorGarbage) -> None:
        self._evaluations = evaluations
        self._garbage = garbage

    def CreateEvaluations(
        self, request: pb.CreateEvaluationsRequest, context: grpc.ServicerContext
    ) -> pb.CreateEvaluationsResponse:
        evaluations = self._evaluations.create(request)
        return pb.CreateEvaluationsResponse(evaluations=evaluations, openings=self._evaluations.openings(request))

    def GetEvaluation(
        self, request: pb.GetEvaluationRequest, context: grpc.ServicerContext
    ) -> pb.GetEvaluationResponse:
        return pb.GetEvaluationResponse(evaluation=self._evaluations.get(request.evaluation_id))

    def ListEvaluations(
        self, request: pb.ListEvaluationsRequest, context: grpc.ServicerContext
    ) -> pb.ListEvaluationsResponse:
        found, token = self._evaluations.page(request)
        return pb.ListEvaluationsResponse(evaluations=found, next_page_token=token)

    def WatchEvaluations(
        self, request: pb.WatchEvaluationsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchEvaluationsResponse]:
        def end_with_the_call(end: object) -> None:
            if not context.add_callback(end):  # type: ignore[arg-type]
                raise PreceptorError("CANCELLED", "the call has ended")

        for evaluation in self._evaluations.watch(request.evaluation_ids, end_with_the_call):
            yield pb.WatchEvaluationsResponse(evaluation=evaluation)

    def CancelEvaluations(
        self, request: pb.CancelEvaluationsRequest, context: grpc.ServicerContext
    ) -> pb.CancelEvaluationsResponse:
        return pb.CancelEvaluationsResponse(cancelled=self._evaluations.cancel(request))

    def GradeAnswers(self, request: pb.GradeAnswersRequest, context: grpc.ServicerContext) -> pb.GradeAnswersResponse:
        correct, grader = self._evaluations.grade(request)
        return pb.GradeAnswersResponse(correct=correct, grader=grader)

    def ListAttempts(self, request: pb.ListAttemptsRequest, context: grpc.ServicerContext) -> pb.ListAttemptsResponse:
        return pb.ListAttemptsResponse(attempts=self._evaluations.attempts(request.evaluation_id))

    def RetryEvaluations(
        self, request: pb.RetryEvaluationsRequest, context: grpc.ServicerContext
    ) -> pb.RetryEvaluationsResponse:
        return pb.RetryEvaluationsResponse(retried=self._evaluations.retry(request))

    def GetQueueStatus(
        self, request: pb.GetQueueStatusRequest, context: grpc.ServicerContext
    ) -> pb.GetQueueStatusResponse:
        return self._evaluations.queue_status()

    def CollectGarbage(
        self, request: pb.EvaluatorServiceCollectGarbageRequest, context: grpc.ServicerContext
    ) -> pb.EvaluatorServiceCollectGarbageResponse:
        keep = kept_seconds(request.keep_days if request.HasField("keep_days") else None)
        found = self._garbage.collect(keep, dry_run=request.dry_run, edits=request.edits)
        return pb.EvaluatorServiceCollectGarbageResponse(garbage=found)
