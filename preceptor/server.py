"""The only place where a gRPC server is made: options, health, reflection, error translation, drain on SIGTERM.

A servicer raises ``PreceptorError``; the interceptor here turns it into a status with ``ErrorInfo``. Anything else is a
bug: it is logged with its traceback and reported as INTERNAL without details.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from preceptor.errors import DOMAIN, PreceptorError
from preceptor.settings import ServiceSettings

log = logging.getLogger(__name__)

# Large enough for a run's tasks inline (a SQuAD file is 0.5 MB); weights never travel in messages.
MAX_MESSAGE_BYTES = 64 * 2**20
# Clients ping every 30 s (preceptor.channel); a server that allowed fewer would answer GOAWAY.
MIN_PING_SECONDS = 10

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_SECONDS * 1000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_SECONDS * 1000),
    ("grpc.so_reuseport", 0),  # an occupied port is an error, not a second listener
]


def to_status(error: PreceptorError) -> status_pb2.Status:
    """The wire form of an error: code, message and ErrorInfo with reason and metadata."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    detail = any_pb2.Any()
    detail.Pack(info)
    code: int = getattr(code_pb2, error.code.name)
    return status_pb2.Status(code=code, message=error.message, details=[detail])


class ErrorTranslator(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """Turns what a servicer raises into a gRPC status."""

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handler of unary and of server-streaming methods (the contract has no others)."""
        handler: Any = continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        method = handler_call_details.method
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:

            def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
                try:
                    yield from handler.unary_stream(request, context)
                except Exception as error:  # everything a servicer can raise ends here, as a status
                    _abort(error, method, context)

            return grpc.unary_stream_rpc_method_handler(stream, **codec)

        def unary(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                return handler.unary_unary(request, context)
            except Exception as error:  # as above
                _abort(error, method, context)

        return grpc.unary_unary_rpc_method_handler(unary, **codec)


def _abort(error: Exception, method: str, context: grpc.ServicerContext) -> None:
    if not isinstance(error, PreceptorError):
        if context.code() is not None:  # type: ignore[attr-defined]
            raise error  # the servicer has aborted by itself
        log.error("%s failed", method, exc_info=error)
        error = PreceptorError("INTERNAL", f"{method.rsplit('/', 1)[-1]} failed: {type(error).__name__}")
    context.abort_with_status(rpc_status.to_status(to_status(error)))


class Server:
    """A gRPC server with health and reflection, listening since its construction.

    Raises PreceptorError(PORT_IN_USE).
    """

    def __init__(
        self,
        services: Sequence[str],
        add_servicers: Callable[[grpc.Server], None],
        settings: ServiceSettings,
    ) -> None:
        """``services`` are full names, e.g. ``preceptor.v1.TeacherService``."""
        self._grace = settings.grace_seconds
        self._server = grpc.server(
            ThreadPoolExecutor(settings.max_threads, thread_name_prefix="rpc"),
            interceptors=[ErrorTranslator()],
            options=_OPTIONS,
        )
        self._health = health.HealthServicer()
        self._names = ["", *services]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        add_servicers(self._server)
        address = f"{settings.host}:{settings.port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError:
            self.port = 0
        if self.port == 0:
            raise PreceptorError("PORT_IN_USE", f"cannot listen on {address}", port=settings.port)
        self._server.start()
        self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> None:
        """Says NOT_SERVING, lets calls under way finish within the grace time, then closes."""
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._server.stop(self._grace).wait(self._grace + 5)

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in self._names:
            self._health.set(name, status)


def serve(
    services: Sequence[str],
    add_servicers: Callable[[grpc.Server], None],
    settings: ServiceSettings,
    on_drain: Callable[[], None] = lambda: None,
) -> None:
    """Serves until SIGTERM or SIGINT (or until the parent named in the settings is gone), then drains.

    ``on_drain`` is called first, so that open watches and background work end by themselves.
    """
    stopping = stop_signal(settings.parent_pid)
    server = Server(services, add_servicers, settings)
    log.info("serving %s on %s:%d", ", ".join(services), settings.host, server.port)
    stopping.wait()
    log.info("draining")
    on_drain()
    server.stop()
    log.info("stopped")


def stop_signal(parent_pid: int = 0) -> threading.Event:
    """An event that SIGTERM, SIGINT or the end of the parent process sets."""
    stopping = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if parent_pid:

        def watch_parent() -> None:
            while os.getppid() == parent_pid:
                time.sleep(1)
            stopping.set()

        threading.Thread(target=watch_parent, name="parent-watch", daemon=True).start()
    return stopping
