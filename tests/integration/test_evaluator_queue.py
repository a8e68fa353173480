"""The evaluator's process on a real Redis with real Celery workers, which are killed. No model: see scripted_worker."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from preceptor.channel import call, is_serving, open_channel, stream
from preceptor.redis_server import EmbeddedRedis
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1.evaluator_pb2_grpc import EvaluatorServiceStub
from tests.evaluation_requests import group

START_SECONDS = 60.0
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(holds: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


class Stack:
    """Redis, an evaluator and workers as processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.log = folder / "trained.log"
        self.log.touch()
        self.server = EmbeddedRedis(folder / "redis", free_port())
        self.redis = self.start_redis()
        self.port = free_port()
        self.channel = open_channel(f"127.0.0.1:{self.port}")
        self.stub = EvaluatorServiceStub(self.channel)
        self.evaluator = self.start_evaluator()

    def spawn(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        output = (self.folder / f"process-{len(self.processes)}.log").open("wb")
        with output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        return process

    def start_redis(self) -> subprocess.Popen[bytes]:
        process = self.spawn(*self.server.command)
        with redis.Redis.from_url(self.server.url) as client:

            def answers() -> bool:
                try:
                    return bool(client.ping())
                except redis.RedisError:
                    return False

            wait_until(answers, START_SECONDS)
        return process

    def start_evaluator(self) -> subprocess.Popen[bytes]:
        process = self.spawn(
            sys.executable,
            "-m",
            "evaluator",
            PRECEPTOR_HOME=str(self.folder),
            PRECEPTOR_PORT=str(self.port),
            PRECEPTOR_BROKER_URL=self.server.url,
            PRECEPTOR_ORPHAN_SECONDS="6",
        )
        wait_until(lambda: is_serving(f"127.0.0.1:{self.port}"), START_SECONDS)
        return process

    def start_worker(self, *options: str) -> subprocess.Popen[bytes]:
        return self.spawn(
            sys.executable, "-m", "tests.integration.scripted_worker", self.server.url, str(self.log), *options
        )

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGKILL)
        process.wait(10)

    def create(self, *documents: str, **options: object) -> list[str]:
        request = group(*documents, **options)  # type: ignore[arg-type]
        return [item.id for item in call(self.stub.CreateEvaluations, request).evaluations]

    def results(self, ids: list[str], seconds: float = 60) -> list[pb.Evaluation]:
        """The final evaluations, in order."""
        request = pb.WatchEvaluationsRequest(evaluation_ids=ids)
        responses = stream(self.stub.WatchEvaluations, request, deadline=seconds)
        found = {response.evaluation.id: response.evaluation for response in responses}
        return [found[one] for one in ids]

    def trained(self) -> Counter[str]:
        return Counter(self.log.read_text().split())

    def close(self) -> None:
        self.channel.close()
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(10)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    made = Stack(tmp_path)
    yield made
    made.close()


def test_the_same_evaluation_asked_by_two_runs_trains_once(stack: Stack) -> None:
    stack.start_worker()
    first = stack.create("Ada lives in Lisbon.", "Nothing.", seeds=(1, 2))
    second = stack.create("Ada lives in Lisbon.", "Nothing.", seeds=(1, 2), owner="run-2")
    assert first == second
    values = [item.reward.value for item in stack.results(first, START_SECONDS)]
    assert values == [0.5, 0.0]
    third = group("Ada lives in Lisbon.", seeds=(1, 2), owner="run-3")
    assert call(stack.stub.CreateEvaluations, third).evaluations[0].cached
    assert sorted(stack.trained().values()) == [1, 1, 1, 1, 1]  # four trials and the baseline, once each


def test_a_failing_trial_is_a_failure_with_its_reason_and_without_reward(stack: Stack) -> None:
    stack.start_worker()
    bad, good = stack.results(stack.create("fail:TRIAL_DIVERGED", "Ada lives in Lisbon."), START_SECONDS)
    assert bad.state == pb.EVALUATION_STATE_FAILED
    assert (bad.failure.reason, bad.failure.attempts) == ("TRIAL_DIVERGED", 1)
    assert not bad.HasField("reward")
    assert good.reward.value == 0.5


def test_a_killed_worker_s_batch_is_given_again(stack: Stack) -> None:
    doomed = stack.start_worker("--die-first")
    ids = stack.create("Ada lives in Lisbon.")
    doomed.wait(START_SECONDS)
    died = time.monotonic()
    stack.start_worker()
    (found,) = stack.results(ids, 40)
    took = time.monotonic() - died
    print(f"given again and finished {took:.1f} s after the kill")
    assert found.reward.value == 0.5
    assert took < 45  # 11 s where the machine is not busy
    assert sorted(stack.trained().values()) == [1, 2]  # the baseline was done, the lost trial done again


@pytest.mark.parametrize("moment", ["nothing runs", "a worker is busy"])
def test_a_killed_evaluator_finishes_after_its_restart(stack: Stack, moment: str) -> None:
    if moment == "a worker is busy":
        stack.start_worker("--slow", "3")
    ids = stack.create("Ada lives in Lisbon.", "Ada is a baker.")
    if moment == "a worker is busy":
        wait_until(lambda: len(stack.trained()) >= 2, START_SECONDS)
    stack.kill(stack.evaluator)
    stack.start_evaluator()
    stack.start_worker()
    assert [item.reward.value for item in stack.results(ids)] == [0.5, 0.5]
    assert set(stack.trained().values()) == {1}


