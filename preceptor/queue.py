"""The Celery app, the reason for each of its settings, and the payload's form.

One task: a trial batch in, its result out, both proto messages as canonical JSON (never pickle). The Celery task id
is ``<batch id>.<attempt>``: the same work under the same attempt is one task, and a new attempt (after a lost
worker) is another, so a late result of an old attempt is still found by its id and is the same work.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit, urlunsplit

import redis
from celery import Celery
from celery.exceptions import InvalidTaskError
from celery.worker.strategy import default as celery_strategy
from google.protobuf.json_format import MessageToDict, ParseDict

from preceptor import __version__
from preceptor.errors import PreceptorError
from preceptor.names import celery_task_id, split_task_id
from preceptor.security import plaintext_cause
from preceptor.v1 import trial_pb2 as trial

TRIAL_BATCH_TASK = "preceptor.run_trial_batch"
TRIAL_QUEUE = "trials"
# What the name of a student's own queue begins with.
_OWN_QUEUE = f"{TRIAL_QUEUE}."
# Part of every evaluation's identity: raise it when the same payload comes to mean another computation.
PROTOCOL_VERSION = 1

# A Redis that accepts and says nothing is one that is away: this long is waited for a single answer.
ANSWER_SECONDS = 10.0
CONNECT_SECONDS = 5.0
# Asking why must not take longer than the next try would.
CAUSE_SECONDS = 2.0
# The longest pause between two tries to store a result.
RESULT_RETRY_SECONDS = 5.0

# Headers of a message; never in its body, which is named by its content: when it was sent (unix seconds), and for which
# evaluations, where somebody follows their traces.
SENT, EVALUATIONS = "preceptor_sent", "preceptor_evaluations"

_ANSWERS = ("answers", "probe_answers")


def make_app(broker_url: str) -> Celery:
    """The app for both sides of the queue. Connects lazily."""
    url = celery_url(broker_url)
    app = Celery("preceptor", broker=url, backend=url, set_as_current=False)
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
        broker_transport_options={
            # Redis redelivers what is not acknowledged in this time. Far above any batch, so that a long batch never
            # runs twice; lost workers are noticed by their lease (preceptor.leases), not by this.
            "visibility_timeout": 6 * 3600,
            "socket_keepalive": True,
            # kombu's default is to wait for ever: a cable that is pulled would hold an acknowledgement until TCP gives
            # up, which takes a quarter of an hour.
            "socket_timeout": ANSWER_SECONDS,
            "socket_connect_timeout": CONNECT_SECONDS,
            # The one wait that no socket timeout covers is the event loop's for the next job. kombu looks at it this
            # often, and drops a connection that is so long overdue: 21 s at most, where its default makes 51.
            "health_check_interval": 10,
            # Whoever submits hears at once that Redis is away, and knows better when to try again. (A worker's waiting
            # for its connection is the setting below.)
            "max_retries": 0,
        },
        # The worker's connection is for ever: Celery's default gives up after 100 tries, three quarters of an hour.
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        # A Redis that refuses (its disk or memory is full) is waited for like one that is away; by default the worker
        # would end with a traceback.
        broker_channel_error_retry=True,
        # Results outlive a long stop of the evaluator.
        result_expires=24 * 3600,
        # A result that ends while Redis is away, or refuses, is stored when it is back. Without a limit: nothing
        # counts as lost meanwhile, so a worker with a result has nothing better to do than to keep it.
        result_backend_always_retry=True,
        result_backend_max_sleep_between_retries_ms=int(RESULT_RETRY_SECONDS * 1000),
        result_backend_transport_options={
            "additional_connection_errors": [redis.ResponseError],
            # The loop within that loop: Celery's default tries 20 times, 19 s, and says each of them.
            "retry_policy": {"max_retries": 0},
        },
        # Celery's default is 120 s.
        redis_socket_timeout=ANSWER_SECONDS,
        redis_socket_connect_timeout=CONNECT_SECONDS,
        redis_socket_keepalive=True,
        redis_backend_health_check_interval=25,
        worker_hijack_root_logger=False,
        # Nobody listens to these; they are traffic per job. Remote control would be a second connection to lose.
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        task_ignore_result=False,
    )
    return app


def trial_strategy(task: Any, app: Celery, consumer: Any, **options: Any) -> Callable[..., Any]:
    """How a worker takes a message: as Celery does, but one that is no task of ours is refused for good. Celery would
    end the worker by it, and it would go back to the queue and end the next one.

    For ``app.task(Strategy="preceptor.queue:trial_strategy")``.
    """
    take = celery_strategy(task, app, consumer, **options)

    def take_carefully(message: Any, body: Any, *rest: Any, **more: Any) -> Any:
        parts = message.payload if body is None else None
        if not (
            isinstance(parts, list)
            and [type(part) for part in parts] == [list, dict, dict]
            and isinstance(message.headers.get("id"), str)
        ):
            raise InvalidTaskError("it has no id, or its body is not [args, kwargs, embed]")  # logged, acknowledged
        return take(message, body, *rest, **more)

    return take_carefully


def celery_url(broker_url: str) -> str:
    """The URL as Celery wants it: it has its own name for sockets, and takes any certificate unless told not to."""
    parts = urlsplit(broker_url)
    if parts.scheme == "unix":
        return f"redis+socket://{parts.netloc}{parts.path}?{parts.query.replace('db=', 'virtual_host=')}"
    if parts.scheme == "rediss" and "ssl_cert_reqs=" not in parts.query:
        query = "&".join(filter(None, (parts.query, "ssl_cert_reqs=required")))
        return urlunsplit((parts.scheme, parts.netloc, parts.path, query, ""))
    return broker_url


def check_broker(broker_url: str) -> float:
    """Asks Redis once. Returns by how many seconds this machine's clock is ahead of the one of Redis.

    Raises PreceptorError: BROKER_REFUSED where trying again cannot help (URL, user, password, database number),
    TLS_FAILED where certificates are why, else BROKER_UNREACHABLE. No message holds the password.
    """
    place = _without_password(broker_url)
    try:
        number = urlsplit(broker_url).path.strip("/")
        if not broker_url.startswith("unix:") and number and not number.isdecimal():
            raise ValueError(f"the database is a number, not {number!r}")
        client = redis.Redis.from_url(
            broker_url, socket_timeout=CONNECT_SECONDS, socket_connect_timeout=CONNECT_SECONDS, retry=None
        )
    except ValueError as error:
        raise PreceptorError("BROKER_REFUSED", f"PRECEPTOR_BROKER_URL={place} is no URL of a Redis: {error}") from None
    try:
        with client:
            asked = time.time()
            seconds, microseconds = client.time()
            answered = time.time()
    except (redis.AuthenticationError, redis.ResponseError) as error:
        wanting = isinstance(error, redis.AuthenticationError) and "@" not in broker_url
        why = "it wants a password" if wanting else error
        raise PreceptorError("BROKER_REFUSED", f"Redis at {place} refuses: {why}") from None
    except (redis.RedisError, OSError) as error:
        if why := _tls_cause(broker_url, error):
            raise PreceptorError("TLS_FAILED", f"Redis at {place}: {why}") from None
        raise PreceptorError("BROKER_UNREACHABLE", f"Redis at {place} does not answer: {error}") from None
    return (asked + answered) / 2 - (seconds + microseconds / 1e6)


def _tls_cause(url: str, error: Exception) -> str:
    """Why TLS is the reason that Redis cannot be asked; empty where it is not."""
    parts = urlsplit(url)
    said = str(error)
    if parts.scheme == "redis" and isinstance(error, redis.ConnectionError):
        try:
            speaks = plaintext_cause(f"{parts.hostname}:{parts.port or 6379}")
        except ValueError:  # no port
            return ""
        return "it speaks TLS; write rediss:// in PRECEPTOR_BROKER_URL" if speaks else ""
    if parts.scheme != "rediss":
        return ""
    if isinstance(error, redis.TimeoutError):
        return "it does not speak TLS; write redis:// in PRECEPTOR_BROKER_URL" if _speaks_plainly(parts) else ""
    if "SSL: " not in said and not (said := _hung_up(parts)):
        return ""
    if "mismatch" in said or "not valid for" in said:
        return f"its certificate does not name {parts.hostname} (subjectAltName)"
    if "CERTIFICATE_VERIFY_FAILED" in said:
        return f"its certificate is refused: {said.rpartition('verify failed: ')[2].partition(' (_ssl')[0]}"
    if "ALERT_" in said:
        alert = said.rpartition("ALERT_")[2].partition("]")[0].replace("_", " ").lower()
        return f"it refuses this side's certificate: {alert}"
    return said


def _hung_up(parts: SplitResult) -> str:
    """What a Redis says that shakes hands and then wants nothing of us; empty where it does not do that. In TLS 1.3 a
    server judges the client's certificate after the client believes to be connected."""
    files = dict(parse_qsl(parts.query))
    try:
        context = ssl.create_default_context(cafile=files.get("ssl_ca_certs"))
        if "ssl_certfile" in files:
            context.load_cert_chain(files["ssl_certfile"], files.get("ssl_keyfile"))
        with (
            socket.create_connection((parts.hostname, parts.port or 6379), timeout=CAUSE_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=parts.hostname) as connection,
        ):
            try:
                return "" if connection.recv(1) else "ALERT_NONE_GIVEN]"
            except TimeoutError:  # it waits for us to speak
                return ""
    except ssl.SSLError as error:
        return str(error)
    except (OSError, ValueError):
        return ""


