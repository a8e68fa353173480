"""Traces: ids that need no storage, spans that cost the work nothing, logs with the same ids."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from preceptor import tracing
from preceptor.errors import PreceptorError
from preceptor.metrics import SPANS, Metric, Metrics
from preceptor.telemetry import JsonFormatter
from preceptor.tracing import OtlpTraces, Place, Traces, about, current, evaluation_place, parse_traceparent, run_place


class Counted(Metrics):
    """Counts spans by outcome."""

    def __init__(self) -> None:
        self.spans: dict[str, float] = {}

    def count(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        assert metric is SPANS
        self.spans[labels["outcome"]] = self.spans.get(labels["outcome"], 0) + amount


class Stuck:
    """A collector that takes a connection and says nothing."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def export(self, spans: Any) -> SpanExportResult:
        self.let_go.wait(30)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.let_go.set()


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def kept() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traces(kept: InMemorySpanExporter) -> Iterator[OtlpTraces]:
    made = OtlpTraces("worker", "http://127.0.0.1:9", Counted(), kept)
    yield made
    made.close()


def test_ids_follow_from_names_and_never_change() -> None:
    # Another version must find the same trace.
    assert evaluation_place("eval-1") == Place("59e59a83a51b6e259f0e7708558368b8", "6e57abcfdb4b0c77")
    assert evaluation_place("eval-1").trace_id != evaluation_place("eval-2").trace_id
    assert run_place("r").trace_id == run_place("r", "round-00001").trace_id
    assert run_place("r").span_id != run_place("r", "round-00001").span_id


def test_a_place_travels_as_a_traceparent() -> None:
    place = evaluation_place("eval-1")
    assert parse_traceparent(place.traceparent) == place


@pytest.mark.parametrize(
    "text", ["", "00", "00-0-0-01", f"00-{'0' * 32}-{'1' * 16}-01", f"00-{'x' * 32}-{'1' * 16}-01", None, b"\xff"]
)
def test_what_is_no_traceparent_is_none(text: object) -> None:
    assert parse_traceparent(text) is None


def test_spans_of_many_processes_are_one_trace_without_their_having_heard_of_each_other(
    traces: OtlpTraces, kept: InMemorySpanExporter
) -> None:
    root, round_ = evaluation_place("eval-1"), run_place("r", "round-00001")
    traces.record("train", 10.0, 12.5, within=root, attributes={"batch": "b", "steps": 3})
    traces.record("evaluation", 9.0, 13.0, at=root, links=[round_], error="TRIAL_LOST")
    traces.close()
    train, whole = kept.get_finished_spans()
    assert f"{train.context.trace_id:032x}" == f"{whole.context.trace_id:032x}" == root.trace_id
    assert f"{train.parent.span_id:016x}" == f"{whole.context.span_id:016x}" == root.span_id
    assert whole.parent is None
    assert (train.start_time, train.end_time) == (10_000_000_000, 12_500_000_000)
    assert train.attributes == {"preceptor.batch": "b", "preceptor.steps": 3}
    assert f"{whole.links[0].context.span_id:016x}" == round_.span_id
    assert whole.status.description == "TRIAL_LOST"
    assert train.resource.attributes["service.name"] == "preceptor-worker"


def test_spans_within_spans(traces: OtlpTraces, kept: InMemorySpanExporter) -> None:
    with traces.span("round", at=run_place("r", "1"), within=run_place("r")):
        assert current() == run_place("r", "1")
        with pytest.raises(PreceptorError), traces.span("update"):
            raise PreceptorError("UPDATE_FAILED", "x")
    assert current() is None
    with traces.span("nobody's"):
        assert current() is None
    traces.close()
    update, round_ = kept.get_finished_spans()
    assert (update.name, round_.name) == ("update", "round")
    assert update.parent.span_id == round_.context.span_id
    assert update.status.description == "UPDATE_FAILED"
    assert f"{round_.parent.span_id:016x}" == run_place("r").span_id


