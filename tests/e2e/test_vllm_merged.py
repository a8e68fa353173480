"""A student whose edits are merged into it is served by vLLM as it answers here: two stacked adapters, written by
``python -m student.merge``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preceptor.artifacts import folder_sha256
from preceptor.v1 import types_pb2 as types
from student.answering import answer
from student.base import load_base
from student.base_cache import BaseCache
from student.full import NoAdapters
from student.merge import main
from student.trial import ALL_LINEAR, TrainingSettings
from tests.e2e.test_vllm_adapters import ANSWERING, QUESTIONS, TOLERANCE, asked, save_student, trained
from tests.e2e.vllm_server import vllm_python, vllm_server

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]


def test_merged_weights_answer_in_vllm_as_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = vllm_python()
    if python is None:
        pytest.skip("no vLLM here: `make test-vllm` installs it, or name an interpreter in PRECEPTOR_VLLM_PYTHON")
    source, merged = tmp_path / "student", tmp_path / "merged"
    save_student(source, "llama")
    recipe = TrainingSettings(learning_rate=1e-2, epochs=40, batch_size=3)
    base = load_base(source, source=str(source), commit=folder_sha256(source))
    trained(base, ("q_proj", "v_proj"), {"first": (recipe, 1)}, tmp_path)
    below = [types.Artifact(uri=(tmp_path / "first").as_uri(), sha256=folder_sha256(tmp_path / "first"))]
    student = types.PinnedStudent(source=str(source), commit=base.commit, adapters=below)
    trained(BaseCache(1, "cpu").get(student), ALL_LINEAR, {"second": (recipe, 0)}, tmp_path)
    edits = [word for name in ("first", "second") for word in ("--adapter", str(tmp_path / name))]
    assert main(["--source", str(source), "--commit", base.commit, *edits, "--out", str(merged)]) == 0
    assert json.loads(capsys.readouterr().out)["max_logit_difference"] == 0

    here = load_base(merged, source="", commit="")
    (expected,) = answer(here, NoAdapters(), [0], [asked(here)], ANSWERING)
    assert [one.text for one in expected] == [question.answer for question in QUESTIONS], "it was taught these answers"
    with vllm_server(python, merged, tmp_path, "--max-model-len", "256") as server:
        for row, one in zip(asked(here), expected, strict=True):
            choice = server.complete(
                "base", list(row.prompt), max_tokens=12, temperature=0, stop_token_ids=sorted(here.newline_ids)
            )
            text = str(here.tokenizer.decode(choice["token_ids"], skip_special_tokens=True))
            assert text.split("\n", 1)[0].strip() == one.text
            assert server.logprob("base", row.prompt, row.gold) == pytest.approx(one.gold_logprob, abs=TOLERANCE)
