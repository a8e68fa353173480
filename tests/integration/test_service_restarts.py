"""Services as processes that are killed, paused and asked to end in the middle of their work."""

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

from preceptor.channel import call, connect, is_serving, stream
from preceptor.errors import PreceptorError
from preceptor.testing.scripted_evaluator import ScriptedEvaluator
from preceptor.testing.scripted_house import ScriptedHouse
from preceptor.testing.scripted_teacher import ScriptedTeacher
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import student_pb2 as students
from preceptor.v1 import student_pb2_grpc
from preceptor.v1 import teacher_pb2 as teacher
from tests.integration.test_orchestrator_runs import results, undisturbed, until
from tests.integration.test_teacher_restart import Process, ended, update
from tests.orchestrated import OrchestratorProcess, create_request, orchestrator_here
from tests.small_disk import small_disk
from tests.unit.tiny_students import save_student
from tests.unit.tiny_teachers import save_tiny_teacher

# The longest deadline of one try of the orchestrator is 10 s; keepalive gives a connection up after 40 s.
PAUSE_SECONDS = 21.0


class StudentProcess:
    """`python -m student` on a free port, without a Redis."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self.log = home / f"student-{port}.log"
        environment = os.environ | {
            "PRECEPTOR_HOME": str(home),
            "PRECEPTOR_PORT": str(port),
            "PRECEPTOR_BROKER_URL": "redis://127.0.0.1:1/0",
            "PRECEPTOR_GRACE_SECONDS": "2",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "student"], env=environment, stdout=log, stderr=log)
        self.stub = connect(self.address, student_pb2_grpc.StudentServiceStub)

    def serve(self) -> StudentProcess:
        """Waits until it serves."""
        until(lambda: is_serving(self.address) or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


@pytest.fixture
def ending() -> Iterator[list[StudentProcess]]:
    made: list[StudentProcess] = []
    yield made
    for process in made:
        process.end()


@pytest.mark.usefixtures("databases")
def test_a_killed_student_service_knows_what_it_has_answered(tmp_path: Path, ending: list[StudentProcess]) -> None:
    folder = save_student(tmp_path / "model")
    first = StudentProcess(tmp_path).serve()
    ending.append(first)
    register = students.RegisterStudentRequest(request_id="r1", name="tiny", source=str(folder))
    registered = call(first.stub.RegisterStudent, register).student
    call(first.stub.ActivateStudent, students.ActivateStudentRequest(request_id="r2", name="tiny"))
    first.process.kill()
    first.process.wait(10)
    second = StudentProcess(tmp_path).serve()
    ending.append(second)
    assert call(second.stub.RegisterStudent, register).student.pinned == registered.pinned
    found = call(second.stub.GetStudent, students.GetStudentRequest()).student
    assert (found.name, found.active, found.pinned) == ("tiny", True, registered.pinned)


def test_without_room_a_student_is_refused_with_the_disk_named_and_the_same_request_works_later(
    tmp_path: Path, ending: list[StudentProcess]
) -> None:
    folder = save_student(tmp_path / "model")
    register = students.RegisterStudentRequest(request_id="r1", name="tiny", source=str(folder))
    with small_disk(tmp_path / "disk") as disk:
        process = StudentProcess(disk.path).serve()
        ending.append(process)
        disk.fill()
        with pytest.raises(PreceptorError) as refused:
            call(process.stub.RegisterStudent, register)
        assert refused.value.reason == "DISK_FULL"
        assert str(disk.path) in refused.value.message
        with pytest.raises(PreceptorError) as missing:  # it serves what it can
            call(process.stub.GetStudent, students.GetStudentRequest(name="tiny"))
        assert missing.value.reason == "STUDENT_NOT_FOUND"
        disk.free()
        assert call(process.stub.RegisterStudent, register).student.name == "tiny"
        process.end()


def test_a_second_student_service_on_one_home_names_the_first_and_takes_over_when_it_ends(
    tmp_path: Path, ending: list[StudentProcess]
) -> None:
    first = StudentProcess(tmp_path).serve()
    refused = StudentProcess(tmp_path)
    ending += [first, refused]
    assert refused.process.wait(60) == 2
    assert f"another process has it (pid {first.process.pid})" in refused.log.read_text()
    assert "Traceback" not in refused.log.read_text()
    waiting = StudentProcess(tmp_path)
    ending.append(waiting)
    time.sleep(3)
    assert not is_serving(waiting.address)
    first.process.terminate()
    waiting.serve()
    assert first.process.wait(20) == 0


def test_sigterm_twice_in_the_middle_of_an_update_ends_the_teacher_within_its_grace_time(tmp_path: Path) -> None:
    source = save_tiny_teacher(tmp_path / "model")
    process = Process(tmp_path / "home", source)
    try:
        request = update()
        request.settings.epochs = 1000
        policy = call(process.stub.UpdatePolicy, request).policy
        wanted = teacher.GetPolicyRequest(policy_id=policy.id)
        until(lambda: call(process.stub.GetPolicy, wanted).policy.steps > 3)
        watch = stream(process.stub.WatchPolicy, teacher.WatchPolicyRequest(policy_id=policy.id), deadline=60)
        next(watch)
        began = time.monotonic()
        process.process.terminate()
        time.sleep(0.1)
        process.process.terminate()
        with pytest.raises(PreceptorError) as told:
            list(watch)
        assert told.value.reason == "SHUTTING_DOWN"
        assert process.process.wait(20) == 0
        assert time.monotonic() - began < 12
    finally:
        if process.process.poll() is None:
            process.kill()


def test_a_teacher_killed_while_it_waits_for_room_ends_with_the_same_policy_and_leaves_nothing(tmp_path: Path) -> None:
    source = save_tiny_teacher(tmp_path / "model")
    processes: list[Process] = []
    request = update()
    request.settings.epochs = 10
    try:
        with small_disk(tmp_path / "disk") as disk:
            processes.append(Process(disk.path, source))
            policy = call(processes[0].stub.UpdatePolicy, request).policy
            left = disk.path / "artifacts" / "policies" / f".draft-{policy.id}-x"
            left.mkdir(parents=True)
            (left / "adapter_model.safetensors").write_bytes(b"half")
            disk.fill()
            wanted = teacher.GetPolicyRequest(policy_id=policy.id)
            until(lambda: call(processes[-1].stub.GetPolicy, wanted).policy.failure.reason == "DISK_FULL")
            processes[-1].kill()
            processes.append(Process(disk.path, source))  # there is no room for it either
            disk.fill()  # what the first one had left was removed
            until(lambda: call(processes[-1].stub.GetPolicy, wanted).policy.failure.reason == "DISK_FULL")
            disk.free()
            finished = ended(processes[1], policy.id)
            assert finished.state == teacher.POLICY_STATE_READY
            assert [path.name for path in left.parent.iterdir()] == [policy.id]
            processes[1].kill()
        processes.append(Process(tmp_path / "undisturbed", source))
        expected = ended(processes[2], call(processes[2].stub.UpdatePolicy, request).policy.id)
        assert expected.adapter.sha256 == finished.adapter.sha256
    finally:
        for process in processes:
            if process.process.poll() is None:
                process.kill()


def test_an_orchestrator_that_was_paused_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    request = create_request()
    expected = undisturbed(tmp_path, request)
    evaluator = ScriptedEvaluator(seconds=0.5)
    with ScriptedHouse(tmp_path, evaluator=evaluator) as house:
        process = OrchestratorProcess(house, tmp_path)
        process.start()
        run_id = process.client.create(request)
        until(lambda: len(evaluator.requests) >= 2)
        process.send(signal.SIGSTOP)
        try:
            time.sleep(PAUSE_SECONDS)
        finally:
            process.send(signal.SIGCONT)
        assert process.client.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        assert results(process.client.summary(run_id)) == expected
        process.send(signal.SIGTERM)
        assert process.terminate() == 0  # asked twice


@pytest.mark.parametrize("name", ["teacher", "evaluator"])
def test_a_service_that_is_away_for_longer_than_a_deadline_changes_nothing(tmp_path: Path, name: str) -> None:
    request = create_request()
    expected = undisturbed(tmp_path, request)
    teacher_, evaluator = ScriptedTeacher(group_seconds=0.2, update_seconds=0.5), ScriptedEvaluator(seconds=0.3)
    with ScriptedHouse(tmp_path, teacher_, evaluator) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(request)
        until(lambda: len(evaluator.requests) >= 2)
        house.stop(name)
        time.sleep(12)
        house.start(name)
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        assert results(o.summary(run_id)) == expected
