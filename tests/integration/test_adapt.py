"""``preceptor adapt`` with an embedded stack, the models that ship, and the merged student in transformers' hands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from preceptor.hashes import folder_sha256
from preceptor.stack import shipped_models
from worlds.almanac.passages import passages

REPOSITORY = Path(__file__).parents[2]
# Several imports of torch on a busy machine.
SECONDS = 420

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (shipped_models() / "student").is_dir(), reason="the world's models are not built"),
]


def adapt(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("PRECEPTOR_")}
    command = [sys.executable, "-m", "preceptor", "adapt", "--world", "almanac:2", "--workers", "1", "--out", "out"]
    settings = ["--config", str(REPOSITORY / "configs" / "almanac.toml"), "--set", "teacher.prompt_format=self_qa"]
    environment = {**own, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*command, *settings, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
    )


def test_the_merged_student_answers_as_it_was_measured(tmp_path: Path) -> None:
    done = adapt(tmp_path, "--self-edits", "4", "--merged", "--joint", "epochs=12", "--json")
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    rows = {row["name"]: row for row in record["results"]}
    assert rows["sealed questions"]["questions"] == 16
    assert rows["sealed questions"]["after"]["mean"] > rows["sealed questions"]["before"]["mean"] + 0.3
    assert rows["what it knew"]["after"]["mean"] > 0.8
    out = tmp_path / "out"
    assert record["merged_sha256"] == folder_sha256(out / "merged")
    assert (out / "adapter" / "adapter_config.json").is_file()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(out / "merged")
    model: Any = AutoModelForCausalLM.from_pretrained(out / "merged", dtype="float32")
    right = []
    for passage in passages(0, "heldout", 2):
        for question in passage.questions_of(passage.questions[-1].bank):  # sealed
            ids = tokenizer(f"Question: {question.text}\nAnswer:", return_tensors="pt").input_ids
            made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
            text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]
            right.append(text.strip(" .").casefold() == question.answer.casefold())
    assert len(right) == 16
    assert sum(right) / 16 == pytest.approx(rows["sealed questions"]["after"]["mean"], abs=1 / 16 + 1e-9)

    again = adapt(tmp_path, "--self-edits", "4", "--joint", "epochs=12", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["id"] == record["id"]
