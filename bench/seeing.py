"""What metrics and traces cost: milliseconds of CPU of the services per evaluation, with and without them.

    python -m bench.seeing [--evaluations 1200] [--pairs 3]

As the part ``cpu`` of ``bench.control_plane`` measures it (a client or a whole run over the real evaluator and
orchestrator, simulated workers that answer at once), in turns: without, with metrics that are scraped every five
seconds, with traces to a collector in this process, with both. Simulated workers tell nothing; what a worker's part of
a trace costs is measured beside, as the time of one span.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from bench.control_plane import SHAPES, at_the_door, through_a_run
from bench.control_plane_house import free_port
from preceptor.metrics import Metrics
from preceptor.tracing import OtlpTraces, evaluation_place
from scripts.collect_traces import Collector

SCRAPE_SECONDS = 5.0
ARMS = {"off": (False, False), "metrics": (True, False), "traces": (False, True), "both": (True, True)}


@contextmanager
def scraped(ports: Collection[int]) -> Iterator[None]:
    """Somebody asks for the metrics on these ports now and then while the context is open."""
    stopping = threading.Event()

    def scrape_for_ever() -> None:
        while not stopping.wait(SCRAPE_SECONDS):
            for port in ports:
                with suppress(OSError):  # it starts or ends just now
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read()

    thread = threading.Thread(target=scrape_for_ever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(10)


def measure(arm: str, evaluations: int) -> dict[str, float]:
    """Milliseconds per evaluation at the door and through a run, and how many spans of each evaluation came."""
    metrics, traces = ARMS[arm]
    spans = 0

    def take(request: dict[str, Any]) -> None:
        nonlocal spans
        spans += sum(len(part["spans"]) for one in request["resourceSpans"] for part in one["scopeSpans"])

    (shape,) = (shape for shape in SHAPES if shape.name == "group")
    ports = {name: free_port() for name in ("evaluator", "orchestrator")} if metrics else {}
    collector = Collector(take)
    endpoint = collector.endpoint if traces else ""
    try:
        with scraped(ports.values()):
            door = at_the_door(shape, evaluations, metrics_ports=ports, otlp_endpoint=endpoint)
            run = through_a_run(shape, evaluations, metrics_ports=ports, otlp_endpoint=endpoint)
    finally:
        collector.close()
    return {
        "door_ms": door["ms"]["all"],
        "run_ms": run["ms"]["all"],
        "spans": spans / (door["evaluations"] + run["evaluations"]),
    }


def microseconds_of_a_span(spans: int = 20_000) -> float:
    """CPU of recording one span in a process, without sending it."""
    traces = OtlpTraces("bench", "http://127.0.0.1:9", Metrics(), InMemorySpanExporter())
    place = evaluation_place("eval-1")
    began = time.thread_time()
    for _ in range(spans):
        traces.record("train", 1.0, 2.0, within=place, attributes={"batch": "b", "trials": 3})
    seconds = time.thread_time() - began
    traces.close()
    return 1e6 * seconds / spans


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--evaluations", type=int, default=1200)
    parser.add_argument("--pairs", type=int, default=3)
    asked = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for turn in range(asked.pairs):
        for arm in ARMS if turn % 2 == 0 else reversed(ARMS):
            found[arm].append(measure(arm, asked.evaluations))
            print(f"turn {turn + 1}, {arm}: {json.dumps(found[arm][-1])}", flush=True)
    for name in ("door_ms", "run_ms"):
        off = [one[name] for one in found["off"]]
        print(f"{name}: off {statistics.median(off):.2f}", end="")
        for arm in list(ARMS)[1:]:
            more = statistics.median(one[name] - without for one, without in zip(found[arm], off, strict=True))
            print(f"; {arm} {more:+.2f}", end="")
        print()
    print(f"a span: {microseconds_of_a_span():.0f} us")


if __name__ == "__main__":
    main()
