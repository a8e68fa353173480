"""Students from a bucket of a real S3-compatible server (moto's), and from a *simulated* hub.

The hub is ``tests/hub_server.py``: a real HTTP server that ``huggingface_hub`` really talks to, with no network.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from preceptor.artifact_cache import ArtifactCache
from preceptor.artifacts_s3 import S3Folder
from preceptor.errors import PreceptorError
from preceptor.hashes import folder_sha256
from student.source import fetch, inspect
from tests.hub_server import HubServer, hub_server
from tests.s3_server import BUCKET, S3Server, s3_server
from tests.unit.tiny_students import save_student


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    server.set_environment(monkeypatch)
    return server


def _refused(source: str, revision: str = "") -> PreceptorError:
    with pytest.raises(PreceptorError) as caught:
        inspect(source, revision)
    return caught.value


def _not_fetched(source: str, commit: str, cache: ArtifactCache | None) -> PreceptorError:
    with pytest.raises(PreceptorError) as caught:
        fetch(source, commit, cache)
    return caught.value


def _copy(s3: S3Server, folder: Path, prefix: str) -> str:
    """As ``aws s3 cp --recursive`` does."""
    for path in folder.iterdir():
        s3.put(f"{prefix}/{path.name}", path.read_bytes())
    return f"s3://{BUCKET}/{prefix}"


# A bucket


def test_a_student_in_a_bucket_is_what_it_is_on_the_disk(s3: S3Server, folder: Path, tmp_path: Path) -> None:
    here = inspect(folder.as_uri())
    assert here == inspect(str(folder))
    url = f"s3://{BUCKET}/put"
    assert S3Folder(url).upload(folder).sha256 == here.commit
    for source in (url, f"{url}/", _copy(s3, folder, "copied")):
        facts = inspect(source)
        assert facts.source == source.rstrip("/")
        assert (facts.commit, facts.parameters, facts.architecture, facts.context_tokens) == (
            here.commit, here.parameters, here.architecture, here.context_tokens)  # fmt: skip
        fetched = fetch(facts.source, facts.commit, ArtifactCache(tmp_path / "copies"))
        assert folder_sha256(fetched) == here.commit


def test_where_there_is_a_manifest_the_weights_are_not_read(
    s3: S3Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{BUCKET}/large"
    S3Folder(url).upload(folder)
    read: list[int] = []
    original = S3Folder.read

    def counted(self: S3Folder, name: str, start: int = 0, end: int | None = None) -> bytes:
        data = original(self, name, start, end)
        if name.endswith(".safetensors"):
            read.append(len(data))
        return data

    monkeypatch.setattr(S3Folder, "read", counted)
    inspect(url)
    weights = (folder / "model.safetensors").read_bytes()
    assert sum(read) == 8 + int.from_bytes(weights[:8], "little")


def test_what_is_no_student_is_refused_with_the_object_named(s3: S3Server, folder: Path, tmp_path: Path) -> None:
    def broken(name: str) -> str:
        return _copy(s3, folder, name)

    without = broken("no-tokenizer")
    s3.client().delete_object(Bucket=BUCKET, Key="no-tokenizer/tokenizer.json")
    pickled = broken("pickled")
    s3.put("pickled/pytorch_model.bin", b"x")
    cut = broken("cut")
    s3.put("cut/model.safetensors", (folder / "model.safetensors").read_bytes()[:-10])
    empty = broken("empty")
    s3.put("empty/model.safetensors", b"")
    S3Folder(gone := f"s3://{BUCKET}/gone").upload(folder)
    s3.client().delete_object(Bucket=BUCKET, Key="gone/generation_config.json")
    forged = broken("forged")
    s3.put("forged/.preceptor-manifest", b"no manifest at all")
    for source, reason, name in (
        (without, "BAD_STUDENT_SOURCE", "tokenizer.json"),
        (pickled, "UNSAFE_CHECKPOINT", "pytorch_model.bin"),
        (cut, "BAD_STUDENT_SOURCE", "model.safetensors"),
        (empty, "BAD_STUDENT_SOURCE", "model.safetensors"),
        (gone, "BAD_STUDENT_SOURCE", "generation_config.json"),
        (forged, "BAD_STUDENT_SOURCE", "forged"),
        (f"s3://{BUCKET}/nothing", "BAD_STUDENT_SOURCE", "config.json"),
        ("s3://no-such-bucket/x", "ARTIFACT_STORE_REFUSED", "x"),
        ("s3://", "BAD_STUDENT_SOURCE", ""),
    ):
        error = _refused(source)
        assert error.reason == reason, source
        assert error.metadata["file"].endswith(name), source
    assert _refused(pickled, "main").reason == "INVALID_REQUEST"


def test_a_student_that_was_changed_in_the_bucket_is_not_used(s3: S3Server, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "generation_config.json").write_text("{}")
    url = f"s3://{BUCKET}/changing"
    commit = S3Folder(url).upload(folder).sha256
    kept = ArtifactCache(tmp_path / "kept")
    fetch(url, commit, kept)
    s3.put("changing/generation_config.json", b"{}")  # past the manifest
    error = _not_fetched(url, commit, ArtifactCache(tmp_path / "a"))
    assert (error.reason, error.metadata["file"]) == ("STUDENT_CHANGED", f"{url}/generation_config.json")
    S3Folder(url).upload(other)  # with it
    assert _not_fetched(url, commit, ArtifactCache(tmp_path / "b")).reason == "STUDENT_CHANGED"
    assert inspect(url).commit == folder_sha256(other)
    assert fetch(url, commit, kept).is_dir(), "a worker that has it goes on"
    S3Folder(url).remove_all()
    assert _not_fetched(url, commit, ArtifactCache(tmp_path / "c")).reason == "BAD_STUDENT_SOURCE"
    assert _not_fetched(url, commit, None).reason == "BAD_STUDENT_SOURCE"


def test_a_bucket_that_is_away_is_no_fault_of_the_student(s3: S3Server, folder: Path, tmp_path: Path) -> None:
    url = _copy(s3, folder, "away")
    s3.proxy.refuse(600)
    try:
        assert _refused(url).reason == "ARTIFACT_STORE_UNREACHABLE"
        error = _not_fetched(url, folder_sha256(folder), ArtifactCache(tmp_path / "copies"))
        assert error.reason == "ARTIFACT_STORE_UNREACHABLE"
    finally:
        s3.proxy.heal()


# A hub, simulated

_HUB_CODE = """
import json, sys
from preceptor.errors import PreceptorError
from student.source import fetch, inspect
try:
    if sys.argv[1] == "inspect":
        facts = inspect(sys.argv[2], sys.argv[3])
        print(json.dumps({"source": facts.source, "commit": facts.commit, "architecture": facts.architecture}))
    else:
        print(json.dumps({"folder": str(fetch(sys.argv[2], sys.argv[3]))}))
