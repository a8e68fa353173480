"""compose.yaml against a Docker engine, by tests/e2e/compose.sh, which says what it shows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# A build with a download of torch, a run of some minutes, and ten deaths.
LIMIT_SECONDS = 3600


def _missing(engine: bool) -> str:
    """Why no compose (and no engine) can be used here; empty where they can."""
    if not shutil.which("docker"):
        return "docker is not on PATH"
    commands = [["docker", "compose", "version"], ["docker", "version", "--format", "{{.Server.Version}}"]]
    for command in commands if engine else commands[:1]:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except subprocess.TimeoutExpired:
            return f"`{' '.join(command)}` does not answer (DOCKER_HOST={os.environ.get('DOCKER_HOST', '')})"
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return ""


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS + 60)
def test_a_run_through_compose_is_the_embedded_run_whatever_happens_to_its_containers() -> None:
    if missing := _missing(engine=True):
        pytest.skip(f"needs a Docker engine (docker on PATH, DOCKER_HOST): {missing}")
    done = subprocess.run(
        [str(REPOSITORY / "tests" / "e2e" / "compose.sh")],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    print(done.stdout)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, summary.get("failed", done.stdout[-2000:])
    assert summary["good"]
    assert summary["same_result"] == "yes"
    assert summary["kills"] == 10


def test_the_compose_files_and_the_dockerfile_read_well() -> None:
    """Without an engine: the compose plugin resolves the file, hadolint finds nothing."""
    hadolint = Path(sys.executable).parent / "hadolint"
    if hadolint.exists():
        done = subprocess.run([hadolint, REPOSITORY / "Dockerfile"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    if missing := _missing(engine=False):
        pytest.skip(f"needs compose: {missing}")
    compose = ["docker", "compose", "--profile", "*", "config", "--quiet"]
    done = subprocess.run(compose, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
