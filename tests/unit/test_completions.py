"""What a teacher may ask for."""

from __future__ import annotations

import pytest

from preceptor.completions import Limits, MalformedSelfEdit, parse
from preceptor.tasks import LossMask


@pytest.mark.parametrize("mask", list(LossMask))
def test_a_teacher_chooses_only_among_masks_that_always_leave_something_to_train(mask: LossMask) -> None:
    completion = f"directive: loss={mask}\nAda is in Rome."
    if mask is LossMask.OUTPUTS_ONLY:
        with pytest.raises(MalformedSelfEdit, match="loss=outputs_only has no valid value"):
            parse(completion, Limits())
    else:
        assert parse(completion, Limits()).directive.loss_mask is mask


@pytest.mark.parametrize("setting", ["schedule=cosine", "max_steps=9", "pad_to=64", "gradient_accumulation=2"])
def test_a_teacher_cannot_ask_for_what_is_the_runs_affair(setting: str) -> None:
    with pytest.raises(MalformedSelfEdit, match="is not one of lr="):
        parse(f"directive: {setting}\nAda is in Rome.", Limits())


@pytest.mark.parametrize(
    ("completion", "line"),
    [
        ("\n\ndirective: lr=fast\nA.", 3),
        ("directive: lr=1e-3\n\nA.\ndirective: lr=1e-3", 4),
        ("A.\n\n" + "x" * 9000, 3),
        ("\n", 0),
    ],
)
def test_what_is_malformed_is_told_with_its_line(completion: str, line: int) -> None:
    with pytest.raises(MalformedSelfEdit) as caught:
        parse(completion, Limits())
    assert caught.value.line == line
