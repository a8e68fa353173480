"""A real worker process on a real Redis: what it promises to those who put batches on the queue."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import torch

from preceptor import __version__
from preceptor.artifacts import folder_sha256
from preceptor.leases import LEASE_SECONDS
from preceptor.names import celery_task_id
from preceptor.queue import TRIAL_BATCH_TASK, TRIAL_QUEUE, fetch_result, submit
from preceptor.v1 import trial_pb2 as wire
from preceptor.v1 import types_pb2 as types
from student.base_cache import BaseCache
from student.deployment import DeploymentBoard
from student.worker_job import TrialJob
from tests.integration.worker_house import ENDLESS, START_SECONDS, Queue, redis_server, wait_for, worker_process
from tests.unit.tiny_students import save_student


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def queue(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Queue]:
    """A queue with one worker."""
    folder = tmp_path_factory.mktemp("queue")
    with redis_server(folder / "redis") as server, worker_process(server.url, folder / "worker.log"):
        made = Queue(server.url, student)
        wait_for(made.worker, START_SECONDS)
        yield made


def without_times(result: wire.TrialBatchResult) -> wire.TrialBatchResult:
    bare = wire.TrialBatchResult()
    bare.CopyFrom(result)
    for field in ("worker", "load_seconds", "train_seconds", "answer_seconds", "peak_memory_bytes"):
        bare.ClearField(field)  # type: ignore[arg-type]
    for one in bare.results:
        one.ClearField("seconds")
    return bare


def test_a_batch_comes_back_answered_and_a_failed_trial_fails_alone(queue: Queue) -> None:
    result = queue.run(queue.batch("answered"))
    assert not result.HasField("failure"), result.failure
    assert [one.trial_id for one in result.results] == ["baseline", "edit", "too long"]
    baseline, edit, too_long = result.results
    assert (baseline.steps, edit.steps) == (0, 8)
    assert edit.answers[0].gold_logprob > baseline.answers[0].gold_logprob
    assert edit.answers[0].gold_tokens == len(" Rome")
    assert len(edit.probe_answers) == 1
    assert edit.final_loss < edit.first_loss
    assert too_long.failure.reason == "SEQUENCE_TOO_LONG"
    assert not too_long.answers
    assert result.peak_memory_bytes > 10**7


def test_the_queue_changes_no_bit(queue: Queue) -> None:
    batch = queue.batch("bits", epochs=12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the worker
    try:
        here = TrialJob(BaseCache(1, "cpu"), "here", 60).run(batch, 1, lambda _step: None, threading.Event())
    finally:
        torch.set_num_threads(threads)
    assert without_times(queue.run(batch)) == without_times(here)


def test_work_that_was_done_is_not_done_again(queue: Queue) -> None:
    batch = queue.batch("once")
    del batch.trials[2]  # the one that fails
    first = queue.run(batch)
    done = wait_for(lambda: status if (status := queue.worker()) and not status.task_id else None, 10).trials_done
    # delivered once more, and asked for once more under a new attempt
    assert queue.run(batch) == first
    assert queue.run(batch, attempt=2) == first
    time.sleep(0.5)
    assert wait_for(queue.worker, 10).trials_done == done


def test_an_earlier_attempt_that_failed_is_no_reason_not_to_try(queue: Queue, student: Path) -> None:
    batch = queue.batch("second try")
    batch.student.source += "-not-there"
    assert queue.run(batch).failure.reason == "BAD_STUDENT_SOURCE"
    batch.student.source = str(student)
    assert not queue.run(batch, attempt=2).HasField("failure")


def test_a_batch_that_was_cancelled_before_its_turn_is_not_begun_and_its_next_attempt_is(queue: Queue) -> None:
    batch = queue.batch("cancelled")
    del batch.trials[2]  # the one that fails
    queue.leases.cancel(celery_task_id(batch.id, 1), [trial.id for trial in batch.trials])
    assert queue.run(batch).failure.reason == "CANCELLED"
    assert not queue.run(batch, attempt=2).HasField("failure")
    with redis.Redis.from_url(queue.url) as client:
        (key,) = client.scan_iter(match="preceptor:*:cancelled.1")
        assert 0 < client.ttl(key) <= 24 * 3600


def test_a_changed_student_is_refused_and_the_worker_lives_on(queue: Queue, student: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(student, tmp_path / "changed")
    (changed / "generation_config.json").write_text("{}")
    batch = queue.batch("changed")
    batch.student.source = str(changed)
    result = queue.run(batch)
    assert result.failure.reason == "STUDENT_CHANGED"
    assert result.failure.attempts == 1
    assert not result.results
    assert not queue.run(queue.batch("after the change")).HasField("failure")


def test_a_batch_that_this_worker_cannot_read_or_do_is_a_failure(queue: Queue) -> None:
    task_id = celery_task_id("unreadable", 1)
    for payload, reason in (
        ({"id": "unreadable", "quantum_trials": 3}, "VERSION_SKEW"),
        ({"id": "unreadable", "trials": "three"}, "INVALID_REQUEST"),
        (["unreadable"], "INVALID_REQUEST"),
    ):
        queue.app.send_task(TRIAL_BATCH_TASK, args=[payload], task_id=task_id, queue=TRIAL_QUEUE)
        assert queue.result(task_id).failure.reason == reason
        queue.app.backend.delete(queue.app.backend.get_key_for_task(task_id))
    later = queue.batch("of a later version")
    later.protocol_version = 99
    skew = queue.run(later).failure
    assert skew.reason == "VERSION_SKEW"
    assert "speaks version 1 " in skew.message
    assert "is of version 99" in skew.message
    assert __version__ in skew.message


def test_the_active_student_is_loaded_before_any_job(queue: Queue, tmp_path: Path) -> None:
    second = save_student(tmp_path / "second", "qwen2")
    commit = folder_sha256(second)
    DeploymentBoard(queue.url).publish(types.PinnedStudent(name="second", source=str(second), commit=commit))
    wait_for(lambda: DeploymentBoard(queue.url).status(commit).state == "READY", 30)


def test_a_student_that_cannot_be_loaded_is_reported(queue: Queue, tmp_path: Path) -> None:
    pinned = types.PinnedStudent(name="gone", source=str(tmp_path / "gone"), commit="0" * 64)
    board = DeploymentBoard(queue.url)
    board.publish(pinned)
    wait_for(lambda: board.status(pinned.commit).state == "FAILED", 30)
    failure = board.status(pinned.commit).failure
    assert failure is not None
    assert failure.reason == "BAD_STUDENT_SOURCE"


def test_a_batch_survives_its_worker(student: Path, tmp_path: Path) -> None:
    """SIGKILL: the lease ends, and the next attempt is run. SIGTERM: the batch is given back at once, for the next."""
    with redis_server(tmp_path / "redis") as server:
        url = server.url
        queue = Queue(url, student)
        endless = queue.training("endless", ENDLESS)
        task_id = celery_task_id(endless.id, 1)
        log = tmp_path / "worker.log"

        with worker_process(url, log) as killed:
            wait_for(queue.worker, START_SECONDS)
            submit(queue.app, endless, 1)
            wait_for(lambda: queue.leases.holders([task_id]), 30)
            wait_for(lambda: (status := queue.worker()) and status.steps_done > 0, 30)
            killed.send_signal(signal.SIGKILL)
            killed.wait(10)
            wait_for(lambda: not queue.leases.holders([task_id]), LEASE_SECONDS + 3)
            assert fetch_result(queue.app, task_id) is None

        with worker_process(url, log) as ended:
            wait_for(queue.worker, START_SECONDS)
            second = submit(queue.app, endless, 2)
            wait_for(lambda: queue.leases.holders([second]), 30)
            wait_for(lambda: (status := queue.worker()) and status.steps_done > 0, 30)
            begun = time.monotonic()
            ended.send_signal(signal.SIGTERM)
            assert ended.wait(20) == 0
            assert time.monotonic() - begun < 10, "a worker that is to end does not finish a long batch first"
            assert queue.result(second).failure.reason == "SHUTTING_DOWN"
            assert not queue.leases.holders([second])

        with worker_process(url, log, PRECEPTOR_BATCH_SECONDS="2"):
            # The message of the second attempt may come once more: it was answered.
            result = queue.result(submit(queue.app, endless, 3), START_SECONDS)
            # it is the same work, and too much for the time limit that this worker has
            assert result.failure.reason == "TRIAL_TIMEOUT"
            assert result.failure.attempts == 3
            assert queue.result(second).failure.reason == "SHUTTING_DOWN"
