"""Real workers to whom something happens: messages twice, pauses, a Redis that goes away, what breaks in themselves."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from preceptor.leases import LEASE_SECONDS
from preceptor.queue import TRIAL_QUEUE, fetch_result, submit
from student.watchdog import ENDED_ITSELF
from tests.chaos.proxy import Proxy
from tests.integration.worker_house import (
    ENDLESS,
    LONG,
    START_SECONDS,
    Queue,
    RedisServer,
    redis_server,
    wait_for,
    worker_process,
)
from tests.unit.tiny_students import save_student

# A beat of 2 s, a step, and a busy machine.
NOTICED_SECONDS = 10.0


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("student"))


@dataclass
class Pair:
    """A queue with two workers."""

    server: RedisServer
    queue: Queue
    processes: dict[str, subprocess.Popen[bytes]]  # by the name that the worker gives itself
    log: Path

    def said(self, words: str) -> int:
        """How often the workers' log says this."""
        return self.log.read_text().count(words)

    def cancel(self, task_id: str) -> None:
        """Ends an endless batch."""
        self.queue.leases.cancel(task_id, ["edit"])
        assert self.queue.result(task_id, NOTICED_SECONDS).failure.reason == "CANCELLED"


@pytest.fixture(scope="module")
def pair(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    log = folder / "workers.log"
    with (
        redis_server(folder / "redis") as server,
        worker_process(server.url, log) as first,
        worker_process(server.url, log) as second,
    ):
        queue = Queue(server.url, student)
        names = [worker.name for worker in queue.workers(2)]
        processes = {name: one for name in names for one in (first, second) if name.endswith(f":{one.pid}")}
        yield Pair(server, queue, processes, log)


def test_a_message_that_is_delivered_twice_is_trained_once(pair: Pair) -> None:
    batch = pair.queue.training("twice", ENDLESS)
    task_id = submit(pair.queue.app, batch, 1)
    holder = pair.queue.at_work(task_id)
    assert submit(pair.queue.app, batch, 1) == task_id
    wait_for(lambda: pair.said(f"{task_id} is not begun: another worker is at it"), 20)
    assert pair.queue.leases.holders([task_id])[task_id].worker == holder.name
    assert fetch_result(pair.queue.app, task_id) is None
    wait_for(lambda: any(not one.task_id for one in pair.queue.leases.workers()), NOTICED_SECONDS)  # and is free again
    pair.cancel(task_id)
    with pair.server.client() as client:
        wait_for(lambda: not client.hlen("unacked"), NOTICED_SECONDS)  # both deliveries are acknowledged


def test_a_paused_worker_leaves_what_was_given_on_meanwhile(pair: Pair) -> None:
    batch = pair.queue.training("paused", ENDLESS)
    first = submit(pair.queue.app, batch, 1)
    paused = pair.queue.at_work(first)
    pair.processes[paused.name].send_signal(signal.SIGSTOP)
    wait_for(lambda: not pair.queue.leases.holders([first]), LEASE_SECONDS + 3)
    second = submit(pair.queue.app, batch, 2)
    other = pair.queue.at_work(second)
    assert other.name != paused.name
    begun = time.monotonic()
    pair.processes[paused.name].send_signal(signal.SIGCONT)
    wait_for(lambda: pair.said(f"{first} is left after "), NOTICED_SECONDS)
    print(f"left {time.monotonic() - begun:.1f} s after it could go on")
    wait_for(lambda: not pair.queue.leases.holders([first]), NOTICED_SECONDS)
    assert fetch_result(pair.queue.app, first) is None
    # The first attempt's message comes once more, to a worker that has nothing to do.
    submit(pair.queue.app, batch, 1)
    wait_for(lambda: pair.said(f"{first} is not begun: a later attempt"), NOTICED_SECONDS)
    assert pair.queue.at_work(second).name == other.name
    pair.cancel(second)
    assert pair.queue.leases.begun([batch.id]) == {batch.id: 2}


def test_connections_that_drop_while_redis_stays_up_train_nothing_twice(pair: Pair) -> None:
    batch = pair.queue.training("dropped", LONG)
    task_id = submit(pair.queue.app, batch, 1)
    pair.queue.at_work(task_id)
    with pair.server.client() as client:
        client.client_kill_filter(_type="normal", skipme=True)
    result = pair.queue.result(task_id)
    assert not result.HasField("failure"), result.failure
    with pair.server.client() as client:
        wait_for(lambda: not client.hlen("unacked") and not client.llen(TRIAL_QUEUE), 30)
    time.sleep(3)  # for whoever would begin it again
    assert pair.said(f"batch {batch.id}: 1 trials in") == 1
    # and both workers go on taking jobs
    names = set()
    for number in range(20):
        names.add(pair.queue.run(pair.queue.training(f"after the drop {number}", LONG // 32)).worker)
    assert names <= set(pair.processes)


@pytest.mark.parametrize("how", ["away", "full"])
def test_a_result_that_ends_while_redis_takes_nothing_arrives_later(pair: Pair, how: str) -> None:
    batch = pair.queue.training(f"redis is {how}", LONG)
    task_id = submit(pair.queue.app, batch, 1)
    pair.queue.at_work(task_id)
    if how == "away":
        pair.server.stop()
    else:
        with pair.server.client() as client:
            client.config_set("maxmemory", "1")
    wait_for(lambda: pair.said(f"batch {batch.id}: 1 trials in"), START_SECONDS)
    wait_for(lambda: pair.said("Failed operation _store_result"), NOTICED_SECONDS)
    if how == "away":
        pair.server.start()
    else:
        with pair.server.client() as client:
            client.config_set("maxmemory", "0")
    result = pair.queue.result(task_id, 30)
    assert not result.HasField("failure"), result.failure
    pair.queue.workers(2)
    wait_for(lambda: not pair.queue.leases.holders([task_id]), NOTICED_SECONDS)
    # Both workers are back: one does not do for two batches at once.
    for one in [submit(pair.queue.app, pair.queue.training(f"{how} {n}", ENDLESS), 1) for n in range(2)]:
        wait_for(lambda one=one: pair.queue.leases.holders([one]), 60)  # type: ignore[misc]
        pair.queue.leases.cancel(one, ["edit"])
        pair.queue.result(one, 30)
    assert pair.said(f"batch {batch.id}: 1 trials in") == 1
    assert pair.said("Traceback") == 0


def test_nothing_is_begun_before_redis_has_granted_it(pair: Pair) -> None:
    batch = pair.queue.training("not granted", LONG // 32)
    with pair.server.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "-eval")  # messages come, claims fail
        try:
            task_id = submit(pair.queue.app, batch, 1)
            wait_for(lambda: pair.said("waiting for Redis before beginning: ") >= 3, 20)
            assert not pair.queue.leases.holders([task_id])
            assert not pair.said(f"batch {batch.id}: ")
        finally:
            client.execute_command("ACL", "SETUSER", "default", "+eval")
    assert not pair.queue.result(task_id).HasField("failure")
    assert pair.said(f"batch {batch.id}: 1 trials in") == 1


def test_workers_that_are_refused_their_jobs_wait_and_go_on(pair: Pair) -> None:
    before = [worker.name for worker in pair.queue.workers(2)]
    lost = pair.said("Connection to broker lost")
    with pair.server.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "-brpop")  # as MISCONF does, where Redis's disk is full
        try:
            wait_for(lambda: pair.said("Connection to broker lost") >= lost + 4, 20)
        finally:
            client.execute_command("ACL", "SETUSER", "default", "+brpop")
    assert not pair.queue.run(pair.queue.training("after the refusal", LONG // 32)).HasField("failure")
    assert [worker.name for worker in pair.queue.workers(2)] == before


@pytest.mark.slow
def test_a_network_that_stalls_for_half_a_minute_does_not_wedge_a_worker(student: Path, tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    with redis_server(tmp_path / "redis") as server, Proxy(lambda: ("127.0.0.1", server.port)) as proxy:
        url = server.url.replace(f":{server.port}/", f":{proxy.port}/")
        with worker_process(url, log) as process:
            queue = Queue(server.url, student)
            (before,) = queue.workers(1)
            batch = queue.training("stalled", LONG)
            task_id = submit(queue.app, batch, 1)
            queue.at_work(task_id)
            proxy.stall(30)  # while it trains, and while it has a result
            result = queue.result(task_id, 90)
            assert not result.HasField("failure"), result.failure
            wait_for(queue.idle, 30)
            proxy.stall(30)  # while it waits for a job
            # What Redis pops for a connection that is gone is gone with it: kombu's BRPOP waits for a second each time.
            # The evaluator notices that nobody has it; here the job comes after that second.
            time.sleep(3)
            begun = time.monotonic()
            later = queue.run(queue.training("after the stall", 1024))
            assert not later.HasField("failure"), later.failure
            print(f"a job sent 3 s into a stall of 30 s was back after {time.monotonic() - begun:.1f} s")
            assert process.poll() is None
            assert queue.workers(1)[0].name == before.name
    assert log.read_text().count("batch stalled: 1 trials in") == 1


@pytest.mark.parametrize(
    ("what", "settings", "words"),
    [
        ("hangs", {"PRECEPTOR_STALL_SECONDS": "3"}, ("PRECEPTOR_STALL_SECONDS", "never_returns")),
        ("hangs while loading", {"PRECEPTOR_LOAD_SECONDS": "3"}, ("PRECEPTOR_LOAD_SECONDS", "never_returns")),
        ("holds the interpreter", {}, ("holds_the_interpreter",)),
        ("cannot beat", {}, ("cannot beat any more: RuntimeError", "never_returns")),
    ],
)
def test_a_worker_that_stands_still_ends_itself_and_says_where(
    student: Path, tmp_path: Path, what: str, settings: dict[str, str], words: tuple[str, ...]
) -> None:
    log = tmp_path / "worker.log"
    with redis_server(tmp_path / "redis") as server:
        queue = Queue(server.url, student)
        broken = worker_process(server.url, log, what, module="tests.integration.broken_worker", **settings)
        with broken as process:
            queue.workers(1)
            task_id = submit(queue.app, queue.batch("stuck"), 1)
            wait_for(lambda: queue.leases.holders([task_id]), 20)
            begun = time.monotonic()
            code = process.wait(30)
            print(f"{what}: ended {time.monotonic() - begun:.1f} s after it took the batch")
            # faulthandler's own end has the code 1
            assert code == (1 if what == "holds the interpreter" else ENDED_ITSELF)
            said = log.read_text()
            for word in words:
                assert word in said
        wait_for(lambda: not queue.leases.holders([task_id]), LEASE_SECONDS + 3)
        assert fetch_result(queue.app, task_id) is None


def test_a_worker_whose_device_broke_says_so_and_comes_back_only_by_being_started_again(
    student: Path, tmp_path: Path
) -> None:
    log = tmp_path / "worker.log"
    with redis_server(tmp_path / "redis") as server:
        queue = Queue(server.url, student)
        broken = worker_process(server.url, log, "loses the device", module="tests.integration.broken_worker")
        with broken as process:
            queue.workers(1)
            failure = queue.run(queue.batch("device")).failure
            assert failure.reason == "DEVICE_FAILED"
            assert "device-side assert triggered" in failure.message
            assert process.wait(20) == ENDED_ITSELF
        with worker_process(server.url, log):
            wait_for(lambda: queue.worker() if queue.idle().trials_done == 0 else None, START_SECONDS)
            assert not queue.run(queue.batch("device"), attempt=2).HasField("failure")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (":wrong@", "invalid username-password pair or user is disabled"),
        ("", "it wants a password"),
    ],
)
def test_a_worker_that_redis_refuses_says_so_and_does_not_start(tmp_path: Path, wrong: str, words: str) -> None:
    log = tmp_path / "worker.log"
    with redis_server(tmp_path / "redis") as server:
        place = server.url.rpartition("@")[2]
        with worker_process(f"redis://{wrong}{place}", log) as process:
            assert process.wait(60) == 2
        said = log.read_text()
        assert "BROKER_REFUSED" in said
        assert words in said
        assert "wrong@" not in said
        log.unlink()
        with worker_process(server.url.removesuffix("/0") + "/4711", log) as process:
            assert process.wait(60) == 2
        assert "DB index is out of range" in log.read_text()
        said += log.read_text()
        log.unlink()
        with worker_process("redis://127.0.0.1:1/abc", log) as process:
            assert process.wait(60) == 2
        said += log.read_text()
        assert "PRECEPTOR_BROKER_URL=redis://127.0.0.1:1/abc is no URL of a Redis" in said
        assert "Traceback" not in said


def test_a_worker_without_redis_waits_for_it(student: Path, tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    server = RedisServer(tmp_path / "redis")
    with worker_process(server.url, log) as process:
        wait_for(lambda: log.exists() and "BROKER_UNREACHABLE" in log.read_text(), START_SECONDS)
        server.start()
        try:
            queue = Queue(server.url, student)
            queue.workers(1)
            assert process.poll() is None
        finally:
            process.terminate()
            process.wait(20)
            server.stop()
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_sigterm_ends_a_worker_that_cannot_store_its_result(student: Path, tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    with redis_server(tmp_path / "redis") as server, worker_process(server.url, log) as process:
        queue = Queue(server.url, student)
        queue.workers(1)
        batch = queue.training("unstored", LONG)
        queue.at_work(submit(queue.app, batch, 1))
        server.stop()
        wait_for(lambda: "Failed operation _store_result" in log.read_text(), START_SECONDS)
        process.terminate()
        begun = time.monotonic()
        process.wait(60)
        print(f"ended {time.monotonic() - begun:.1f} s after SIGTERM")


def test_a_killed_connection_is_no_error_for_a_lease_board(pair: Pair) -> None:
    board = pair.queue.leases
    names = [worker.name for worker in pair.queue.workers(2)]
    with pair.server.client() as client:
        assert client.client_kill_filter(_type="normal", skipme=True) > 0
    assert [worker.name for worker in board.workers()] == names
