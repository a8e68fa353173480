"""SEAL's self-edit for few-shot tasks, a JSON object, and the directive that it is.

    {"data_generation": {"use_basic_augmentations": true, "use_size_augmentations": false,
                         "use_chain_augmentations": false, "use_repeat_augmentations": false},
     "training": {"strategy": "train_using_output_tokens", "learning_rate": 1e-4, "num_train_epochs": 2}}

A code fence and words around the object are passed over; what stands in it is read strictly: a directive that is
silently repaired would be rewarded as if the teacher had chosen it. What is absent is the run's default, an absent
augmentation of a given ``data_generation`` false. Beyond the published keys there is ``use_color_permutations``
(absent: true, as published).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from preceptor.completions import Limits, MalformedSelfEdit
from preceptor.tasks import Augmentations, Directive, LossMask

_AUGMENTATIONS = {
    "use_basic_augmentations": "basic",
    "use_size_augmentations": "size",
    "use_chain_augmentations": "chain",
    "use_repeat_augmentations": "repeat",
    "use_color_permutations": "colours",
}
# Every document that is made of a task has the marker, so that nothing is ever left without loss.
_STRATEGIES = {"train_using_all_tokens": LossMask.ALL, "train_using_output_tokens": LossMask.AFTER_MARKER}
_SECTIONS = ("data_generation", "training")
# Where an object of JSON may begin: chatter has braces, too.
_BEGINS = re.compile(r'\{\s*["}]')
_MOST_SHOWN = 60


def parse_json_directive(text: str, limits: Limits) -> Directive:
    """The directive in a completion.

    Raises MalformedSelfEdit, whose message names the key and whose line is the object's or the fault's.
    """
    values, line = _only_object(text)
    try:
        _known(values, _SECTIONS, "")
        generation, training = (_section(values, name) for name in _SECTIONS)
        return Directive(
            learning_rate=_within(training, "learning_rate", _number, limits.learning_rate),
            epochs=_within(training, "num_train_epochs", _whole, limits.epochs),
            loss_mask=_strategy(training),
            augmentations=_augmentations(generation) if "data_generation" in values else None,
        )
    except MalformedSelfEdit as error:
        raise MalformedSelfEdit(str(error), line) from None


def render_json_directive(directive: Directive) -> str:
    """The completion that ``parse_json_directive`` reads back; what SEAL's form has no key for is left out."""
    values: dict[str, dict[str, object]] = {}
    if (asked := directive.augmentations) is not None:
        generation: dict[str, object] = {key: getattr(asked, name) for key, name in _AUGMENTATIONS.items()}
        if asked.colours:
            del generation["use_color_permutations"]
        values["data_generation"] = generation
    training: dict[str, object] = {}
    if directive.loss_mask is not None:
        only_outputs = directive.loss_mask is not LossMask.ALL
        training["strategy"] = "train_using_output_tokens" if only_outputs else "train_using_all_tokens"
    if directive.learning_rate is not None:
        training["learning_rate"] = directive.learning_rate
    if directive.epochs is not None:
        training["num_train_epochs"] = directive.epochs
    if training:
        values["training"] = training
    return json.dumps(values)


def _only_object(text: str) -> tuple[dict[str, Any], int]:
    """The JSON object in a text and the line it begins in; said again word for word it counts once."""
    found: list[tuple[dict[str, Any], int]] = []
    at = 0
    decoder = json.JSONDecoder(object_pairs_hook=_without_repeats, parse_constant=_no_number)
    while match := _BEGINS.search(text, at):
        line = text.count("\n", 0, match.start()) + 1
        try:
            value, at = decoder.raw_decode(text, match.start())
        except json.JSONDecodeError as error:
            raise MalformedSelfEdit(f"no valid JSON: {error.msg}", error.lineno) from None
        except MalformedSelfEdit as error:
            raise MalformedSelfEdit(str(error), line) from None
        except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
            raise MalformedSelfEdit("no JSON that can be read", line) from None
        found.append((value, line))
    if not found:
        raise MalformedSelfEdit("no JSON object")
    if any(value != found[0][0] for value, _ in found):
        raise MalformedSelfEdit("a second JSON object that differs from the first", found[1][1])
    return found[0]


def _without_repeats(items: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(items)
    if len(values) < len(items):
        twice = next(key for key, _ in items if sum(key == other for other, _ in items) > 1)
        raise MalformedSelfEdit(f"{_shown(twice)} is given twice")
    return values


def _no_number(text: str) -> object:
    raise MalformedSelfEdit(f"{text} is no number")


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name, {})
    if not isinstance(section, dict):
        raise MalformedSelfEdit(f"{name} must be an object, is {_shown(section)}")
    return section


def _augmentations(values: Mapping[str, Any]) -> Augmentations:
    _known(values, tuple(_AUGMENTATIONS), "data_generation.")
    for key, value in values.items():
        if not isinstance(value, bool):
            raise MalformedSelfEdit(f"data_generation.{key} must be true or false, is {_shown(value)}")
    return Augmentations(**{_AUGMENTATIONS[key]: value for key, value in values.items()})


def _strategy(values: Mapping[str, Any]) -> LossMask | None:
    _known(values, ("strategy", "learning_rate", "num_train_epochs"), "training.")
    if "strategy" not in values:
        return None
    strategy = values["strategy"]
    if not isinstance(strategy, str) or strategy not in _STRATEGIES:
        raise MalformedSelfEdit(f"training.strategy must be one of {', '.join(_STRATEGIES)}, is {_shown(strategy)}")
    return _STRATEGIES[strategy]


def _within(
    values: Mapping[str, Any], key: str, read: Callable[[str, object], Any], limits: tuple[float, float]
) -> Any | None:
    """The number under a key of the training; None where it is absent."""
    if key not in values:
        return None
    value, (low, high) = read(f"training.{key}", values[key]), limits
    if not low <= value <= high:
        raise MalformedSelfEdit(f"training.{key} is outside {low}..{high}: {_shown(value)}")
    return value


def _number(place: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MalformedSelfEdit(f"{place} must be a number, is {_shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise MalformedSelfEdit(f"{place} is too large") from None


def _whole(place: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise MalformedSelfEdit(f"{place} must be a whole number, is {_shown(value)}")
    return value


def _known(values: Mapping[str, Any], keys: tuple[str, ...], place: str) -> None:
    if unknown := next((key for key in values if key not in keys), None):
        raise MalformedSelfEdit(f"{place}{_shown(unknown)} is not one of {', '.join(keys)}")


def _shown(value: object) -> str:
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except (ValueError, RecursionError):
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."
