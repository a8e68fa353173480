"""Where in a JSON text a value stands, so that an error about it can name the line.

Python's parser keeps no places. This reads again, only when there is something to report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class JsonPlaces:
    """The places in one valid JSON text. Starts of top-level elements are kept, so that many questions are cheap."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._top: list[int] | None = None

    def line(self, path: Sequence[str | int]) -> int:
        """The line (from 1) of the value at ``path``, or of the nearest value around it that exists."""
        at = _skip(self._text, 0)
        for depth, step in enumerate(path):
            child = self._child(at, step, top=depth == 0)
            if child is None:
                break
            at = child
        return self._text.count("\n", 0, at) + 1

    def _child(self, at: int, step: str | int, top: bool) -> int | None:
        if isinstance(step, str):
            return next((start for key, start in _members(self._text, at) if key == step), None)
        if not top:
            return next((start for place, start in enumerate(_elements(self._text, at)) if place == step), None)
        if self._top is None:
            self._top = list(_elements(self._text, at))
        return self._top[step] if step < len(self._top) else None


def _elements(text: str, at: int) -> Iterator[int]:
    """Where each element of the list at ``at`` starts; nothing if there is no list."""
    if text[at] != "[":
        return
    at = _skip(text, at + 1)
    while text[at] != "]":
        yield at
        at = _past_comma(text, _DECODER.raw_decode(text, at)[1])


def _members(text: str, at: int) -> Iterator[tuple[str, int]]:
    """Each key of the object at ``at`` and where its value starts; nothing if there is no object."""
    if text[at] != "{":
        return
    at = _skip(text, at + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        at = _skip(text, _skip(text, at) + 1)  # the colon
        yield key, at
        at = _past_comma(text, _DECODER.raw_decode(text, at)[1])


def _past_comma(text: str, at: int) -> int:
    at = _skip(text, at)
    return _skip(text, at + 1) if text[at] == "," else at


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match  # the pattern matches the empty string
    return match.end()
