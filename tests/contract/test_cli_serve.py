"""``preceptor students serve`` against a registry over real gRPC; it becomes the serving process."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from preceptor.hashes import folder_sha256
from preceptor.v1 import student_pb2
from tests.contract.cli_services import Services
from tests.unit.test_serve_student import after, interpreter
from tests.unit.tiny_students import save_student

REPOSITORY = Path(__file__).parents[2]


def test_the_registered_student_is_served_from_its_verified_files(tmp_path: Path) -> None:
    folder = save_student(tmp_path / "student")
    commit = folder_sha256(folder)
    with Services() as services:
        student = student_pb2.Student(name="tiny")
        student.pinned.source, student.pinned.commit = str(folder), commit
        services.students.students["tiny"] = student
        own = {key: value for key, value in os.environ.items() if not key.startswith("PRECEPTOR_")}
        own |= {**services.environment, "PRECEPTOR_HOME": str(tmp_path / "home")}
        own |= {"PRECEPTOR_VLLM_PYTHON": str(interpreter(tmp_path)), "PRECEPTOR_METRICS_PORT": "1"}

        def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "preceptor", "students", "serve", *arguments]
            return subprocess.run(command, env=own, cwd=REPOSITORY, capture_output=True, text=True, timeout=180)

        done = serve("tiny", "--port", "8123", "--for-workers", "--dry-run", "--", "--max-num-seqs", "8")
        unknown = serve("nobody", "--dry-run")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert after(words, "--model") == str(folder)
    assert after(words, "--served-model-name") == f"tiny@{commit[:12]}"
    assert after(words, "--port") == "8123"
    assert words[-2:] == ["--max-num-seqs", "8"]
    assert words[0].startswith("VLLM_")
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in words
    assert unknown.returncode == 2
    assert "STUDENT_NOT_FOUND" in unknown.stderr
