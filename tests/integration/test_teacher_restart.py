"""The teacher as a process of its own: killed in the middle of an update, it ends where it would have ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from preceptor.artifacts import verified_folder
from preceptor.channel import call, connect, is_serving, stream
from preceptor.convert import task_to_proto
from preceptor.tasks import Passage
from preceptor.v1 import teacher_pb2 as pb
from preceptor.v1 import teacher_pb2_grpc
from tests.unit.tiny_teachers import PASSAGE, save_tiny_teacher


class Process:
    """`python -m teacher` on a free port."""

    def __init__(self, home: Path, source: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        environment = os.environ | {
            "PRECEPTOR_HOME": str(home),
            "PRECEPTOR_PORT": str(port),
            "PRECEPTOR_TEACHER_SOURCE": str(source),
            "PRECEPTOR_TEACHER_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen([sys.executable, "-m", "teacher"], env=environment)
        end = time.monotonic() + 90
        while not is_serving(self.address):
            assert self.process.poll() is None, "the teacher ended by itself"
            assert time.monotonic() < end, "the teacher does not serve"
        self.stub = connect(self.address, teacher_pb2_grpc.TeacherServiceStub)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=10)


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    made: list[Process] = []
    yield made
    for process in made:
        if process.process.poll() is None:
            process.kill()


def update() -> pb.UpdatePolicyRequest:
    request = pb.UpdatePolicyRequest(request_id="r1", seed=7, activate=True)
    # long enough to have a middle
    request.settings.MergeFrom(pb.UpdateSettings(rank=4, learning_rate=1e-3, epochs=25, batch_size=1, top_k=2))
    for i in range(4):
        task = task_to_proto(Passage(f"Title {i}", f"{PASSAGE} Number {i}.", ()))
        for j in range(3):
            completion = f"Ada Brook lives in Lisbon.\nNumber {i} {j}."
            request.examples.add(group_id=f"g{i}", task=task, completion=completion, reward=j - 0.5)
    return request


def ended(process: Process, policy_id: str) -> pb.Policy:
    request = pb.WatchPolicyRequest(policy_id=policy_id)
    return [response.policy for response in stream(process.stub.WatchPolicy, request, deadline=120)][-1]


def test_killed_in_the_middle_of_an_update_it_ends_with_the_same_policy(
    tmp_path: Path, processes: list[Process]
) -> None:
    source = save_tiny_teacher(tmp_path / "model")
    killed = Process(tmp_path / "killed", source)
    processes.append(killed)
    policy = call(killed.stub.UpdatePolicy, update()).policy
    while call(killed.stub.GetPolicy, pb.GetPolicyRequest(policy_id=policy.id)).policy.steps < 5:
        time.sleep(0.005)
    killed.kill()
    assert not (tmp_path / "killed" / "artifacts" / "policies" / policy.id).exists()

    again = Process(tmp_path / "killed", source)
    processes.append(again)
    assert call(again.stub.UpdatePolicy, update()).policy.id == policy.id  # a client that retries
    finished = ended(again, policy.id)
    assert finished.state == pb.POLICY_STATE_READY
    assert finished.active
    assert finished.steps == 4 * 25

    undisturbed = Process(tmp_path / "undisturbed", source)
    processes.append(undisturbed)
    expected = ended(undisturbed, call(undisturbed.stub.UpdatePolicy, update()).policy.id)
    assert expected.id == finished.id
    ours = load_file(verified_folder(finished.adapter) / "adapter_model.safetensors")
    theirs = load_file(verified_folder(expected.adapter) / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)

    undisturbed.process.send_signal(signal.SIGTERM)
    assert undisturbed.process.wait(timeout=20) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"PRECEPTOR_TEACHER_SOURCE": "/nowhere"}, "BAD_TEACHER_SOURCE"),
        ({"PRECEPTOR_TEACHER_ROWS": "0"}, "PRECEPTOR_TEACHER_ROWS"),
    ],
)
def test_a_bad_setting_ends_it_with_one_message(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    environment = os.environ | {"PRECEPTOR_HOME": str(tmp_path)} | changes
    done = subprocess.run(
        [sys.executable, "-m", "teacher"], env=environment, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
