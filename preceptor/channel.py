"""The only place where a gRPC client is made: options, deadlines, retries, and the server's errors raised again.

    teacher = connect("127.0.0.1:7101", teacher_pb2_grpc.TeacherServiceStub)
    policy = call(teacher.GetPolicy, GetPolicyRequest()).policy
    for response in stream(teacher.GenerateSelfEdits, request, deadline=600): ...

Every call has a deadline and carries the house's token and this side's version. A unary call is sent again while the
service cannot take it and time is left: reads are harmless and every mutating request carries a ``request_id``. Streams
are not resent here; who opens one knows what to ask for next.
"""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from preceptor import rates, versions
from preceptor.errors import CATALOGUE, DOMAIN, PreceptorError
from preceptor.security import Security, house_security
from preceptor.server import KEEPALIVE_SECONDS, KEEPALIVE_TIMEOUT_SECONDS, MAX_MESSAGE_BYTES, MAX_METADATA_BYTES
from preceptor.tracing import TRACEPARENT, current

# A unary call answers from memory or SQL; what takes longer is a resource with a state.
DEFAULT_DEADLINE_SECONDS = 60.0
# What passes by itself, and says that nothing was done or that doing it again is harmless (``request_id``). Not
# DISK_FULL: somebody has to make room, and one more try may copy a model onto the full disk. Least of all what only
# other settings can mend.
RETRIED = frozenset({"SERVICE_UNREACHABLE", "SHUTTING_DOWN", "SERVICE_BUSY", "RATE_LIMITED", "QUEUE_FULL"})
RETRY_SECONDS, MAX_RETRY_SECONDS = 0.2, 2.0

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
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


def open_channel(address: str, security: Security | None = None) -> grpc.Channel:
    """A channel with the house's options. ``security``: what the environment of this process says unless given.

    Raises PreceptorError (UNAUTHENTICATED, TLS_FAILED) where the token or the certificates cannot be read.
    """
    return _Channel(address, house_security() if security is None else security)


class _Channel(grpc.Channel):
    """A channel whose calls carry the token and the version, and which can say why it does not connect.

    gRPC's own call credentials refuse to travel in plaintext, and its interceptors double the cost of a call.
    """

    def __init__(self, address: str, security: Security) -> None:
        self.address = address
        self.security = security
        self._plain: Any = (
            grpc.secure_channel(address, security.tls.channel_credentials(), options=_OPTIONS)
            if security.tls
            else grpc.insecure_channel(address, options=_OPTIONS)
        )
        self.metadata: tuple[tuple[str, str], ...] = versions.METADATA
        if security.token:
            self.metadata += (("authorization", security.authorization),)

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        return _Method(self, self._plain.unary_unary(*arguments, **options))

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        return _Method(self, self._plain.unary_stream(*arguments, **options))

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        return _Method(self, self._plain.stream_unary(*arguments, **options))

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        return _Method(self, self._plain.stream_stream(*arguments, **options))

    def subscribe(self, callback: Callable[[grpc.ChannelConnectivity], None], try_to_connect: bool = False) -> None:
        self._plain.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        self._plain.unsubscribe(callback)

    def close(self) -> None:
        self._plain.close()

    def __enter__(self) -> _Channel:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class _Method:
    """A method of any kind, called with the channel's metadata beside those of the caller."""

    def __init__(self, channel: _Channel, plain: Any) -> None:
        self.channel = channel
        self._plain = plain

    def __call__(self, request: Any, timeout: float | None = None, metadata: Any = (), **options: Any) -> Any:
        return self._plain(request, timeout, self._metadata(metadata), **options)

    def with_call(self, request: Any, timeout: float | None = None, metadata: Any = (), **options: Any) -> Any:
        return self._plain.with_call(request, timeout, self._metadata(metadata), **options)

    def future(self, request: Any, timeout: float | None = None, metadata: Any = (), **options: Any) -> Any:
        return self._plain.future(request, timeout, self._metadata(metadata), **options)

    def _metadata(self, callers: Any) -> tuple[Any, ...]:
        place = current()
        traced = ((TRACEPARENT, place.traceparent),) if place else ()
        return (*self.channel.metadata, *traced, *(callers or ()))


def new_request_id() -> str:
    """For a mutating request that is meant once."""
    return uuid.uuid4().hex


def call(
    method: grpc.UnaryUnaryMultiCallable[Request, Response],
    request: Request,
    *,
    deadline: float = DEFAULT_DEADLINE_SECONDS,
    retried: Collection[str] = RETRIED,
) -> Response:
    """Calls a unary method; ``deadline`` in seconds covers all tries, which go on while the error is one of
    ``retried``. Raises the server's PreceptorError, or SERVICE_UNREACHABLE, TLS_FAILED, DEADLINE_EXCEEDED."""
    end = time.monotonic() + deadline
    pause = RETRY_SECONDS
    while True:
        try:
            # Not wait_for_ready: it would wait in silence for a connection that TLS will never let happen.
            return method(request, timeout=max(end - time.monotonic(), 0.001))
        except grpc.RpcError as error:
            translated = _translated(error, method)
            told = _told_to_wait(translated)
            if translated.reason not in retried or time.monotonic() + max(pause, told) > end:
                raise translated from None
        # So that those who were refused together do not come together; no sooner than the service says.
        time.sleep(max(told, pause * random.uniform(0.5, 1)))
        pause = min(pause * 1.5, MAX_RETRY_SECONDS)


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
    end = time.monotonic() + deadline
    if wait_for_ready and isinstance(method, _Method):
        _wait_until_there(method.channel, end)
    while True:
        responses: Any = method(request, timeout=max(end - time.monotonic(), 0.001), wait_for_ready=wait_for_ready)
        opened(responses)
        try:
            yield from responses
            return
        except grpc.RpcError as error:
            translated = _translated(error, method)
            told = _told_to_wait(translated) or RETRY_SECONDS
            # Said before anything else is, and nothing was done.
            if translated.reason != "RATE_LIMITED" or time.monotonic() + told > end:
                raise translated from None
        finally:
            responses.cancel()
        time.sleep(told)


