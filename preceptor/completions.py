"""Reads a completion as a self-edit, and writes a self-edit the way a teacher should.

The form is::

    directive: lr=3e-3 epochs=8 replay=0.25
    Ada Brook lives in Lisbon.
    Ada Brook works as a baker.

The directive line may be missing; every other non-empty line is one study document. ``parse`` is strict about what
it understands: an unknown key, a value that is no number or a value outside the limits makes the completion
MALFORMED, because a directive that is silently repaired would be rewarded as if the teacher had chosen it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from preceptor.tasks import Directive, LossMask, SelfEdit


class MalformedSelfEdit(ValueError):
    """A completion that is no self-edit; the message says why. ``line`` counts from 1; 0: the completion as a whole."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True, slots=True)
class Limits:
    """What a teacher may ask for. Bounds are inclusive."""

    learning_rate: tuple[float, float] = (1e-6, 1e-1)
    epochs: tuple[int, int] = (1, 64)
    replay_share: tuple[float, float] = (0.0, 0.9)
    rank: tuple[int, int] = (1, 128)
    documents: int = 512
    document_chars: int = 8_192


def _mask(raw: str) -> LossMask:
    """A mask that leaves something to train whatever the documents are. Raises ValueError."""
    mask = LossMask(raw)
    if mask is LossMask.OUTPUTS_ONLY:
        raise ValueError(raw)
    return mask


_KEYS: dict[str, tuple[str, Callable[[str], object]]] = {
    "lr": ("learning_rate", float),
    "epochs": ("epochs", int),
    "replay": ("replay_share", float),
    "rank": ("rank", int),
    "loss": ("loss_mask", _mask),
}
_DIRECTIVE = re.compile(r"^\s*directive\s*:(.*)$", re.IGNORECASE)


def parse(completion: str, limits: Limits, *, finished: bool = True) -> SelfEdit:
    """The self-edit in ``completion``.

    ``finished`` is False when generation stopped at its token limit: the last document is then cut off and the
    completion counts as malformed, since a half-written fact teaches something wrong.

    Raises MalformedSelfEdit.
    """
    if not finished:
        raise MalformedSelfEdit("the completion ran into the token limit before it ended")
    lines = [(at, line.strip()) for at, line in enumerate(completion.splitlines(), 1) if line.strip()]
    directive = Directive()
    if lines and (match := _DIRECTIVE.match(lines[0][1])):
        try:
            directive = _parse_directive(match[1], limits)
        except MalformedSelfEdit as error:
            raise MalformedSelfEdit(str(error), lines[0][0]) from None
        lines = lines[1:]
    if not lines:
        raise MalformedSelfEdit("no study document")
    if len(lines) > limits.documents:
        raise MalformedSelfEdit(f"{len(lines)} documents; at most {limits.documents} are allowed")
    for number, (at, line) in enumerate(lines, 1):
        if len(line) > limits.document_chars:
            raise MalformedSelfEdit(f"document {number} has {len(line)} characters, limit {limits.document_chars}", at)
        if _DIRECTIVE.match(line):
            raise MalformedSelfEdit(f"a second directive in document {number}", at)
    return SelfEdit(tuple(line for _, line in lines), directive)


def _parse_directive(text: str, limits: Limits) -> Directive:
    values: dict[str, object] = {}
    for item in text.replace(",", " ").split():
        key, equals, raw = item.partition("=")
        if not equals or key not in _KEYS:
            raise MalformedSelfEdit(f"directive: {_short(item)!r} is not one of {', '.join(f'{k}=' for k in _KEYS)}")
        name, read = _KEYS[key]
        if name in values:
            raise MalformedSelfEdit(f"directive: {key} is given twice")
        try:
            value = read(raw)
        except ValueError:
            raise MalformedSelfEdit(f"directive: {key}={_short(raw)} has no valid value") from None
        if isinstance(value, int | float) and not isinstance(value, LossMask):
            low, high = getattr(limits, name)
            if not low <= value <= high:
                raise MalformedSelfEdit(f"directive: {key}={_short(raw)} is outside {low}..{high}")
        values[name] = value
    return Directive(**values)  # type: ignore[arg-type]


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def render(edit: SelfEdit) -> str:
    """The completion that ``parse`` reads back as ``edit``."""
    lines = list(edit.documents)
    if directive := render_directive(edit.directive):
        lines.insert(0, directive)
    return "\n".join(lines)


def render_directive(directive: Directive) -> str:
    """``directive: lr=3e-3 epochs=8``, or the empty string where nothing is set."""
    items = []
    for key, (name, _) in _KEYS.items():
        value = getattr(directive, name)
        if value is not None:
            items.append(f"{key}={_number(value)}" if isinstance(value, float) else f"{key}={value}")
    return f"directive: {' '.join(items)}" if items else ""


def _number(value: float) -> str:
    """Shortest usual writing: 3e-3 below a hundredth, else plain."""
    if 0 < value < 0.01:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"
