"""What every artifact store promises, on a disk and in a bucket of a real S3-compatible server (moto's)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from click.testing import CliRunner

from preceptor.artifact_cache import ArtifactCache
from preceptor.artifacts import ArtifactStore, FolderStore, artifact_store, folder_sha256
from preceptor.artifacts_s3 import MANIFEST, S3Folder, S3Store, _translated, read_manifest
from preceptor.cli.artifacts import artifacts as artifacts_command
from preceptor.errors import PreceptorError
from preceptor.settings import HouseSettings
from preceptor.storage import storage_error, when_there_is_room
from preceptor.v1 import types_pb2 as types
from tests.s3_server import BUCKET, S3Server, s3_server
from tests.small_disk import small_disk


def _write(folder: Path) -> None:
    (folder / "a.txt").write_text("a")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text("b")


def _file(name: str, data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return write


def _reason(act: Callable[[], object]) -> str:
    with pytest.raises(PreceptorError) as caught:
        act()
    return caught.value.reason


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


class Place(ABC):
    """Where a store's files lie, to be looked at and damaged past the store."""

    @abstractmethod
    def store(self) -> ArtifactStore:
        """A store as another process would have it, with nothing in its cache."""

    @abstractmethod
    def put(self, path: str, text: str) -> None: ...

    @abstractmethod
    def remove(self, path: str) -> None: ...

    @abstractmethod
    def paths(self) -> list[str]: ...

    @abstractmethod
    def leave_a_draft(self) -> None:
        """As a writer does that is killed."""


class Disk(Place):
    def __init__(self, folder: Path) -> None:
        self.root = folder / "store"

    def store(self) -> ArtifactStore:
        return FolderStore(self.root)

    def put(self, path: str, text: str) -> None:
        (self.root / path).write_text(text)

    def remove(self, path: str) -> None:
        (self.root / path).unlink()

    def paths(self) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())

    def leave_a_draft(self) -> None:
        (self.root / ".draft-y-1").mkdir()
        _write(self.root / ".draft-y-1")


class Bucket(Place):
    def __init__(self, server: S3Server, folder: Path) -> None:
        self.server, self._folder = server, folder
        self.prefix = folder.name
        self.url = f"s3://{BUCKET}/{self.prefix}"
        self._stores = 0

    def store(self) -> ArtifactStore:
        self._stores += 1
        return S3Store(self.url, ArtifactCache(self._folder / f"cache-{self._stores}"))

    def put(self, path: str, text: str) -> None:
        self.server.put(f"{self.prefix}/{path}", text.encode())

    def remove(self, path: str) -> None:
        self.server.client().delete_object(Bucket=BUCKET, Key=f"{self.prefix}/{path}")

    def paths(self) -> list[str]:
        found = [key.removeprefix(f"{self.prefix}/") for key in self.server.keys(f"{self.prefix}/")]
        return sorted(path for path in found if not path.endswith(MANIFEST))

    def leave_a_draft(self) -> None:
        self.put("y/a.txt", "a")


