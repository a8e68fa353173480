"""Promises of JsonPlaces: the line of any value, and of what is around a value that is not there."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from preceptor.json_places import JsonPlaces

TEXT = """\
[
  {"a": "x, ]", "b":
    [1, {"c": "\\"}"}]},
  [],

  "last"
]
"""


def test_lines_of_values_at_any_depth() -> None:
    places = JsonPlaces(TEXT)
    assert places.line(()) == 1
    assert places.line((0,)) == 2
    assert places.line((0, "b")) == 3
    assert places.line((0, "b", 1, "c")) == 3
    assert places.line((2,)) == 6


def test_what_is_not_there_has_the_line_of_what_is_around_it() -> None:
    places = JsonPlaces(TEXT)
    assert places.line((0, "z")) == 2
    assert places.line((1, 4)) == 4
    assert places.line((9,)) == 1
    assert places.line((2, "z")) == 6


@given(
    st.recursive(
        st.text(max_size=4) | st.integers(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    )
)
def test_every_value_is_found_at_the_line_the_writer_put_it(value: Any) -> None:
    text = json.dumps(value, indent=1)
    places = JsonPlaces(text)
    expected = iter(range(1, text.count("\n") + 2))

    def check(inner: Any, path: tuple[str | int, ...], line: int) -> None:
        assert places.line(path) == line
        children = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
        for key, child in children:
            check(child, (*path, key), next(expected))
        if isinstance(inner, (dict, list)) and inner:
            next(expected)  # the closing bracket's line

    check(value, (), next(expected))
