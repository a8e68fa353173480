"""Prompt formats by name: how a task is put before the teacher.

``FORMATS`` are the tiny teacher's. Every one of them asks for the same shape of answer, which
``preceptor.completions`` reads: a first line ``directive: key=value ...`` and then one study document per line.
The tiny teacher of ``worlds/almanac`` was warm-started on exactly these strings (and that of ``worlds/mosaic`` on
``augmentations``), so a change here means rebuilding it (``make worlds``); that is why each format carries a version.

For real models there are the files of ``preceptor/prompt_templates``, and a user's own (``Formats``).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from preceptor.errors import PreceptorError
from preceptor.prompt_formats import PromptFormat, read_templates, shipped_templates

FORMATS = {
    f.name: f
    for f in (
        # The teacher chooses the style itself; the format that training uses by default.
        PromptFormat("open", 1, "Write a directive, then study material for this passage, one document per line."),
        PromptFormat("implications", 1, "Write a directive, then every fact of this passage as a short statement."),
        PromptFormat("rewrite", 1, "Write a directive, then every fact of this passage in several wordings."),
        PromptFormat("self_qa", 1, "Write a directive, then every fact of this passage as question and answer."),
        PromptFormat("copy", 1, "Write a directive, then this passage again, sentence by sentence."),
    )
}
# Of few-shot tasks: a directive as JSON, no documents.
FEW_SHOT_FORMATS = {
    "augmentations": PromptFormat(
        "augmentations", 1, "Write a directive as JSON for this task.", splitting="directive", kind="few_shot"
    )
}
# Nobody writes: the passage is the self-edit.
NONE = PromptFormat("none", 1, "The passage itself; the teacher writes nothing.", splitting="whole", asks=False)


@cache
def shipped_formats() -> dict[str, PromptFormat]:
    """All that ships, by name."""
    return {**FORMATS, **FEW_SHOT_FORMATS, NONE.name: NONE, **shipped_templates()}


class Formats:
    """What ships and, with a ``folder``, a user's own templates.

    Raises PreceptorError(FILE_NOT_FOUND, BAD_PROMPT_TEMPLATE).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._formats = dict(shipped_formats())
        if folder is not None:
            self._formats |= read_templates(folder, self._formats)

    def __iter__(self) -> Iterator[PromptFormat]:
        return iter(self._formats.values())

    def find(self, name: str) -> PromptFormat:
        """The format called ``name``. Raises PreceptorError(UNKNOWN_PROMPT_FORMAT)."""
        try:
            return self._formats[name]
        except KeyError:
            raise PreceptorError(
                "UNKNOWN_PROMPT_FORMAT", f"no prompt format named {name!r}; there are: {', '.join(self._formats)}"
            ) from None


def prompt_format(name: str) -> PromptFormat:
    """The format called ``name`` of those that ship; raises PreceptorError(UNKNOWN_PROMPT_FORMAT)."""
    return Formats().find(name)
