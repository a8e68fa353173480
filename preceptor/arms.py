"""The arms of the held-out measurement: their names, their order in every table, and what people call them.

``orchestrator/heldout.py`` says what study material each has. An arm of a fixed prompt format is ``format:NAME``.
"""

from __future__ import annotations

NO_EDIT = "no_edit"
PASSAGE = "passage_only"
FORMAT = "format:"
UNTRAINED = "untrained_teacher"
FIXED = "fixed_strategy"
EXTERNAL = "external_teacher"
TRAINED = "trained_teacher"
IN_CONTEXT = "in_context"
ORACLE = "oracle"
SHUFFLED = "shuffled_facts"
# Arms whose edits the tasks bring (Task.reference_edits); left out where they bring none.
REFERENCES = (ORACLE, SHUFFLED)

_WORDS = {
    NO_EDIT: "no edit",
    PASSAGE: "raw passage only",
    UNTRAINED: "untrained teacher",
    FIXED: "best fixed strategy",
    EXTERNAL: "external teacher",
    TRAINED: "trained teacher",
    IN_CONTEXT: "text in the prompt",
    ORACLE: "oracle",
    SHUFFLED: "shuffled facts",
}
# What is another thing where the tasks are few-shot tasks, whose demonstrations stand in every prompt.
_FEW_SHOT_WORDS = {NO_EDIT: "no edit (in context)", ORACLE: "oracle directive", SHUFFLED: "wrong directive"}
# In the names of differences, e.g. "trained_minus_fixed".
_SHORT = {
    UNTRAINED: "untrained",
    FIXED: "fixed",
    PASSAGE: "passage",
    EXTERNAL: "external",
    TRAINED: "trained",
    SHUFFLED: "shuffled",
}
# The control of the measurement itself: wrong facts in right form must teach nothing.
CONTROL = "shuffled_minus_no_edit"


def format_arm(prompt_format: str) -> str:
    """The arm of a prompt format."""
    return FORMAT + prompt_format


def words(arm: str, few_shot: bool = False) -> str:
    """The arm's name for people."""
    if few_shot and arm in _FEW_SHOT_WORDS:
        return _FEW_SHOT_WORDS[arm]
    return f"format {arm.removeprefix(FORMAT)}" if arm.startswith(FORMAT) else _WORDS.get(arm, arm)


def difference_of(first: str, second: str) -> str:
    """The name of a paired difference, e.g. ``trained_minus_format:rewrite``."""
    return f"{_SHORT.get(first, first)}_minus_{_SHORT.get(second, second)}"
