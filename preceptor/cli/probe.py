"""``preceptor probe PROCESS``: whether the process of this container is well, for whoever supervises it.

A service is asked for its health as any client asks (TLS too; health needs no token), through this machine's own
interface. A worker has no port; it is well while it beats in Redis. Light, because it is asked every few seconds.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from preceptor.cli.output import json_option

if TYPE_CHECKING:
    from preceptor.settings import HouseSettings

SERVICES = ("teacher", "student", "evaluator", "orchestrator")
# Both well within what a supervisor gives it.
ASK_SECONDS = 5.0


@click.command()
@click.argument("process", type=click.Choice([*SERVICES, "worker"]))
@json_option
@click.pass_context
def probe(context: click.Context, process: str, as_json: bool) -> None:
    """Asks the PROCESS of this container whether it is well.

    Ends with 0 if it is, with 1 if it is not and says why, with 2 where it cannot be asked (settings, certificates).
    """
    from preceptor.cli.connection import house_settings
    from preceptor.cli.output import print_json

    settings = house_settings()
    well, said = _worker(settings) if process == "worker" else _service(process, settings)
    if as_json:
        print_json({"process": process, "well": well, "said": said})
    else:
        print(f"{process} {said}")
    if not well:
        context.exit(1)


def _service(service: str, settings: HouseSettings) -> tuple[bool, str]:
    from preceptor.channel import health_of
    from preceptor.errors import PreceptorError

    host = os.environ.get("PRECEPTOR_HOST", "")
    if host in ("", "0.0.0.0", "::", "[::]"):
        host = "localhost"  # which certificates name
    default = getattr(settings, f"{service}_address").rpartition(":")[2]
    address = f"{host}:{os.environ.get('PRECEPTOR_PORT') or default}"
    try:
        health = health_of(address, deadline=ASK_SECONDS)
    except PreceptorError as error:
        if error.reason in ("TLS_FAILED", "UNAUTHENTICATED"):  # of this side: no other answer is to be had
            raise
        return False, f"does not answer at {address}: {error.message}"
    return health.serving, f"{'serves' if health.serving else 'does not serve'} at {address} ({health.version})"


def _worker(settings: HouseSettings) -> tuple[bool, str]:
    with _without("opentelemetry"):
        import redis
    from preceptor.leases import LEASE_SECONDS, LeaseBoard

    host = socket.gethostname()
    try:
        workers = [one for one in LeaseBoard(settings.broker_url).workers() if one.name.rpartition(":")[0] == host]
    except redis.RedisError as error:
        return False, f"cannot be asked for: Redis does not answer ({error})"
    if not workers:
        return False, f"has not been heard of by Redis in {LEASE_SECONDS} s (host {host})"
    busy = next((one for one in workers if one.task_id), None)
    doing = f"at {busy.task_id}, {busy.steps_done} steps" if busy else "waits for work"
    return True, f"{workers[0].name} beats, {doing}"


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Lets no import in its body find a package that is not imported yet. redis-py takes OpenTelemetry where it finds
    it, for metrics that nobody asks it for: a fifth of a worker's probe."""
    hidden: dict[str, Any] = {} if package in sys.modules else {package: None}
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
