"""One GPU for one worker. ``nvidia-smi`` is a script here and the GPUs are simulated; locks and processes are real."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from preceptor.cli.server_checks import gpu_findings
from preceptor.errors import PreceptorError
from student.gpu_lease import Gpu, leased_gpu, list_gpus, read_list, visible

ROOT = Path(__file__).parents[2]
TWO = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa0000-1111)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb0000-2222)
"""
WITH_INSTANCES = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa0000-1111)
  MIG 3g.20gb     Device  0: (UUID: MIG-c7384736-a75d)
  MIG 3g.20gb     Device  1: (UUID: MIG-c7384736-b75d)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bbbb0000-2222)
"""
# A worker's beginning and nothing else: takes a GPU, says which, and stays.
HOLDER = """
import os, sys, time
from pathlib import Path
from preceptor.errors import PreceptorError
from student.gpu_lease import leased_gpu
assert "torch" not in sys.modules
try:
    with leased_gpu(sys.argv[2], Path(sys.argv[1]), int(sys.argv[3]), float(sys.argv[4])) as gpu:
        print(gpu and gpu.uuid, os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
        time.sleep(60)
except PreceptorError as error:
    print(error.reason, error.message, flush=True)
    sys.exit(2)
"""


def simulate(folder: Path, monkeypatch: pytest.MonkeyPatch, listed: str, code: int = 0) -> None:
    """Puts an nvidia-smi on PATH that says this."""
    folder.mkdir(exist_ok=True)
    (folder / "listed").write_text(listed)
    tool = folder / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\n[ "$1" = -L ] || exit 9\ncat "{folder}/listed"\nexit {code}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def taken(locks: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who holds what, as `preceptor doctor` says it."""
    monkeypatch.setenv("PRECEPTOR_GPU_LOCKS", str(locks))
    (finding,) = gpu_findings([])
    return finding.found.removeprefix(f"{locks}: ")


class Holders:
    """Processes that hold GPUs."""

    def __init__(self, locks: Path) -> None:
        self.locks = locks
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, device: str = "auto", share: int = 1, wait: float = 0.0) -> tuple[subprocess.Popen[str], str]:
        """A process and the first line it says."""
        command = [sys.executable, "-c", HOLDER, str(self.locks), device, str(share), str(wait)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.processes.append(process)
        assert process.stdout
        return process, process.stdout.readline().strip()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def holders(tmp_path: Path) -> Iterator[Holders]:
    made = Holders(tmp_path / "locks")
    yield made
    made.close()


def test_each_worker_gets_a_gpu_of_its_own_and_the_next_is_told_who_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holders: Holders
) -> None:
    simulate(tmp_path / "bin", monkeypatch, TWO)
    first, said = holders.start()
    assert said == "GPU-aaaa0000-1111 GPU-aaaa0000-1111"
    second, said = holders.start()
    assert said == "GPU-bbbb0000-2222 GPU-bbbb0000-2222"
    third, said = holders.start()
    assert third.wait(10) == 2
    assert said.startswith("GPU_NONE_LEFT 2 GPUs for workers here, and all are taken: GPU-aaaa0000-1111 (NVIDIA H100")
    for pid in (first.pid, second.pid):
        assert f":{pid}" in said
    here = socket.gethostname()
    assert taken(holders.locks, monkeypatch) == (
        f"GPU-aaaa0000-1111 by {here}:{first.pid}; GPU-bbbb0000-2222 by {here}:{second.pid}"
    )


def test_a_lease_is_gone_with_its_process_and_a_gpu_that_is_given_back_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holders: Holders
) -> None:
    simulate(tmp_path / "bin", monkeypatch, TWO.splitlines()[0])
    first, _ = holders.start()
    first.kill()  # SIGKILL: nobody tidies up
    first.wait(10)
    assert taken(holders.locks, monkeypatch) == "none is taken"
    second, said = holders.start()
    assert said.startswith("GPU-aaaa")
    os.kill(second.pid, signal.SIGSTOP)  # one that is only stopped keeps it
    begin = time.monotonic()
    command = [sys.executable, "-c", HOLDER, str(holders.locks), "auto", "1", "30"]
    waiting = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    holders.processes.append(waiting)
    time.sleep(1.5)
    assert waiting.poll() is None
    second.kill()
    assert waiting.stdout
    assert waiting.stdout.readline().startswith("GPU-aaaa")
    assert time.monotonic() - begin < 15


def test_gpus_are_shared_by_so_many_workers_as_is_said_and_each_gets_one_before_any_gets_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holders: Holders
) -> None:
    simulate(tmp_path / "bin", monkeypatch, TWO)
    uuids = [holders.start(share=2)[1].split()[0][:8] for _ in range(4)]
    assert uuids == ["GPU-aaaa", "GPU-bbbb", "GPU-aaaa", "GPU-bbbb"]
    last, said = holders.start(share=2)
    assert last.wait(10) == 2
    assert "2 workers on each" in said
    assert said.count(" by ") == 4


