from pathlib import Path

import pytest

from preceptor.artifacts import ArtifactStore, folder_sha256
from preceptor.errors import PreceptorError


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
