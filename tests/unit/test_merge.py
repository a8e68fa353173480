"""Merged students as folders: what ``python -m student.merge`` writes is what the worker computes with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preceptor.artifacts import folder_sha256
from preceptor.v1 import types_pb2 as types
from student.base_cache import BaseCache
from student.lora_bank import LoraBank
from student.merge import main
from student.peft_format import export_adapter
from student.source import inspect
from student.trial import ALL_LINEAR
from tests.unit.tiny_students import byte_tokenizer, save_student, tiny_base, tiny_model


def save_adapter(folder: Path, seed: int, rank: int = 4, shape: str = "llama") -> Path:
    """An adapter as after training: both of its factors are random."""
    base = tiny_base(shape)
    bank = LoraBank(base.model, ALL_LINEAR, [rank], [8.0], [seed])
    bank.values_KP += torch.randn(bank.values_KP.shape, generator=torch.Generator().manual_seed(seed)) / 10
    bank.set_factors(0, bank.factors(0))
    export_adapter(base, bank, 0, folder)
    return folder


def arguments(source: Path, *adapters: Path, out: Path) -> list[str]:
    named = [word for folder in adapters for word in ("--adapter", str(folder))]
    return ["--source", str(source), "--commit", folder_sha256(source), *named, "--out", str(out)]


def test_the_command_writes_the_student_that_a_worker_computes_with(tmp_path: Path) -> None:
    source = save_student(tmp_path / "student")
    adapters = [save_adapter(tmp_path / "one", 1), save_adapter(tmp_path / "two", 2, rank=3)]
    command = [sys.executable, "-m", "student.merge", *arguments(source, *adapters, out=tmp_path / "a" / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    folder = Path(told["folder"])
    assert told == {
        "folder": str(tmp_path / "a" / "merged"),
        "commit": folder_sha256(folder),
        "dtype": "float32",
        "max_logit_difference": 0.0,
    }
    assert inspect(str(folder)).commit == told["commit"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("Where is Ada?")["input_ids"]])
    edits = [types.Artifact(uri=one.as_uri(), sha256=folder_sha256(one)) for one in adapters]
    commit = folder_sha256(source)
    worker = BaseCache(2, "cpu").get(types.PinnedStudent(source=str(source), commit=commit, adapters=edits))
    with torch.no_grad():
        theirs, ours = model(ids).logits, worker.model(ids).logits
        before = AutoModelForCausalLM.from_pretrained(source)(ids).logits
    assert torch.equal(theirs, ours)
    assert (ours - before).abs().max() > 0.1
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["merged"]  # no draft is left


def test_a_student_is_written_in_the_type_it_is_stored_in_rounded_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "student"
    model = tiny_model()
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    adapters = [save_adapter(tmp_path / "one", 1), save_adapter(tmp_path / "two", 2)]
    assert main(arguments(source, *adapters, out=tmp_path / "merged")) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"
    both = [types.Artifact(uri=one.as_uri(), sha256=folder_sha256(one)) for one in adapters]
    student = types.PinnedStudent(source=str(source), commit=folder_sha256(source), adapters=both)
    exact = BaseCache(1, "cpu").get(student).model.state_dict()  # in float32
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, exact[name].to(torch.bfloat16)), name


def test_a_merged_student_is_an_edit_of_its_base_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, adapter = save_student(tmp_path / "student"), save_adapter(tmp_path / "one", 1)
    merged, again = tmp_path / "merged", tmp_path / "again"
    assert main(arguments(source, adapter, out=merged)) == 0
    assert main(arguments(source, merged, adapter, out=again)) == 0
    capsys.readouterr()
    weights = [AutoModelForCausalLM.from_pretrained(one).state_dict() for one in (source, merged, again)]
    name = "model.layers.1.mlp.up_proj.weight"
    base, once, twice = (one[name] for one in weights)
    assert torch.allclose(twice - base, 2 * (once - base), atol=1e-5)


def test_what_cannot_be_merged_or_written_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, adapter = save_student(tmp_path / "student"), save_adapter(tmp_path / "one", 1)
    out = tmp_path / "merged"

    def refused(*words: str) -> str:
        assert main(words) == 2
        said = capsys.readouterr()
        assert not said.out
        assert said.err.count("\n") == 1
        return said.err

    assert refused(*arguments(source, tmp_path / "gone", out=out)).startswith("ARTIFACT_NOT_FOUND: ")
    wrong = arguments(source, adapter, out=out)
    wrong[3] = "0" * 64
    assert refused(*wrong).startswith("STUDENT_CHANGED: ")
    wider = tmp_path / "wider"
    tiny_model(intermediate_size=64).save_pretrained(wider)
    byte_tokenizer().save_pretrained(wider)
    assert "model.layers.0.mlp.down_proj takes 64 and gives 32 values, the adapter's 48 and 32" in refused(
        *arguments(wider, adapter, out=out)
    )
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert refused(*arguments(source, adapter, out=out)).startswith("OUTPUT_NOT_WRITABLE: ")
    assert (out / "mine.txt").read_text() == "precious"
    (tmp_path / "file").write_text("")
    refused_place = arguments(source, adapter, out=tmp_path / "file" / "merged")
    assert refused(*refused_place).startswith("OUTPUT_NOT_WRITABLE: ")


def test_an_adapter_of_a_layer_that_shares_its_weight_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merged into a tied head it would change the embeddings."""
    from safetensors.torch import load_file, save_file

    source, adapter = save_student(tmp_path / "student"), save_adapter(tmp_path / "one", 1)
    file = adapter / "adapter_model.safetensors"
    factors = {"A": torch.randn(4, 32), "B": torch.randn(257, 4)}
    head = {f"base_model.model.lm_head.lora_{half}.weight": value for half, value in factors.items()}
    save_file(load_file(file) | head, file)
    assert main(arguments(source, adapter, out=tmp_path / "merged")) == 2
    assert capsys.readouterr().err.startswith("BASE_NOT_ADAPTABLE: ")
