"""One GPU for one worker: taken before torch is imported, held for life, gone with the process however that ends.

    with leased_gpu(settings) as gpu:  # sets CUDA_VISIBLE_DEVICES, so it must come before torch
        ...

The lease is the system's lock (flock) on ``<gpu_locks>/<UUID>.lock``. All workers of a machine share that folder, those
in containers too: the lock belongs to the file, wherever it is mounted. A folder on a network will not do. What the
file says is only for people; who holds it is the system's word. ``gpu_share`` workers on one GPU hold
``<UUID>.lock``, ``<UUID>.1.lock``...; each GPU gets its first worker before any gets its second.

GPUs are what ``nvidia-smi -L`` lists, a MIG instance for itself, in that order, and of those what CUDA_VISIBLE_DEVICES
and NVIDIA_VISIBLE_DEVICES leave. (In a container the latter's numbers count the machine's GPUs, of which the container
sees only those named: so only UUIDs and "none" are looked at.)
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from preceptor.errors import PreceptorError

TOOL = "nvidia-smi"
ASK_SECONDS = 20.0
ASK_AGAIN_SECONDS = 0.5
# Of a lock file: who holds it. Of a fixed length, so that it needs no new room on a full disk.
HOLDER_BYTES = 120

_GPU = re.compile(r"GPU (?P<number>\d+): (?P<name>.+) \(UUID: (?P<uuid>GPU-[\w-]+)\)")
_MIG = re.compile(r"\s+(?P<name>MIG .+?)\s+Device\s+\d+: \(UUID: (?P<uuid>MIG-[\w/-]+)\)")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or an instance of one (MIG). ``number`` is nvidia-smi's, for an instance that of its GPU."""

    uuid: str
    name: str
    number: int


