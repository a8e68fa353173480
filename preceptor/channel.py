"""The only place where a gRPC client is made: options, deadlines, retries, and the server's errors raised again.

    teacher = connect("127.0.0.1:7101", teacher_pb2_grpc.TeacherServiceStub)
    policy = call(teacher.GetPolicy, GetPolicyRequest()).policy
    for response in stream(teacher.GenerateSelfEdits, request, deadline=600): ...

Every call has a deadline. A unary call is sent again while the service is unreachable and time is left: reads are
harmless and every mutating request carries a ``request_id``. Streams are not resent here; who opens one knows what
to ask for next.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from preceptor.errors import CATALOGUE, DOMAIN, PreceptorError
from preceptor.server import MAX_MESSAGE_BYTES

# A unary call answers from memory or SQL; what takes longer is a resource with a state.
DEFAULT_DEADLINE_SECONDS = 60.0

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # gRPC over DNS sticks to one replica unless told otherwise.
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
    ("grpc.enable_http_proxy", 0),
    # Otherwise channels to one address share a connection and its back-off: a new channel to a service that has just
    # started would fail because an old one had found nobody there.
    ("grpc.use_local_subchannel_pool", 1),
]

Stub = TypeVar("Stub")
Request = TypeVar("Request")
Response = TypeVar("Response")


def connect(address: str, stub: type[Stub]) -> Stub:
    """A stub on a channel of its own. Connects lazily; make it after any fork."""
    return stub(open_channel(address))  # type: ignore[call-arg]


def open_channel(address: str) -> grpc.Channel:
    """A channel with the house's options."""
    return grpc.insecure_channel(address, options=_OPTIONS)


def new_request_id() -> str:
    """For a mutating request that is meant once."""
    return uuid.uuid4().hex


def call(
    method: grpc.UnaryUnaryMultiCallable[Request, Response],
    request: Request,
    *,
    deadline: float = DEFAULT_DEADLINE_SECONDS,
) -> Response:
    """Calls a unary method; ``deadline`` in seconds covers all tries. Raises the server's PreceptorError, or
    SERVICE_UNREACHABLE, DEADLINE_EXCEEDED."""
    end = time.monotonic() + deadline
    while True:
        left = end - time.monotonic()
        try:
            return method(request, timeout=max(left, 0.001), wait_for_ready=left > 1)
        except grpc.RpcError as error:
            translated = from_rpc_error(error)
            if translated.reason not in ("SERVICE_UNREACHABLE", "SHUTTING_DOWN") or time.monotonic() + 0.2 > end:
                raise translated from None
            time.sleep(0.2)


def stream(
    method: grpc.UnaryStreamMultiCallable[Request, Response],
    request: Request,
    *,
    deadline: float,
    wait_for_ready: bool = True,
    opened: Callable[[Any], None] = lambda _call: None,
) -> Iterator[Response]:
    """Iterates a server stream; closing the iterator cancels it. Raises as ``call`` does.

    ``wait_for_ready`` False: a service that is away is an error at once, not after the deadline. ``opened`` is given
    the call, whose ``cancel()`` ends the iteration from another thread (with CANCELLED).
    """
    responses: Any = method(request, timeout=deadline, wait_for_ready=wait_for_ready)
    opened(responses)
    try:
        yield from responses
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
    finally:
        responses.cancel()


def is_serving(address: str, *, deadline: float = 1.0) -> bool:
    """Whether the service at ``address`` says that it serves."""
    with open_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=deadline)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def from_rpc_error(error: grpc.RpcError) -> PreceptorError:
    """The exception that the server raised, or the one that says why it could not be asked."""
    failed: Any = error
    status = rpc_status.from_call(failed)
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in CATALOGUE:
            return PreceptorError(info.reason, status.message, **dict(info.metadata))
    code, details = failed.code(), failed.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        return PreceptorError("SERVICE_UNREACHABLE", f"the service does not answer: {details}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return PreceptorError("DEADLINE_EXCEEDED", "no answer within the deadline")
    if code is grpc.StatusCode.CANCELLED:
        return PreceptorError("CANCELLED", "the call was cancelled")
    return PreceptorError("INTERNAL", f"{code.name}: {details}")
