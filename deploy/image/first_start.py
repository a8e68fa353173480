#!/usr/bin/env python
"""``first_start.py SERVICE...`` starts each service once while its image is made, and asks it what a health check asks.

So a build fails where install.sh took away what somebody needs; and what the processes import is compiled then, which
nobody can do later, under a root that is read-only. Redis and a bucket are not there: services wait for the one, and
how the other is missed is looked at. The orchestrator draws a picture of each kind.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

START_SECONDS = 120.0
# What comes up only later in a process, or not at all while nobody is there to talk to.
LATER = {
    "queue": ("celery.app.amqp", "celery.backends.redis", "kombu.transport.redis", "httpx2"),
    "all": (
        *("psycopg", "sqlalchemy.dialects.postgresql.psycopg", "rich.live", "rich.panel", "rich.table", "rich.text"),
        *("prometheus_client.exposition", "opentelemetry.exporter.otlp.proto.http.trace_exporter"),
    ),
}


def start(service: str, environment: Mapping[str, str]) -> None:
    """Starts the service, waits until it says that it serves, and ends it. SystemExit where it does not."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        environment = {**environment, "PRECEPTOR_PORT": str(free.getsockname()[1])}
    process = subprocess.Popen([sys.executable, "-m", service], env=environment)
    try:
        until = time.monotonic() + START_SECONDS
        while subprocess.run(
            [sys.executable, "-m", "preceptor", "probe", service], env=environment, check=False
        ).returncode:
            if process.poll() is not None or time.monotonic() > until:
                sys.exit(f"first_start: {service} does not serve in the image that is made for it")
            time.sleep(0.5)
    finally:
        process.terminate()
        process.wait(60)


def look_into_a_bucket() -> None:
    """Asks for a bucket at a port where nobody is: it takes all of the client to find that out."""
    from preceptor.artifacts_s3 import S3Folder
    from preceptor.errors import PreceptorError

    os.environ |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "no", "AWS_SECRET_ACCESS_KEY": "body"}
    try:
        S3Folder("s3://bucket").files()
    except PreceptorError as error:
        if error.reason != "ARTIFACT_STORE_UNREACHABLE":
            raise


def draw() -> None:
    """A picture of each kind."""
    from orchestrator import pictures

    pictures.by_round(
        [pictures.Line("a", [(1, 0.1, 0.02), (2, 0.2, None)]), pictures.Line("b", [(1, 0.0, 0.01)])], "reward"
    )
    pictures.differences([("a", 0.1, (0.05, 0.15), True)])
    pictures.rewards_by_group([pictures.Dots("a", [(0.1, 0.02, True), (-0.2, 0.02, False)])])
    pictures.accuracy_by_arm([("a", 0.5, (0.4, 0.6), True)])
    pictures.time_by_phase([("round 1", {"generate": 3.0, "update": 12.0})])


def main(services: list[str]) -> None:
    """All of it, with a home that is gone afterwards."""
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"PRECEPTOR_HOME": home, "PRECEPTOR_HOST": "127.0.0.1", "HOME": home, "MPLCONFIGDIR": home}
        os.chdir(Path(home))
        draws = "orchestrator" in services
        for name in LATER["all"] + (() if draws else LATER["queue"]):
            importlib.import_module(name)
        for service in services:
            start(service, os.environ)
        draw() if draws else look_into_a_bucket()


if __name__ == "__main__":
    main(sys.argv[1:])
