"""A whole run of the embedded stack with its weights in a bucket of a real S3-compatible server (moto's): a student
swapped to one from there, the server away for a while in the middle, and what is collected afterwards."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preceptor.stack import shipped_models
from tests.e2e.conftest import SMALL, Preceptor, outcome, read_until, summary_in, wait_until
from tests.s3_server import BUCKET, S3Server, s3_server

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


def test_a_run_with_its_weights_in_a_bucket_gives_the_same_result_and_a_student_comes_from_there(
    undisturbed: tuple[Preceptor, dict[str, Any]], preceptor: Preceptor, s3: S3Server, tmp_path: Path
) -> None:
    preceptor.environment |= {**s3.environment, "PRECEPTOR_ARTIFACTS_URL": f"s3://{BUCKET}/house"}

    def said(*arguments: str) -> Any:
        code, output = preceptor(*arguments, "--json")
        assert code == 0, output
        return json.loads(output)

    source = f"s3://{BUCKET}/models/other"
    put = said("artifacts", "put", str(shipped_models() / "student_qwen2"), source)
    assert said("artifacts", "verify", source)["sha256"] == put["sha256"]

    stack = preceptor.start("up")
    try:
        wait_until(lambda: preceptor("students", "list", "--json")[0] == 0, 240, "the stack is up")
        first = said("runs", "create", str(SMALL))["id"]
        assert said("students", "register", "other", "--source", source)["pinned"]["commit"] == put["sha256"]
        code, output = preceptor("students", "activate", "other", "--wait")
        assert code == 0, output
        watching = preceptor.start("runs", "watch", first)
        read_until(watching, "round 1")
        s3.proxy.refuse(10)
        output, _ = watching.communicate(timeout=600)
        assert watching.returncode == 0, output
        assert preceptor("runs", "report", first, "--out", str(tmp_path / "first"))[0] == 0
        assert outcome(summary_in(tmp_path / "first")) == outcome(undisturbed[1])
        weights = [key for key in s3.keys("house/policies/") if key.endswith("adapter_model.safetensors")]
        assert len(weights) >= 1
        assert not (preceptor.home / "artifacts").exists()

        code, output = preceptor("run", str(SMALL), "--connect", "--out", str(tmp_path / "second"))
        assert code == 0, output
        assert summary_in(tmp_path / "second")["student"]["name"] == "other"

        assert said("gc", "--dry-run")["garbage"] == [], "nothing is old"
    finally:
        stack.send_signal(signal.SIGINT)
        stack.communicate(timeout=60)

    stack = preceptor.start("up")  # a teacher keeps what it has just used
    try:
        wait_until(lambda: preceptor("students", "list", "--json")[0] == 0, 240, "the stack is up")
        would = said("gc", "--dry-run", "--keep-days", "0")
        assert {item["kind"] for item in would["garbage"]} == {"adapter", "written groups", "attempts"}
        assert would["bytes"] > 0
        code, output = preceptor("gc", "--dry-run", "--keep-days", "0")
        assert code == 0, output
        assert "would go" in output
        done = said("gc", "--keep-days", "0")
        gone = [item["name"] for item in done["garbage"] if item["kind"] == "adapter"]
        assert gone == [item["name"] for item in would["garbage"] if item["kind"] == "adapter"]
        assert not [key for name in gone for key in s3.keys(f"house/policies/{name}/")]
        assert said("gc", "--keep-days", "0")["garbage"] == []
        # Its policies are trained again and write again, and all is as it was.
        code, output = preceptor("run", str(SMALL), "--connect", "--out", str(tmp_path / "third"))
        assert code == 0, output
        assert outcome(summary_in(tmp_path / "third")) == outcome(summary_in(tmp_path / "second"))
    finally:
        stack.send_signal(signal.SIGINT)
        stack.communicate(timeout=60)
