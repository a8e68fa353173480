"""Adapters in a folder that a server reads: whose they are, and when they go."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from student import served_adapters
from student.served_adapters import AdapterFolder


def holding(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_text(text)

    return write


def files(root: Path) -> list[str]:
    return sorted(path.read_text() for path in root.rglob("adapter_model.safetensors"))


def killed_with(root: Path, *texts: str) -> None:
    """A process that puts adapters there and is gone without a farewell."""
    program = (
        "import os, sys; from pathlib import Path; from student.served_adapters import AdapterFolder\n"
        "folder = AdapterFolder(Path(sys.argv[1]))\n"
        "for text in sys.argv[2:]: folder.put(lambda to: (to / 'adapter_model.safetensors').write_text(text))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", program, str(root), *texts]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], timeout=60).returncode == -9


def test_a_name_stands_for_one_content_of_one_process(tmp_path: Path) -> None:
    one, other = AdapterFolder(tmp_path), AdapterFolder(tmp_path)
    (first, where), (again, where_again) = one.put(holding("a")), one.put(holding("a"))
    assert (first, where) == (again, where_again)
    names = {first, one.put(holding("b"))[0], other.put(holding("a"))[0]}
    assert len(names) == 3
    assert where.name == first
    assert files(tmp_path) == ["a", "a", "b"]
    one.close()
    assert files(tmp_path) == ["a"]
    other.close()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        holding("half")(folder)
        raise OSError("no room")

    folder = AdapterFolder(tmp_path)
    with pytest.raises(OSError, match="no room"):
        folder.put(fail)
    assert files(tmp_path) == []
    folder.close()


def test_only_what_the_dead_left_is_a_leftover(tmp_path: Path) -> None:
    living = AdapterFolder(tmp_path)
    kept, _ = living.put(holding("mine"))
    killed_with(tmp_path, "a", "b")
    looking = AdapterFolder(tmp_path)
    with looking.leftovers() as names:
        assert len(names) == 2
        assert kept not in names
        assert files(tmp_path) == ["a", "b", "mine"], "the server may be told first"
        with AdapterFolder(tmp_path).leftovers() as others:
            assert others == [], "one at a time clears up"
    assert files(tmp_path) == ["mine"]
    with looking.leftovers() as names:
        assert names == []
    living.close()
    looking.close()


def test_leftovers_stay_where_the_server_could_not_be_told(tmp_path: Path) -> None:
    killed_with(tmp_path, "a")
    folder = AdapterFolder(tmp_path)
    with pytest.raises(ConnectionError), folder.leftovers():
        raise ConnectionError
    assert files(tmp_path) == ["a"]
    with folder.leftovers() as names:
        assert len(names) == 1
    assert files(tmp_path) == []
    folder.close()


def test_a_folder_without_its_lock_is_a_leftover(tmp_path: Path) -> None:
    killed_with(tmp_path, "a")
    (lock,) = tmp_path.glob("*.lock")
    lock.unlink()
    folder = AdapterFolder(tmp_path)
    with folder.leftovers() as names:
        assert len(names) == 1
    assert files(tmp_path) == []
    folder.close()


def test_files_that_may_still_be_read_go_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = AdapterFolder(tmp_path)
    given_up, _ = folder.put(holding("given up"))
    done, _ = folder.put(holding("done"))
    folder.abandon([given_up])
    folder.remove([done])
    assert files(tmp_path) == ["given up"]
    folder.abandon([])
    assert files(tmp_path) == ["given up"], "it is too early"
    now = served_adapters.time.monotonic()
    monkeypatch.setattr(served_adapters.time, "monotonic", lambda: now + served_adapters.ABANDONED_SECONDS + 1)
    folder.abandon([])
    assert files(tmp_path) == []
    folder.close()


def test_what_is_given_up_and_comes_again_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = AdapterFolder(tmp_path)
    name, _ = folder.put(holding("a"))
    folder.abandon([name])
    assert folder.put(holding("a"))[0] == name
    now = served_adapters.time.monotonic()
    monkeypatch.setattr(served_adapters.time, "monotonic", lambda: now + served_adapters.ABANDONED_SECONDS + 1)
    folder.abandon([])
    assert files(tmp_path) == ["a"]
    folder.close()


def test_a_process_that_gave_a_batch_up_leaves_its_files_to_the_next(tmp_path: Path) -> None:
    folder = AdapterFolder(tmp_path)
    name, _ = folder.put(holding("a"))
    folder.abandon([name])
    folder.close()
    folder.close()  # once more is nothing
    assert files(tmp_path) == ["a"]
    following = AdapterFolder(tmp_path)
    with following.leftovers() as names:
        assert names == [name]
    assert files(tmp_path) == []
    following.close()