def test_the_device_says_which_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holders: Holders) -> None:
    simulate(tmp_path / "bin", monkeypatch, TWO)
    _, said = holders.start("cuda:1")
    assert said.startswith("GPU-bbbb")
    process, said = holders.start("cuda:1")
    assert process.wait(10) == 2
    assert said.startswith("GPU_NONE_LEFT 1 GPU for workers here")
    process, said = holders.start("cuda:7")
    assert process.wait(10) == 2
    assert said.startswith("DEVICE_UNUSABLE PRECEPTOR_DEVICE=cuda:7 cannot be used")


def test_without_a_gpu_the_processor_does_it_unless_a_gpu_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(tmp_path / "bin", monkeypatch, "No devices were found\n", code=6)
    with leased_gpu("auto", tmp_path / "locks", 1, 0) as gpu:
        assert gpu is None
    with pytest.raises(PreceptorError, match="shows no such GPU") as raised, leased_gpu("cuda", tmp_path, 1, 0):
        pass
    assert raised.value.reason == "DEVICE_UNUSABLE"
    simulate(tmp_path / "bin", monkeypatch, TWO)
    for device, locks in (("cpu", tmp_path / "locks"), ("auto", None)):
        with leased_gpu(device, locks, 1, 0) as gpu:
            assert gpu is None
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_driver_that_does_not_answer_is_no_reason_to_train_on_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(tmp_path / "bin", monkeypatch, "Failed to initialize NVML: Driver/library version mismatch\n", code=18)
    with pytest.raises(PreceptorError, match="Driver/library version mismatch"), leased_gpu("auto", tmp_path, 1, 0):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(tmp_path / "bin", monkeypatch, TWO)
    (tmp_path / "file").touch()
    locks = tmp_path / "file" / "locks"
    with pytest.raises(PreceptorError, match=f"PRECEPTOR_GPU_LOCKS={locks} cannot be"), leased_gpu("auto", locks, 1, 0):
        pass


def test_within_a_process_the_lease_ends_with_its_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(tmp_path / "bin", monkeypatch, TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with ExitStack() as stack:
        gpu = stack.enter_context(leased_gpu("auto", tmp_path / "locks", 1, 0))
        assert gpu == Gpu("GPU-bbbb0000-2222", "NVIDIA H100 80GB HBM3", 1)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-bbbb0000-2222"
        assert taken(tmp_path / "locks", monkeypatch).startswith("GPU-bbbb0000-2222 by ")
    assert taken(tmp_path / "locks", monkeypatch) == "none is taken"


def test_the_instances_of_a_gpu_are_taken_for_themselves() -> None:
    assert [(gpu.uuid, gpu.number) for gpu in read_list(WITH_INSTANCES)] == [
        ("MIG-c7384736-a75d", 0),
        ("MIG-c7384736-b75d", 0),
        ("GPU-bbbb0000-2222", 1),
    ]
    assert read_list(WITH_INSTANCES)[0].name == "MIG 3g.20gb of NVIDIA A100-SXM4-40GB"


@pytest.mark.parametrize(
    ("cuda", "nvidia", "left"),
    [
        (None, None, "ab"),
        (None, "all", "ab"),
        (None, "1", "ab"),  # in a container there are only those that it was given, and their numbers are others
        (None, "GPU-bbbb0000-2222", "b"),
        (None, "none", ""),
        (None, "void", ""),
        ("1,0", None, "ba"),
        ("0", None, "a"),
        ("GPU-bbbb", None, "b"),
        ("GPU-bbbb0000-2222, GPU-aaaa0000-1111", None, "ba"),
        ("1,7,0", None, "b"),
        ("", None, ""),
        ("-1", None, ""),
        ("0,0", None, "a"),
    ],
)
def test_only_what_the_environment_leaves_is_taken(cuda: str | None, nvidia: str | None, left: str) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": cuda, "NVIDIA_VISIBLE_DEVICES": nvidia}
    found = visible(read_list(TWO), {name: value for name, value in environment.items() if value is not None})
    assert "".join(gpu.uuid[4] for gpu in found) == left


def test_no_driver_is_no_gpu(tmp_path: Path) -> None:
    assert list_gpus({"PATH": str(tmp_path)}) == []


def test_a_folder_that_knows_no_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(tmp_path / "bin", monkeypatch, TWO)

    def no_locks(_file: object, _how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))  # NFS without its lock service

    monkeypatch.setattr("student.gpu_lease.fcntl.flock", no_locks)
    locks = tmp_path / "locks"
    with pytest.raises(PreceptorError) as raised, leased_gpu("auto", locks, 1, 0):
        pass
    assert raised.value.reason == "DEVICE_UNUSABLE"
    assert f"PRECEPTOR_GPU_LOCKS={locks} cannot be used: No locks available" in raised.value.message
