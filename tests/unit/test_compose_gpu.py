"""compose.gpu.yaml over compose.yaml: it is well-formed, and says what the processes read. No GPU is asked for here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from preceptor.settings import HouseSettings
from student.settings import StudentSettings, WorkerSettings
from teacher.settings import TeacherSettings

REPOSITORY = Path(__file__).parents[2]
FILES = (REPOSITORY / "compose.yaml", REPOSITORY / "compose.gpu.yaml")
SETTINGS: dict[str, type[HouseSettings]] = {
    "teacher": TeacherSettings, "student": StudentSettings, "worker": WorkerSettings,
}  # fmt: skip


def filled(part: Any, variables: dict[str, str]) -> Any:
    """What was read, with its text as compose fills it in: ${A:-b}, ${A:+b}, ${A}; $$ is a dollar."""
    if isinstance(part, dict):
        return {key: filled(value, variables) for key, value in part.items()}
    if isinstance(part, list):
        return [filled(value, variables) for value in part]
    if not isinstance(part, str):
        return part

    def value(match: re.Match[str]) -> str:
        name, operator, other = match["name"], match["operator"], match["other"] or ""
        given = variables.get(name, "")
        return (other if given else "") if operator == ":+" else given or other

    text = re.sub(r"(?<!\$)\$\{(?P<name>\w+)(?:(?P<operator>:[-+])(?P<other>[^}]*))?\}", value, part)
    return text.replace("$$", "$")


def service(name: str, **variables: str) -> dict[str, Any]:
    """One service's environment, command and volumes after the overlay. Lists of volumes are added, as compose does."""
    merged: dict[str, Any] = {"environment": {}, "volumes": []}
    for file in FILES:
        one = filled(yaml.safe_load(file.read_text())["services"].get(name, {}), variables)
        environment, volumes = one.get("environment", {}), one.get("volumes", [])
        merged = {
            **merged,
            **one,
            "environment": {**merged["environment"], **environment},
            "volumes": [*merged["volumes"], *volumes],
        }
    return merged


