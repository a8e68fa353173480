"""Where in a JSON text a value stands, so that an error about it can name the line.

Python's parser keeps no places. This reads again, only when there is something to report.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class JsonPlaces:
    """The places in one valid JSON text. What was read once is kept, so that many questions cost no more than one."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._ends = [match.start() for match in re.finditer("\n", text)]
        self._children: dict[int, dict[str | int, int]] = {}  # by the place of their parent

    def line(self, path: Sequence[str | int]) -> int:
        """The line (from 1) of the value at ``path``, or of the nearest value around it that exists."""
        at = _skip(self._text, 0)
        for step in path:
            if at not in self._children:
                self._children[at] = self._read(at)
            if step not in self._children[at]:
                break
            at = self._children[at][step]
        return bisect_left(self._ends, at) + 1

    def _read(self, at: int) -> dict[str | int, int]:
        found: dict[str | int, int] = {}
        try:
            found.update(_members(self._text, at))  # of two with one key the later, as the parser has it
            found.update(enumerate(_elements(self._text, at)))
        except RecursionError:  # nested so deeply that it could just be parsed; the value around it will do
            pass
        return found


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
