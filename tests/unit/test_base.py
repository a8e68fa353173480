"""A student is loaded as transformers knows it, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from preceptor.errors import PreceptorError
from student.base import load_base
from tests.unit.tiny_students import OTHERS, PACKED, byte_tokenizer, save_student, tiny_model

IDS = torch.tensor([[72, 101, 108, 108, 111]])


@pytest.mark.parametrize("shape", [*PACKED, *OTHERS])
def test_decoder_and_head_apart_give_the_models_logits(shape: str, tmp_path: Path) -> None:
    base = load_base(save_student(tmp_path, shape), source="", commit="")
    with torch.no_grad():
        apart = base.logits(base.decoder(IDS)[0][0])
        torch.testing.assert_close(apart, base.model(IDS).logits[0])
        torch.testing.assert_close(apart, tiny_model(shape)(IDS).logits[0])


@pytest.mark.parametrize(("shape", "changes"), [("cohere", {}), ("granite", {"logits_scaling": 8.0})])
def test_a_student_whose_logits_are_made_otherwise_is_refused(
    shape: str, changes: dict[str, float], tmp_path: Path
) -> None:
    tiny_model(shape, **changes).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(PreceptorError, match=shape) as refused:
        load_base(tmp_path, source="", commit="")
    assert refused.value.reason == "BAD_STUDENT_SOURCE"
