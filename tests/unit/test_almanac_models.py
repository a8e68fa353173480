"""Promises of the files that ship: they load, they are small, and any text goes through their tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from worlds.almanac import MODELS

tokenizers = pytest.importorskip("tokenizers")

NAMES = ("teacher", "student", "student_qwen2")
SHIPPED_BYTES = 16 * 2**20


@pytest.mark.parametrize("name", NAMES)
def test_every_model_has_the_files_that_from_pretrained_reads(name: str) -> None:
    files = {path.name for path in (MODELS / name).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
    assert not [f for f in files if f.endswith((".bin", ".pt", ".pkl"))]


def test_all_weights_together_are_small() -> None:
    assert sum((MODELS / name / "model.safetensors").stat().st_size for name in NAMES) < SHIPPED_BYTES


def test_the_two_students_have_different_shapes() -> None:
    shapes = {json.loads((MODELS / name / "config.json").read_text())["model_type"] for name in NAMES[1:]}
    assert shapes == {"llama", "qwen2"}


def test_all_models_share_one_tokenizer() -> None:
    assert len({(MODELS / name / "tokenizer.json").read_bytes() for name in NAMES}) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Ada Birch lives in Lisbon.",
        "Naïve façade — 東京, emoji 🦆\tand a tab\r\nsecond line",
        " leading and trailing ",
        "Question: Who?\nAnswer: nobody",
        "\x00\x1b control",
    ],
)
def test_any_text_comes_back_from_the_tokenizer(text: str) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(MODELS / "student" / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_every_word_of_the_world_is_one_token() -> None:
    from worlds.almanac.tokens import world_words

    tokenizer = tokenizers.Tokenizer.from_file(str(MODELS / "student" / "tokenizer.json"))
    assert [w for w in world_words() if len(tokenizer.encode(f" {w}", add_special_tokens=False).ids) != 1] == []


def test_importing_the_world_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, worlds.almanac, worlds.almanac.passages, worlds.almanac.memory, worlds.almanac.edits;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
