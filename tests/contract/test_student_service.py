"""StudentService as a client sees it: a real server on a loopback port, real SQL, a real Redis."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import redis

from preceptor.channel import call, connect, new_request_id, stream
from preceptor.errors import PreceptorError
from preceptor.leases import LeaseBoard, WorkerStatus
from preceptor.redis_server import EmbeddedRedis
from preceptor.server import Server
from preceptor.settings import ServiceSettings
from preceptor.v1 import student_pb2 as api
from preceptor.v1 import types_pb2 as types
from preceptor.v1.student_pb2_grpc import StudentServiceStub, add_StudentServiceServicer_to_server
from student.deployment import DeploymentBoard
from student.registry import Registry
from student.servicer import SERVICE, StudentServicer
from tests.unit.tiny_students import save_student


@pytest.fixture(scope="module")
def broker_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"), port)
    process = subprocess.Popen(server.command)
    try:
        client = redis.Redis.from_url(server.url)
        for _ in range(200):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.05)
        client.close()
        yield server.url
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("student"))


class Service:
    """A running service and a client of it."""

    def __init__(self, database_url: str, broker_url: str) -> None:
        self.board = DeploymentBoard(broker_url)
        self.registry = Registry(database_url)
        self.servicer = StudentServicer(self.registry, self.board, watch_seconds=0.05)
        self.server = Server(
            [SERVICE],
            lambda server: add_StudentServiceServicer_to_server(self.servicer, server),
            ServiceSettings(grace_seconds=1),
        )
        self.stub = connect(f"127.0.0.1:{self.server.port}", StudentServiceStub)

    def register(self, name: str, source: Path | str, request_id: str = "", revision: str = "") -> api.Student:
        request = api.RegisterStudentRequest(
            request_id=request_id or new_request_id(), name=name, source=str(source), revision=revision
        )
        return call(self.stub.RegisterStudent, request).student

    def activate(self, name: str, request_id: str = "") -> api.Deployment:
        request = api.ActivateStudentRequest(request_id=request_id or new_request_id(), name=name)
        return call(self.stub.ActivateStudent, request).deployment

    def watch(self, name: str = "", seconds: float = 5) -> list[api.Deployment]:
        request = api.WatchDeploymentRequest(name=name)
        return [one.deployment for one in stream(self.stub.WatchDeployment, request, deadline=seconds)]

    def stop(self) -> None:
        self.servicer.drain()
        self.server.stop()
        self.registry.close()


@pytest.fixture
def service(database_url: str, broker_url: str) -> Iterator[Service]:
    client = redis.Redis.from_url(broker_url)
    client.flushall()
    client.close()
    running = Service(database_url, broker_url)
    yield running
    running.stop()


def reason_of(caught: pytest.ExceptionInfo[PreceptorError]) -> str:
    return caught.value.reason


def test_a_registered_student_is_described_and_pinned(service: Service, folder: Path) -> None:
    student = service.register("tiny", folder)
    assert student.architecture == "LlamaForCausalLM"
    assert student.context_tokens == 128
    assert student.parameters == sum(tensor_sizes(folder / "model.safetensors"))
    assert student.pinned.source == str(folder)
    assert len(student.pinned.commit) == 64
    assert not student.active
    assert call(service.stub.GetStudent, api.GetStudentRequest(name="tiny")).student == student
    versions = call(service.stub.ListVersions, api.ListVersionsRequest(name="tiny")).versions
    assert [(one.version, one.pinned) for one in versions] == [(1, student.pinned)]


def tensor_sizes(path: Path) -> list[int]:
    from safetensors import safe_open

    with safe_open(path, "pt") as tensors:
        return [tensors.get_tensor(name).numel() for name in tensors.keys()]  # noqa: SIM118


def test_the_commit_is_the_content_not_the_place(service: Service, folder: Path, tmp_path: Path) -> None:
    same = shutil.copytree(folder, tmp_path / "copy")
    other = save_student(tmp_path / "other", seed=1)
    commits = [service.register(name, at).pinned.commit for name, at in (("a", folder), ("b", same), ("c", other))]
    assert commits[0] == commits[1] != commits[2]


def test_retry_with_the_same_request_id_gives_the_first_answer(service: Service, folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder, tmp_path / "copy")
    first = service.register("tiny", source, "request-1")
    shutil.rmtree(source)  # the answer does not depend on the world any more
    assert service.register("tiny", source, "request-1") == first
    with pytest.raises(PreceptorError) as caught:
        service.register("other", folder, "request-1")
    assert reason_of(caught) == "REQUEST_ID_REUSED"
    with pytest.raises(PreceptorError) as caught:
        service.activate("tiny", "request-1")
    assert reason_of(caught) == "REQUEST_ID_REUSED"


def test_a_failed_request_can_be_sent_again(service: Service, folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "later"
    with pytest.raises(PreceptorError):
        service.register("tiny", source, "request-2")
    shutil.copytree(folder, source)
    assert service.register("tiny", source, "request-2").name == "tiny"


def test_a_request_without_an_id_is_refused(service: Service, folder: Path) -> None:
    with pytest.raises(PreceptorError) as caught:
        call(service.stub.RegisterStudent, api.RegisterStudentRequest(name="tiny", source=str(folder)))
    assert reason_of(caught) == "INVALID_REQUEST"
    assert caught.value.metadata["field"] == "request_id"


def test_a_name_means_one_student(service: Service, folder: Path, tmp_path: Path) -> None:
    first = service.register("tiny", folder)
    assert service.register("tiny", folder) == first
    with pytest.raises(PreceptorError, match="registered already") as caught:
        service.register("tiny", save_student(tmp_path / "other", seed=1))
    assert reason_of(caught) == "STUDENT_NAME_TAKEN"
    for name in ("", "Tiny", "a/b", "x" * 65):
        with pytest.raises(PreceptorError) as caught:
            service.register(name, folder)
        assert caught.value.metadata["field"] == "name"


def test_bad_folders_are_refused_with_the_file_that_is_wrong(service: Service, folder: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return shutil.copytree(folder, tmp_path / name)

    without_tokenizer = broken("without-tokenizer")
    (without_tokenizer / "tokenizer.json").unlink()
    without_weights = broken("without-weights")
    (without_weights / "model.safetensors").unlink()
    with_pickle = broken("with-pickle")
    (with_pickle / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    cut_off = broken("cut-off")
    weights = (cut_off / "model.safetensors").read_bytes()
    (cut_off / "model.safetensors").write_bytes(weights[:-10])
    own_code = broken("own-code")
    config = json.loads((own_code / "config.json").read_text())
    (own_code / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    classifier = broken("classifier")
    (classifier / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    no_json = broken("no-json")
    (no_json / "config.json").write_text("{")
    no_end = broken("no-end")
    (no_end / "tokenizer_config.json").write_text("{}")
    missing_shard = broken("missing-shard")
    (missing_shard / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002.safetensors"}}')
    for source, reason, file in (
        (without_tokenizer, "BAD_STUDENT_SOURCE", "tokenizer.json"),
        (without_weights, "BAD_STUDENT_SOURCE", "without-weights"),
        (with_pickle, "UNSAFE_CHECKPOINT", "pytorch_model.bin"),
        (cut_off, "BAD_STUDENT_SOURCE", "model.safetensors"),
        (own_code, "UNSAFE_CHECKPOINT", "config.json"),
        (classifier, "BAD_STUDENT_SOURCE", "config.json"),
        (no_json, "BAD_STUDENT_SOURCE", "config.json"),
        (no_end, "BAD_STUDENT_SOURCE", "tokenizer_config.json"),
        (missing_shard, "BAD_STUDENT_SOURCE", "model-00002.safetensors"),
        (tmp_path / "nowhere", "BAD_STUDENT_SOURCE", "nowhere"),
    ):
        with pytest.raises(PreceptorError) as caught:
            service.register("broken", source)
        assert reason_of(caught) == reason, source
        assert Path(caught.value.metadata["file"]).name == file
    assert not call(service.stub.ListStudents, api.ListStudentsRequest()).students, "nothing half-registered"


def test_a_hub_id_without_a_network_is_unreachable(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PreceptorError, match="hub") as caught:
        service.register("remote", "some-team/some-model")
    assert reason_of(caught) == "MODEL_UNREACHABLE"


def test_a_hub_that_does_not_answer_is_unreachable_and_no_bug(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(PreceptorError, match="could not be asked") as caught:
        service.register("remote", "some-team/some-model")
    assert reason_of(caught) == "MODEL_UNREACHABLE"


def test_unknown_students_are_not_found(service: Service) -> None:
    for method, request in (
        (service.stub.GetStudent, api.GetStudentRequest(name="nobody")),
        (service.stub.ActivateStudent, api.ActivateStudentRequest(request_id="1", name="nobody")),
        (service.stub.DeleteStudent, api.DeleteStudentRequest(request_id="2", name="nobody")),
        (service.stub.ListVersions, api.ListVersionsRequest(name="nobody")),
    ):
        with pytest.raises(PreceptorError) as caught:
            call(method, request)  # type: ignore[arg-type]
        assert reason_of(caught) == "STUDENT_NOT_FOUND"
    with pytest.raises(PreceptorError) as caught:
        service.watch("nobody")
    assert reason_of(caught) == "STUDENT_NOT_FOUND"
    with pytest.raises(PreceptorError) as caught:
        call(service.stub.GetStudent, api.GetStudentRequest())
    assert reason_of(caught) == "NO_ACTIVE_STUDENT"


def test_students_are_listed_in_pages(service: Service, folder: Path) -> None:
    names = [f"student-{number}" for number in range(5)]
    for name in reversed(names):
        service.register(name, folder)
    seen, token = [], ""
    while True:
        page = call(service.stub.ListStudents, api.ListStudentsRequest(page_size=2, page_token=token))
        assert len(page.students) <= 2
        seen += [one.name for one in page.students]
        token = page.next_page_token
        if not token:
            break
    assert seen == names


def test_a_swap_is_visible_at_once_and_survives_a_restart(
    service: Service, folder: Path, tmp_path: Path, database_url: str, broker_url: str
) -> None:
    service.register("old", folder)
    new = service.register("new", save_student(tmp_path / "qwen", "qwen2"))
    service.activate("old")
    service.activate("new")
    assert call(service.stub.GetStudent, api.GetStudentRequest()).student.name == "new"
    assert [one.active for one in call(service.stub.ListStudents, api.ListStudentsRequest()).students] == [True, False]
    client = redis.Redis.from_url(broker_url)
    client.flushall()  # Redis may lose everything
    client.close()
    again = Service(database_url, broker_url)
    try:
        assert call(again.stub.GetStudent, api.GetStudentRequest()).student.name == "new"
        assert again.board.wanted() == new.pinned
    finally:
        again.stop()


def test_the_active_student_cannot_be_deleted(service: Service, folder: Path) -> None:
    service.register("a", folder)
    service.register("b", folder)
    service.activate("a")
    with pytest.raises(PreceptorError) as caught:
        call(service.stub.DeleteStudent, api.DeleteStudentRequest(request_id=new_request_id(), name="a"))
    assert reason_of(caught) == "STUDENT_IN_USE"
    call(service.stub.DeleteStudent, api.DeleteStudentRequest(request_id=new_request_id(), name="b"))
    assert [one.name for one in call(service.stub.ListStudents, api.ListStudentsRequest()).students] == ["a"]
    assert folder.is_dir()


def test_a_deployment_is_ready_when_a_worker_holds_the_student(service: Service, folder: Path, broker_url: str) -> None:
    commit = service.register("tiny", folder).pinned.commit
    assert service.activate("tiny").state == api.DEPLOYMENT_STATE_LOADING
    LeaseBoard(broker_url).beat(WorkerStatus("host:1"))
    watch = stream(service.stub.WatchDeployment, api.WatchDeploymentRequest(name="tiny"), deadline=10)
    first = next(watch).deployment
    assert (first.state, first.workers_alive) == (api.DEPLOYMENT_STATE_LOADING, 1)
    LeaseBoard(broker_url).beat(WorkerStatus("host:1", students=(commit,)))
    rest = [one.deployment for one in watch]
    assert [one.state for one in rest] == [api.DEPLOYMENT_STATE_READY]
    assert (rest[0].workers_ready, rest[0].workers_alive) == (1, 1)


def test_a_deployment_fails_with_the_workers_reason(service: Service, folder: Path) -> None:
    commit = service.register("tiny", folder).pinned.commit
    service.activate("tiny")
    service.board.report_failure(commit, PreceptorError("STUDENT_CHANGED", "other files", file="/models/tiny"))
    (last,) = service.watch()
    assert last.state == api.DEPLOYMENT_STATE_FAILED
    assert last.failure == types.Failure(reason="STUDENT_CHANGED", message="/models/tiny: other files")
    assert service.activate("tiny").state == api.DEPLOYMENT_STATE_LOADING, "a new activation is a new try"


def test_a_student_that_is_not_active_is_not_waited_for(service: Service, folder: Path) -> None:
    service.register("tiny", folder)
    with pytest.raises(PreceptorError, match="not being deployed") as caught:
        service.watch("tiny")
    assert reason_of(caught) == "INVALID_REQUEST"


def test_open_watches_end_when_the_service_drains(service: Service, folder: Path) -> None:
    service.register("tiny", folder)
    service.activate("tiny")
    watch = stream(service.stub.WatchDeployment, api.WatchDeploymentRequest(), deadline=30)
    next(watch)
    service.servicer.drain()
    with pytest.raises(PreceptorError) as caught:
        next(watch)
    assert reason_of(caught) == "SHUTTING_DOWN"


def test_promotion_and_rollback_say_that_they_are_not_served_yet(service: Service) -> None:
    for method, request in (
        (service.stub.PromoteSelfEdit, api.PromoteSelfEditRequest()),
        (service.stub.RollbackStudent, api.RollbackStudentRequest()),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            method(request, timeout=5, wait_for_ready=True)  # type: ignore[operator]
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
