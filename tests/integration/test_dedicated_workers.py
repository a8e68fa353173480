"""Real workers: with a student of their own, with a GPU of their own (simulated), with a student that does not fit."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from preceptor.artifacts import folder_sha256
from preceptor.leases import LeaseBoard, WorkerStatus
from preceptor.queue import fetch_result, submit
from preceptor.v1 import types_pb2 as types
from student.deployment import DeploymentBoard
from tests.integration.worker_house import START_SECONDS, Queue, redis_server, wait_for, worker_process
from tests.unit.test_gpu_lease import TWO, simulate
from tests.unit.tiny_students import save_student


def pinned(name: str, folder: Path) -> types.PinnedStudent:
    return types.PinnedStudent(name=name, source=str(folder), commit=folder_sha256(folder))


def test_a_dedicated_worker_takes_its_own_students_batches_only_and_ignores_other_activations(tmp_path: Path) -> None:
    common, own = (save_student(tmp_path / name, seed=seed) for seed, name in enumerate(("common", "own")))
    log = tmp_path / "worker.log"
    with (
        redis_server(tmp_path / "redis") as server,
        worker_process(server.url, log, PRECEPTOR_STUDENTS="own") as _,
    ):
        queue, board = Queue(server.url, common), DeploymentBoard(server.url)
        (worker,) = queue.workers(1)
        assert worker.serves == ("own",)
        other = submit(queue.app, queue.batch("other"), 1)
        board.publish(pinned("common", common))
        batch = queue.batch("mine")
        batch.student.CopyFrom(pinned("own", own))
        mine = submit(queue.app, batch, 1, "trials.own")
        assert not queue.result(mine).HasField("failure")
        time.sleep(3)  # it looks for another student once a second
        assert fetch_result(queue.app, other) is None
        status = queue.worker()
        assert status is not None
        assert status.students == (batch.student.commit,)
        # It is no worker of the active student, and the deployment does not wait for it.
        active = board.status(pinned("common", common).commit, "common")
        assert (active.state, active.workers_alive) == ("LOADING", 0)
        board.publish(pinned("own", own))
        assert board.status(batch.student.commit, "own").state == "READY"
    with redis_server(tmp_path / "redis") as server, worker_process(server.url, log) as _:
        assert not Queue(server.url, common).result(other, START_SECONDS).HasField("failure")  # it was only waiting


def test_a_student_that_does_not_fit_fails_its_deployment_and_its_batches_and_the_worker_lives(tmp_path: Path) -> None:
    folder = save_student(tmp_path / "student")
    log = tmp_path / "worker.log"
    with (
        redis_server(tmp_path / "redis") as server,
        worker_process(server.url, log, "has no room", module="tests.integration.broken_worker") as worker,
    ):
        queue, board = Queue(server.url, folder), DeploymentBoard(server.url)
        queue.workers(1)
        board.publish(queue.student)
        failed = wait_for(lambda: found if (found := board.status(queue.student.commit)).failure else None, 20)
        assert failed.state == "FAILED"
        assert failed.failure is not None
        assert failed.failure.reason == "STUDENT_TOO_LARGE"
        for name in ("first", "second"):
            failure = queue.run(queue.batch(name)).failure
            assert failure.reason == "STUDENT_TOO_LARGE"
            assert "and NVIDIA T0 has 0.00 of 1.00 GiB free" in failure.message
        assert worker.poll() is None
    assert "cannot load tiny: student tiny needs 0.00 GiB" in log.read_text()


def test_a_student_with_workers_of_its_own_is_loaded_by_them_alone(tmp_path: Path) -> None:
    """Others may have no room for it, and would say that its deployment has failed."""
    folder = save_student(tmp_path / "own")
    student = pinned("own", folder)
    with (
        redis_server(tmp_path / "redis") as server,
        worker_process(server.url, tmp_path / "log", "has no room", module="tests.integration.broken_worker") as _,
    ):
        queue, board, leases = Queue(server.url, folder), DeploymentBoard(server.url), LeaseBoard(server.url)
        queue.workers(1)
        status = WorkerStatus(name="elsewhere:1", students=(), serves=("own",))
        leases.beat(status)  # it is there, and still loads
        board.publish(student)
        for _ in range(5):
            leases.beat(status)
            time.sleep(1)
        seen = board.status(student.commit, "own")
        assert (seen.state, seen.workers_alive) == ("LOADING", 1)
        leases.beat(replace(status, students=(student.commit,)))
        seen = board.status(student.commit, "own")
        assert (seen.state, seen.workers_ready, seen.workers_alive) == ("READY", 1, 1)


def test_two_workers_for_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one ends with 2 before it has asked for anything else; torch here has no CUDA, so the first one says
    that its GPU cannot be used, which is as far as it gets."""
    simulate(tmp_path / "bin", monkeypatch, TWO.splitlines()[0])
    log = tmp_path / "worker.log"
    settings = {"PRECEPTOR_GPU_LOCKS": str(tmp_path / "locks"), "PRECEPTOR_GPU_WAIT_SECONDS": "0"}
    away = "redis://127.0.0.1:1/0"  # the first one holds its GPU while it waits for Redis
    with worker_process(away, log, **settings) as first:
        wait_for(lambda: "does not answer" in log.read_text(), START_SECONDS)
        with worker_process(away, tmp_path / "second.log", **settings) as second:
            assert second.wait(START_SECONDS) == 2
        said = (tmp_path / "second.log").read_text()
        assert "1 GPU for workers here, and all are taken: GPU-aaaa0000-1111 (NVIDIA H100 80GB HBM3) by" in said
        assert f":{first.pid}\n  next: start fewer workers here" in said
        assert "(GPU_NONE_LEFT)" in said
        assert "Traceback" not in said
    with redis_server(tmp_path / "redis") as server, worker_process(server.url, log, **settings) as third:
        assert third.wait(START_SECONDS) == 2
    assert "PRECEPTOR_DEVICE=cuda cannot be used" in log.read_text()


def test_a_gpu_that_cannot_be_named_is_not_used_without_a_lease(tmp_path: Path) -> None:
    """As in a container that was given a GPU without nvidia-smi."""
    log = tmp_path / "worker.log"
    settings = {"PRECEPTOR_GPU_LOCKS": str(tmp_path / "locks")}
    with (
        redis_server(tmp_path / "redis") as server,
        worker_process(server.url, log, "sees a GPU", module="tests.integration.broken_worker", **settings) as worker,
    ):
        assert worker.wait(START_SECONDS) == 2
    assert "torch sees one and nvidia-smi none" in log.read_text()
