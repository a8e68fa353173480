"""SEAL's self-edit for few-shot tasks: read as published, refused with its place where it is malformed."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.completions import Limits, MalformedSelfEdit
from preceptor.few_shot.directives import parse_json_directive, render_json_directive
from preceptor.tasks import Augmentations, Directive, LossMask

# The published example, as a model gives it.
PUBLISHED = """{
  "data_generation": {
    "use_basic_augmentations": true,
    "use_size_augmentations": true,
    "use_chain_augmentations": false,
    "use_repeat_augmentations": false
  },
  "training": {
    "strategy": "train_using_output_tokens",
    "learning_rate": 0.0001,
    "num_train_epochs": 2
  }
}"""
READ = Directive(
    learning_rate=1e-4,
    epochs=2,
    loss_mask=LossMask.AFTER_MARKER,
    augmentations=Augmentations(basic=True, size=True, chain=False, repeat=False, colours=True),
)


@pytest.mark.parametrize(
    "text",
    [
        PUBLISHED,
        f"```json\n{PUBLISHED}\n```",
        f"```\n{PUBLISHED}```\nThis choice is {{simple}} and robust.",
        f"Sure! Here is the configuration for {{this}} task:\n\n{PUBLISHED}\n\nLet me know.",
        f"{PUBLISHED}\nOnce more:\n{json.dumps(json.loads(PUBLISHED))}",
        PUBLISHED.replace("0.0001", "1e-4"),
    ],
)
def test_the_published_form_is_read_whatever_stands_around_it(text: str) -> None:
    assert parse_json_directive(text, Limits()) == READ


def test_what_is_absent_is_the_runs_default() -> None:
    assert parse_json_directive("{}", Limits()) == Directive()
    assert parse_json_directive('{"data_generation": {}}', Limits()) == Directive(augmentations=Augmentations())
    only = parse_json_directive(
        '{"training": {"strategy": "train_using_all_tokens", "learning_rate": 1}}', Limits(learning_rate=(1e-6, 1.0))
    )
    assert only == Directive(loss_mask=LossMask.ALL, learning_rate=1.0)


def test_colours_stay_where_the_directive_says_so() -> None:
    found = parse_json_directive('{"data_generation": {"use_color_permutations": false}}', Limits())
    assert found.augmentations == Augmentations(colours=False)


def changed(section: str, key: str, value: Any) -> str:
    values = json.loads(PUBLISHED)
    values[section][key] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "fault", "line"),
    [
        ("", "no JSON object", 0),
        ("I would rotate the grids.", "no JSON object", 0),
        ('["data_generation"]', "no JSON object", 0),
        ("Well:\n" + PUBLISHED[:-3], "no valid JSON", 13),
        (PUBLISHED.replace("true", "True"), "no valid JSON", 3),
        ('{"augment": {}}', "augment is not one of data_generation, training", 1),
        ('\n{"data_generation": true}', "data_generation must be an object, is true", 2),
        ('{"training": []}', "training must be an object", 1),
        (changed("data_generation", "use_basic_augmentations", "yes"), "use_basic_augmentations must be true or", 1),
        (changed("data_generation", "use_basic_augmentations", 1), "must be true or false, is 1", 1),
        (changed("data_generation", "use_colours", True), "data_generation.use_colours is not one of", 1),
        (changed("training", "strategy", "train_on_everything"), "training.strategy must be one of", 1),
        (changed("training", "strategy", None), "training.strategy must be one of", 1),
        (changed("training", "optimizer", "adam"), "training.optimizer is not one of", 1),
        (changed("training", "learning_rate", "1e-4"), "learning_rate must be a number", 1),
        (changed("training", "learning_rate", True), "learning_rate must be a number", 1),
        (changed("training", "learning_rate", 2), "training.learning_rate is outside 1e-06..0.1", 1),
        (changed("training", "learning_rate", 10**400), "training.learning_rate is too large", 1),
        (changed("training", "learning_rate", float("nan")), "NaN is no number", 1),
        (changed("training", "num_train_epochs", 2.5), "num_train_epochs must be a whole number", 1),
        (changed("training", "num_train_epochs", 0), "training.num_train_epochs is outside 1..64", 1),
        ('{"training": {"learning_rate": 1e-4, "learning_rate": 1e-3}}', "learning_rate is given twice", 1),
        (f"{PUBLISHED}\n{changed('training', 'num_train_epochs', 3)}", "a second JSON object", 14),
        ('{"a": ' * 100_000, "no JSON that can be read", 1),
        ('{"training": {"num_train_epochs": ' + "9" * 5000 + "}}", "no JSON that can be read", 1),
    ],
)
def test_a_malformed_self_edit_says_what_and_where(text: str, fault: str, line: int) -> None:
    with pytest.raises(MalformedSelfEdit, match=fault.replace("(", r"\(")) as caught:
        parse_json_directive(text, Limits())
    assert caught.value.line == line
    assert len(str(caught.value)) < 300


@given(st.text(max_size=200))
def test_no_text_does_more_than_be_malformed(text: str) -> None:
    with suppress(MalformedSelfEdit):
        assert isinstance(parse_json_directive("{" + text, Limits()), Directive)


@given(
    st.builds(
        Directive,
        learning_rate=st.none() | st.floats(1e-6, 1e-1),
        epochs=st.none() | st.integers(1, 64),
        loss_mask=st.sampled_from([None, LossMask.ALL, LossMask.AFTER_MARKER]),
        augmentations=st.none() | st.builds(Augmentations, *[st.booleans()] * 5),
    )
)
def test_what_is_written_is_read_back(directive: Directive) -> None:
    assert parse_json_directive(render_json_directive(directive), Limits()) == directive
