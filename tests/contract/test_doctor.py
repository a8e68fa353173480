"""What ``preceptor doctor`` finds out about a stack that an operator has set up wrongly, and what it says to do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preceptor import __version__
from preceptor.certificates import make_certificate
from preceptor.channel import Health
from preceptor.cli import main
from preceptor.cli.checks import EXTRAS, GIB
from preceptor.errors import CATALOGUE
from preceptor.leases import LeaseBoard, WorkerStatus
from preceptor.redis_server import EmbeddedRedis
from preceptor.v1 import evaluator_pb2, student_pb2, types_pb2
from preceptor.versions import CONTRACT_VERSION
from student.gpu_lease import leased_gpu
from tests.contract.cli_services import Services
from tests.inference_server import BASE, KEY, Reply, played_server
from tests.unit.test_gpu_lease import TWO, simulate


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PRECEPTOR_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    with Services() as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = EmbeddedRedis(tmp_path / "redis", port)
    process = subprocess.Popen(server.command, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 20
        while not listens(port):
            assert time.monotonic() < end
            time.sleep(0.05)
        yield server.url
    finally:
        process.terminate()
        process.wait(10)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def findings(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    main(["doctor", "--json"])
    out = capsys.readouterr().out
    assert "secret" not in out
    return {finding["what"]: finding for finding in json.loads(out)["findings"]}


def test_a_broker_is_checked_as_soon_as_it_is_named_and_a_wrong_password_is_told_from_a_wrong_host(
    redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preceptor.cli.stack_checks.find_stack", lambda _settings: None)  # no stack is up
    assert "redis" not in findings(capsys)
    monkeypatch.setenv("PRECEPTOR_BROKER_URL", redis_url)
    found = findings(capsys)
    assert found["redis"]["state"] == "ok"
    assert "workers" not in found  # nobody has said that there should be some
    place = redis_url.rpartition("@")[2]
    monkeypatch.setenv("PRECEPTOR_BROKER_URL", f"redis://:secret@{place}")
    refused = findings(capsys)["redis"]
    assert refused["state"] == "problem"
    assert "password" in refused["next_step"]
    monkeypatch.setenv("PRECEPTOR_BROKER_URL", "redis://:secret@127.0.0.1:1/0")
    away = findings(capsys)["redis"]
    assert away["state"] == "problem"
    assert "check that Redis runs" in away["next_step"]


@pytest.mark.parametrize(
    ("version", "contract", "state"),
    [
        (__version__, CONTRACT_VERSION, "ok"),
        ("9.9.9", CONTRACT_VERSION, "note"),
        ("9.9.9", CONTRACT_VERSION + 1, "problem"),
        ("", "", "ok"),
    ],
)
def test_another_version_is_named_with_both(
    services: Services,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    contract: object,
    state: str,
) -> None:
    answer = Health(True, version, str(contract), 0.0)
    monkeypatch.setattr("preceptor.cli.stack_checks.health_of", lambda _address, deadline: answer)
    found = findings(capsys)["orchestrator"]
    assert found["state"] == state
    assert (version or "unknown") in found["found"]
    if state != "ok":
        assert f"this is {__version__}" in found["found"]
        assert "same version" in found["next_step"]


@pytest.mark.parametrize(("ahead", "said"), [(3600.0, "3600 s ahead of"), (-90.0, "90 s behind"), (1.0, "")])
def test_a_clock_that_is_far_off_is_told(
    services: Services, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ahead: float, said: str
) -> None:
    answer = Health(True, __version__, str(CONTRACT_VERSION), ahead)
    monkeypatch.setattr("preceptor.cli.stack_checks.health_of", lambda _address, deadline: answer)
    found = findings(capsys)
    assert ("clock of the evaluator" in found) == bool(said)
    if said:
        assert said in found["clock of the evaluator"]["found"]
        assert found["clock of the evaluator"]["state"] == "note"


def test_the_services_tell_their_version_and_their_clock(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    found = findings(capsys)
    assert f"version {__version__}" in found["orchestrator"]["found"]
    assert not [what for what in found if what.startswith("clock")]


def test_a_second_stack_is_told(
    services: Services, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "another stack" not in findings(capsys)
    monkeypatch.setattr("preceptor.cli.stack_checks.is_serving", lambda _address, deadline: True)
    other = findings(capsys)["another stack"]
    assert "127.0.0.1:7104" in other["found"]
    assert services.environment["PRECEPTOR_ORCHESTRATOR_ADDRESS"] in other["found"]


def test_a_stack_under_another_name_of_this_machine_is_no_second_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preceptor.cli.stack_checks.is_serving", lambda _address, deadline: True)
    monkeypatch.setenv("PRECEPTOR_ORCHESTRATOR_ADDRESS", "localhost:7104")  # as a container's own name
    assert "another stack" not in findings(capsys)
    monkeypatch.setenv("PRECEPTOR_ORCHESTRATOR_ADDRESS", "no.such.host.invalid:7104")
    assert "another stack" in findings(capsys)


@pytest.mark.parametrize(("free", "size", "state"), [(0.5, 10, "problem"), (3, 100, "note"), (6, 100, "ok")])
def test_a_disk_that_is_nearly_full_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, free: float, size: float, state: str
) -> None:
    monkeypatch.setenv("PRECEPTOR_ORCHESTRATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("preceptor.cli.checks.free_bytes", lambda _path: (int(free * GIB), int(size * GIB)))
    found = findings(capsys)["disk"]
    assert found["state"] == state
    assert f"{free:.1f} of {size:.1f} GiB free" in found["found"]


# -- a stack that others run (compose, a cluster) ----------------------------------------------------------------------


def test_where_services_are_named_only_those_are_asked_and_nothing_of_the_embedded_stack_is_missed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECEPTOR_ORCHESTRATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setitem(EXTRAS, "models", ("torch", "no-such-package"))
    found = findings(capsys)
    assert found["orchestrator"]["state"] == "problem"
    assert "does not answer at 127.0.0.1:1" in found["orchestrator"]["found"]
    assert not {"teacher", "evaluator", "redis", "redis server", "ports", "workers"} & set(found)
    assert found["extra models"] == {
        "what": "extra models",
        "state": "ok",
        "found": "not whole here (without no-such-package)",
        "next_step": "",
    }


@pytest.mark.parametrize(
    ("variables", "what", "said", "step"),
    [
        (
            {"PRECEPTOR_BROKER_PASSWORD_FILE": "/no/such/file"},
            "settings",
            "PRECEPTOR_BROKER_PASSWORD_FILE=/no/such/file cannot be read: No such file or directory",
            "correct or unset the variable",
        ),
        (
            {"PRECEPTOR_DATABASE_URL": "postgresql://u@h/d", "PRECEPTOR_DATABASE_PASSWORD_FILE": "/no/such/file"},
            "settings of the services",
            "PRECEPTOR_DATABASE_PASSWORD_FILE=/no/such/file cannot be read",
            "correct or unset the variable",
        ),
        ({"PRECEPTOR_TOKEN_FILE": "/no/such/file"}, "token", "the token cannot be read: No such file", "same token"),
        ({"PRECEPTOR_TLS": "/no/such/folder"}, "certificates", "ca.pem cannot be read", "one authority"),
        (
            {"PRECEPTOR_DATABASE_URL": "postgresql://u:secret@127.0.0.1:1/d"},
            "database",
            "u@127.0.0.1:1/d: connection",
            "check PRECEPTOR_DATABASE_URL",
        ),
        (
            {"PRECEPTOR_TEACHER_SERVER_URL": "http://127.0.0.1:1", "PRECEPTOR_TEACHER_SERVER_MODEL": "m"},
            "teacher server",
            "(SERVER_UNREACHABLE)",
            "",
        ),
        (
            {
                "PRECEPTOR_ANSWER_SERVER_URL": "http://127.0.0.1:1",
                "PRECEPTOR_ANSWER_SERVER_API_KEY_FILE": "/no/such/file",
            },
            "answer server",
            "PRECEPTOR_ANSWER_SERVER_API_KEY_FILE=/no/such/file cannot be read: No such file",
            "correct the path",
        ),
        (
            {
                "PRECEPTOR_ARTIFACTS_URL": "s3://bucket/prefix",
                "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
                "AWS_ACCESS_KEY_ID": "x",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_REGION": "us-east-1",
            },
            "artifacts",
            "(ARTIFACT_STORE_UNREACHABLE)",
            "AWS_ENDPOINT_URL",
        ),
    ],
)
def test_each_bad_input_is_one_finding_with_what_to_change(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    what: str,
    said: str,
    step: str,
) -> None:
    monkeypatch.setattr("preceptor.cli.stack_checks.find_stack", lambda _settings: None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = findings(capsys)[what]
    assert found["state"] == "problem"
    assert said in found["found"]
    assert found["next_step"]
    assert step in found["next_step"]


def test_a_folder_of_artifacts_is_looked_at(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("preceptor.cli.stack_checks.find_stack", lambda _settings: None)
    monkeypatch.setenv("PRECEPTOR_ARTIFACTS_URL", str(tmp_path / "there"))
    assert findings(capsys)["artifacts"]["state"] == "ok"
    monkeypatch.setenv("PRECEPTOR_ARTIFACTS_URL", "/no/such/folder")
    assert findings(capsys)["artifacts"]["state"] == "problem"


def test_a_bucket_is_no_problem_where_nothing_is_installed_to_ask_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preceptor.cli.stack_checks.find_stack", lambda _settings: None)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setenv("PRECEPTOR_ARTIFACTS_URL", "s3://bucket/prefix")
    found = findings(capsys)["artifacts"]
    assert found["state"] == "note"
    assert "docker compose exec SERVICE" in found["next_step"]


def test_who_holds_which_gpu_is_told(
    redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The GPU is simulated; the lock and the worker's word are real."""
    monkeypatch.setattr("preceptor.cli.stack_checks.find_stack", lambda _settings: None)
    monkeypatch.setenv("PRECEPTOR_BROKER_URL", redis_url)
    monkeypatch.setenv("PRECEPTOR_GPU_LOCKS", str(tmp_path / "locks"))
    LeaseBoard(redis_url).beat(WorkerStatus("host:1", gpu="GPU-aaaa0000-1111"))
    simulate(tmp_path / "bin", monkeypatch, TWO)
    assert "none is taken" in findings(capsys)["gpu locks"]["found"]
    with leased_gpu("auto", tmp_path / "locks", 1, 0):
        found = findings(capsys)
    assert found["gpu leases"]["found"] == "GPU-aaaa0000-1111 by host:1"
    assert found["gpu locks"]["found"].endswith(f"GPU-aaaa0000-1111 by {socket.gethostname()}:{os.getpid()}")