@pytest.mark.parametrize("answers", ["", "http://student-vllm:8000"])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_variable_is_a_setting_and_all_settings_can_be_read(
    name: str, answers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = yaml.safe_load(FILES[1].read_text())["services"][name]["environment"]
    for variable, given in service(name, ANSWER_SERVER=answers)["environment"].items():
        if not variable.startswith("PRECEPTOR_"):
            continue
        # (compose.yaml gives some to processes that have no use for them: tests/e2e/test_compose.py)
        assert variable not in overlay or variable.removeprefix("PRECEPTOR_").lower() in SETTINGS[name].model_fields, (
            variable
        )
        value = str(given)
        if value.startswith("/run/secrets/"):
            file = tmp_path / value.strip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("secret\n")
            value = str(file)
        monkeypatch.setenv(variable, value)
    read = SETTINGS[name]()
    if isinstance(read, WorkerSettings):
        assert read.gpu_locks == Path("/var/lib/preceptor-gpu-locks")
        assert read.answer_server_url == answers


def test_the_teacher_asks_the_server_that_stands_beside_it_by_its_names() -> None:
    teacher, vllm = service("teacher")["environment"], service("vllm")
    command = " ".join(vllm["command"][0].split())
    assert teacher["PRECEPTOR_TEACHER_SERVER_URL"] == "http://vllm:8000"
    assert "--port 8000" in command
    assert f"--served-model-name {teacher['PRECEPTOR_TEACHER_SERVER_MODEL']} " in command
    assert f"--max-loras {teacher['PRECEPTOR_TEACHER_SERVER_ADAPTERS']} " in command
    assert teacher["PRECEPTOR_TEACHER_SOURCE"] == vllm["environment"]["TEACHER"]
    # Policies reach the server as folders: at the same path in both.
    assert "state:/var/lib/preceptor" in vllm["volumes"]
    assert "state:/var/lib/preceptor" in service("teacher")["volumes"]


def test_the_teacher_and_its_server_see_one_gpu_and_workers_all_of_them() -> None:
    def devices(name: str) -> dict[str, Any]:
        (only,) = service(name)["deploy"]["resources"]["reservations"]["devices"]
        assert only["driver"] == "nvidia"
        assert {"gpu", "compute", "utility"} == set(only["capabilities"])  # utility: nvidia-smi, which leases ask
        return dict(only)

    assert devices("teacher")["device_ids"] == devices("vllm")["device_ids"] == ["0"]
    assert devices("worker")["count"] == "all"
    assert service("worker")["environment"]["CUDA_VISIBLE_DEVICES"] != ""  # which would be none
    assert "gpu_locks:/var/lib/preceptor-gpu-locks" in service("worker")["volumes"]


@pytest.mark.parametrize("name", ["vllm", "student-vllm"])
def test_a_server_has_no_rights_and_its_key_from_a_file(name: str) -> None:
    made = service(name)
    assert made["user"] == "10001:0"
    assert made["read_only"] is True
    assert made["cap_drop"] == ["ALL"]
    assert "ports" not in made
    assert 'VLLM_API_KEY="$(cat /run/secrets/token)"' in made["command"][0]
    assert not [name for name in made["environment"] if re.search(r"KEY|PASSWORD|TOKEN$", name)]
    for variable in ("HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "HF_HOME"):
        assert made["environment"][variable].startswith("/var/lib/preceptor/")


@pytest.mark.parametrize(
    ("name", "variables", "said"),
    [
        ("vllm", {"TEACHER": "org/model", "TEACHER_REVISION": "abc"}, "serve org/model --revision abc --served-model"),
        ("vllm", {"TEACHER": "/students/mine"}, "serve /students/mine --served-model-name teacher"),
        (
            "student-vllm",
            {"STUDENT": "mine", "STUDENT_SOURCE": "org/model", "STUDENT_COMMIT": "0123456789abcdef"},
            "serve org/model --revision 0123456789abcdef --served-model-name mine@0123456789ab",
        ),
        (
            "student-vllm",
            {"STUDENT": "mine", "STUDENT_SOURCE": "/students/mine", "STUDENT_COMMIT": "0123456789abcdef"},
            "serve /students/mine --served-model-name mine@0123456789ab ",
        ),
    ],
)
def test_what_a_server_is_started_with(name: str, variables: dict[str, str], said: str, tmp_path: Path) -> None:
    """The script really runs, with a `vllm` that prints what it was given."""
    vllm, token = tmp_path / "vllm", tmp_path / "token"
    vllm.write_text('#!/bin/sh\necho "$@ KEY=$VLLM_API_KEY"\n')
    vllm.chmod(0o755)
    token.write_text("key\n")
    made = service(name, **variables)
    script = made["command"][0].replace("/run/secrets/token", str(token))
    script = script.replace("/var/lib/preceptor/answers", str(tmp_path / "answers"))
    environment = {key: str(value) for key, value in made["environment"].items()}
    environment |= {"HOME": str(tmp_path / "home"), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert done.stdout.endswith("KEY=key\n")


def test_a_student_server_without_a_student_says_what_is_missing(tmp_path: Path) -> None:
    script = service("student-vllm")["command"][0].replace("/var/lib/preceptor", str(tmp_path))
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "STUDENT": "", "STUDENT_SOURCE": "x"}
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert "student-vllm: set STUDENT, its name" in done.stderr


def test_compose_itself_takes_both_files_without_a_word() -> None:
    """Needs docker with its compose plugin, and no daemon."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, timeout=60).returncode:
        pytest.skip("docker compose is not installed")
    files = [word for file in FILES for word in ("-f", str(file))]
    command = [docker, "compose", *files, "--profile", "*", "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    services = json.loads(done.stdout)["services"]
    assert {"vllm", "student-vllm", "teacher", "worker", "redis", "postgres"} <= set(services)
    assert services["worker"]["environment"]["PRECEPTOR_BROKER_URL"].startswith("redis://")  # the overlay adds
