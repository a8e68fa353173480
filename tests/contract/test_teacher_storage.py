"""The teacher on a disk that is full or has lost something: what waits, what is made again, what stays the same."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preceptor.artifacts import verified_folder
from preceptor.channel import call, stream
from preceptor.errors import PreceptorError
from preceptor.v1 import teacher_pb2 as pb
from tests.contract.test_teacher_service import Running, generate_request, update_request, watched
from tests.small_disk import small_disk

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def policy(running: Running, policy_id: str) -> pb.Policy:
    return call(running.stub.GetPolicy, pb.GetPolicyRequest(policy_id=policy_id)).policy


def made(running: Running, **changes: Any) -> pb.Policy:
    """A policy that was trained."""
    started = call(running.stub.UpdatePolicy, update_request(**{"request_id": "first", **changes})).policy
    ended = watched(running, started.id)[-1]
    assert ended.state == pb.POLICY_STATE_READY
    return ended


def written(running: Running, policy_id: str) -> list[bytes]:
    """What a policy writes, but for the time it takes."""
    groups = list(stream(running.stub.GenerateSelfEdits, generate_request(2, policy_id=policy_id), deadline=60))
    for group in groups:
        group.seconds = 0
    return [group.SerializeToString(deterministic=True) for group in groups]


def damage(home: Path, policy_id: str, how: str) -> None:
    folder = home / "artifacts" / "policies" / policy_id
    if how == "gone":
        shutil.rmtree(folder)
    else:
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(b"" if how == "empty" else weights.read_bytes()[:-7])


def test_an_update_needs_room_for_its_artifact_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "tmp") as disk:
        disk.fill()
        monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
        running = Running(tmp_path / "home")
        try:
            made(running)
        finally:
            running.stop()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed teacher makes: a policy, its child, and what the first one writes."""
    running = Running(tmp_path_factory.mktemp("undisturbed"))
    try:
        first = made(running)
        child = made(running, request_id="second", parent_id=first.id)
        return {"first": first.adapter.sha256, "child": child.adapter.sha256, "text": written(running, first.id)}
    finally:
        running.stop()


@pytest.mark.parametrize("how", ["empty", "truncated", "gone"])
def test_a_policy_with_damaged_files_is_trained_again_and_writes_the_same(
    tmp_path: Path, expected: dict[str, Any], how: str
) -> None:
    running = Running(tmp_path)
    first = made(running)
    base = policy(running, first.parent_id)
    running.stop()
    damage(tmp_path, first.id, how)
    running = Running(tmp_path)
    try:
        assert written(running, first.id) == expected["text"]
        after = policy(running, first.id)
        assert after.adapter.sha256 == expected["first"]
        assert verified_folder(after.adapter).is_dir()
        assert policy(running, "").id == base.id  # what is active is as it was
    finally:
        running.stop()


def test_a_child_of_a_damaged_policy_is_what_it_would_have_been(tmp_path: Path, expected: dict[str, Any]) -> None:
    running = Running(tmp_path)
    first = made(running, activate=True)
    call(running.stub.ActivatePolicy, pb.ActivatePolicyRequest(request_id="back", policy_id=first.parent_id))
    damage(tmp_path, first.id, "truncated")
    try:
        child = made(running, request_id="second", parent_id=first.id)
        assert child.adapter.sha256 == expected["child"]
        assert policy(running, first.id).adapter.sha256 == expected["first"]
        assert not policy(running, first.id).active  # being made again activates nothing
    finally:
        running.stop()


def test_a_restart_in_the_middle_of_making_a_policy_again_is_waited_for(
    tmp_path: Path, expected: dict[str, Any]
) -> None:
    running = Running(tmp_path)
    first = made(running)
    damage(tmp_path, first.id, "gone")
    running.teacher.policies.stop()  # so that nobody trains it again here
    running.teacher.policies.restore(first.id)
    assert policy(running, first.id).state == pb.POLICY_STATE_TRAINING
    running.stop()
    running = Running(tmp_path)
    try:
        assert written(running, first.id) == expected["text"]
        assert made(running, request_id="second", parent_id=first.id).adapter.sha256 == expected["child"]
    finally:
        running.stop()


def test_a_damaged_folder_of_a_policy_that_was_not_finished_is_not_taken_for_whole(
    tmp_path: Path, expected: dict[str, Any]
) -> None:
    running = Running(tmp_path)
    folder = tmp_path / "artifacts" / "policies" / update_id(running)
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"")  # named, and then the power was gone
    try:
        first = made(running)
        assert first.adapter.sha256 == expected["first"]
        assert verified_folder(first.adapter) == folder
    finally:
        running.stop()


def update_id(running: Running) -> str:
    """The id that the update will give."""
    from teacher.servicer import update

    wanted = update(update_request("x"))
    parent = policy(running, "")
    return type(wanted)(parent.id, wanted.examples, wanted.settings, wanted.seed, False).policy_id(parent.base_commit)


def test_an_update_without_room_waits_says_so_and_ends_with_the_same_policy(
    tmp_path: Path, expected: dict[str, Any]
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        running = Running(disk.path)
        try:
            with running.device:  # it cannot begin before the disk is full
                started = call(running.stub.UpdatePolicy, update_request("first")).policy
                disk.fill()
            until(lambda: policy(running, started.id).failure.reason == "DISK_FULL")
            waiting = policy(running, started.id)
            assert waiting.state == pb.POLICY_STATE_TRAINING
            assert str(disk.path) in waiting.failure.message
            assert waiting.steps == waiting.steps_planned  # nothing is trained twice
            disk.free()
            ended = watched(running, started.id)[-1]
            assert ended.state == pb.POLICY_STATE_READY
            assert not ended.failure.reason
            assert ended.adapter.sha256 == expected["first"]
            assert [path.name for path in (disk.path / "artifacts" / "policies").iterdir()] == [started.id]
        finally:
            running.stop()


def test_an_update_that_waits_for_room_does_not_keep_the_service_up_and_goes_on_after_a_restart(
    tmp_path: Path, expected: dict[str, Any]
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        running = Running(disk.path)
        with running.device:
            started = call(running.stub.UpdatePolicy, update_request("first")).policy
            disk.fill()
        until(lambda: policy(running, started.id).failure.reason == "DISK_FULL")
        began = time.monotonic()
        running.stop()
        assert time.monotonic() - began < 8
        disk.free()
        running = Running(disk.path)
        try:
            assert watched(running, started.id)[-1].adapter.sha256 == expected["first"]
        finally:
            running.stop()


def test_what_was_written_without_room_is_not_written_twice(
    tmp_path: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        running = Running(disk.path)
        batches: list[int] = []
        write = running.teacher.writer._batch

        def counted(*arguments: Any) -> Any:
            batches.append(1)
            return write(*arguments)

        monkeypatch.setattr(running.teacher.writer, "_batch", counted)
        try:
            first = made(running)
            disk.fill()
            for _ in range(2):
                with pytest.raises(PreceptorError) as refused:
                    written(running, first.id)
                assert refused.value.reason == "DISK_FULL"
            disk.free()
            assert written(running, first.id) == expected["text"]
            assert len(batches) == 2  # of a task each, as the first batches are small
            assert not running.teacher.writer._unsaved
        finally:
            running.stop()
