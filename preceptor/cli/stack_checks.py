"""The checks behind ``preceptor doctor`` that ask a stack: its services, Redis, workers and student.

Of an embedded stack everything is asked; where the settings name addresses, that is asked which they name.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Collection, Iterator

import psutil

from preceptor import __version__
from preceptor.channel import Health, call, connect, health_of, is_serving, stream
from preceptor.cli.connection import find_stack
from preceptor.cli.server_checks import (
    Finding,
    artifact_findings,
    database_findings,
    gpu_findings,
    inference_findings,
    problem,
    security_findings,
)
from preceptor.errors import CATALOGUE, PreceptorError
from preceptor.settings import HouseSettings
from preceptor.versions import CONTRACT_VERSION

SERVICES = ("teacher", "student", "evaluator", "orchestrator")
PROBE_SECONDS = 3.0
# Nothing is decided by comparing the clocks of two machines; but logs and times of runs would mislead.
CLOCK_SECONDS = 5.0


def named_services(settings: HouseSettings) -> list[str]:
    """The services whose address somebody has set."""
    return [name for name in SERVICES if f"{name}_address" in settings.model_fields_set]


def is_served(settings: HouseSettings) -> bool:
    """Whether the settings name services or a Redis: then there is a stack that others run, and none is embedded."""
    return bool(named_services(settings)) or "broker_url" in settings.model_fields_set


def stack_findings(settings: HouseSettings) -> Iterator[Finding]:
    """What there is to say of the stack that commands would use."""
    secured = list(security_findings(settings))
    yield from secured
    if any(one.state == "problem" for one in secured):
        return  # nobody can be asked
    try:
        addresses = find_stack(settings)
    except PreceptorError as error:  # it is there, and its TLS does not fit
        addresses = settings if is_served(settings) else None
        if addresses is None:
            yield problem("stack", error)
            return
    # Somebody has said where they are: one that does not answer is missed.
    named = named_services(settings)
    if addresses is None and named:
        addresses = settings
    if addresses is None:
        yield Finding(
            "stack", "ok", f"none is up for {settings.home.resolve()}", "`preceptor run` starts one, `preceptor up` too"
        )
        if is_served(settings):
            yield from _broker(settings, workers_wanted=False)
        yield from _servers(settings, ())
        return
    embedded = addresses is not settings
    yield Finding(
        "stack", "ok", f"up ({addresses.home.resolve()})" if embedded or not named else "named by the settings"
    )
    yield from _other_stack(addresses)
    up = set()
    for name in SERVICES if embedded or not named else named:
        finding, health = _service(addresses, name)
        yield finding
        if health is not None:
            up.add(name)
            yield from _clock(f"clock of the {name}", health.seconds_ahead)
    if embedded or not named or "broker_url" in settings.model_fields_set:
        yield from _broker(addresses, workers_wanted=True)
    yield from _servers(addresses, up)


def _servers(addresses: HouseSettings, up: Collection[str]) -> Iterator[Finding]:
    yield from database_findings()
    yield from artifact_findings(addresses)
    commit = ""
    if "student" in up:
        finding, commit = _active_student(addresses)
        yield finding
    yield from inference_findings(commit)
    if "evaluator" in up:
        yield from _queues(addresses)


def _queues(addresses: HouseSettings) -> Iterator[Finding]:
    from preceptor.cli.evaluations import unserved
    from preceptor.v1 import evaluator_pb2, evaluator_pb2_grpc

    stub = connect(addresses.evaluator_address, evaluator_pb2_grpc.EvaluatorServiceStub)
    try:
        status = call(stub.GetQueueStatus, evaluator_pb2.GetQueueStatusRequest(), deadline=5, retried=())
    except PreceptorError as error:
        yield problem("queues", error)
        return
    if status.evaluations_failed:
        step = "`preceptor evaluations failed` says why and what to do"
        yield Finding("evaluations", "note", f"{status.evaluations_failed} have FAILED", step)
    if not status.workers:  # said already, of all workers
        return
    for line in unserved(status):
        yield Finding(
            "queues", "note", line, "start such a worker, or change PRECEPTOR_DEDICATED_STUDENTS of the evaluator"
        )


def _other_stack(addresses: HouseSettings) -> Iterator[Finding]:
    usual = str(HouseSettings.model_fields["orchestrator_address"].default)
    if addresses.orchestrator_address != usual and not _is_here(addresses.orchestrator_address, usual):
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


def _is_here(address: str, usual: str) -> bool:
    """Whether an address is the usual one under another name: this container's, with the usual port."""
    host, _, port = address.rpartition(":")
    if port != usual.rpartition(":")[2]:
        return False
    own = {one.address for interface in psutil.net_if_addrs().values() for one in interface}
    try:
        return any(str(found[4][0]) in own for found in socket.getaddrinfo(host.strip("[]"), None))
    except OSError:
        return False


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
    where = addresses.broker_url.rpartition("@")[2].partition("?")[0]  # never the password
    where = where.removeprefix("redis://").removeprefix("rediss://")
    try:
        ahead = check_broker(addresses.broker_url)
        workers = LeaseBoard(addresses.broker_url).workers()
    except PreceptorError as error:
        yield problem("redis", error)
        return
    except (redis.RedisError, ValueError) as error:
        yield Finding(
            "redis",
            "problem",
            f"does not answer at {where}: {type(error).__name__}",
            "check that it runs and PRECEPTOR_BROKER_URL",
        )
        return
    secure = ", with TLS" if addresses.broker_url.startswith("rediss://") else ""
    yield Finding("redis", "ok", f"answers at {where}{secure}")
    yield from _clock("clock of redis", -ahead)
    if workers_wanted or workers:
        yield _workers([worker.name for worker in workers])
    yield from gpu_findings(workers)


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


def _active_student(addresses: HouseSettings) -> tuple[Finding, str]:
    """And its commit, where there is one."""
    from preceptor.v1 import student_pb2, student_pb2_grpc

    stub = connect(addresses.student_address, student_pb2_grpc.StudentServiceStub)
    try:
        student = call(stub.GetStudent, student_pb2.GetStudentRequest(), deadline=5).student
        watch = student_pb2.WatchDeploymentRequest(name=student.name)
        seen = stream(stub.WatchDeployment, watch, deadline=5)
        deployment = next((one.deployment for one in seen), student_pb2.Deployment())
    except PreceptorError as error:
        return problem("active student", error), ""
    found = f"{student.name} ({student.architecture}, {student.parameters:,} parameters)"
    if deployment.state == student_pb2.DEPLOYMENT_STATE_FAILED:
        failure = deployment.failure
        step = CATALOGUE[failure.reason if failure.reason in CATALOGUE else "INTERNAL"].next_step
        found = f"{found}: {failure.message} ({failure.reason})"
        return Finding("active student", "problem", found, step), student.pinned.commit
    ready = f"in memory of {deployment.workers_ready} of {deployment.workers_alive} workers"
    return Finding("active student", "ok", f"{found}, {ready}"), student.pinned.commit
