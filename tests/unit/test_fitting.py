"""A student that does not fit is told from its files' headers. GPUs are simulated: their memory is a number."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from preceptor.artifacts import folder_sha256
from preceptor.errors import PreceptorError
from preceptor.v1 import types_pb2 as types
from student import fitting
from student.base_cache import BaseCache
from student.fitting import GIB, check_fits, weight_bytes
from tests.unit.tiny_students import save_student


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_student(tmp_path / "tiny")


def room_for(monkeypatch: pytest.MonkeyPatch, there: int) -> None:
    monkeypatch.setattr(fitting, "room", lambda _device: (there, f"NVIDIA T0 has {there / GIB:.2f} of 1.00 GiB free"))


def test_the_weights_are_counted_as_they_are_loaded(folder: Path) -> None:
    parameters = sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 4
    assert 0.9 * parameters < weight_bytes(folder, 1) <= parameters
    assert weight_bytes(folder, 4) == 4 * weight_bytes(folder, 1)


def test_shards_count_once_and_what_is_quantised_as_it_is_stored(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(10, 10), "ids": torch.zeros(8, dtype=torch.int64)}, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(10, 10)}, tmp_path / "consolidated.safetensors")
    assert weight_bytes(tmp_path, 2) == 200 + 64
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {}}))
    assert weight_bytes(tmp_path, 2) == 400 + 64
    save_file({"b": torch.zeros(5)}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "consolidated.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_bytes(tmp_path, 2) == 400 + 20


def test_what_cannot_be_read_is_left_to_loading(tmp_path: Path) -> None:
    assert weight_bytes(tmp_path, 2) == 0
    (tmp_path / "config.json").write_text("[")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert weight_bytes(tmp_path, 2) == 0


def test_one_that_is_too_large_is_refused_with_both_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = weight_bytes(folder, 2)
    room_for(monkeypatch, needed)
    check_fits(folder, "cuda", "tiny")
    room_for(monkeypatch, needed - 1)
    with pytest.raises(PreceptorError) as raised:
        check_fits(folder, "cuda", "tiny")
    assert raised.value.reason == "STUDENT_TOO_LARGE"
    assert raised.value.message.startswith(f"student tiny needs {needed / GIB:.2f} GiB for its weights in bfloat16,")
    assert raised.value.message.endswith("and NVIDIA T0 has 0.00 of 1.00 GiB free")


def test_a_machine_has_room_for_a_tiny_student(folder: Path) -> None:
    check_fits(folder, "cpu", "tiny")
    there, said = fitting.room("cpu")
    assert there > GIB / 4
    assert f"{there / GIB:.2f} GiB" in said


def test_others_leave_the_cache_before_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [save_student(tmp_path / str(seed), seed=seed) for seed in range(3)]
    pinned = [types.PinnedStudent(name=f.name, source=str(f), commit=folder_sha256(f)) for f in folders]
    each = weight_bytes(folders[0], 4)
    cache = BaseCache(5, "cpu")
    monkeypatch.setattr(fitting, "room_alone", lambda _device: 2 * each)
    # Room for two of them.
    monkeypatch.setattr(fitting, "room", lambda _device: (2 * each - len(cache._bases) * each, "there is no more"))
    for one in pinned:
        cache.get(one)
    assert cache.commits() == (pinned[1].commit, pinned[2].commit)
    monkeypatch.setattr(fitting, "room", lambda _device: (each - 1, "there is no more"))
    with pytest.raises(PreceptorError, match="student 0 needs"):
        cache.get(pinned[0])


@pytest.mark.parametrize("capacity", [1, 5])
def test_nobody_leaves_for_one_that_would_not_fit_alone_or_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capacity: int
) -> None:
    """A worker would read the student that it works with again after each try."""
    small, large = (save_student(tmp_path / str(seed), seed=seed) for seed in range(2))
    pinned = [types.PinnedStudent(name=f.name, source=str(f), commit=folder_sha256(f)) for f in (small, large)]
    cache = BaseCache(capacity, "cpu")
    cache.get(pinned[0])
    with pytest.raises(PreceptorError) as raised:
        cache.get(types.PinnedStudent(name="gone", source=str(tmp_path / "gone"), commit="0" * 64))
    assert raised.value.reason != "STUDENT_TOO_LARGE"
    monkeypatch.setattr(fitting.psutil, "virtual_memory", lambda: SimpleNamespace(total=weight_bytes(large, 4) - 1))
    with pytest.raises(PreceptorError) as raised:
        cache.get(pinned[1])
    assert raised.value.reason == "STUDENT_TOO_LARGE"
    assert cache.commits() == (pinned[0].commit,)
