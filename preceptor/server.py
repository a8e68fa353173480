"""The only place where a gRPC server is made: options, the door, health, reflection, errors, drain on SIGTERM.

A servicer raises ``PreceptorError``; the doorkeeper turns it into a status with ``ErrorInfo``. Anything else is a bug:
it is logged with its traceback and reported as INTERNAL without details. Before a call reaches a servicer its token and
version are looked at, whether there is room for it, and whether its client calls too often. Health is answered without
a token and at any load, since whoever supervises a service ends it where health does not answer.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from preceptor import versions
from preceptor.errors import DOMAIN, PreceptorError
from preceptor.metrics import CALL_SECONDS, CALLS, ERRORS, STREAMS
from preceptor.rates import RETRY_SECONDS, RateLimit, client_name
from preceptor.security import Security, load_security
from preceptor.settings import ServiceSettings
from preceptor.telemetry import OFF, Telemetry
from preceptor.tracing import TRACEPARENT, about, parse_traceparent

log = logging.getLogger(__name__)

# Large enough for a run's tasks inline (a SQuAD file is 0.5 MB); weights never travel in messages.
MAX_MESSAGE_BYTES = 64 * 2**20
# An error travels as metadata: twice, once in base64 and once with everything but ASCII percent-encoded. The limits
# count both, so that what is said stays below the 8 KB that clients of other make take.
MAX_METADATA_BYTES = 64 * 2**10
MAX_ERROR_BYTES, MAX_PLACE_BYTES = 6_000, 600
# Both sides ping an open connection, so that a peer that is stopped or whose machine is gone is noticed within 20 s
# instead of hours. The thread that answers pings is gRPC's own: it is not held up by Python. (gRPC pings on its own
# account too, to measure the line, and while such a ping is out no other is sent: ping_timeout_ms, else a minute.)
KEEPALIVE_SECONDS, KEEPALIVE_TIMEOUT_SECONDS = 10, 10
# A server that allowed fewer pings than its clients send would answer GOAWAY.
MIN_PING_SECONDS = KEEPALIVE_SECONDS // 2
# A call that finds all threads taken waits behind at most so many others a thread.
WAITING_PER_THREAD = 3
DOOR_THREADS = 2
LATE_SIGNAL_SECONDS = 1.0
# Whoever tries tokens must not fill the disk with logs.
SECONDS_BETWEEN_REFUSALS_LOGGED = 1.0

HEALTH_CHECK = f"/{health.SERVICE_NAME}/Check"
HEALTH_WATCH = f"/{health.SERVICE_NAME}/Watch"

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_SECONDS * 1000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_SECONDS * 1000),
    ("grpc.so_reuseport", 0),  # an occupied port is an error, not a second listener
]


def to_status(error: PreceptorError) -> status_pb2.Status:
    """The wire form of an error: code, message and ErrorInfo with reason and metadata, cut to what can travel."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    for key, value in error.metadata.items():
        info.metadata[key] = _sendable(value, MAX_PLACE_BYTES)
    details = [any_pb2.Any()]
    details[0].Pack(info)
    if seconds := error.metadata.get(RETRY_SECONDS):  # as clients of other make know it
        details.append(any_pb2.Any())
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(float(seconds) * 1e9))
        details[1].Pack(retry)
    code: int = getattr(code_pb2, error.code.name)
    return status_pb2.Status(code=code, message=_sendable(error.message, MAX_ERROR_BYTES), details=details)


def _sendable(text: str, limit: int) -> str:
    """Text that UTF-8 can carry (a lone surrogate is none), of at most about ``limit`` bytes as it travels."""
    raw = text.encode(errors="replace")
    left = float(limit)
    for at, byte in enumerate(raw):
        left -= 4 / 3 + (1 if 32 <= byte < 127 and byte != ord("%") else 3)
        if left < 0:
            return raw[:at].decode(errors="ignore") + " ..."
    return raw.decode()


