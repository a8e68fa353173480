"""What the services of compose.yaml are told: by .env, and of passwords."""

from __future__ import annotations

import os
import runpy
import subprocess
from pathlib import Path

import pytest
import yaml

from preceptor.queue import TRIAL_QUEUE
from tests.unit.test_compose_gpu import FILES, service

OURS = [
    name
    for name, one in yaml.safe_load(FILES[0].read_text())["services"].items()
    if "PRECEPTOR_HOME" in one.get("environment", {})
]


def test_all_processes_of_ours_are_meant() -> None:
    assert set(OURS) == {
        *("teacher", "external-teacher", "student", "evaluator", "orchestrator", "worker", "almanac", "cli"),
    }


@pytest.mark.parametrize("name", OURS)
def test_a_limit_in_env_is_for_who_calls_the_orchestrator_and_never_between_services(name: str) -> None:
    """.env is every process's ``env_file``; only what ``environment`` says is stronger."""
    limit = service(name, PRECEPTOR_RATE_LIMIT="20")["environment"].get("PRECEPTOR_RATE_LIMIT")
    assert limit == ("20" if name == "orchestrator" else "0")


def test_workers_keep_edits_where_the_others_find_them() -> None:
    who = [service(name) for name in ("teacher", "evaluator", "worker")]
    assert {one["volumes"][0] for one in who} == {"state:/var/lib/preceptor"}  # not read-only, for none of them
    assert {one["environment"]["PRECEPTOR_HOME"] for one in who} == {"/var/lib/preceptor"}


def test_a_second_teacher_is_found_by_the_orchestrator_and_keeps_what_it_makes_to_itself() -> None:
    said = {"PRECEPTOR_EXTERNAL_TEACHER_ADDRESS": "external-teacher:7101", "PRECEPTOR_ARTIFACTS_URL": "s3://ours/all"}
    orchestrator, teacher = (service(name, **said)["environment"] for name in ("orchestrator", "external-teacher"))
    assert orchestrator["PRECEPTOR_EXTERNAL_TEACHER_ADDRESS"] == "external-teacher:7101"
    not_ours = ("DATABASE_URL", "DATABASE_PASSWORD_FILE", "ARTIFACTS_URL", "TEACHER_SOURCE")
    assert {name: teacher.get(f"PRECEPTOR_{name}") for name in not_ours} == dict.fromkeys(not_ours, "")


@pytest.mark.parametrize("name", yaml.safe_load(FILES[0].read_text())["services"])
def test_no_password_is_on_the_command_line_of_a_process_that_stays(name: str) -> None:
    """Whoever is on the machine can read that."""
    command = service(name).get("command", "")
    for line in "\n".join(command if isinstance(command, list) else [command]).splitlines():
        assert not ("exec " in line and "/run/secrets/" in line.rpartition("exec ")[2]), line


@pytest.mark.parametrize("tls", ["", "1"])
def test_flower_finds_the_queue_where_redis_listens(tls: str, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "redis_password").write_text("pass")
    (tmp_path / "celery").write_text("#!/bin/sh\n")
    (tmp_path / "celery").chmod(0o755)
    (script,) = service("flower")["command"]
    script = script.replace("/run/secrets", str(secrets)).replace("cd /tmp", f"cd {tmp_path}")
    subprocess.run(
        ["sh", "-c", script], env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "TLS": tls}, check=True, timeout=30
    )
    said = runpy.run_path(str(tmp_path / "celeryconfig.py"))
    assert said["broker_url"] == f"redis{'s' if tls else ''}://:pass@redis:6379/0"
    assert said["task_default_queue"] == TRIAL_QUEUE
    assert ("broker_use_ssl" in said) == bool(tls)
    if tls:
        assert said["broker_use_ssl"] == {
            "ssl_cert_reqs": "required",
            "ssl_ca_certs": f"{secrets}/tls/ca.pem",
            "ssl_certfile": f"{secrets}/tls/cert.pem",
            "ssl_keyfile": f"{secrets}/tls/key.pem",
        }
    assert not (tmp_path / "celeryconfig.py").stat().st_mode & 0o077
