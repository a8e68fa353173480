"""The scripted evaluator keeps the contract's word about attempts and retries, as the real one does."""

from __future__ import annotations

from typing import Any

import pytest

from preceptor.errors import PreceptorError
from preceptor.testing.scripted_evaluator import ScriptedEvaluator
from preceptor.v1 import evaluator_pb2 as pb
from tests.evaluation_requests import group

CONTEXT: Any = None


def test_what_failed_is_tried_again_under_its_id_and_its_attempts_are_known() -> None:
    broken = True
    house = ScriptedEvaluator(fails=lambda _task, edit: broken and edit.documents[0] == "bad")
    made = house.CreateEvaluations(group("bad", "good"), CONTEXT).evaluations
    status = house.GetQueueStatus(pb.GetQueueStatusRequest(), CONTEXT)
    assert (status.evaluations_waiting, status.evaluations_failed) == (0, 1)
    assert {worker.name for worker in status.workers} == {"scripted:1", "scripted:2"}
    broken = False
    request = pb.RetryEvaluationsRequest(request_id="r", owner="run-1", reason="TRIAL_LOST")
    assert house.RetryEvaluations(pb.RetryEvaluationsRequest(request_id="o", owner="run-2"), CONTEXT).retried == 0
    assert [house.RetryEvaluations(request, CONTEXT).retried for _ in range(2)] == [1, 1]
    with pytest.raises(PreceptorError) as raised:
        house.RetryEvaluations(pb.RetryEvaluationsRequest(request_id="r"), CONTEXT)
    assert raised.value.reason == "REQUEST_ID_REUSED"
    attempts = house.ListAttempts(pb.ListAttemptsRequest(evaluation_id=made[0].id), CONTEXT).attempts
    assert [(one.number, one.failure.reason, one.HasField("end_time")) for one in attempts] == [
        (1, "TRIAL_LOST", True),
        (2, "", True),
    ]
    with pytest.raises(PreceptorError) as raised:
        house.ListAttempts(pb.ListAttemptsRequest(evaluation_id="none"), CONTEXT)
    assert raised.value.reason == "EVALUATION_NOT_FOUND"
