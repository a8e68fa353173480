"""What an empty registry begins with."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from preceptor.errors import PreceptorError
from preceptor.stack import SHIPPED_STUDENTS, shipped_models, shipped_student
from student import default_student
from student.default_student import parse_default, register_default
from student.registry import Registry
from tests.unit.tiny_students import save_student


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(f"sqlite:///{tmp_path / 'student.db'}")


def test_it_is_named_as_it_would_be_registered() -> None:
    assert parse_default("almanac") == ("almanac", str(shipped_models() / "student"), "")
    assert parse_default("mosaic") == ("mosaic", str(shipped_models("mosaic") / "student"), "")
    assert parse_default("mine=/models/a=b@c") == ("mine", "/models/a=b@c", "")
    assert parse_default("qwen=Qwen/Qwen2.5-7B@a1b2") == ("qwen", "Qwen/Qwen2.5-7B", "a1b2")
    assert parse_default("qwen=Qwen/Qwen2.5-7B") == ("qwen", "Qwen/Qwen2.5-7B", "")
    for wrong in ("Qwen/Qwen2.5-7B", "=x", "UPPER=x", "a="):
        with pytest.raises(PreceptorError, match="PRECEPTOR_DEFAULT_STUDENT") as caught:
            parse_default(wrong)
        assert caught.value.reason == "BAD_CONFIG"


def test_the_shipped_students_are_registered_after_a_first_start_and_once_and_the_default_one_is_active(
    registry: Registry,
) -> None:
    for _ in range(2):
        register_default(registry, "almanac")
        assert [(one.name, one.active) for one in registry.students("", 9)] == [
            ("almanac", True),
            ("almanac-qwen2", False),
            ("mosaic", False),
        ]
    assert registry.get().current.source == str((shipped_models() / "student").resolve())
    for name in SHIPPED_STUDENTS:
        assert registry.get(name).current.source == str(shipped_student(name).resolve())


def test_a_registry_that_has_a_student_and_nothing_asked_for_are_left_alone(registry: Registry, tmp_path: Path) -> None:
    register_default(registry, "")
    assert not registry.students("", 9)
    mine = f"mine={save_student(tmp_path / 'mine')}"
    for _ in range(2):
        register_default(registry, mine)
        assert [one.name for one in registry.students("", 9)] == ["mine"]


def test_a_home_of_before_gets_the_students_that_ship_and_keeps_its_active_one(
    registry: Registry, tmp_path: Path
) -> None:
    register_default(registry, f"mine={save_student(tmp_path / 'mine')}")
    register_default(registry, "almanac")
    assert [(one.name, one.active) for one in registry.students("", 9)] == [
        ("almanac", False),
        ("almanac-qwen2", False),
        ("mine", True),
        ("mosaic", False),
    ]


def test_a_students_own_name_stays_and_a_deleted_one_does_not_come_back(registry: Registry, tmp_path: Path) -> None:
    own = save_student(tmp_path / "own")
    register_default(registry, f"mosaic={own}")
    register_default(registry, "almanac")
    assert registry.get("mosaic").current.source == str(own)

    def forget(session: Session) -> bytes:
        registry.delete(session, "almanac-qwen2")
        return b""

    registry.once("forget", b"", forget)
    register_default(registry, "almanac")
    assert [one.name for one in registry.students("", 9)] == ["almanac", "mosaic"]


def test_a_folder_that_is_not_there_is_an_error_and_a_hub_that_does_not_answer_is_asked_again_later(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PreceptorError) as caught:
        register_default(registry, f"mine={tmp_path / 'nothing'}")
    assert caught.value.reason == "BAD_STUDENT_SOURCE"

    def away(source: str, revision: str = "") -> None:
        raise PreceptorError("MODEL_UNREACHABLE", f"{source} cannot be had")

    monkeypatch.setattr(default_student, "inspect", away)
    register_default(registry, "mine=house/mine@abc")
    assert not registry.students("", 9)
    monkeypatch.undo()
    register_default(registry, f"mine={save_student(tmp_path / 'mine')}")
    assert registry.get().name == "mine"
