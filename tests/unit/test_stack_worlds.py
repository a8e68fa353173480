"""A stack has the teacher of the world that is run, and a run is not taken by another world's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from preceptor.cli.session import check_teacher
from preceptor.errors import PreceptorError
from preceptor.hashes import folder_sha256
from preceptor.settings import HouseSettings
from preceptor.stack import SHIPPED_STUDENTS, WORLDS, Stack, shipped_models, shipped_student
from preceptor.v1 import teacher_pb2 as pb
from preceptor.v1 import teacher_pb2_grpc
from teacher.settings import TeacherSettings


class OneTeacher(teacher_pb2_grpc.TeacherServiceServicer):
    """A service that says which base its teacher is."""

    def __init__(self) -> None:
        self.base_commit = ""

    def GetPolicy(self, request: pb.GetPolicyRequest, context: grpc.ServicerContext) -> pb.GetPolicyResponse:
        return pb.GetPolicyResponse(policy=pb.Policy(id="base", base_commit=self.base_commit))


@pytest.fixture
def teacher() -> Iterator[tuple[OneTeacher, HouseSettings]]:
    service, server = OneTeacher(), grpc.server(ThreadPoolExecutor(1))
    teacher_pb2_grpc.add_TeacherServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service, HouseSettings(teacher_address=f"127.0.0.1:{port}")
    server.stop(None).wait()


def test_every_world_has_a_teacher_and_its_students_where_the_stack_looks_for_them() -> None:
    for world in WORLDS:
        assert (shipped_models(world) / "teacher" / "model.safetensors").is_file()
    for name, (world, _) in SHIPPED_STUDENTS.items():
        assert shipped_student(name).parent == shipped_models(world)
        assert (shipped_student(name) / "model.safetensors").is_file()


def test_a_teacher_is_named_by_its_world_by_a_folder_or_is_the_first_worlds() -> None:
    assert TeacherSettings().base_source == str(shipped_models("almanac") / "teacher")
    assert TeacherSettings(teacher_source="mosaic").base_source == str(shipped_models("mosaic") / "teacher")
    assert TeacherSettings(teacher_source="/models/mine").base_source == "/models/mine"


def test_a_stack_for_no_world_in_particular_has_the_teacher_of_the_homes_last(tmp_path: Path) -> None:
    def source(world: str | None) -> str:
        return Stack(HouseSettings(home=tmp_path), world=world).teacher_source({})

    assert source(None) == "almanac"  # a home of before
    assert source("mosaic") == "mosaic"
    assert source(None) == "mosaic"
    assert source("almanac") == "almanac"
    (tmp_path / "world").write_text("atlantis\n")
    assert source(None) == "almanac"


def test_what_the_environment_says_about_the_teacher_counts_first(tmp_path: Path) -> None:
    stack = Stack(HouseSettings(home=tmp_path), world="mosaic")
    assert stack.teacher_source({"PRECEPTOR_TEACHER_SOURCE": "Qwen/Qwen2.5-7B"}) == "Qwen/Qwen2.5-7B"
    assert stack.teacher_source({"PRECEPTOR_TEACHER_BACKEND": "openai"}) == ""
    assert stack.teacher_source({"PRECEPTOR_TEACHER_BACKEND": "", "PRECEPTOR_TEACHER_SOURCE": ""}) == "mosaic"


def test_a_run_is_refused_by_a_stack_with_another_worlds_tiny_teacher_and_taken_by_any_other(
    teacher: tuple[OneTeacher, HouseSettings],
) -> None:
    service, addresses = teacher
    service.base_commit = folder_sha256(shipped_models("almanac") / "teacher")
    check_teacher(addresses, "almanac")
    with pytest.raises(PreceptorError, match=r"the world almanac's.*the world mosaic's") as refused:
        check_teacher(addresses, "mosaic")
    assert refused.value.reason == "WRONG_TEACHER"
    service.base_commit = "0123456789abcdef"  # people's own
    for world in WORLDS:
        check_teacher(addresses, world)
