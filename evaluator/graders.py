"""Graders say whether an answer is right. Each has a version that is part of every evaluation's identity.

A grader is a pure function of question and answer. One that can be unreachable (a judge) must raise, never guess: an
outage is a failure of the evaluation, not a wrong answer.
"""

from __future__ import annotations

import re
import string
import unicodedata
from typing import Protocol

from preceptor.errors import PreceptorError
from preceptor.tasks import Question

_ARTICLES = frozenset({"a", "an", "the"})
_DECIMAL_POINT = re.compile(r"(?<=\d)\.(?=\d)")
_MINUS = re.compile(r"(?<!\w)[-−](?=\d)")
# Private-use characters that carry what must survive the removal of punctuation.
_KEPT = {"\ue000": ".", "\ue001": "-"}


class Grader(Protocol):
    """Decides about answers. Raise ``version`` whenever any decision may change."""

    @property
    def name(self) -> str:
        """What a protocol calls it."""
        ...

    @property
    def version(self) -> str:
        """Part of every evaluation's identity."""
        ...

    def grade(self, question: Question, answer: str) -> bool:
        """Whether ``answer`` is a right answer to ``question``."""
        ...


class ExactMatch:
    """Right where the normalised answer equals the normalised gold answer or one of its aliases.

    The normalisation is that of SQuAD (case, punctuation, articles, white space; Rajpurkar et al. 2016), with Unicode
    NFKC before it and three differences: a decimal point and a leading minus stay ("3.5" is not "35", "-5" is not "5"),
    an article that is the whole answer stays ("A" can be the right letter), and what has no letter or digit is compared
    as it is.
    """

    name = "exact"
    version = "1"

    def grade(self, question: Question, answer: str) -> bool:
        """Whether the two are equal after normalisation. An empty answer is wrong."""
        given = normalise(answer)
        return bool(given) and any(given == normalise(gold) for gold in (question.answer, *question.aliases))


def normalise(text: str) -> str:
    """The form in which answers are compared."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    for mark in _KEPT:
        text = text.replace(mark, "")
    kept = _MINUS.sub("\ue001", _DECIMAL_POINT.sub("\ue000", text))
    bare = "".join(character for character in kept if not _is_punctuation(character))
    for mark, meaning in _KEPT.items():
        bare = bare.replace(mark, meaning)
    words = unicodedata.normalize("NFKC", bare).split()
    return " ".join([word for word in words if word not in _ARTICLES] or words or text.split())


def _is_punctuation(character: str) -> bool:
    # string.punctuation also has ASCII symbols ($ + < = > ^ ` | ~), which SQuAD removes as well.
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def grader_named(name: str) -> Grader:
    """The grader a protocol names; empty means "exact". Raises PreceptorError(GRADER_UNKNOWN)."""
    if name in ("", ExactMatch.name):
        return ExactMatch()
    raise PreceptorError("GRADER_UNKNOWN", f"there is no grader {name!r}; known: {ExactMatch.name}", field="grader")


def grader_label(grader: Grader) -> str:
    """Name and version, as reports and identities carry them."""
    return f"{grader.name}/{grader.version}"
