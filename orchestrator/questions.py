"""Questions that the untrained teacher writes from a passage, for training tasks that nobody has labelled. Pure.

The base policy is asked for the passage's facts as question and answer (the prompt format ``self_qa``), several times.
What it wrote becomes reward questions only where it can be checked without a label:

* a pair must be one: ``Question: ... Answer: ...``, with words on both sides;
* **agreement**: one completion may misread the passage, several rarely misread it alike. A question must stand in at
  least two completions, and the same answer in at least ``agreement`` of those that it stands in. A completion that
  gives a question two answers has none;
* **answerability**: the answer must stand in the passage's title or text, word by word, and must not stand in its
  question; it must not have more words than an answer may have tokens.

Questions and answers are compared by their words, without case and punctuation. Each question that is dropped is
counted once, by the first check that it fails.

What is left is divided once, by a seed: one half rewards self-edits, the other half (the gate bank) never does. No
question is ever in a prompt. What the division cannot give: writer and policy share a base, so the policy may well
write the same questions into its study material (docs/label_free.md).
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from preceptor.v1 import types_pb2 as types

NO_PAIR = "no pair of question and answer"
SEEN_ONCE = "in one completion only"
DISAGREED = "the completions disagree"
NOT_IN_TEXT = "the answer does not stand in the text"
IN_QUESTION = "the answer stands in the question"
TOO_LONG = "the answer is too long"

# A line, or a question on one line and its answer on the next.
_PAIR = re.compile(
    r"\b(?:question|q)[ \t]*:[ \t]*(?P<question>\S.*?)\s*\b(?:answer|a)[ \t]*:[ \t]*(?P<answer>\S.*)", re.IGNORECASE
)
_OPENING = re.compile(r"^\W*(?:question|q)[ \t]*:", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+")

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Checked:
    """What is left of the questions written for one passage, in the order of their writing, and what was dropped."""

    pairs: tuple[Pair, ...]
    dropped: Mapping[str, int]


def read_pairs(documents: Sequence[str]) -> tuple[list[Pair], int]:
    """The pairs of question and answer in study documents, and how many documents are no part of one."""
    pairs, others = [], 0
    waiting = ""  # a question whose answer may be in the next document
    for document in documents:
        found = _PAIR.search(document)
        if waiting and found is None:
            found = _PAIR.search(f"{waiting} {document}")
        elif waiting:
            others += 1
        if found is None and _OPENING.match(document):
            others += bool(waiting)
            waiting = document
            continue
        if found is not None and words(found["question"]) and words(found["answer"]):
            pairs.append((found["question"].strip(), found["answer"].strip()))
        else:
            others += 1 + bool(waiting and found is None)
        waiting = ""
    return pairs, others + bool(waiting)


def checked(
    title: str, text: str, completions: Iterable[Sequence[str]], *, agreement: float, max_words: int
) -> Checked:
    """The questions of ``completions`` (each the documents of one) that pass the checks of this module.

    ``agreement``: share of the completions with a question that must give the same answer, 0..1. ``max_words``: the
    longest answer.
    """
    dropped: Counter[str] = Counter()
    written: dict[tuple[str, ...], list[dict[tuple[str, ...], Pair]]] = {}  # by question: each completion's answers
    for documents in completions:
        pairs, others = read_pairs(documents)
        dropped[NO_PAIR] += others
        answers: dict[tuple[str, ...], dict[tuple[str, ...], Pair]] = {}
        for pair in pairs:
            answers.setdefault(words(pair[0]), {}).setdefault(words(pair[1]), pair)
        for question, its_answers in answers.items():
            written.setdefault(question, []).append(its_answers)
    source = words(f"{title}\n{text}")
    kept = []
    for question, given in written.items():
        single = [next(iter(answers.items())) for answers in given if len(answers) == 1]
        ranking = Counter(answer for answer, _ in single).most_common(2)
        answer, count = ranking[0] if ranking else ((), 0)
        if len(given) < 2:
            dropped[SEEN_ONCE] += 1
        elif count < max(1, agreement * len(given)) or [votes for _, votes in ranking].count(count) > 1:
            dropped[DISAGREED] += 1
        elif not _stands(answer, source):
            dropped[NOT_IN_TEXT] += 1
        elif _stands(answer, question):
            dropped[IN_QUESTION] += 1
        elif max(len(answer), len((pair := dict(reversed(single))[answer])[1].split())) > max_words:
            dropped[TOO_LONG] += 1
        else:
            kept.append(pair)
    return Checked(tuple(kept), {reason: count for reason, count in sorted(dropped.items()) if count})


def divided(pairs: Sequence[Pair], seed: int) -> list[types.Question]:
    """The pairs as written questions: a random half (rounded up) in the reward bank, the others in the gate's."""
    rewarded = set(random.Random(seed).sample(range(len(pairs)), (len(pairs) + 1) // 2))
    return [
        types.Question(
            text=question,
            answer=answer,
            bank=types.QUESTION_BANK_REWARD if place in rewarded else types.QUESTION_BANK_GATE,
            written=True,
        )
        for place, (question, answer) in enumerate(pairs)
    ]


def words(text: str) -> tuple[str, ...]:
    """The words of ``text`` as they are compared."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _stands(sought: Sequence[str], among: Sequence[str]) -> bool:
    length = len(sought)
    return any(among[start : start + length] == sought for start in range(len(among) - length + 1))
