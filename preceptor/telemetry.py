"""How a process is seen: its log, its metrics and its traces. Never a secret, never a whole prompt at INFO.

``Telemetry`` is made once per process by ``preceptor.launch`` and passed on to whatever has something to tell. ``OFF``
has nothing to tell to anybody, and costs an empty call.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from preceptor.metrics import Metrics, PrometheusMetrics
from preceptor.settings import HouseSettings
from preceptor.tracing import OtlpTraces, Traces, current, current_names, evaluation_place

# What a log record may carry beside its message (``extra={"evaluation": ...}``), and what ``tracing.about`` sets.
_NAMES = ("run", "round", "evaluation", "batch", "policy")


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Where a process tells what it does."""

    metrics: Metrics = field(default_factory=Metrics)
    traces: Traces = field(default_factory=Traces)


OFF = Telemetry()


@contextmanager
def telemetry(process: str, settings: HouseSettings) -> Iterator[Telemetry]:
    """What the settings of this process ask for, until the end of the context.

    Raises PreceptorError: EXTRA_MISSING, PORT_IN_USE.
    """
    if not (settings.metrics_port or settings.otlp_endpoint):
        yield OFF
        return
    metrics, traces = Metrics(), Traces()
    try:
        if settings.metrics_port:
            metrics = PrometheusMetrics(process, settings.metrics_host, settings.metrics_port)
        if settings.otlp_endpoint:
            traces = OtlpTraces(process, settings.otlp_endpoint, metrics)
        yield Telemetry(metrics, traces)
    finally:
        traces.close()
        metrics.close()


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, service, logger, message, what it is about, the ids of its trace and span,
    and the traceback where there is one."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The record as a JSON line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= current_names()
        line |= {name: str(getattr(record, name)) for name in _NAMES if hasattr(record, name)}
        if "evaluation" in line:  # its trace has its name, whether anybody records it or not
            line["trace_id"] = evaluation_place(line["evaluation"]).trace_id
        elif (place := current()) is not None:
            line |= {"trace_id": place.trace_id, "span_id": place.span_id}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up_logging(service: str, settings: HouseSettings) -> None:
    """Sends this process's log to stderr in the form that the settings ask for."""
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(JsonFormatter(service))
    else:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {service} %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    # Third parties that narrate every connection at INFO, or log every result whole.
    for noisy in ("httpx", "httpx2", "urllib3", "filelock", "celery.worker.strategy", "celery.app.trace", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("kombu.asynchronous.hub").addFilter(_without_redis_traceback)


def _without_redis_traceback(record: logging.LogRecord) -> bool:
    """kombu's timers tell of a Redis that refuses with a traceback, every ten seconds; the message says it as well."""
    error = record.exc_info[1] if record.exc_info else None
    if error is not None and type(error).__module__.partition(".")[0] == "redis":
        record.exc_info = record.exc_text = None
    return True
