"""The checks behind ``preceptor doctor``: the machine and the installation. The stack's are in ``stack_checks``."""

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
from pathlib import Path

import psutil

from preceptor import __version__
from preceptor.cli.connection import house_settings
from preceptor.cli.server_checks import Finding
from preceptor.cli.stack_checks import is_served, stack_findings
from preceptor.errors import PreceptorError
from preceptor.settings import HouseSettings
from preceptor.storage import free_bytes, mount_of

GIB = 2**30
# What the embedded stack is promised to need at most, and what a run of the shipped world writes, generously.
MEMORY_BYTES, DISK_BYTES = 4 * GIB, GIB
# Of a disk, less than this free is worth a word: others write there, too.
LOW_SHARE = 0.05
# What each extra of pyproject.toml brings (a test keeps the two alike).
EXTRAS = {
    "queue": ("celery", "redis"),
    "state": ("sqlalchemy",),
    "models": ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy"),
    "orchestrator": ("jinja2", "matplotlib", "numpy"),
}


def all_findings() -> list[Finding]:
    """All checks, in the order in which one would ask."""
    try:
        settings = house_settings()
    except PreceptorError as error:
        wrong = Finding("settings", "problem", error.message, "correct or unset the variable")
        return [_python(), *_packages(served=True), wrong]
    served = is_served(settings)
    # In a container, or beside somebody's stack, only what is needed there is missed.
    own = [] if served else [_redis_binary(settings), _ports()]
    return [
        *(_python(), *_packages(served), *own),
        *(*_home(settings.home), *_machine(served), *stack_findings(settings)),
    ]


def _python() -> Finding:
    # An older Python cannot have come this far: the package refuses it when it is installed.
    return Finding("python", "ok", f"{platform.python_version()} ({sys.executable}), preceptor {__version__}")


def _packages(served: bool) -> Iterator[Finding]:
    for extra, packages in EXTRAS.items():
        versions, missing = [], []
        for package in packages:
            try:
                versions.append(f"{package} {importlib.metadata.version(package)}")
            except importlib.metadata.PackageNotFoundError:
                missing.append(package)
        if missing and served:
            yield Finding(f"extra {extra}", "ok", f"not whole here (without {', '.join(missing)})")
        elif missing:
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
    free, size = free_bytes(existing)
    found = f"{free / GIB:.1f} of {size / GIB:.1f} GiB free on {mount_of(existing)}"
    if free < DISK_BYTES:
        yield Finding("disk", "problem", found, f"make room: {DISK_BYTES / GIB:.0f} GiB")
    elif free < LOW_SHARE * size:
        yield Finding("disk", "note", found, "make room before it is full: runs wait while there is none")
    else:
        yield Finding("disk", "ok", found)


def _machine(served: bool) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("processor", "ok", f"{cores} core{'s' if cores > 1 else ''} ({platform.machine()})")
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    if memory.available < MEMORY_BYTES and not served:
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