def _speaks_plainly(parts: SplitResult) -> bool:
    """Whether a Redis answers there without TLS; with TLS it would say nothing to this."""
    try:
        with socket.create_connection((parts.hostname, parts.port or 6379), timeout=CAUSE_SECONDS) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(1) in (b"+", b"-")
    except (OSError, ValueError):
        return False


def _without_password(url: str) -> str:
    bare = url.partition("?")[0]  # nor what names files, or a password in another way
    before, at, place = bare.rpartition("@")
    scheme, _, secret = before.partition("://")
    user = secret.partition(":")[0]
    return f"{scheme}://{user}{':***' if ':' in secret else ''}@{place}" if at else bare


def queue_of(student: str, dedicated: Collection[str] = ()) -> str:
    """The queue of a student's batches: its own where it is one of the ``dedicated``, else the one of all others."""
    return _OWN_QUEUE + student if student in dedicated else TRIAL_QUEUE


def student_of(queue: str) -> str:
    """Whose own queue this is; empty for the one of all others."""
    return queue.removeprefix(_OWN_QUEUE) if queue.startswith(_OWN_QUEUE) else ""


def served_queues(students: Collection[str]) -> tuple[str, ...]:
    """The queues that a worker takes batches from that is there for these students; for none: for all others."""
    return tuple(sorted(queue_of(one, students) for one in students)) or (TRIAL_QUEUE,)