@pytest.fixture(params=["disk", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "disk":
        return Disk(tmp_path)
    return _bucket(request.getfixturevalue("s3"), tmp_path, monkeypatch)


@pytest.fixture
def bucket(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    return _bucket(s3, tmp_path, monkeypatch)


def _bucket(server: S3Server, tmp_path: Path, patch: pytest.MonkeyPatch) -> Bucket:
    server.set_environment(patch)
    return Bucket(server, tmp_path)


# Every store


def test_a_folder_is_published_whole_and_found_again_by_its_hash(place: Place) -> None:
    artifact = place.store().write_folder("policy-1", _write)
    found = place.store().local_path(artifact)
    assert (found / "sub" / "b.txt").read_text() == "b"
    assert folder_sha256(found) == artifact.sha256
    assert place.store().write_folder("policy-1", _write) == artifact


def test_a_write_that_fails_leaves_nothing_behind(place: Place, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        _write(folder)
        raise RuntimeError("disk on fire")

    store = place.store()
    with pytest.raises(RuntimeError):
        store.write_folder("x", fail)
    assert store.list() == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_changed_or_missing_artifact_is_refused(place: Place) -> None:
    artifact = place.store().write_folder("x", _write)
    place.put("x/a.txt", "changed")
    assert _reason(lambda: place.store().local_path(artifact)) == "ARTIFACT_CORRUPT"
    place.remove("x/a.txt")
    assert _reason(lambda: place.store().local_path(artifact)) == "ARTIFACT_CORRUPT"
    artifact.uri += "-gone"
    assert _reason(lambda: place.store().local_path(artifact)) == "ARTIFACT_NOT_FOUND"


def test_a_damaged_folder_gives_way_to_a_whole_one(place: Place) -> None:
    artifact = place.store().write_folder("x", _write)
    place.put("x/a.txt", "")  # as a power cut may leave it
    assert place.store().write_folder("x", _write) == artifact
    assert (place.store().local_path(artifact) / "a.txt").read_text() == "a"
    assert place.paths() == ["x/a.txt", "x/sub/b.txt"]


def test_other_content_under_a_name_takes_the_place_of_what_was_there(place: Place) -> None:
    old = place.store().write_folder("x", _write)
    new = place.store().write_folder("x", _file("c.txt", b"c"))
    assert place.paths() == ["x/c.txt"]
    assert place.store().local_path(new).is_dir()
    assert _reason(lambda: place.store().local_path(old)) == "ARTIFACT_CORRUPT"


def test_what_there_is_is_listed_and_what_is_removed_is_gone(place: Place) -> None:
    store = place.store()
    store.write_folder("x", _write)
    artifact = store.write_folder("y", _write)
    assert [(one.name, one.whole) for one in store.list()] == [("x", True), ("y", True)]
    assert all(one.bytes >= 2 and one.age_seconds < 60 for one in store.list())
    store.remove("y")
    store.remove("y")  # twice is harmless
    assert [one.name for one in store.list()] == ["x"]
    assert _reason(lambda: place.store().local_path(artifact)) == "ARTIFACT_NOT_FOUND"


def test_what_a_killed_writer_left_is_listed_as_such_and_can_be_removed(place: Place) -> None:
    store = place.store()
    store.write_folder("x", _write)
    place.leave_a_draft()
    (left,) = (one for one in store.list() if not one.whole)
    store.remove(left.name)
    assert [one.name for one in store.list()] == ["x"]


# A disk


def test_a_whole_folder_is_kept(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    artifact = store.write_folder("x", _write)
    kept = (tmp_path / "x").stat().st_ino
    assert store.write_folder("x", _write) == artifact
    assert (tmp_path / "x").stat().st_ino == kept
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.write_folder("x", _write)
    for name in (".draft-y-1", ".damaged-x-1"):
        (tmp_path / name).mkdir()
        _write(tmp_path / name)
    store.remove_leftovers()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_hash_depends_on_names_and_contents_but_not_on_place_or_hidden_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        _write(folder)
    (two / ".cache").write_text("x")
    assert folder_sha256(one) == folder_sha256(two)
    (two / "a.txt").rename(two / "c.txt")
    assert folder_sha256(one) != folder_sha256(two)


def test_the_hash_of_a_folder_is_what_it_always_was(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a.txt", "a/b.txt", "a-b.txt"):  # by the parts of the path: "a/b" before "a-b"
        (tmp_path / name).write_text(name)
    assert folder_sha256(tmp_path) == "322d55ef42b5b20d17ba8cc1dc56f8cce12025e3755e885dca113da27474c00c"


def test_without_room_nothing_is_published_and_with_room_it_is(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        store = FolderStore(disk.path / "store")
        disk.fill()
        assert _reason(lambda: store.write_folder("x", _write)) == "DISK_FULL"
        disk.free()
        artifact = store.write_folder("x", _write)
        assert store.local_path(artifact).is_dir()
        assert [path.name for path in (disk.path / "store").iterdir()] == ["x"]


def test_a_store_on_a_disk_needs_nothing_of_fsspec(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom preceptor.artifacts import artifact_store, ArtifactCache\nfrom pathlib import Path\n"
        f"store = artifact_store('file://{tmp_path}/x', ArtifactCache(Path('none')))\n"
        "store.write_folder('a', lambda folder: (folder / 'f').write_text('f'))\n"
        "print([name for name in ('fsspec', 's3fs', 'botocore', 'aiohttp') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "[]"
    assert (tmp_path / "x" / "a" / "f").is_file()


# A bucket


def test_a_file_of_many_chunks_comes_whole_and_in_order(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preceptor.artifacts_s3._CHUNK_BYTES", 1000)
    data = b"".join(number.to_bytes(4, "big") for number in range(5000))
    artifact = bucket.store().write_folder("x", _file("w", data))
    assert (bucket.store().local_path(artifact) / "w").read_bytes() == data


def test_a_folder_copied_by_other_means_has_the_hash_it_has_on_the_disk(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    _write(tmp_path / "model")
    bucket.put("m/a.txt", "a")
    bucket.put("m/sub/b.txt", "b")
    bucket.put("m/.hidden", "not part of it")
    sha256 = folder_sha256(tmp_path / "model")
    found = bucket.store().local_path(types.Artifact(uri=f"{bucket.url}/m", sha256=sha256))
    assert folder_sha256(found) == sha256
    bucket.put("m/a.txt", "b")
    artifact = types.Artifact(uri=f"{bucket.url}/m", sha256=sha256)
    assert _reason(lambda: bucket.store().local_path(artifact)) == "ARTIFACT_CORRUPT"


def test_keys_that_lead_out_of_the_folder_are_not_followed(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.txt").write_text("a")
    bucket.put("m/a.txt", "a")
    for key in ("m//" + str(tmp_path / "outside-1"), "m/../../outside-2", "m/sub/../../../../outside-3"):
        bucket.server.put(f"{bucket.prefix}/{key}", b"x")
    sha256 = folder_sha256(tmp_path / "model")
    found = bucket.store().local_path(types.Artifact(uri=f"{bucket.url}/m", sha256=sha256))
    assert [path.name for path in found.iterdir()] == ["a.txt"]
    assert not list(tmp_path.rglob("outside*"))


def test_what_was_written_to_a_disk_before_there_was_a_bucket_is_still_found(bucket: Bucket, tmp_path: Path) -> None:
    artifact = FolderStore(tmp_path / "disk").write_folder("x", _write)
    assert bucket.store().local_path(artifact) == tmp_path / "disk" / "x"


@pytest.mark.parametrize("line", ["", "0" * 64 + "  ../../etc/passwd", "0" * 64 + "  /etc/passwd", "00  a", "x" * 500])
def test_a_manifest_that_leads_elsewhere_is_refused(line: str) -> None:
    assert _reason(lambda: read_manifest(f"{'0' * 64}  a\n{line}\n")) == "ARTIFACT_CORRUPT"


def test_a_missing_bucket_and_a_wrong_key_are_refused_in_our_words(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = bucket.store().write_folder("x", _write)
    cache = ArtifactCache(tmp_path / "other")
    nowhere = S3Store("s3://no-such-bucket/x", cache)
    for act in (nowhere.list, nowhere.remove_leftovers, lambda: nowhere.write_folder("x", _write)):
        assert _reason(act) == "ARTIFACT_STORE_REFUSED"
    key, secret = bucket.server.check_keys()
    try:
        wrong = bucket.store()
        for fails in (wrong.list, lambda: wrong.local_path(artifact), lambda: wrong.write_folder("x", _write)):
            assert _reason(fails) == "ARTIFACT_STORE_REFUSED"
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        assert _reason(bucket.store().list) == "ARTIFACT_STORE_REFUSED"  # with another's secret
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        assert bucket.store().local_path(artifact).is_dir()
    finally:
        bucket.server.let_everybody_in()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(PreceptorError) as none:
        bucket.store().list()
    assert none.value.reason == "ARTIFACT_STORE_REFUSED"
    assert "credentials" in none.value.message


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("SlowDown", 503, "ARTIFACT_STORE_UNREACHABLE"),
        ("TooManyRequests", 429, "ARTIFACT_STORE_UNREACHABLE"),
        ("RequestTimeout", 400, "ARTIFACT_STORE_UNREACHABLE"),
        ("AccessDenied", 403, "ARTIFACT_STORE_REFUSED"),
        ("NoSuchKey", 404, "ARTIFACT_NOT_FOUND"),
    ],
)
def test_a_store_that_is_too_busy_is_told_from_one_that_refuses(code: str, status: int, reason: str) -> None:
    answer: Any = {"Error": {"Code": code, "Message": "x"}, "ResponseMetadata": {"HTTPStatusCode": status}}

    def ask() -> None:
        with _translated("s3://bucket/x"):
            raise ClientError(answer, "GetObject")

    assert _reason(ask) == reason


def test_a_store_that_is_away_is_waited_for_until_it_is_back(bucket: Bucket) -> None:
    store = bucket.store()
    store.write_folder("before", _write)
    bucket.server.proxy.refuse(600)
    away = threading.Event()
    waited: list[PreceptorError] = []

    def waits(error: PreceptorError) -> None:
        waited.append(error)
        away.set()

    written: list[types.Artifact] = []
    thread = threading.Thread(
        target=lambda: written.append(
            when_there_is_room(lambda: store.write_folder("x", _write), lambda _seconds: time.sleep(0.1), waits)
        )
    )
    thread.start()
    try:
        assert away.wait(60)
    finally:
        bucket.server.proxy.heal()
    thread.join(60)
    assert {error.reason for error in waited} == {"ARTIFACT_STORE_UNREACHABLE"}
    assert bucket.store().local_path(written[0]).is_dir()


def test_a_connection_that_breaks_in_the_middle_of_a_file_is_made_again(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preceptor.artifacts_s3._CHUNK_BYTES", 100_000)
    data = os.urandom(3_000_000)
    artifact = bucket.store().write_folder("x", _file("w", data))
    bucket.server.proxy.delay(0.02)
    found: list[Path] = []
    thread = threading.Thread(target=lambda: found.append(bucket.store().local_path(artifact)))
    thread.start()
    try:
        for _ in range(3):
            time.sleep(0.25)
            bucket.server.proxy.drop()
    finally:
        thread.join(60)
        bucket.server.proxy.heal()
    assert (found[0] / "w").read_bytes() == data


_UPLOAD = """
import sys
from pathlib import Path
from preceptor.artifact_cache import ArtifactCache
from preceptor.artifacts_s3 import S3Store
def write(folder):
    for number in range(60):
        (folder / f"{number:03}").write_bytes(bytes([number]) * 50_000)
print(S3Store(sys.argv[1], ArtifactCache(Path(sys.argv[2]))).write_folder("x", write).sha256, flush=True)
"""


def test_an_upload_killed_in_the_middle_is_no_artifact_and_the_next_one_is(bucket: Bucket, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _UPLOAD, bucket.url, str(tmp_path / "cache")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        end = time.monotonic() + 60
        while len(bucket.paths()) < 8 and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()
    there = bucket.paths()
    assert 8 <= len(there) < 60
    (left,) = bucket.store().list()
    assert not left.whole
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    artifact = types.Artifact(uri=f"{bucket.url}/x", sha256=ran.stdout.strip())
    assert len(list(bucket.store().local_path(artifact).iterdir())) == 60


_FETCH = """
import sys
from pathlib import Path
from preceptor.artifact_cache import ArtifactCache
from preceptor.artifacts_s3 import S3Folder, fetch
from preceptor.v1 import types_pb2 as types
original, read = S3Folder.read, []
S3Folder.read = lambda self, name, *rest: read.append(name) or original(self, name, *rest)
fetch(types.Artifact(uri=sys.argv[1], sha256=sys.argv[2]), ArtifactCache(Path(sys.argv[3])))
print(len(read), flush=True)
"""


def test_two_processes_that_want_the_same_artifact_fetch_it_once(bucket: Bucket, tmp_path: Path) -> None:
    artifact = bucket.store().write_folder("x", _write)
    command = [sys.executable, "-c", _FETCH, artifact.uri, artifact.sha256, str(tmp_path / "shared")]
    bucket.server.proxy.delay(0.1)  # long enough for both to be there
    try:
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        said = [process.communicate(timeout=120)[0].strip() for process in processes]
    finally:
        bucket.server.proxy.heal()
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(said) == ["0", "3"]  # the manifest and two files


_REMOVE = """
import sys
from pathlib import Path
from preceptor.artifacts import FolderStore
store = FolderStore(Path(sys.argv[1]))
print("removing", flush=True)
for stored in store.list():
    store.remove(stored.name)
"""


@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_a_folder_that_is_put_does_not_take_the_place_of_others(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    _write(model)
    models = f"file://{tmp_path}/models" if kind == "disk" else request.getfixturevalue("bucket").url
    put = partial(CliRunner().invoke, artifacts_command)
    for _ in range(2):  # the same again is no harm
        assert put(["put", str(model), f"{models}/one"]).exit_code == 0
    refused = put(["put", str(model), models])
    assert isinstance(refused.exception, PreceptorError)
    assert (refused.exception.reason, "one/a.txt" in str(refused.exception)) == ("INVALID_REQUEST", True)
    assert put(["verify", f"{models}/one"]).exit_code == 0
    assert put(["put", str(model), models, "--replace"]).exit_code == 0
    assert put(["verify", f"{models}/one"]).exit_code == 1


def test_removing_that_is_killed_in_the_middle_leaves_whole_artifacts_and_leftovers(tmp_path: Path) -> None:
    for policy in range(20):  # not through the store, which waits for the disk at each of 6000 files
        folder = tmp_path / f"policy-{policy}"
        folder.mkdir()
        for number in range(300):
            (folder / str(number)).touch()
    store = FolderStore(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", _REMOVE, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    while (tmp_path / "policy-10").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    left = store.list()
    assert 1 <= len(left) < 20
    for stored in left:
        if stored.whole:
            assert len(list((tmp_path / stored.name).iterdir())) == 300
        store.remove(stored.name)
    assert list(tmp_path.iterdir()) == []


def test_uploads_in_parts_that_nobody_ends_are_ended(bucket: Bucket) -> None:
    client = bucket.server.client()
    client.create_multipart_upload(Bucket=BUCKET, Key=f"{bucket.prefix}/x/weights")
    client.create_multipart_upload(Bucket=BUCKET, Key="elsewhere/weights")
    S3Folder(bucket.url).abort_uploads(older_than_seconds=3600)  # moto says of each that it was begun in 2010
    left = client.list_multipart_uploads(Bucket=BUCKET)["Uploads"]
    assert [upload["Key"] for upload in left] == ["elsewhere/weights"]


def test_without_the_extra_the_message_names_it(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(PreceptorError) as missing:
        bucket.store()
    assert missing.value.reason == "EXTRA_MISSING"
    assert "s3" in missing.value.message


def test_what_is_no_place_for_artifacts_is_refused_at_the_start(tmp_path: Path) -> None:
    for url in ("gs://bucket/x", "s3://", "s3:///x", "s3://key:secret@bucket/x", "http://here/x"):
        with pytest.raises(ValueError, match="artifacts_url"):
            HouseSettings(artifacts_url=url)
        assert _reason(partial(artifact_store, url, ArtifactCache(tmp_path))) == "INVALID_REQUEST"


def test_a_disk_that_is_full_is_told_from_a_store_that_refuses(bucket: Bucket, tmp_path: Path) -> None:
    artifact = bucket.store().write_folder("x", _file("w", b"w" * 500_000))
    with small_disk(tmp_path / "disk", 1) as disk:
        store = S3Store(bucket.url, ArtifactCache(disk.path / "cache"))
        disk.fill()
        assert _reason(lambda: store.local_path(artifact)) == "DISK_FULL"
        assert _reason(lambda: store.write_folder("x", _write)) == "DISK_FULL"
        disk.free()
        assert store.local_path(artifact).is_dir()


def test_store_reasons_are_waited_for() -> None:
    for reason in ("ARTIFACT_STORE_UNREACHABLE", "ARTIFACT_STORE_REFUSED"):
        error = PreceptorError(reason, "x")
        assert storage_error(error) is error