def test_a_certificate_that_ends_soon_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    monkeypatch.setattr("preceptor.cli.stack_checks.find_stack", lambda _settings: None)
    for days, state in ((30, "ok"), (3, "note")):
        folder = make_certificate(tmp_path / str(days), "house", ["localhost"], days, 100)
        monkeypatch.setenv("PRECEPTOR_TLS", str(folder))
        found = findings(capsys)["certificates"]
        assert found["state"] == state
        assert f"valid for {days} days" in found["found"]


def test_a_student_that_no_worker_can_load_is_told_with_its_reason(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    services.students.students["large"] = student_pb2.Student(name="large", parameters=7)
    services.students.active = "large"
    found = findings(capsys)["active student"]
    assert (found["state"], found["found"]) == ("ok", "large (, 7 parameters), in memory of 0 of 2 workers")
    services.students.deployments = [student_pb2.DEPLOYMENT_STATE_FAILED]
    found = findings(capsys)["active student"]
    assert found["state"] == "problem"
    assert "the folder is gone (MODEL_UNREACHABLE)" in found["found"]
    assert found["next_step"] == CATALOGUE["MODEL_UNREACHABLE"].next_step


def test_what_waits_for_workers_of_its_own_and_what_has_failed_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = evaluator_pb2.QueueReport(name="trials.large", student="large", waiting_batches=3)
    status = evaluator_pb2.GetQueueStatusResponse(
        evaluations_failed=7, workers=[evaluator_pb2.WorkerReport(name="a:1")], queues=[own]
    )
    monkeypatch.setattr("tests.contract.scripted_evaluator.Evaluator.GetQueueStatus", lambda *_: status, raising=False)
    with Services() as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        found = findings(capsys)
    assert found["queues"]["found"] == "student large waits for a worker with PRECEPTOR_STUDENTS=large (3 batches)"
    assert found["queues"]["state"] == found["evaluations"]["state"] == "note"
    assert found["evaluations"]["found"] == "7 have FAILED"


def test_inference_servers_are_asked_who_they_are_and_what_they_serve(
    services: Services, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    services.students.students["x"] = student_pb2.Student(name="x", pinned=types_pb2.PinnedStudent(commit="c0ffee" * 4))
    services.students.active = "x"
    with played_server() as teacher, played_server() as answers:
        monkeypatch.setenv("PRECEPTOR_TEACHER_SERVER_URL", teacher.url)
        monkeypatch.setenv("PRECEPTOR_TEACHER_SERVER_API_KEY", KEY)
        monkeypatch.setenv("PRECEPTOR_ANSWER_SERVER_URL", answers.url)
        monkeypatch.setenv("PRECEPTOR_ANSWER_SERVER_API_KEY", KEY)
        found = findings(capsys)
        assert found["teacher server"]["state"] == "ok"
        assert f"answers (vLLM {teacher.version}), serves {BASE}" in found["teacher server"]["found"]
        assert found["answer server"]["state"] == "note", found["answer server"]
        assert "does not serve the active student (...@c0ffeec0ffee)" in found["answer server"]["found"]
        answers.adapters["x@c0ffeec0ffee"] = "/x"
        assert findings(capsys)["answer server"]["state"] == "ok"

        def told() -> tuple[str, str]:
            one = findings(capsys)["teacher server"]
            assert one["state"] == "problem"
            return one["found"].rpartition("(")[2].rstrip(")"), one["next_step"]

        monkeypatch.setenv("PRECEPTOR_TEACHER_SERVER_MODEL", "another")
        assert told() == ("MODEL_NOT_SERVED", CATALOGUE["MODEL_NOT_SERVED"].next_step)
        teacher.version = "0.1.0"
        assert told() == ("SERVER_TOO_OLD", CATALOGUE["SERVER_TOO_OLD"].next_step)
        teacher.trouble = lambda _number, _path, _body: Reply(401, {})
        assert told() == ("SERVER_REFUSED", CATALOGUE["SERVER_REFUSED"].next_step)
