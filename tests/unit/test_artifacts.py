from pathlib import Path

import pytest

from preceptor.artifacts import ArtifactStore, folder_sha256
from preceptor.errors import PreceptorError
from tests.small_disk import small_disk


def _write(folder: Path) -> None:
    (folder / "a.txt").write_text("a")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text("b")


def test_a_folder_is_published_whole_and_found_again_by_its_hash(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    artifact = store.write_folder("policy-1", _write)
    assert (store.local_path(artifact) / "sub" / "b.txt").read_text() == "b"
    assert store.write_folder("policy-1", _write) == artifact


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        _write(folder)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        ArtifactStore(tmp_path).write_folder("x", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_or_missing_artifact_is_refused(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    artifact = store.write_folder("x", _write)
    (tmp_path / "x" / "a.txt").write_text("changed")
    with pytest.raises(PreceptorError) as corrupt:
        store.local_path(artifact)
    assert corrupt.value.reason == "ARTIFACT_CORRUPT"
    artifact.uri = (tmp_path / "gone").as_uri()
    with pytest.raises(PreceptorError) as missing:
        store.local_path(artifact)
    assert missing.value.reason == "ARTIFACT_NOT_FOUND"


def test_a_folder_hash_depends_on_names_and_contents_but_not_on_place_or_hidden_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        _write(folder)
    (two / ".cache").write_text("x")
    assert folder_sha256(one) == folder_sha256(two)
    (two / "a.txt").rename(two / "c.txt")
    assert folder_sha256(one) != folder_sha256(two)


def test_a_damaged_folder_gives_way_to_a_whole_one_and_a_whole_one_is_kept(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    artifact = store.write_folder("x", _write)
    kept = (tmp_path / "x").stat().st_ino
    assert store.write_folder("x", _write) == artifact
    assert (tmp_path / "x").stat().st_ino == kept
    (tmp_path / "x" / "a.txt").write_text("")  # as a power cut may leave it
    assert store.write_folder("x", _write) == artifact
    assert store.local_path(artifact).is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.write_folder("x", _write)
    for name in (".draft-y-1", ".damaged-x-1"):
        (tmp_path / name).mkdir()
        _write(tmp_path / name)
    store.remove_leftovers()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_without_room_nothing_is_published_and_with_room_it_is(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        store = ArtifactStore(disk.path / "store")
        disk.fill()
        with pytest.raises(PreceptorError) as full:
            store.write_folder("x", _write)
        assert full.value.reason == "DISK_FULL"
        disk.free()
        artifact = store.write_folder("x", _write)
        assert store.local_path(artifact).is_dir()
        assert [path.name for path in (disk.path / "store").iterdir()] == ["x"]
