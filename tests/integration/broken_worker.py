"""A real worker with one thing broken in it: ``python -m tests.integration.broken_worker WHAT``.

What torch raises on a broken GPU is raised here without one: the type and the text are torch's
(c10/cuda/CUDAException.h), the GPU is not there.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from typing import Any

import torch

from preceptor.launch import launch
from preceptor.leases import Answer, LeaseBoard, WorkerStatus
from student import fitting, watchdog, worker, worker_job
from student.base_cache import BaseCache
from student.settings import WorkerSettings


def never_returns(*_: Any, **__: Any) -> Any:
    threading.Event().wait()


def holds_the_interpreter(*_: Any, **__: Any) -> Any:
    ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the lock that CDLL would release


def loses_the_device(*_: Any, **__: Any) -> Any:
    raise torch.AcceleratorError(
        "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
    )


def break_the_beat() -> None:
    sound = LeaseBoard.beat
    began = time.monotonic()

    def beat(self: LeaseBoard, status: WorkerStatus) -> Answer:
        if status.task_id and time.monotonic() > began + 3:
            raise RuntimeError("a mistake that nobody thought of")
        return sound(self, status)

    LeaseBoard.beat = beat  # type: ignore[method-assign]


def main(what: str) -> int:
    if what == "hangs":
        worker_job.run_trials = never_returns
    elif what == "hangs while loading":
        BaseCache.get = never_returns  # type: ignore[method-assign]
    elif what == "holds the interpreter":
        watchdog.LOCKED_SECONDS = 3
        worker_job.run_trials = holds_the_interpreter
    elif what == "loses the device":
        worker_job.run_trials = loses_the_device
    elif what == "has no room":
        fitting.room = lambda _device: (1000, "NVIDIA T0 has 0.00 of 1.00 GiB free")
    elif what == "sees a GPU":
        torch.cuda.is_available = lambda: True
    elif what == "cannot beat":
        break_the_beat()
        worker_job.run_trials = never_returns
    return launch("worker", WorkerSettings, worker.run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
