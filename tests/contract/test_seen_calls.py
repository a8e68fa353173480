"""Calls between services, as metrics and traces see them."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import grpc
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from preceptor.channel import call, connect, is_serving, stream
from preceptor.errors import PreceptorError
from preceptor.metrics import STUDENT, Metrics, PrometheusMetrics
from preceptor.server import Server
from preceptor.settings import ServiceSettings
from preceptor.telemetry import Telemetry
from preceptor.tracing import OtlpTraces, about, run_place
from preceptor.v1 import student_pb2, student_pb2_grpc
from tests.contract.test_server_and_channel import SERVICE, Servicer, _add

ROUND = run_place("r", "round-00001")


class House:
    """A server that is seen."""

    def __init__(self) -> None:
        self.metrics = PrometheusMetrics(STUDENT, "127.0.0.1", 0)
        self.spans = InMemorySpanExporter()
        self.traces = OtlpTraces(STUDENT, "http://127.0.0.1:9", Metrics(), self.spans)
        seen = Telemetry(self.metrics, self.traces)
        self.server = Server([SERVICE], _add(Servicer()), ServiceSettings(grace_seconds=5), seen)
        self.address = f"127.0.0.1:{self.server.port}"
        self.stub = connect(self.address, student_pb2_grpc.StudentServiceStub)

    def told(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics.port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def close(self) -> None:
        self.server.stop()
        self.traces.close()
        self.metrics.close()


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    yield made
    made.close()


def test_calls_are_counted_by_method_and_status_and_errors_by_reason(house: House) -> None:
    call(house.stub.GetStudent, student_pb2.GetStudentRequest(name="x"))
    for name in ("missing", "missing", "bug"):
        with pytest.raises(PreceptorError):
            call(house.stub.GetStudent, student_pb2.GetStudentRequest(name=name))
    list(stream(house.stub.WatchDeployment, student_pb2.WatchDeploymentRequest(name="x"), deadline=10))
    house.server.stop()  # every call has ended
    told = house.told()
    one = 'method="StudentService/GetStudent"'
    assert told[f'preceptor_grpc_calls_total{{code="OK",{one}}}'] == 1
    assert told[f'preceptor_grpc_calls_total{{code="NOT_FOUND",{one}}}'] == 2
    assert told[f'preceptor_grpc_calls_total{{code="INTERNAL",{one}}}'] == 1
    assert told[f"preceptor_grpc_call_seconds_count{{{one}}}"] == 4
    assert told['preceptor_errors_total{reason="STUDENT_NOT_FOUND"}'] == 2
    assert told['preceptor_errors_total{reason="INTERNAL"}'] == 1
    assert told['preceptor_grpc_calls_total{code="OK",method="StudentService/WatchDeployment"}'] == 1
    assert told['preceptor_grpc_streams_open{method="StudentService/WatchDeployment"}'] == 0


def test_health_checks_and_names_that_nobody_serves_make_no_labels(house: House) -> None:
    assert is_serving(house.address)
    with grpc.insecure_channel(house.address) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/preceptor.v1.Nobody/Knows")(b"", timeout=5)
    assert not any("Health" in name or "Nobody" in name for name in house.told())


def test_a_call_is_part_of_its_callers_span(house: House) -> None:
    with about(ROUND):
        call(house.stub.GetStudent, student_pb2.GetStudentRequest(name="x"))
        with pytest.raises(PreceptorError):
            call(house.stub.GetStudent, student_pb2.GetStudentRequest(name="missing"))
        list(stream(house.stub.WatchDeployment, student_pb2.WatchDeploymentRequest(name="x"), deadline=10))
    call(house.stub.GetStudent, student_pb2.GetStudentRequest(name="x"))  # nobody's
    house.server.stop()
    house.traces.close()
    spans = house.spans.get_finished_spans()
    assert [span.name for span in spans] == [
        "StudentService/GetStudent",
        "StudentService/GetStudent",
        "StudentService/WatchDeployment",
    ]
    for span in spans:
        assert span.parent is not None
        assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (ROUND.trace_id, ROUND.span_id)


def test_what_a_stranger_says_is_his_trace_does_no_harm(house: House) -> None:
    call_ = house.stub.GetStudent
    for said in ("garbage", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 4000):
        call_(student_pb2.GetStudentRequest(name="x"), timeout=5, metadata=(("traceparent", said),))
    house.traces.close()
    assert not house.spans.get_finished_spans()


def test_the_span_of_a_call_that_failed_says_why(house: House) -> None:
    with about(ROUND):
        for name in ("missing", "bug"):
            with pytest.raises(PreceptorError):
                call(house.stub.GetStudent, student_pb2.GetStudentRequest(name=name))
    house.server.stop()
    house.traces.close()
    assert [span.status.description for span in house.spans.get_finished_spans()] == ["STUDENT_NOT_FOUND", "KeyError"]