def list_gpus(environment: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that this process may use; none where there is no driver.

    Raises PreceptorError(DEVICE_UNUSABLE) where there is one and it does not answer.
    """
    tool = shutil.which(TOOL, path=environment.get("PATH"))
    if tool is None:
        return []
    try:
        answer = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=ASK_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise PreceptorError(
            "DEVICE_UNUSABLE", f"{TOOL} -L does not answer: {error}", field="PRECEPTOR_DEVICE"
        ) from None
    if answer.returncode:
        said = " ".join((answer.stdout + answer.stderr).split())[:300]
        if "No devices were found" in said:
            return []
        raise PreceptorError("DEVICE_UNUSABLE", f"{TOOL} -L fails: {said}", field="PRECEPTOR_DEVICE")
    return visible(read_list(answer.stdout), environment)


def read_list(listed: str) -> list[Gpu]:
    """The GPUs of ``nvidia-smi -L``. One that is cut into instances is not there itself: CUDA could not use it."""
    found: list[Gpu] = []
    for line in listed.splitlines():
        if gpu := _GPU.match(line):
            found.append(Gpu(gpu["uuid"], gpu["name"], int(gpu["number"])))
        elif (mig := _MIG.match(line)) and found:
            whole = found[-1]
            if whole.uuid.startswith("GPU-"):
                found.pop()
            found.append(Gpu(mig["uuid"], f"{mig['name']} of {whole.name}", whole.number))
    return found


def visible(gpus: Sequence[Gpu], environment: Mapping[str, str]) -> list[Gpu]:
    """Those that the environment leaves, in its order. As CUDA has it, the list ends before a name that is none."""
    named = environment.get("NVIDIA_VISIBLE_DEVICES", "").strip()
    if named in ("none", "void"):
        return []
    uuids = [one.strip() for one in named.split(",")]
    if all(one.startswith(("GPU-", "MIG-")) for one in uuids):
        gpus = [gpu for gpu in gpus if any(gpu.uuid.startswith(one) for one in uuids)]
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return list(gpus)
    left: list[Gpu] = []
    for one in (part.strip() for part in chosen.split(",")):
        by_number = [gpu for gpu in gpus if one.isdecimal() and gpu.number == int(one)]
        by_name = [gpu for gpu in gpus if one.startswith(("GPU-", "MIG-")) and gpu.uuid.startswith(one)]
        if not (meant := by_number or by_name):
            break
        left += [gpu for gpu in meant if gpu not in left]
    return left


@contextmanager
def leased_gpu(device: str, locks: Path | None, share: int, wait_seconds: float) -> Iterator[Gpu | None]:
    """A GPU for this process alone (or with ``share`` - 1 others), which is the only one that CUDA shows it.

    None where it is to use none, or ``locks`` is not set. ``device`` "cuda:1" means the second of those visible. Waits
    ``wait_seconds`` for a worker that is just giving one back. Raises PreceptorError: GPU_NONE_LEFT, saying who holds
    them; DEVICE_UNUSABLE where there is no such GPU, or the folder cannot be used.
    """
    if locks is None or not (device == "auto" or device.startswith("cuda")):
        yield None
        return
    gpus = list_gpus(os.environ)
    if not gpus and device == "auto":
        yield None
        return
    gpus = _meant(device, gpus)
    end = time.monotonic() + wait_seconds
    while (taken := _take_one(gpus, locks, share)) is None:
        if time.monotonic() >= end:
            raise _none_left(gpus, locks, share)
        time.sleep(ASK_AGAIN_SECONDS)
    gpu, lock = taken
    with lock:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu.uuid
        yield gpu


def _meant(device: str, gpus: list[Gpu]) -> list[Gpu]:
    number = device.partition(":")[2]
    if number.isdecimal():
        gpus = gpus[int(number) : int(number) + 1]
    if not gpus:
        message = f"PRECEPTOR_DEVICE={device} cannot be used: {TOOL} shows no such GPU here"
        raise PreceptorError("DEVICE_UNUSABLE", message, field="PRECEPTOR_DEVICE")
    return gpus


def _take_one(gpus: Sequence[Gpu], locks: Path, share: int) -> tuple[Gpu, IO[bytes]] | None:
    for place in range(share):
        for gpu in gpus:
            lock = _open(_path(locks, gpu.uuid, place))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            except OSError as error:
                lock.close()
                raise _unusable(locks, error) from None
            with suppress(OSError):
                holder = f"{socket.gethostname()}:{os.getpid()}"[:HOLDER_BYTES]
                os.pwrite(lock.fileno(), f"{holder:<{HOLDER_BYTES}}\n".encode(), 0)
            return gpu, lock
    return None


def _path(locks: Path, uuid: str, place: int) -> Path:
    return locks / f"{uuid.replace('/', '_')}{f'.{place}' if place else ''}.lock"


def _open(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.fdopen(
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660), "r+b", buffering=0
        )
    except OSError as error:
        raise _unusable(path.parent, error) from None


def _unusable(locks: Path, error: OSError) -> PreceptorError:
    message = f"PRECEPTOR_GPU_LOCKS={locks} cannot be used: {error.strerror}"
    return PreceptorError("DEVICE_UNUSABLE", message, file=str(locks), field="PRECEPTOR_GPU_LOCKS")


def _none_left(gpus: Sequence[Gpu], locks: Path, share: int) -> PreceptorError:
    held = [
        f"{gpu.uuid} ({gpu.name}) by {_holder(_path(locks, gpu.uuid, place))}" for gpu in gpus for place in range(share)
    ]
    each = f", {share} workers on each" if share > 1 else ""
    return PreceptorError(
        "GPU_NONE_LEFT",
        f"{len(gpus)} GPU{'s' if len(gpus) > 1 else ''} for workers here{each}, and all are taken: {'; '.join(held)}",
        file=str(locks),
    )


def _holder(path: Path) -> str:
    try:
        said = path.read_bytes()[:HOLDER_BYTES].decode(errors="replace").strip()
    except OSError:
        said = ""
    return said if said.isprintable() and said else "somebody who has not said who"
