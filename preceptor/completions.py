"""Reads a completion as a self-edit, and writes a self-edit the way a teacher should.

The form is::

    directive: lr=3e-3 epochs=8 replay=0.25
    Ada Brook lives in Lisbon.
    Ada Brook works as a baker.

The directive line may be missing; every other non-empty line is one study document (or what another ``splitting``
makes of the rest, see preceptor.splitting). ``parse`` is strict about what it understands: an unknown key, a value that
is no number or a value outside the limits makes the completion MALFORMED, because a directive that is silently repaired
would be rewarded as if the teacher had chosen it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from preceptor.splitting import split
from preceptor.tasks import TARGETS, Directive, FineTuning, LossMask, SelfEdit


class MalformedSelfEdit(ValueError):
    """A completion that is no self-edit; the message says why. ``line`` counts from 1; 0: the completion as a whole."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


class TooCostlySelfEdit(ValueError):
    """A self-edit that reads well, and whose training would cost more than the limits allow."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a teacher may ask for. Bounds are inclusive.

    ``trained_characters`` is the cost guard (0: none): characters of the documents, times epochs, replay included. For
    it alone there are the defaults of the run, which hold where a directive says nothing.
    """

    learning_rate: tuple[float, float] = (1e-6, 1e-1)
    epochs: tuple[int, int] = (1, 64)
    replay_share: tuple[float, float] = (0.0, 0.9)
    rank: tuple[int, int] = (1, 128)
    documents: int = 512
    document_chars: int = 8_192
    targets: tuple[str, ...] = tuple(TARGETS)
    allow_full: bool = False
    trained_characters: int = 0
    default_epochs: int = 1
    default_replay_share: float = 0.0

    def check_cost(self, edit: SelfEdit) -> None:
        """Raises TooCostlySelfEdit."""
        if not self.trained_characters:
            return
        epochs = edit.directive.epochs or self.default_epochs
        replayed = edit.directive.replay_share
        share = self.default_replay_share if replayed is None else replayed
        # Of what is trained on, a share is replay: the documents are the rest of it.
        cost = math.ceil(sum(map(len, edit.documents)) * epochs / (1 - share))
        if cost > self.trained_characters:
            raise TooCostlySelfEdit(
                f"too costly: {cost} characters to train on ({len(edit.documents)} documents, {epochs} epochs, replay "
                f"{share:g}), limit {self.trained_characters}"
            )


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
    "targets": ("targets", str),
    "fine_tuning": ("fine_tuning", FineTuning),
}
_DIRECTIVE = re.compile(r"^\s*directive\s*:(.*)$", re.IGNORECASE)


def parse(
    completion: str, limits: Limits, *, finished: bool = True, splitting: str = "lines", title: str = ""
) -> SelfEdit:
    """The self-edit in ``completion``.

    ``finished`` is False when generation stopped at its token limit: the last document is then cut off. Lines of the
    tiny teacher count as malformed then, as does a single document, since a half-written fact teaches something wrong;
    of a longer list it is left out. Documents begin with ``title``, where one is given.

    Raises MalformedSelfEdit.
    """
    if not finished and splitting in ("lines", "whole"):
        raise MalformedSelfEdit("the completion ran into the token limit before it ended")
    if splitting != "lines":
        return _parse_freely(completion, limits, finished, splitting, title)
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
    return SelfEdit(tuple(_titled(line, title) for _, line in lines), directive)


def _parse_freely(completion: str, limits: Limits, finished: bool, splitting: str, title: str) -> SelfEdit:
    """Of a model that was never taught our form: the directive may stand behind an opening, in bold or in a fence, and
    of too many documents the first count."""
    directive, given, kept = Directive(), 0, []
    for at, line in enumerate(completion.splitlines(), 1):
        if not (match := _DIRECTIVE.match(line.replace("*", "").replace("`", ""))):
            kept.append(line)
            continue
        if given:
            raise MalformedSelfEdit("a second directive", at)
        given = at
        try:
            directive = _parse_directive(match[1], limits)
        except MalformedSelfEdit as error:
            raise MalformedSelfEdit(str(error), at) from None
    documents = split("\n".join(kept), splitting, title=title, finished=finished)
    if not documents and not finished:
        raise MalformedSelfEdit("the completion ran into the token limit before its first document ended")
    if not documents:
        raise MalformedSelfEdit("no study document")
    documents = tuple(_titled(document, title) for document in documents[: limits.documents])
    for number, document in enumerate(documents, 1):
        if len(document) > limits.document_chars:
            raise MalformedSelfEdit(f"document {number} has {len(document)} characters, limit {limits.document_chars}")
    return SelfEdit(documents, directive)


def _titled(document: str, title: str) -> str:
    """The document behind its title, which stands there once."""
    return document if not title or document.startswith(title) else f"{title}\n{document}"


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
        if name == "targets" and value not in limits.targets:
            raise MalformedSelfEdit(f"directive: {key}={_short(raw)} is not one of {', '.join(limits.targets)}")
        if value is FineTuning.FULL and not limits.allow_full:
            raise MalformedSelfEdit(f"directive: {key}={_short(raw)} is not allowed")
        if isinstance(value, int | float):
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
