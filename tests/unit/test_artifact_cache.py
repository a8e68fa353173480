"""What the copies of artifacts on a machine's disk promise, also to several processes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from preceptor.artifact_cache import ArtifactCache
from preceptor.errors import PreceptorError
from preceptor.hashes import folder_sha256

_CODE = """
import sys, time
from pathlib import Path
from preceptor.artifact_cache import ArtifactCache
cache, sha256, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
def fill(draft, room):
    (draft / "f").write_text("half")
    print("filling", flush=True)
    time.sleep(seconds)
    (draft / "f").write_text("content")
print(ArtifactCache(cache).get(sha256, fill), flush=True)
"""
_SHA256 = hashlib.sha256(f"{hashlib.sha256(b'content').hexdigest()}  f\n".encode()).hexdigest()


def _fill(content: str, filled: list[str] | None = None) -> Callable[[Path, Callable[[int], None]], None]:
    def fill(draft: Path, room: Callable[[int], None]) -> None:
        room(len(content))
        (draft / "f").write_text(content)
        if filled is not None:
            filled.append(content)

    return fill


def _hash(content: str, tmp_path: Path) -> str:
    folder = tmp_path / f"sample-{content[:8]}"
    folder.mkdir(exist_ok=True)
    (folder / "f").write_text(content)
    return folder_sha256(folder)


def _process(cache: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _CODE, str(cache), _SHA256, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_what_is_here_is_not_fetched_again_and_what_is_damaged_is(tmp_path: Path) -> None:
    cache, filled = ArtifactCache(tmp_path / "cache"), list[str]()
    for _ in range(2):
        folder = cache.get(_SHA256, _fill("content", filled))
    assert filled == ["content"]
    (folder / "f").write_text("damaged")
    assert (cache.get(_SHA256, _fill("content", filled)) / "f").read_text() == "content"
    assert filled == ["content", "content"]


def test_what_has_another_hash_is_refused_and_not_kept(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path / "cache")
    with pytest.raises(PreceptorError) as caught:
        cache.get(_SHA256, _fill("something else"))
    assert caught.value.reason == "ARTIFACT_CORRUPT"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f".lock-{_SHA256}"]


def test_a_hash_that_is_none_leads_nowhere(tmp_path: Path) -> None:
    for sha256 in ("", "../x", "A" * 64, "0" * 63):
        with pytest.raises(PreceptorError) as caught:
            ArtifactCache(tmp_path / "cache").get(sha256, _fill("content"))
        assert caught.value.reason == "ARTIFACT_NOT_FOUND"
    assert not (tmp_path / "cache").exists()


def test_of_two_processes_that_want_the_same_one_fetches_it(tmp_path: Path) -> None:
    processes = [_process(tmp_path / "cache", 1.0) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sorted(len(words) for words in said) == [1, 2]  # one has been filling
    assert {words[-1] for words in said} == {str(tmp_path / "cache" / _SHA256)}


def test_what_a_killed_process_had_begun_is_begun_again(tmp_path: Path) -> None:
    process = _process(tmp_path / "cache", 60.0)
    assert process.stdout is not None
    assert process.stdout.readline() == "filling\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    assert (tmp_path / "cache" / f".draft-{_SHA256}" / "f").read_text() == "half"
    other = _hash("other", tmp_path)
    ArtifactCache(tmp_path / "cache").get(other, _fill("other"))  # whoever comes next, for whatever, tidies
    assert not (tmp_path / "cache" / f".draft-{_SHA256}").exists()
    assert (ArtifactCache(tmp_path / "cache").get(_SHA256, _fill("content")) / "f").read_text() == "content"


def test_the_least_recently_used_leave_first(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path / "cache", max_bytes=250, in_use_seconds=0)
    contents = {name: name * 100 for name in "abc"}
    hashes = {name: _hash(content, tmp_path) for name, content in contents.items()}
    for age, name in ((300, "a"), (200, "b")):
        folder = cache.get(hashes[name], _fill(contents[name]))
        os.utime(folder, (time.time() - age, time.time() - age))
    cache.get(hashes["a"], _fill(contents["a"]))  # used again
    cache.get(hashes["c"], _fill(contents["c"]))
    kept = {path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")}
    assert kept == {hashes["a"], hashes["c"]}


def test_what_somebody_may_be_reading_stays_beyond_the_bound(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path / "cache", max_bytes=10)
    folders = [cache.get(_hash(name * 100, tmp_path), _fill(name * 100)) for name in "ab"]
    assert all(folder.is_dir() for folder in folders)


def test_a_draft_of_ones_own_can_be_kept(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path / "cache")
    with cache.draft() as draft:
        (draft / "f").write_text("content")
        cache.add(draft, _SHA256)
    with cache.draft() as draft:
        (draft / "f").write_text("content")
        cache.add(draft, _SHA256)  # twice is harmless

    def never(_draft: Path, _room: Callable[[int], None]) -> None:
        raise AssertionError("it is here")

    assert (cache.get(_SHA256, never) / "f").read_text() == "content"
    assert not list((tmp_path / "cache").glob(".upload-*"))
