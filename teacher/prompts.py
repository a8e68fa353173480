"""Prompt formats by name: how a passage is put before the teacher.

A format is a template with ``{title}`` and ``{text}``. Every format asks for the same shape of answer, which
``preceptor.completions`` reads: a first line ``directive: key=value ...`` and then one study document per line.
The tiny teacher of ``worlds/almanac`` was warm-started on exactly these strings, so a change here means
rebuilding it (``make worlds``); that is why each format carries a version.
"""

from __future__ import annotations

from dataclasses import dataclass

from preceptor.errors import PreceptorError


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """One way to ask for a self-edit."""

    name: str
    version: int
    instruction: str

    def render(self, title: str, text: str) -> str:
        """The prompt for one passage; the completion starts right after it."""
        return f"# {title}\n{text.strip()}\n\n{self.instruction}\n"


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


def prompt_format(name: str) -> PromptFormat:
    """The format called ``name``; raises PreceptorError(UNKNOWN_PROMPT_FORMAT)."""
    try:
        return FORMATS[name]
    except KeyError:
        raise PreceptorError(
            "UNKNOWN_PROMPT_FORMAT", f"no prompt format named {name!r}; there are: {', '.join(FORMATS)}"
        ) from None