def test_off_nothing_is_recorded_and_nothing_is_current() -> None:
    with Traces().span("x", at=run_place("r")):
        assert current() is None


def test_a_collector_that_is_stuck_holds_nobody_up_and_what_it_misses_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracing, "QUEUED_SPANS", 100)
    monkeypatch.setattr(tracing, "SPANS_AT_ONCE", 10)
    monkeypatch.setattr(tracing, "FLUSH_SECONDS", 0.2)
    counted, stuck = Counted(), Stuck()
    traces = OtlpTraces("worker", "http://127.0.0.1:9", counted, stuck)
    began = time.monotonic()
    for _ in range(1000):
        traces.record("x", 1, 2, within=evaluation_place("e"))
    assert time.monotonic() - began < 5
    assert counted.spans["full"] >= 1000 - 100 - 10
    traces.close()
    assert time.monotonic() - began < 8
    wait_for(lambda: counted.spans.get("refused", 0) >= 10)


def test_a_collector_that_is_away_is_one_line_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    counted = Counted()
    with caplog.at_level(logging.INFO):
        traces = OtlpTraces("worker", f"http://127.0.0.1:{port}", counted)
        for _ in range(2):
            traces.record("x", 1, 2, within=evaluation_place("e"))
            time.sleep(0.1)
        wait_for(lambda: counted.spans.get("refused", 0) >= 1)
        traces.close()
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.name for record in said] == ["preceptor.tracing"]


def test_a_part_of_the_traces_is_the_same_part_in_every_process_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.2")
    kept = []
    for process in ("evaluator", "worker"):
        spans = InMemorySpanExporter()
        traces = OtlpTraces(process, "http://127.0.0.1:9", Counted(), spans)
        for number in range(200):
            place = evaluation_place(f"eval-{number}")
            traces.record("evaluation", 1, 2, at=place)
            traces.record("train", 1, 2, within=place)
        traces.close()
        kept.append(sorted((span.context.trace_id, span.name) for span in spans.get_finished_spans()))
    assert kept[0] == kept[1]
    whole = {trace_id for trace_id, name in kept[0] if name == "evaluation"}
    assert 10 < len(whole) < 90
    assert whole == {trace_id for trace_id, name in kept[0] if name == "train"}


def test_a_mistake_in_a_span_is_counted_and_not_raised(traces: OtlpTraces) -> None:
    traces.record("x", 1, 2, at=Place("no number", "none"))
    counted: Any = traces._metrics
    assert counted.spans == {"broken": 1}


def line_of(**extra: str) -> dict[str, Any]:
    record = logging.LogRecord("x", logging.INFO, "", 1, "said", (), None)
    record.__dict__.update(extra)
    line: dict[str, Any] = json.loads(JsonFormatter("worker").format(record))
    return line


def test_log_lines_name_what_they_are_about_by_the_ids_of_its_trace() -> None:
    assert "trace_id" not in line_of()
    line = line_of(evaluation="eval-1")
    assert line["evaluation"] == "eval-1"
    assert line["trace_id"] == evaluation_place("eval-1").trace_id
    with about(run_place("r"), run="r"), about(batch="b.1"):
        line = line_of()
    assert (line["run"], line["batch"]) == ("r", "b.1")
    assert (line["trace_id"], line["span_id"]) == (run_place("r").trace_id, run_place("r").span_id)
    assert "run" not in line_of()


def test_a_span_that_ends_just_before_the_process_is_sent(
    traces: OtlpTraces, kept: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = traces._outbox
    look, late = outbox._some, threading.Event()

    def some() -> list[Any]:
        found = look()
        if not found and not late.is_set():  # the thread has seen that there is nothing; now there is, and then the end
            late.set()
            traces.record("last", 1, 2, within=evaluation_place("e"))
            outbox._closing.set()
        return found

    monkeypatch.setattr(outbox, "_some", some)
    outbox._wake.set()
    assert late.wait(10)
    traces.close()
    assert [span.name for span in kept.get_finished_spans()] == ["last"]