def submit(
    app: Celery, batch: trial.TrialBatch, attempt: int, queue: str = TRIAL_QUEUE, evaluations: Sequence[str] = ()
) -> str:
    """Puts one attempt at a batch on a queue; returns the Celery task id. ``evaluations``: who waits for it, for their
    traces.

    Raises kombu.exceptions.OperationalError within seconds where Redis does not answer, redis.RedisError where it
    refuses.
    """
    task_id = celery_task_id(batch.id, attempt)
    # Not app.send_task: that subscribes to the result, a connection that nobody reads and 19 s where Redis is away.
    # The descriptions would be documents in a log.
    message = app.amqp.create_task_message(
        task_id, TRIAL_BATCH_TASK, (to_payload(batch),), {}, argsrepr="", kwargsrepr=""
    )
    message.headers[SENT] = time.time()
    if evaluations:
        message.headers[EVALUATIONS] = list(evaluations)
    with app.producer_or_acquire() as producer:
        app.amqp.send_task_message(producer, TRIAL_BATCH_TASK, message, queue=queue, retry=False)
    return task_id


def fetch_result(app: Celery, task_id: str) -> trial.TrialBatchResult | None:
    """The stored result of a task, or None where there is none (yet). Raises as ``fetch_results``."""
    return fetch_results(app, [task_id]).get(task_id)


