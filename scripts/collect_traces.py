"""A collector for one's own machine: takes traces by OTLP over HTTP and appends them to a file, as JSON lines.

    python scripts/collect_traces.py traces.jsonl &
    PRECEPTOR_OTLP_ENDPOINT=http://127.0.0.1:4318 preceptor run configs/almanac.toml
    python scripts/draw_trace.py traces.jsonl slowest trace.png

The lines are what the `file` exporter of the OpenTelemetry collector writes, so either may be drawn.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

_IDS = ("traceId", "spanId", "parentSpanId")


class Collector:
    """Answers OTLP/HTTP from its construction until ``close``; ``take`` is given each request as OTLP's JSON."""

    def __init__(self, take: Callable[[dict[str, Any]], None], port: int = 0) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                take(_as_otlp_json(MessageToDict(ExportTraceServiceRequest.FromString(body))))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                """Nothing: a line per request is no news."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        """For PRECEPTOR_OTLP_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Answers no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


def _as_otlp_json(value: Any) -> Any:
    """Protobuf's JSON with the ids as OTLP wants them: hexadecimal, not base64."""
    if isinstance(value, list):
        return [_as_otlp_json(one) for one in value]
    if isinstance(value, dict):
        return {
            key: base64.b64decode(part).hex() if key in _IDS else _as_otlp_json(part) for key, part in value.items()
        }
    return value


def main() -> None:
    """Collects until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="JSON lines are appended there")
    parser.add_argument("--port", type=int, default=4318)
    asked = parser.parse_args()
    writing = threading.Lock()
    with asked.file.open("a", encoding="utf-8") as out:

        def take(request: dict[str, Any]) -> None:
            with writing:
                out.write(json.dumps(request) + "\n")
                out.flush()

        collector = Collector(take, asked.port)
        print(f"collecting on {collector.endpoint} into {asked.file}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            collector.close()


if __name__ == "__main__":
    main()
