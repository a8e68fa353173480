"""The embedded stack with a second teacher over an endpoint: it is there where it can be, and costs nobody else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from preceptor.channel import call, connect, is_serving, stream
from preceptor.settings import HouseSettings
from preceptor.stack import EXTERNAL_TEACHER, Stack
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import teacher_pb2_grpc
from tests.inference_server import BASE, KEY, PlayedServer, Reply, played_server
from tests.orchestrated import passage


@pytest.fixture
def server() -> Iterator[PlayedServer]:
    with played_server(vllm=False) as played:
        yield played


@contextmanager
def stack_with(server: PlayedServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Stack, list[str]]]:
    for name, value in {"SERVER_URL": server.url, "SERVER_MODEL": BASE, "SERVER_API_KEY": KEY}.items():
        monkeypatch.setenv(f"PRECEPTOR_EXTERNAL_TEACHER_{name}", value)
    said: list[str] = []
    with Stack(HouseSettings(home=home), workers=1, on_event=said.append) as stack:
        yield stack, said


def test_an_endpoint_gets_a_teacher_of_its_own_beside_the_one_that_learns(
    tmp_path: Path, server: PlayedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stack_with(server, tmp_path, monkeypatch) as (stack, _):
        (child,) = [child for child in stack.processes() if child.name == EXTERNAL_TEACHER]
        (orchestrator,) = [child for child in stack.processes() if child.name == "orchestrator"]
        assert orchestrator.environment["PRECEPTOR_EXTERNAL_TEACHER_ADDRESS"] == child.address
        end = time.monotonic() + 60
        while not is_serving(child.address):
            assert time.monotonic() < end, child.log.read_text()
            time.sleep(0.1)
        theirs = connect(child.address, teacher_pb2_grpc.TeacherServiceStub)
        ours = connect(stack.addresses.teacher_address, teacher_pb2_grpc.TeacherServiceStub)
        policy = call(theirs.GetPolicy, teacher.GetPolicyRequest()).policy
        assert policy.fixed
        assert policy.base_source == BASE
        assert not call(ours.GetPolicy, teacher.GetPolicyRequest()).policy.fixed
        task = passage("river 1")
        del task.passage.questions[:]
        task.reference_edits.clear()
        request = teacher.GenerateSelfEditsRequest(tasks=[task], samples_per_task=2, prompt_format="self_qa", seed=1)
        (group,) = stream(theirs.GenerateSelfEdits, request, deadline=60)
        assert len(group.self_edits) == 2
    assert (tmp_path / EXTERNAL_TEACHER / "teacher.db").exists()
    assert KEY not in (tmp_path / "logs" / f"{EXTERNAL_TEACHER}.log").read_text()


def test_an_endpoint_that_refuses_leaves_the_stack_up_without_it(
    tmp_path: Path, server: PlayedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.trouble = lambda _number, _path, _body: Reply(401, {"error": {"message": "no such key"}})
    with stack_with(server, tmp_path, monkeypatch) as (stack, said):
        end = time.monotonic() + 90
        while not any("runs go on without its arm" in line for line in said):
            assert time.monotonic() < end, said
            time.sleep(0.1)
        assert stack.failed is None
        assert is_serving(stack.addresses.orchestrator_address)
        (line,) = [line for line in said if "runs go on without its arm" in line]
        assert EXTERNAL_TEACHER in line
