"""Traces: one for each evaluation and one for each run, across all processes, to a collector by OTLP over HTTP.

Ids are not handed on and not stored, they are derived: the trace of an evaluation and its first span are named by the
evaluation's id, those of a run by the run's. So a worker, a service that was started again and a line in a log name the
same trace without having heard of each other, and a span may be sent before the one that it is part of. An evaluation
that is retried goes on in its old trace.

    with traces.span("grading", within=evaluation_place(evaluation.id)): ...
    traces.record("train", began, ended, within=place, attributes={"batch": batch.id})      # unix seconds

``Traces`` takes everything and keeps nothing: what a process has without PRECEPTOR_OTLP_ENDPOINT. ``OtlpTraces`` puts
spans into a bounded queue, which a thread sends. Promise: the work never waits for a collector and never fails by one.
Spans that find the queue full, or that the collector does not take, are dropped and counted; so are those of the last
second before a process is killed, without being counted.

The standard's variables hold: OTEL_EXPORTER_OTLP_HEADERS, and OTEL_TRACES_SAMPLER=traceidratio for a part of the
traces, which is the same part in every process.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from preceptor import __version__
from preceptor.errors import PreceptorError
from preceptor.metrics import SPANS, Metrics

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

log = logging.getLogger(__name__)

TRACEPARENT = "traceparent"  # the W3C's name for it in metadata
# Some 2 KB each: 16 MB at most in memory, and a minute of a collector's absence at a hundred a second.
QUEUED_SPANS = 8192
SPANS_AT_ONCE = 512
# A trace is complete so soon after its last span.
SEND_SECONDS = 1.0
# One try to send, with the exporter's own repetitions in it.
ANSWER_SECONDS = 5.0
# A process that ends waits so long for its last spans to be taken.
FLUSH_SECONDS = 2.0


Attributes = Mapping[str, str | float | bool]
NO_ATTRIBUTES: Attributes = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Place:
    """A span: the ids of its trace (32 hexadecimal digits) and of itself (16)."""

    trace_id: str
    span_id: str

    @property
    def traceparent(self) -> str:
        """The W3C's form of it."""
        return f"00-{self.trace_id}-{self.span_id}-01"


def evaluation_place(evaluation_id: str) -> Place:
    """The first span of an evaluation's trace."""
    return _derived(f"evaluation {evaluation_id}", "")


def run_place(run_id: str, stage: str = "") -> Place:
    """The first span of a run's trace, or the one of a stage of the run."""
    return _derived(f"run {run_id}", stage)


def parse_traceparent(text: object) -> Place | None:
    """What another process says in its metadata; None where it says nothing that can be read."""
    parts = str(text).split("-")
    if len(parts) < 4 or [len(part) for part in parts[:4]] != [2, 32, 16, 2]:
        return None
    try:
        if not int(parts[1], 16) or not int(parts[2], 16):
            return None
    except ValueError:
        return None
    return Place(parts[1], parts[2])


def _derived(name: str, part: str) -> Place:
    digest = hashlib.sha256(f"preceptor {name}".encode()).hexdigest()
    return Place(digest[:32], hashlib.sha256(f"{digest} {part}".encode()).hexdigest()[:16])


@dataclass(frozen=True, slots=True)
class _Scope:
    """What the present thread of work is about: the span it is in, and names for its log lines."""

    place: Place | None = None
    names: tuple[tuple[str, str], ...] = ()


# Of a thread, or of a context that is handed to one (contextvars.copy_context), not of the module.
_NOWHERE = _Scope()
_SCOPE: ContextVar[_Scope] = ContextVar("preceptor_scope", default=_NOWHERE)


def current() -> Place | None:
    """The span that the caller works in, if traces are on and there is one."""
    return _SCOPE.get().place


def current_names() -> Mapping[str, str]:
    """The names that ``about`` has set."""
    return dict(_SCOPE.get().names)


@contextmanager
def about(place: Place | None = None, **names: str) -> Iterator[None]:
    """Within it, calls and log lines are about this span (unless None) and carry these names (``run``, ``batch``)."""
    before = _SCOPE.get()
    _SCOPE.set(_Scope(place or before.place, (*before.names, *names.items())))
    try:
        yield
    finally:
        _SCOPE.set(before)


class Traces:
    """Takes everything and keeps nothing. May be called from any thread.

    Names of spans are few; what differs is in attributes, which get the prefix ``preceptor.``.
    """

    on = False

    def record(
        self,
        name: str,
        began: float,
        ended: float,
        *,
        within: Place | None = None,
        at: Place | None = None,
        links: Sequence[Place] = (),
        error: str = "",
        attributes: Attributes = NO_ATTRIBUTES,
    ) -> None:
        """A span that is over; times in unix seconds. ``within``: what it is part of; ``at``: its own ids, where they
        are derived. Without both nothing is recorded."""

    @contextmanager
    def span(
        self,
        name: str,
        *,
        within: Place | None = None,
        at: Place | None = None,
        links: Sequence[Place] = (),
        attributes: Attributes = NO_ATTRIBUTES,
    ) -> Iterator[None]:
        """A span as long as the context is open, which is ``current`` in it. ``within``: the current one unless
        given; without one and without ``at`` nothing is recorded."""
        yield

    def close(self) -> None:
        """Sends what is there, for a moment."""