def test_redis_killed_and_started_again_loses_nothing(stack: Stack) -> None:
    ids = stack.create("Ada lives in Lisbon.")
    time.sleep(1.5)  # appended to its file once a second
    stack.kill(stack.redis)
    more = stack.create("Ada is a baker.")  # taken on while the broker is away
    stack.start_redis()
    stack.start_worker()
    assert [item.reward.value for item in stack.results([*ids, *more])] == [0.5, 0.5]


def test_redis_that_lost_all_its_data_is_filled_again(stack: Stack) -> None:
    ids = stack.create("Ada lives in Lisbon.")
    with redis.Redis.from_url(stack.server.url) as client:
        wait_until(lambda: client.llen("trials") == 2, 10)
        time.sleep(1.5)
        client.flushall()
        wait_until(lambda: client.llen("trials") == 2, 10)  # long before the 60 s of a job that nobody took
    stack.start_worker()
    assert [item.reward.value for item in stack.results(ids)] == [0.5]


def test_a_result_of_the_first_attempt_ends_the_second_one(stack: Stack) -> None:
    """A worker that is stopped and goes on when its batch has been given to another."""
    first = stack.start_worker("--slow", "6")
    ids = stack.create("Ada lives in Lisbon.")
    wait_until(lambda: len(stack.trained()) == 2, START_SECONDS)  # the baseline is done, the trial has begun
    first.send_signal(signal.SIGSTOP)
    with redis.Redis.from_url(stack.server.url) as client:
        wait_until(lambda: client.llen("trials") == 1, 30)
    first.send_signal(signal.SIGCONT)
    (found,) = stack.results(ids, 40)
    assert found.reward.value == 0.5
    attempts = call(stack.stub.ListAttempts, pb.ListAttemptsRequest(evaluation_id=ids[0])).attempts
    ends = sorted((one.number, one.failure.reason) for one in attempts)
    assert ends[:2] == [(1, ""), (1, "")]
    assert [number for number, _ in ends[2:]] in ([], [2])


def test_what_failed_is_retried_on_real_workers(stack: Stack) -> None:
    stack.start_worker()
    ids = stack.create("fail:TRIAL_DIVERGED", "Ada lives in Lisbon.")
    assert [item.state for item in stack.results(ids)] == [pb.EVALUATION_STATE_FAILED, pb.EVALUATION_STATE_SUCCEEDED]
    stack.kill(stack.evaluator)
    stack.start_evaluator()
    request = pb.RetryEvaluationsRequest(request_id="r")
    assert call(stack.stub.RetryEvaluations, request).retried == 1
    assert [item.failure.reason for item in stack.results(ids)] == ["TRIAL_DIVERGED", ""]
    attempts = call(stack.stub.ListAttempts, pb.ListAttemptsRequest(evaluation_id=ids[0])).attempts
    assert [one.trials for one in attempts if one.HasField("failure")] == [2, 1]
    assert all(one.worker for one in attempts)


def test_sigterm_drains_and_leaves_everything_for_the_next_start(stack: Stack) -> None:
    ids = stack.create("Ada lives in Lisbon.")
    stack.evaluator.terminate()
    assert stack.evaluator.wait(20) == 0
    stack.start_evaluator()
    stack.start_worker()
    assert [item.reward.value for item in stack.results(ids)] == [0.5]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PRECEPTOR_DATABASE_URL": "sqlite:////nowhere/at/all.db"}, "PRECEPTOR_DATABASE_URL"),
        ({"PRECEPTOR_BROKER_URL": "http://127.0.0.1"}, "PRECEPTOR_BROKER_URL"),
        ({"PRECEPTOR_TRIAL_ATTEMPTS": "0"}, "PRECEPTOR_TRIAL_ATTEMPTS"),
        ({"PRECEPTOR_MAX_WAITING": "0"}, "PRECEPTOR_MAX_WAITING"),
    ],
)
def test_a_wrong_environment_is_one_message_and_exit_code_2(
    tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "evaluator"],
        cwd=ROOT,
        env=os.environ | {"PRECEPTOR_HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_redis_that_refuses_is_one_message_and_exit_code_2(stack: Stack, tmp_path: Path) -> None:
    with redis.Redis.from_url(stack.server.url) as client:
        client.config_set("requirepass", "right")
    done = subprocess.run(
        [sys.executable, "-m", "evaluator"],
        cwd=ROOT,
        env=os.environ
        | {
            "PRECEPTOR_HOME": str(tmp_path / "other"),
            "PRECEPTOR_BROKER_URL": stack.server.url.replace("redis://", "redis://:wrong@"),
        },
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert done.returncode == 2
    assert "BROKER_REFUSED" in done.stderr
    assert "wrong" not in done.stderr
    assert "Traceback" not in done.stderr


def test_an_occupied_port_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = {"PRECEPTOR_HOME": str(tmp_path), "PRECEPTOR_PORT": str(taken.getsockname()[1])}
        done = subprocess.run(
            [sys.executable, "-m", "evaluator"],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
        )
    assert done.returncode == 2
    assert "cannot listen" in done.stderr
    assert "Traceback" not in done.stderr
