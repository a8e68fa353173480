"""The checks behind ``preceptor doctor`` that ask a stack: its services, Redis, workers and student."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from preceptor import __version__
from preceptor.channel import Health, call, connect, health_of, is_serving
from preceptor.cli.connection import find_stack
from preceptor.errors import CATALOGUE, PreceptorError
from preceptor.settings import HouseSettings
from preceptor.versions import CONTRACT_VERSION

SERVICES = ("teacher", "student", "evaluator", "orchestrator")
PROBE_SECONDS = 3.0
# Nothing is decided by comparing the clocks of two machines; but logs and times of runs would mislead.
CLOCK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. ``next_step`` is empty where there is nothing to do."""

    what: str
    state: Literal["ok", "note", "problem"]
    found: str
    next_step: str = ""


def stack_findings(settings: HouseSettings) -> Iterator[Finding]:
    """What there is to say of the stack that commands would use."""
    addresses = find_stack(settings)
    if addresses is None:
        yield Finding(
            "stack", "ok", f"none is up for {settings.home.resolve()}", "`preceptor run` starts one, `preceptor up` too"
        )
        if "broker_url" in settings.model_fields_set:  # somebody means to use it
            yield from _broker(settings, workers_wanted=False)
        return
    yield Finding("stack", "ok", f"up ({addresses.home.resolve()})")
    yield from _other_stack(addresses)
    up = set()
    for name in SERVICES:
        finding, health = _service(addresses, name)
        yield finding
        if health is not None:
            up.add(name)
            yield from _clock(f"clock of the {name}", health.seconds_ahead)
    yield from _broker(addresses, workers_wanted=True)
    if "student" in up:
        yield _active_student(addresses)


def _other_stack(addresses: HouseSettings) -> Iterator[Finding]:
    usual = str(HouseSettings.model_fields["orchestrator_address"].default)
    if addresses.orchestrator_address != usual:
        try:
            other = is_serving(usual, deadline=PROBE_SECONDS)
        except PreceptorError:  # it is there, and its TLS does not fit
            other = True
        if other:
            yield Finding(
                "another stack",
                "note",
                f"an orchestrator answers at {usual}, too; commands use the one at {addresses.orchestrator_address}",
                f"end one of them, or set PRECEPTOR_ORCHESTRATOR_ADDRESS={usual} to use that one",
            )


def _service(addresses: HouseSettings, name: str) -> tuple[Finding, Health | None]:
    address = getattr(addresses, f"{name}_address")
    log = addresses.home.resolve() / "logs" / f"{name}.log"
    look = f"look at {log}" if log.exists() else f"start it, or correct PRECEPTOR_{name.upper()}_ADDRESS"
    try:
        health = health_of(address, deadline=PROBE_SECONDS)
    except PreceptorError as error:
        next_step = error.next_step if error.reason == "TLS_FAILED" else look
        return Finding(name, "problem", f"does not answer at {address}: {error.message}", next_step), None
    if not health.serving:
        return Finding(name, "problem", f"is there at {address}, but does not serve now", look), None
    where = f"serves on {address}, version {health.version or 'unknown'}"
    if health.contract and health.contract != str(CONTRACT_VERSION):
        next_step = CATALOGUE["VERSION_SKEW"].next_step
        return Finding(name, "problem", f"{where}; this is {__version__}", next_step), health
    if health.version and health.version != __version__:
        return Finding(name, "note", f"{where}; this is {__version__}", "run the same version everywhere"), health
    return Finding(name, "ok", where), health


def _clock(whose: str, seconds_ahead: float) -> Iterator[Finding]:
    if abs(seconds_ahead) > CLOCK_SECONDS:
        way = "ahead of" if seconds_ahead > 0 else "behind"
        found = f"{abs(seconds_ahead):.0f} s {way} this machine's"
        yield Finding(whose, "note", found, "set the clocks right (NTP): times in logs and reports mislead")


def _broker(addresses: HouseSettings, *, workers_wanted: bool) -> Iterator[Finding]:
    try:
        import redis

        from preceptor.leases import LeaseBoard
        from preceptor.queue import check_broker
    except ImportError:
        yield Finding("redis", "note", "cannot be asked: its packages are missing", "pip install 'preceptor[queue]'")
        return
    where = addresses.broker_url.rpartition("@")[2].removeprefix("redis://")  # never the password
    try:
        ahead = check_broker(addresses.broker_url)
        workers = LeaseBoard(addresses.broker_url).workers()
    except PreceptorError as error:
        yield Finding("redis", "problem", error.message, error.next_step)
        return
    except (redis.RedisError, ValueError) as error:
        yield Finding(
            "redis",
            "problem",
            f"does not answer at {where}: {type(error).__name__}",
            "check that it runs and PRECEPTOR_BROKER_URL",
        )
        return
    yield Finding("redis", "ok", f"answers at {where}")
    yield from _clock("clock of redis", -ahead)
    if workers_wanted or workers:
        yield _workers([worker.name for worker in workers])


def _workers(names: list[str]) -> Finding:
    if not names:
        return Finding(
            "workers", "problem", "none is alive", "look at the worker's log, or start `python -m student.worker`"
        )
    found = f"{len(names)} alive: {', '.join(names)}"
    here = Counter(name.rpartition(":")[0] for name in names)[socket.gethostname()]
    cores = os.cpu_count() or 1
    if here > cores:
        return Finding("workers", "note", f"{found}; {cores} cores here", "run at most one worker a core, or a GPU")
    return Finding("workers", "ok", found)


def _active_student(addresses: HouseSettings) -> Finding:
    from preceptor.v1 import student_pb2, student_pb2_grpc

    stub = connect(addresses.student_address, student_pb2_grpc.StudentServiceStub)
    try:
        student = call(stub.GetStudent, student_pb2.GetStudentRequest(), deadline=5).student
    except PreceptorError as error:
        return Finding("active student", "problem", error.message, error.next_step)
    return Finding(
        "active student", "ok", f"{student.name} ({student.architecture}, {student.parameters:,} parameters)"
    )
