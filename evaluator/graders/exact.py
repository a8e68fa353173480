"""Exact match after normalisation."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from evaluator.graders.grader import Given, Verdict
from preceptor.tasks import Question

_ARTICLES = frozenset({"a", "an", "the"})
_DECIMAL_POINT = re.compile(r"(?<=\d)\.(?=\d)")
_MINUS = re.compile(r"(?<!\w)[-−](?=\d)")
# Private-use characters that carry what must survive the removal of punctuation.
_KEPT = {"\ue000": ".", "\ue001": "-"}


class ExactMatch:
    """Right where the normalised answer equals the normalised gold answer or one of its aliases.

    The normalisation is that of SQuAD (case, punctuation, articles, white space; Rajpurkar et al. 2016), with Unicode
    NFKC before it and three differences: a decimal point and a leading minus stay ("3.5" is not "35", "-5" is not "5"),
    an article that is the whole answer stays ("A" can be the right letter), and what has no letter or digit is compared
    as it is.
    """

    name = "exact"
    version = "1"
    waits = False

    def grade(self, given: Sequence[Given]) -> list[Verdict]:
        """Whether the two are equal after normalisation. An empty answer is wrong."""
        return [Verdict(is_equal(question, answer)) for question, answer in given]


def is_equal(question: Question, answer: str) -> bool:
    """Whether the answer is the gold answer or an alias after normalisation."""
    given = normalise(answer)
    return bool(given) and any(given == normalise(gold) for gold in (question.answer, *question.aliases))


# Gold answers come again with every trial, and most answers to the probes with every self-edit.
@lru_cache(maxsize=8192)
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
