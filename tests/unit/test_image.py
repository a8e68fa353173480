"""What the images are made by: the requirements of extras, and the secrets of compose.yaml."""

from __future__ import annotations

import importlib.util
import os
import runpy
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MAKE_SECRETS = REPOSITORY / "deploy" / "make_secrets.sh"


def test_requirements_of_extras_are_those_that_pip_would_take() -> None:
    requirements = runpy.run_path(str(REPOSITORY / "deploy" / "image" / "requirements.py"))["requirements"]
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    light = requirements(project, ["server", "student", "evaluator"])
    assert set(project["dependencies"]) <= set(light)
    for needed in ("sqlalchemy", "psycopg", "s3fs", "prometheus_client", "celery", "huggingface_hub"):
        assert any(one.startswith(needed) for one in light), needed
    for heavy in ("torch", "transformers", "matplotlib", "preceptor"):
        assert not any(one.startswith(heavy) for one in light), heavy
    assert len(light) == len(set(light))
    assert any(one.startswith("torch") for one in requirements(project, ["worker"]))


def test_secrets_are_made_where_they_are_missing_and_never_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TLS", raising=False)
    folder = tmp_path / "secrets"
    first = subprocess.run([MAKE_SECRETS, folder], capture_output=True, text=True, check=True)
    made = {path.name: path.read_text() for path in folder.iterdir()}
    assert sorted(made) == ["grafana_password", "postgres_password", "redis_password", "token"]
    assert len(set(made.values())) == 4
    for path in folder.iterdir():
        assert len(made[path.name]) == 64
        assert made[path.name].isalnum()
        assert not path.stat().st_mode & (stat.S_IRWXO | stat.S_IWGRP)
    assert not any(secret in first.stdout for secret in made.values())
    (folder / "token").unlink()
    again = subprocess.run([MAKE_SECRETS, folder], capture_output=True, text=True, check=True)
    assert again.stdout.splitlines() == [f"secrets: made {folder}/token"]
    assert (folder / "redis_password").read_text() == made["redis_password"]


def test_certificates_are_there_whole_or_not_at_all(tmp_path: Path) -> None:
    folder, tools = tmp_path / "secrets", tmp_path / "tools"
    folder.mkdir()
    tools.mkdir()
    command = tools / "preceptor"
    command.write_text('#!/bin/sh\nmkdir "$2/house"\nfor one in ca cert key; do echo new > "$2/house/$one.pem"; done\n')
    command.chmod(0o755)
    own = {"PATH": f"{tools}:{os.environ['PATH']}", "TLS": "1"}

    def make() -> dict[str, str]:
        subprocess.run([MAKE_SECRETS, folder], env=own, capture_output=True, text=True, check=True)
        return {path.name: path.read_text() for path in (folder / "tls").iterdir()}

    (folder / "tls").mkdir()  # as somebody who means to put his own there
    (folder / "tls.draft").mkdir()  # as one that was killed leaves it
    (folder / "tls.draft" / "cert.pem").write_text("half")
    assert make() == {"ca.pem": "new\n", "cert.pem": "new\n", "key.pem": "new\n"}
    assert not (folder / "tls.draft").exists()
    (folder / "tls" / "key.pem").unlink()  # somebody's own, and not complete: the processes say what is missing
    (folder / "tls" / "ca.pem").write_text("his own")
    assert make() == {"ca.pem": "his own", "cert.pem": "new\n"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    folder.mkdir(mode=0o500)
    done = subprocess.run([MAKE_SECRETS, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "cannot be written" in done.stderr


def test_a_library_without_its_symbols_is_smaller_and_loads(tmp_path: Path) -> None:
    loaded = runpy.run_path(str(REPOSITORY / "deploy" / "image" / "strip.py"))["loaded"]
    library = Path(importlib.util.find_spec("grpc._cython.cygrpc").origin)  # type: ignore[union-attr, arg-type]
    assert library.suffix == ".so"
    whole = library.read_bytes()
    # As a wheel with symbols has them: behind what is loaded.
    fat = loaded(whole) + b"symbols" * 1000
    slim = loaded(fat)
    assert len(slim) == len(fat) - 7000
    assert loaded(slim) == slim
    (tmp_path / library.name).write_bytes(slim)
    load = f"import ctypes; ctypes.CDLL({str(tmp_path / library.name)!r}).PyInit_cygrpc"
    subprocess.run([sys.executable, "-c", load], check=True, timeout=60)
    assert loaded(b"no library") == b"no library"
