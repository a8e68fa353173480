"""The checks behind ``preceptor doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from preceptor import __version__
from preceptor.channel import call, connect, is_serving
from preceptor.cli.connection import find_stack, house_settings
from preceptor.errors import PreceptorError
from preceptor.settings import HouseSettings

GIB = 2**30
# What the embedded stack is promised to need at most, and what a run of the shipped world writes, generously.
MEMORY_BYTES, DISK_BYTES = 4 * GIB, GIB
SERVICES = ("teacher", "student", "evaluator", "orchestrator")
# What each extra of pyproject.toml brings (a test keeps the two alike).
EXTRAS = {
    "queue": ("celery", "redis"),
    "state": ("sqlalchemy",),
    "models": ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy"),
    "orchestrator": ("jinja2", "matplotlib", "numpy"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. ``next_step`` is empty where there is nothing to do."""

    what: str
    state: Literal["ok", "note", "problem"]
    found: str
    next_step: str = ""


def all_findings() -> list[Finding]:
    """All checks, in the order in which one would ask."""
    findings = [_python(), *_packages()]
    try:
        settings = house_settings()
    except PreceptorError as error:
        return [*findings, Finding("settings", "problem", str(error), "correct or unset the variable")]
    return [*findings, _redis_binary(settings), _ports(), *_home(settings.home), *_machine(), *_stack(settings)]


def _python() -> Finding:
    # An older Python cannot have come this far: the package refuses it when it is installed.
    return Finding("python", "ok", f"{platform.python_version()} ({sys.executable}), preceptor {__version__}")


def _packages() -> Iterator[Finding]:
    for extra, packages in EXTRAS.items():
        versions, missing = [], []
        for package in packages:
            try:
                versions.append(f"{package} {importlib.metadata.version(package)}")
            except importlib.metadata.PackageNotFoundError:
                missing.append(package)
        if missing:
            yield Finding(
                f"extra {extra}", "problem", f"missing: {', '.join(missing)}", "pip install 'preceptor[embedded]'"
            )
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(versions))


def _redis_binary(settings: HouseSettings) -> Finding:
    from preceptor.redis_server import find_redis

    try:
        binary = find_redis()
        answer = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except PreceptorError as error:
        return Finding("redis server", "problem", str(error), error.next_step)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(
            "redis server", "problem", f"does not start: {error}", "install another Redis and put it on PATH"
        )
    version = next((word for word in answer.stdout.split() if word.startswith("v=")), "v=?").removeprefix("v=")
    return Finding("redis server", "ok", f"{version} ({binary})")


def _ports() -> Finding:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        return Finding("ports", "problem", f"no port on 127.0.0.1 can be bound: {error}", "allow loopback sockets")
    return Finding("ports", "ok", "free ports on 127.0.0.1 can be had")


def _home(home: Path) -> Iterator[Finding]:
    where = home.resolve()
    existing = next(folder for folder in (where, *where.parents) if folder.exists())
    probe = existing / f".preceptor-probe-{uuid.uuid4().hex}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        yield Finding(
            "home folder",
            "problem",
            f"{where} cannot be written: {error.strerror}",
            "set PRECEPTOR_HOME to another folder",
        )
    else:
        yield Finding("home folder", "ok", f"{where}{'' if existing == where else ' (will be made)'}")
    free = shutil.disk_usage(existing).free
    state: Literal["ok", "problem"] = "ok" if free >= DISK_BYTES else "problem"
    yield Finding(
        "disk", state, f"{free / GIB:.1f} GiB free", "" if state == "ok" else f"make room: {DISK_BYTES / GIB:.0f} GiB"
    )


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("processor", "ok", f"{cores} core{'s' if cores > 1 else ''} ({platform.machine()})")
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    if memory.available < MEMORY_BYTES:
        yield Finding("memory", "note", found, "the embedded stack may need 4 GiB; close something or use --workers 1")
    else:
        yield Finding("memory", "ok", found)
    yield _gpu()


def _gpu() -> Finding:
    tool = shutil.which("nvidia-smi")
    if not tool:
        return Finding("gpu", "ok", "none (nvidia-smi is not there); the tiny models run on the processor")
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("gpu", "note", f"nvidia-smi does not answer: {error}", "check the driver")
    return Finding("gpu", "ok", "; ".join(answer.stdout.strip().splitlines()) or "none")


def _stack(settings: HouseSettings) -> Iterator[Finding]:
    addresses = find_stack(settings)
    if addresses is None:
        yield Finding(
            "stack", "ok", f"none is up for {settings.home.resolve()}", "`preceptor run` starts one, `preceptor up` too"
        )
        return
    yield Finding("stack", "ok", f"up ({addresses.home.resolve()})")
    up = set()
    for name in SERVICES:
        address = getattr(addresses, f"{name}_address")
        if is_serving(address, deadline=3):
            up.add(name)
            yield Finding(name, "ok", f"serves on {address}")
        else:
            log = addresses.home.resolve() / "logs" / f"{name}.log"
            yield Finding(
                name, "problem", f"does not answer at {address}", f"look at {log}" if log.exists() else "start it"
            )
    yield from _broker(addresses)
    if "student" in up:
        yield _active_student(addresses)


def _broker(addresses: HouseSettings) -> Iterator[Finding]:
    try:
        import redis

        from preceptor.leases import LeaseBoard
    except ImportError:
        yield Finding(
            "redis", "note", "cannot be asked: the package redis is missing", "pip install 'preceptor[queue]'"
        )
        return
    where = addresses.broker_url.rpartition("@")[2].removeprefix("redis://")  # never the password
    try:
        workers = LeaseBoard(addresses.broker_url).workers()
    except (redis.RedisError, ValueError) as error:
        yield Finding(
            "redis",
            "problem",
            f"does not answer at {where}: {type(error).__name__}",
            "check that it runs and PRECEPTOR_BROKER_URL",
        )
        return
    yield Finding("redis", "ok", f"answers at {where}")
    if workers:
        yield Finding("workers", "ok", f"{len(workers)} alive: {', '.join(worker.name for worker in workers)}")
    else:
        yield Finding(
            "workers", "problem", "none is alive", "look at the worker's log, or start `python -m student.worker`"
        )


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