def fetch_results(app: Celery, task_ids: list[str]) -> dict[str, trial.TrialBatchResult]:
    """The stored results of those tasks that have one, in one round trip and without Celery's endless retries.

    What is stored and cannot be read is a failure of that task. Raises redis.RedisError where Redis does not answer.
    """
    if not task_ids:
        return {}
    backend: Any = app.backend
    found = {}
    stored = backend.mget([backend.get_key_for_task(task_id) for task_id in task_ids])
    for task_id, value in zip(task_ids, stored, strict=True):
        if value and (result := _result(task_id, value, backend)) is not None:
            found[task_id] = result
    return found


def _result(task_id: str, value: bytes, backend: Any) -> trial.TrialBatchResult | None:
    try:
        meta = backend.decode_result(value)
        status, stored = meta["status"], meta["result"]
        if status == "SUCCESS":
            return _read_result(stored)
    except Exception as error:  # whatever stands there, no reader of results may end by it
        status, stored = "FAILURE", f"the worker's result cannot be read: {error}"
    if status == "FAILURE":  # the task's own code reports failures as results; this is Celery's word
        result = trial.TrialBatchResult(batch_id=split_task_id(task_id)[0])
        result.failure.reason = "TRIAL_FAILED"
        result.failure.message = str(stored)[:500]
        return result
    return None


def _read_result(stored: Any) -> trial.TrialBatchResult:
    """What ParseDict makes of it. Answers are nearly all of a result, and nearly always what a message's constructor
    takes as it is, in a seventh of the time. Raises whatever ParseDict does."""
    try:
        bare = [{name: part for name, part in one.items() if name not in _ANSWERS} for one in stored["results"]]
        result = ParseDict({**stored, "results": bare}, trial.TrialBatchResult(), ignore_unknown_fields=True)
        for made, one in zip(result.results, stored["results"], strict=True):
            for name in _ANSWERS:
                getattr(made, name).extend(trial.Answer(**answer) for answer in one.get(name, ()))
        return result
    except Exception:  # "NaN" for a number, a field of a later version: JSON says some things in other ways
        return ParseDict(stored, trial.TrialBatchResult(), ignore_unknown_fields=True)


def to_payload(message: trial.TrialBatch | trial.TrialBatchResult) -> dict[str, Any]:
    """A message as the JSON object that travels."""
    return MessageToDict(message, preserving_proto_field_name=True)


def batch_from_payload(payload: Any) -> trial.TrialBatch:
    """The batch in a payload.

    Raises PreceptorError: VERSION_SKEW for another version of the protocol and for unknown fields (they would be work
    that this worker does not understand), INVALID_REQUEST for what no version ever sent.
    """
    if not isinstance(payload, dict):
        raise PreceptorError("INVALID_REQUEST", f"a trial batch is a JSON object, not {type(payload).__name__}")
    unknown = ""
    try:
        batch = ParseDict(payload, trial.TrialBatch())
    except Exception as error:  # ParseError for most; JSON of another shape raises whatever it comes to
        problem = str(error).partition("\n")[0][:300]
        try:
            batch = ParseDict(payload, trial.TrialBatch(), ignore_unknown_fields=True)
        except Exception:
            raise PreceptorError("INVALID_REQUEST", f"this is no trial batch: {problem}") from None
        unknown = f", but has fields unknown here: {problem}"
    version = batch.protocol_version or 1  # as the contract says of none
    if unknown or version != PROTOCOL_VERSION:
        ours = f"this worker is Preceptor {__version__} and speaks version {PROTOCOL_VERSION} of the queue's protocol"
        raise PreceptorError("VERSION_SKEW", f"{ours}; batch {batch.id} is of version {version}{unknown}")
    return batch