class _Pool(ThreadPoolExecutor):
    """Threads for one kind of call, which know how many calls they have."""

    def __init__(self, threads: int, limit: int, name: str) -> None:
        super().__init__(threads, thread_name_prefix=f"rpc-{name}")
        self._limit = limit
        self._calls = 0
        self._lock = threading.Lock()

    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
        """As ThreadPoolExecutor does."""
        with self._lock:
            self._calls += 1
        future = super().submit(function, *arguments, **options)
        future.add_done_callback(self._done)
        return future

    def full(self) -> bool:
        """Whether one more call would wait for too many others."""
        return self._calls >= self._limit

    def _done(self, _future: Future[Any]) -> None:
        with self._lock:
            self._calls -= 1


class Doorkeeper(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """What every call passes: token, version, room; and what a servicer raises leaves as a gRPC status.

    Three pools of threads, so that no kind of call can starve another: unary calls, open streams, and the door itself
    (health, and what is refused), whose work never waits for anything. gRPC picks a pool by an attribute of the
    function that serves the call.
    """

    def __init__(
        self,
        security: Security,
        max_threads: int,
        max_streams: int,
        telemetry: Telemetry = OFF,
        rate_limit: float = 0.0,
    ) -> None:
        self._security = security
        self._rates = RateLimit(rate_limit)
        self._telemetry = telemetry
        # A short queue: what waits longer than others need for four calls should rather be told to come again.
        self._unary = _Pool(max_threads, max_threads * (1 + WAITING_PER_THREAD), "unary")
        self._streams = _Pool(max_streams, max_streams, "stream")
        self.door = _Pool(DOOR_THREADS, sys.maxsize, "door")
        self._handlers: dict[str, Any] = {}  # by method
        self._next_log = 0.0

    def close(self) -> None:
        """Lets the threads end with the calls that they have."""
        for pool in (self._unary, self._streams, self.door):
            pool.shutdown(wait=False)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of one call, or one that refuses it. Runs in gRPC's own thread, one call after another."""
        method = handler_call_details.method
        if method != HEALTH_CHECK:
            metadata: dict[str, Any] = dict(handler_call_details.invocation_metadata or ())
            if refusal := self._security.refusal(metadata.get("authorization")):
                return self._refused(refusal, method, log_it=True)
            contract = metadata.get(versions.CONTRACT_KEY)
            if contract is not None and (
                refusal := versions.skew(contract, str(metadata.get(versions.VERSION_KEY, "")))
            ):
                return self._refused(refusal, method, log_it=True)
        handler = self._handlers.get(method)
        if handler is None:
            handler = continuation(handler_call_details)
            if handler is None:
                return None
            handler = self._handlers[method] = self._wrapped(handler, method)
        if method != HEALTH_CHECK:
            streams = handler.request_streaming or handler.response_streaming
            if (self._streams if streams else self._unary).full():
                kind = "open streams" if streams else "calls"
                busy = PreceptorError("SERVICE_BUSY", f"the service has as many {kind} as it can serve")
                return self._refused(busy, method)
        return handler

    def _refused(self, error: PreceptorError, method: str, log_it: bool = False) -> Any:
        known = method if method in self._handlers else ""  # names that somebody tries are not to be labels

        def refuse(_requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            if log_it and time.monotonic() >= self._next_log:
                self._next_log = time.monotonic() + SECONDS_BETWEEN_REFUSALS_LOGGED
                log.warning("refused a call from %s: %s (%s)", context.peer(), error, error.reason)
            self._telemetry.metrics.count(CALLS, method=_short(known), code=error.code.name)
            self._telemetry.metrics.count(ERRORS, reason=error.reason)
            context.abort_with_status(rpc_status.to_status(to_status(error)))
            yield

        refuse.experimental_thread_pool = self.door  # type: ignore[attr-defined]
        # As a stream, whatever the method is: so nothing of the request is waited for.
        return grpc.stream_stream_rpc_method_handler(refuse)

    def _wrapped(self, handler: Any, method: str) -> Any:
        """The handler with its errors translated, in its pool (the contract has no methods that take streams)."""
        if handler.request_streaming:
            inner = handler.stream_stream or handler.stream_unary

            def pooled(requests: Any, context: grpc.ServicerContext) -> Any:
                return inner(requests, context)

            pooled.experimental_thread_pool = self._streams  # type: ignore[attr-defined]
            make: Any = (
                grpc.stream_stream_rpc_method_handler
                if handler.response_streaming
                else grpc.stream_unary_rpc_method_handler
            )
            return make(pooled, handler.request_deserializer, handler.response_serializer)
        # Read here and not by gRPC, which answers garbage with INTERNAL and a traceback in the log.
        read = handler.request_deserializer

        if handler.response_streaming:
            if method == HEALTH_WATCH:
                return handler  # it holds no thread

            def stream(raw: bytes, context: grpc.ServicerContext) -> Iterator[Any]:
                with self._counted(method, context, streams=True):
                    try:
                        with self._traced(method, context):
                            self._let_in(context)
                            yield from handler.unary_stream(_read(read, raw), context)
                    except Exception as error:  # everything a servicer can raise ends here, as a status
                        self._abort(error, method, context)

            stream.experimental_thread_pool = self._streams  # type: ignore[attr-defined]
            return grpc.unary_stream_rpc_method_handler(stream, None, handler.response_serializer)

        def unary(raw: bytes, context: grpc.ServicerContext) -> Any:
            with self._counted(method, context):
                try:
                    with self._traced(method, context):
                        self._let_in(context)
                        return handler.unary_unary(_read(read, raw), context)
                except Exception as error:  # as above
                    self._abort(error, method, context)

        def check(raw: bytes, context: grpc.ServicerContext) -> Any:
            now, pid = (versions.TIME_KEY, f"{time.time():.3f}"), (versions.PID_KEY, str(os.getpid()))
            context.set_trailing_metadata((*versions.METADATA, now, pid))
            try:
                return handler.unary_unary(_read(read, raw), context)
            except Exception as error:  # as above
                self._abort(error, method, context)

        chosen = check if method == HEALTH_CHECK else unary
        chosen.experimental_thread_pool = (  # type: ignore[attr-defined]
            self.door if method == HEALTH_CHECK else self._unary
        )
        return grpc.unary_unary_rpc_method_handler(chosen, None, handler.response_serializer)

    @contextmanager
    def _counted(self, method: str, context: grpc.ServicerContext, streams: bool = False) -> Iterator[None]:
        """A call under way, as metrics see it: with the status that it ends with."""
        if self._telemetry is OFF:
            yield
            return
        metrics, name = self._telemetry.metrics, _short(method)
        if streams:
            metrics.add(STREAMS, 1, method=name)
        began = time.perf_counter()
        try:
            yield
        finally:
            if streams:
                metrics.add(STREAMS, -1, method=name)
            else:
                metrics.observe(CALL_SECONDS, time.perf_counter() - began, method=name)
            code = context.code()  # type: ignore[attr-defined]
            if code is None:
                code = grpc.StatusCode.OK if context.is_active() else grpc.StatusCode.CANCELLED
            metrics.count(CALLS, method=name, code=code.name)

    @contextmanager
    def _traced(self, method: str, context: grpc.ServicerContext) -> Iterator[None]:
        """A call under way, as traces see it: with the error that the servicer raises, and as part of its caller's
        span, where that is told."""
        if self._telemetry is OFF:
            yield
            return
        metadata: dict[str, Any] = dict(context.invocation_metadata() or ())
        with about(parse_traceparent(metadata.get(TRACEPARENT))), self._telemetry.traces.span(_short(method)):
            yield

    def _let_in(self, context: grpc.ServicerContext) -> None:
        """Raises PreceptorError(RATE_LIMITED). Not at the door, where it is not known who calls."""
        if self._rates.is_on and (
            refusal := self._rates.refusal(client_name(context.peer(), context.auth_context()))  # type: ignore[arg-type]
        ):
            raise refusal

    def _abort(self, error: Exception, method: str, context: grpc.ServicerContext) -> None:
        if not isinstance(error, PreceptorError):
            if context.code() is not None:  # type: ignore[attr-defined]
                raise error  # the servicer has aborted by itself
            log.error("%s failed", method, exc_info=error)
            error = PreceptorError("INTERNAL", f"{method.rsplit('/', 1)[-1]} failed: {type(error).__name__}")
        self._telemetry.metrics.count(ERRORS, reason=error.reason)
        context.abort_with_status(rpc_status.to_status(to_status(error)))


def _short(method: str) -> str:
    """``TeacherService/GetPolicy`` of ``/preceptor.v1.TeacherService/GetPolicy``."""
    return method.rpartition(".")[2] or "unknown"


def _read(deserializer: Callable[[bytes], Any] | None, raw: bytes) -> Any:
    if deserializer is None:
        return raw
    try:
        return deserializer(raw)
    except DecodeError:
        raise PreceptorError("INVALID_REQUEST", "the request is no message of this method") from None


class Server:
    """A gRPC server with health and reflection, listening since its construction.

    Raises PreceptorError: PORT_IN_USE, and as ``preceptor.security.load_security`` does.
    """

    def __init__(
        self,
        services: Sequence[str],
        add_servicers: Callable[[grpc.Server], None],
        settings: ServiceSettings,
        telemetry: Telemetry = OFF,
    ) -> None:
        """``services`` are full names, e.g. ``preceptor.v1.TeacherService``."""
        self._grace = settings.grace_seconds
        security = load_security(settings)
        self._doorkeeper = Doorkeeper(
            security, settings.max_threads, settings.max_streams, telemetry, settings.rate_limit
        )
        self._server = grpc.server(self._doorkeeper.door, interceptors=[self._doorkeeper], options=_OPTIONS)
        self._health = health.HealthServicer()
        self._names = ["", *services]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        add_servicers(self._server)
        address = f"{settings.host}:{settings.port}"
        try:
            self.port = (
                self._server.add_secure_port(address, security.tls.server_credentials())
                if security.tls
                else self._server.add_insecure_port(address)
            )
        except RuntimeError:
            self.port = 0
        if self.port == 0:
            raise PreceptorError("PORT_IN_USE", f"cannot listen on {address}", port=settings.port)
        security.warn_if_open(f"{settings.host}:{self.port}", settings.host)
        self._server.start()
        self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> None:
        """Says NOT_SERVING, lets calls under way finish within the grace time, then closes."""
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._server.stop(self._grace).wait(self._grace + 5)
        self._doorkeeper.close()

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in self._names:
            self._health.set(name, status)


def serve(
    services: Sequence[str],
    add_servicers: Callable[[grpc.Server], None],
    settings: ServiceSettings,
    on_drain: Callable[[], None] = lambda: None,
    telemetry: Telemetry = OFF,
) -> None:
    """Serves until SIGTERM or SIGINT (or until the parent named in the settings is gone), then drains.

    ``on_drain`` is called first, so that open watches and background work end by themselves.
    """
    stopping = stop_signal(settings.parent_pid)
    server = Server(services, add_servicers, settings, telemetry)
    log.info("serving %s on %s:%d", ", ".join(services), settings.host, server.port)
    # A signal that arrives just before the wait begins is handled when it ends: so it must end now and then.
    while not stopping.wait(LATE_SIGNAL_SECONDS):
        pass
    for number in (signal.SIGTERM, signal.SIGINT):
        # Once is enough. With a handler, a second one would kill the interpreter on its way out, and look like a death.
        signal.signal(number, signal.SIG_IGN)
    log.info("draining")
    on_drain()
    server.stop()
    log.info("stopped")


def stop_signal(parent_pid: int = 0) -> threading.Event:
    """An event that SIGTERM, SIGINT or the end of the parent process sets."""
    stopping = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        # From another thread: the one that is interrupted here may hold the event's own lock, to wait for it.
        threading.Thread(target=stopping.set, name="stop-signal", daemon=True).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if parent_pid:

        def watch_parent() -> None:
            while os.getppid() == parent_pid:
                time.sleep(1)
            stopping.set()

        threading.Thread(target=watch_parent, name="parent-watch", daemon=True).start()
    return stopping