except PreceptorError as error:
    print(json.dumps({"reason": error.reason, "message": str(error)}))
"""


class Hub:
    """Asks the simulated hub in processes of their own: its client reads the environment when it is imported."""

    def __init__(self, server: HubServer, home: Path) -> None:
        self.server = server
        self.home = home
        self.environment: dict[str, str] = {}

    def ask(self, what: str, repo: str, revision: str = "") -> dict[str, str]:
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(self.home),
            "HF_HOME": str(self.home / "hub"),
            "HF_ENDPOINT": self.server.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **self.environment,
        }
        command = [sys.executable, "-c", _HUB_CODE, what, repo, revision]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
        assert ran.returncode == 0, ran.stderr
        answer: dict[str, str] = json.loads(ran.stdout.splitlines()[-1])
        return answer


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hub_server() as running:
        yield Hub(running, tmp_path / "home")


def test_a_hub_student_is_pinned_and_a_branch_that_moves_does_not_move_it(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    (with_pickle := tmp_path / "with-pickle").mkdir()
    for path in folder.iterdir():
        shutil.copy(path, with_pickle)
    (with_pickle / "pytorch_model.bin").write_bytes(b"x")
    (with_pickle / "modeling.py").write_text("raise SystemExit")
    first = hub.server.push("team/model", with_pickle)
    registered = hub.ask("inspect", "team/model")
    assert registered["commit"] == first
    second_folder = tmp_path / "second"
    shutil.copytree(folder, second_folder)
    (second_folder / "generation_config.json").write_text('{"max_length": 7}')
    second = hub.server.push("team/model", second_folder)
    hub.server.asked.clear()

    fetched = Path(hub.ask("fetch", registered["source"], registered["commit"])["folder"])
    of_files = [line for line in hub.server.asked if "/resolve/" in line]
    assert of_files, "the hub was really asked"
    assert all(f"/resolve/{first}/" in line for line in of_files), "by the pinned commit, and by nothing else"
    assert (fetched / "generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()
    assert (fetched / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert not (fetched / "pytorch_model.bin").exists(), "no pickle is ever fetched"
    assert not (fetched / "modeling.py").exists(), "nor code"

    assert hub.ask("inspect", "team/model")["commit"] == second, "a new registration is of where the branch is now"
    assert hub.ask("inspect", "team/model", first)["commit"] == first, "or of the revision that is named"


def test_a_worker_that_has_a_hub_student_needs_no_hub(hub: Hub, folder: Path) -> None:
    commit = hub.server.push("team/model", folder)
    there = hub.ask("fetch", "team/model", commit)
    hub.server.close()
    assert hub.ask("fetch", "team/model", commit) == there


def test_without_a_hub_the_message_says_what_to_do(hub: Hub, folder: Path) -> None:
    commit = hub.server.push("team/model", folder)
    hub.environment = {"HF_HUB_OFFLINE": "1"}
    for answer in (hub.ask("inspect", "team/model"), hub.ask("fetch", "team/model", commit)):
        assert answer["reason"] == "MODEL_UNREACHABLE"
        assert "HF_HUB_OFFLINE" in answer["message"]
    hub.environment = {"HF_ENDPOINT": "http://127.0.0.1:1"}
    for answer in (hub.ask("inspect", "team/model"), hub.ask("fetch", "team/model", commit)):
        assert answer["reason"] == "MODEL_UNREACHABLE"
        assert "http://127.0.0.1:1" in answer["message"]
    assert not hub.server.asked


def test_what_the_hub_does_not_give_is_told_apart_from_a_hub_that_is_away(hub: Hub, folder: Path) -> None:
    commit = hub.server.push("team/model", folder)
    for answer in (
        hub.ask("inspect", "team/another"),
        hub.ask("inspect", "team/model", "no-such-branch"),
        hub.ask("fetch", "team/model", hashlib.sha1(b"x", usedforsecurity=False).hexdigest()),
    ):
        assert answer["reason"] == "BAD_STUDENT_SOURCE", answer
    hub.server.token = "secret"
    for answer in (hub.ask("inspect", "team/model"), hub.ask("fetch", "team/model", commit)):
        assert answer["reason"] == "BAD_STUDENT_SOURCE", answer
        assert "secret" not in answer["message"]
    hub.environment = {"HF_TOKEN": "secret"}
    assert hub.ask("inspect", "team/model")["commit"] == commit