def _told_to_wait(error: PreceptorError) -> float:
    """Seconds that the service wants its client to wait."""
    try:
        return max(0.0, float(error.metadata.get(rates.RETRY_SECONDS, "0")))
    except ValueError:
        return 0.0


def _wait_until_there(channel: _Channel, end: float) -> None:
    """Returns when the service can be reached; it is asked something harmless until then. Raises as ``call`` does."""
    try:
        call(
            health_pb2_grpc.HealthStub(channel).Check, health_pb2.HealthCheckRequest(), deadline=end - time.monotonic()
        )
    except PreceptorError as error:
        if error.reason in ("SERVICE_UNREACHABLE", "TLS_FAILED", "DEADLINE_EXCEEDED"):
            raise


@dataclass(frozen=True)
class Health:
    """What a service says of itself; ``version`` and ``contract`` are empty where it tells none.

    ``seconds_ahead``: how far its clock is ahead of ours, give or take half the time that the answer took; 0 where it
    tells no time. ``pid``: its process id on its machine; 0 where it tells none.
    """

    serving: bool
    version: str
    contract: str
    seconds_ahead: float
    pid: int = 0


def health_of(address: str, *, deadline: float = 1.0, security: Security | None = None) -> Health:
    """Asks a service for its health, which needs no token. Raises PreceptorError: SERVICE_UNREACHABLE, TLS_FAILED,
    DEADLINE_EXCEEDED."""
    with open_channel(address, security) as channel:
        method = health_pb2_grpc.HealthStub(channel).Check
        asked = time.time()
        try:
            answer, done = method.with_call(health_pb2.HealthCheckRequest(), timeout=deadline)
        except grpc.RpcError as error:
            raise _translated(error, method) from None
    told: dict[str, Any] = dict(done.trailing_metadata() or ())
    now = (asked + time.time()) / 2
    return Health(
        answer.status == health_pb2.HealthCheckResponse.SERVING,
        str(told.get(versions.VERSION_KEY, "")),
        str(told.get(versions.CONTRACT_KEY, "")),
        float(told.get(versions.TIME_KEY, now)) - now,
        int(told.get(versions.PID_KEY, 0)),
    )


def is_serving(address: str, *, deadline: float = 1.0, pid: int = 0) -> bool:
    """Whether the service at ``address`` says that it serves, and is the process ``pid`` of this machine where one is
    given: a free port may be somebody else's by the time a service takes it.

    Raises PreceptorError (TLS_FAILED, UNAUTHENTICATED) where asking again will not help: our TLS and the service's do
    not fit, or our own settings cannot be read."""
    try:
        health = health_of(address, deadline=deadline)
        return health.serving and (not pid or health.pid == pid)
    except PreceptorError as error:
        if error.reason in ("TLS_FAILED", "UNAUTHENTICATED"):
            raise
        return False


def _translated(error: grpc.RpcError, method: object) -> PreceptorError:
    """As ``from_rpc_error``; a service that cannot be reached is asked whether that is because of TLS."""
    translated = from_rpc_error(error)
    if translated.reason == "SERVICE_UNREACHABLE" and isinstance(method, _Method):
        channel = method.channel
        if cause := channel.security.cause(channel.address):
            return PreceptorError("TLS_FAILED", cause)
    return translated


def from_rpc_error(error: grpc.RpcError) -> PreceptorError:
    """The exception that the server raised, or the one that says why it could not be asked."""
    failed: Any = error
    try:
        status = rpc_status.from_call(failed)
    except (DecodeError, ValueError):  # details that are none, or not of this status: what the code says must do
        status = None
    unknown = ""
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        try:
            ours = detail.Unpack(info) and info.domain == DOMAIN
        except DecodeError:
            continue
        if ours and info.reason in CATALOGUE:
            return PreceptorError(info.reason, status.message, **dict(info.metadata))
        unknown = info.reason if ours else ""
    code, details = failed.code(), failed.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        return PreceptorError("SERVICE_UNREACHABLE", f"the service does not answer: {details}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return PreceptorError("DEADLINE_EXCEEDED", "no answer within the deadline")
    if code is grpc.StatusCode.CANCELLED:
        return PreceptorError("CANCELLED", "the call was cancelled")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return PreceptorError("UNAUTHENTICATED", details or "the service refuses the token")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return PreceptorError("VERSION_SKEW", f"the service does not know this call, it may be older: {details}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return PreceptorError("INVALID_REQUEST", f"a message is larger than {MAX_MESSAGE_BYTES >> 20} MiB: {details}")
    said = f"{code.name if code else 'no status'}: {details}"
    if unknown:
        return PreceptorError(
            "VERSION_SKEW", f"the service gives a reason that this version does not know: {unknown} ({said})"
        )
    return PreceptorError("INTERNAL", said)
