"""The Celery app, the reason for each of its settings, and the payload's form.

One task: a trial batch in, its result out, both proto messages as canonical JSON (never pickle). The Celery task id
is ``<batch id>.<attempt>``: the same work under the same attempt is one task, and a new attempt (after a lost
worker) is another, so a late result of an old attempt is still found by its id and is the same work.
"""

from __future__ import annotations

from typing import Any

from celery import Celery
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from preceptor.names import celery_task_id, split_task_id
from preceptor.v1 import trial_pb2 as trial

TRIAL_BATCH_TASK = "preceptor.run_trial_batch"
TRIAL_QUEUE = "trials"
# Part of every evaluation's identity: raise it when the same payload comes to mean another computation.
PROTOCOL_VERSION = 1


def make_app(broker_url: str) -> Celery:
    """The app for both sides of the queue. Connects lazily."""
    app = Celery("preceptor", broker=broker_url, backend=broker_url, set_as_current=False)
    app.conf.update(
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        task_default_queue=TRIAL_QUEUE,
        # A job is acknowledged when it is done: a worker that dies must not take its job along.
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        # One job at a time and none hoarded: a batch takes seconds to minutes.
        worker_prefetch_multiplier=1,
        worker_concurrency=1,
        # Redis redelivers what is not acknowledged in this time. Far above any batch, so that a long batch never
        # runs twice; lost workers are noticed by their lease (preceptor.leases), not by this.
        broker_transport_options={"visibility_timeout": 6 * 3600, "socket_keepalive": True},
        result_backend_transport_options={"socket_keepalive": True},
        # Results outlive a long stop of the evaluator.
        result_expires=24 * 3600,
        # A result that ends while Redis is away is sent when it is back.
        result_backend_always_retry=True,
        broker_connection_retry_on_startup=True,
        # Importing torch in the pool's child takes longer than the default 4 s.
        worker_proc_alive_timeout=120,
        worker_hijack_root_logger=False,
        # Nobody listens to these; they are traffic per job.
        worker_send_task_events=False,
        task_ignore_result=False,
    )
    return app


def submit(app: Celery, batch: trial.TrialBatch, attempt: int) -> str:
    """Puts one attempt at a batch on the queue; returns the Celery task id."""
    task_id = celery_task_id(batch.id, attempt)
    app.send_task(TRIAL_BATCH_TASK, args=[to_payload(batch)], task_id=task_id, queue=TRIAL_QUEUE)
    return task_id


def fetch_result(app: Celery, task_id: str) -> trial.TrialBatchResult | None:
    """The stored result of a task, or None where there is none (yet)."""
    return _result(task_id, app.backend.get_task_meta(task_id))


def fetch_results(app: Celery, task_ids: list[str]) -> dict[str, trial.TrialBatchResult]:
    """The stored results of those tasks that have one, in one round trip and without Celery's endless retries.

    Raises redis.RedisError where Redis does not answer.
    """
    if not task_ids:
        return {}
    backend: Any = app.backend
    found = {}
    stored = backend.mget([backend.get_key_for_task(task_id) for task_id in task_ids])
    for task_id, value in zip(task_ids, stored, strict=True):
        if value and (result := _result(task_id, backend.decode_result(value))) is not None:
            found[task_id] = result
    return found


def _result(task_id: str, meta: dict[str, Any]) -> trial.TrialBatchResult | None:
    if meta["status"] == "SUCCESS":
        try:
            return ParseDict(meta["result"], trial.TrialBatchResult(), ignore_unknown_fields=True)
        except ParseError as error:
            meta = {"status": "FAILURE", "result": f"the worker's result cannot be read: {error}"}
    if meta["status"] == "FAILURE":  # the task's own code reports failures as results; this is Celery's word
        result = trial.TrialBatchResult(batch_id=split_task_id(task_id)[0])
        result.failure.reason = "TRIAL_FAILED"
        result.failure.message = str(meta["result"])[:500]
        return result
    return None


def to_payload(message: trial.TrialBatch | trial.TrialBatchResult) -> dict[str, Any]:
    """A message as the JSON object that travels."""
    return MessageToDict(message, preserving_proto_field_name=True)


def batch_from_payload(payload: dict[str, Any]) -> trial.TrialBatch:
    """The batch in a payload. Unknown fields are refused: they would be work that this worker does not understand.

    Raises google.protobuf.json_format.ParseError.
    """
    return ParseDict(payload, trial.TrialBatch())