class OtlpTraces(Traces):
    """Sends spans to a collector. Raises PreceptorError(EXTRA_MISSING) without OpenTelemetry."""

    on = True

    def __init__(self, process: str, endpoint: str, metrics: Metrics, exporter: Any = None) -> None:
        """``endpoint`` without ``/v1/traces``. ``exporter``: for tests, instead of OTLP's."""
        try:
            from opentelemetry import context, trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
            from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        except ImportError as error:
            raise PreceptorError(
                "EXTRA_MISSING",
                f"PRECEPTOR_OTLP_ENDPOINT is set and {error.name or 'opentelemetry'} is not installed",
                extra="observability",
            ) from None
        # It tells of every try that failed; once is enough, and said below.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._api, self._context = trace, context
        self._sampled = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        wanted = self._wanted = threading.local()

        class Ids(RandomIdGenerator):
            """The ids of the span that is being made, where they are derived."""

            def generate_trace_id(self) -> int:
                place: Place | None = wanted.place
                return int(place.trace_id, 16) if place else super().generate_trace_id()

            def generate_span_id(self) -> int:
                place: Place | None = wanted.place
                return int(place.span_id, 16) if place else super().generate_span_id()

        outbox = self._outbox = _Outbox(
            exporter or OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=ANSWER_SECONDS), metrics, endpoint
        )

        class Processor(SpanProcessor):
            def on_end(self, span: ReadableSpan) -> None:
                outbox.put(span)

        self._metrics = metrics
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": f"preceptor-{process}", "service.version": __version__}),
            id_generator=Ids(),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(Processor())
        self._tracer = self._provider.get_tracer("preceptor", __version__)

    def record(
        self,
        name: str,
        began: float,
        ended: float,
        *,
        within: Place | None = None,
        at: Place | None = None,
        links: Sequence[Place] = (),
        error: str = "",
        attributes: Attributes = NO_ATTRIBUTES,
    ) -> None:
        """See Traces."""
        if within is None and at is None:
            return
        try:
            trace = self._api
            context = self._context.Context()
            if within is not None:
                context = trace.set_span_in_context(trace.NonRecordingSpan(self._span_context(within)), context)
            self._wanted.place = at
            span = self._tracer.start_span(
                name,
                context,
                attributes={f"preceptor.{key}": value for key, value in attributes.items()},
                links=[trace.Link(self._span_context(link)) for link in links],
                start_time=int(began * 1e9),
            )
            if error:
                span.set_status(trace.Status(trace.StatusCode.ERROR, error))
            span.end(int(max(began, ended) * 1e9))
        except Exception:  # nobody's work may fail because it was to be seen
            log.debug("a span is lost", exc_info=True)
            self._metrics.count(SPANS, outcome="broken")

    @contextmanager
    def span(
        self,
        name: str,
        *,
        within: Place | None = None,
        at: Place | None = None,
        links: Sequence[Place] = (),
        attributes: Attributes = NO_ATTRIBUTES,
    ) -> Iterator[None]:
        """See Traces."""
        within = within or (None if at else current())
        if within is None and at is None:
            yield
            return
        if at is None:
            assert within is not None
            at = Place(within.trace_id, secrets.token_hex(8))
        began, error = time.time(), ""
        try:
            with about(at):
                yield
        except BaseException as raised:
            error = getattr(raised, "reason", "") or type(raised).__name__
            raise
        finally:
            self.record(name, began, time.time(), within=within, at=at, links=links, error=error, attributes=attributes)

    def close(self) -> None:
        """See Traces."""
        self._outbox.close()

    def _span_context(self, place: Place) -> Any:
        return self._api.SpanContext(int(place.trace_id, 16), int(place.span_id, 16), True, self._sampled)


class _Outbox:
    """Spans on their way to the collector."""

    def __init__(self, exporter: Any, metrics: Metrics, endpoint: str) -> None:
        self._exporter, self._metrics, self._endpoint = exporter, metrics, endpoint
        self._spans: deque[ReadableSpan] = deque()
        self._lock = threading.Lock()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._away = False
        self._thread = threading.Thread(target=self._send_for_ever, name="spans", daemon=True)
        self._thread.start()

    def put(self, span: ReadableSpan) -> None:
        """Takes a span, or drops it."""
        with self._lock:
            full = len(self._spans) >= QUEUED_SPANS
            if not full:
                self._spans.append(span)
            enough = len(self._spans) >= SPANS_AT_ONCE
        if full:
            self._metrics.count(SPANS, outcome="full")
        if enough:
            self._wake.set()

    def close(self) -> None:
        """Sends what is there, but not for long."""
        self._closing.set()
        self._wake.set()
        self._thread.join(FLUSH_SECONDS)
        self._exporter.shutdown()

    def _send_for_ever(self) -> None:
        closing = False
        while not closing:
            self._wake.wait(SEND_SECONDS)
            self._wake.clear()
            closing = self._closing.is_set()  # before the look: what was put before the end is sent
            while spans := self._some():
                self._send(spans)

    def _some(self) -> list[ReadableSpan]:
        with self._lock:
            return [self._spans.popleft() for _ in range(min(len(self._spans), SPANS_AT_ONCE))]

    def _send(self, spans: list[ReadableSpan]) -> None:
        try:
            taken = self._exporter.export(spans).name == "SUCCESS"
        except Exception:  # of whatever HTTP library it uses
            log.debug("spans could not be sent", exc_info=True)
            taken = False
        self._metrics.count(SPANS, len(spans), outcome="sent" if taken else "refused")
        if taken == self._away:
            if taken:
                log.info("the collector at %s takes spans again", self._endpoint)
            else:
                log.warning("the collector at %s does not take spans: they are dropped until it does", self._endpoint)
            self._away = not taken
