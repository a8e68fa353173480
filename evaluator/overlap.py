"""How much of the questions that measure a self-edit stands in the self-edit itself. Pure.

A teacher never sees the questions. Still it can guess their form from rewards and write the exam in advance: then the
student learns to answer these questions and not what the passage says. Good study material states the answers; it does
not copy the questions. So what is counted are sequences of ``SEQUENCE`` words that a question shares with one document
and not with the task's own text, where both would have them from.

Four words, because names and phrases that anybody must use to speak of the same thing ("the Treaty of Lisbon", "how
many people live") have up to three or four, and most questions have more: three find twice as much in honest self-edits
(docs/reward_hacks.md). A shorter question is one sequence of all its words, and one of a single word or none, which
stands everywhere, is never copied. Words are compared without case, punctuation, diacritics and what is invisible;
ideographs and kana are a word each. Letters of other alphabets that only look alike stay different, as they are to a
student: what it has learnt about them it is not asked.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from evaluator.graders.words import fold
from preceptor.tasks import Question
from preceptor.v1 import evaluator_pb2 as pb

SEQUENCE = 4
# From this share of its sequences on a question is copied. An inserted or changed word breaks four of them, so that of
# a question of ten words with one word changed three of seven are left; honest material has most at a fifth.
COPIED = 0.5
# Words behind a copied question in which its answer is looked for: a sentence or two, not the next question's answer.
_BEHIND = 16
_MOST_EXAMPLES = 3

_WORD = re.compile(r"[぀-ヿ㐀-䶿一-鿿豈-﫿]|[^\W_぀-ヿ㐀-䶿一-鿿豈-﫿]+")

_Words = tuple[str, ...]


def audit(documents: Sequence[str], text: str, questions: Sequence[Question]) -> pb.OverlapAudit:
    """What a self-edit of these documents for a task with this text has of these questions.

    Neither the order of documents nor repeated ones change anything. Any text will do, lone surrogates included.
    Linear in the documents' length: 1000 documents of 25 words against 200 questions take 20 ms.
    """
    studied = [words(document) for document in dict.fromkeys(documents)]
    asked = [_sequences(words(question.text)) for question in questions]
    lengths = {len(sequence) for sequences in asked for sequence in sequences}
    own = words(text)
    places: dict[_Words, list[int]] = {}
    for number, sequences in enumerate(asked):
        for sequence in sequences:
            places.setdefault(sequence, []).append(number)
    for length in lengths:
        for sequence in places.keys() & set(_runs(own, length)):
            del places[sequence]

    most = [0] * len(asked)
    holders: list[list[int]] = [[] for _ in asked]  # documents that have a question copied
    for number, document in enumerate(studied):
        shared: dict[int, int] = {}
        for length in lengths:
            for sequence in places.keys() & set(_runs(document, length)):
                for question in places[sequence]:
                    shared[question] = shared.get(question, 0) + 1
        for question, count in shared.items():
            most[question] = max(most[question], count)
            if count >= COPIED * len(asked[question]):
                holders[question].append(number)

    golds = [_golds(question) for question in questions]
    copied = [number for number, some in enumerate(holders) if some]
    found = pb.OverlapAudit(
        copied=len(copied),
        answers_stated=_stated(studied, golds),
        exam_form=sum(
            any(_answered(studied[holder], asked[number], golds[number]) for holder in holders[number])
            for number in copied
        ),
        examples=[_printable(questions[number].text) for number in copied[:_MOST_EXAMPLES]],
    )
    if questions:
        shares = (count / len(sequences) for count, sequences in zip(most, asked, strict=True) if sequences)
        found.mean = sum(shares) / len(questions)
    return found


def words(text: str) -> list[str]:
    """The words of ``text`` as they are compared."""
    if text.isascii():  # nearly all of a document, and a tenth of the time
        return _WORD.findall(text.lower())
    visible = "".join(character for character in text if unicodedata.category(character) != "Cf")
    return _WORD.findall(fold(visible))


def _sequences(some: list[str]) -> set[_Words]:
    """Those that a question is known by."""
    return set(_runs(some, min(SEQUENCE, len(some)))) if len(some) > 1 else set()


def _runs(some: list[str], length: int) -> Iterable[_Words]:
    return zip(*(some[start:] for start in range(length)), strict=False)


def _golds(question: Question) -> list[str]:
    """Gold answer and aliases as they would stand in ``_line``; symbols alone stand nowhere."""
    return [_line(some) for gold in (question.answer, *question.aliases) if (some := words(gold))]


def _line(some: Sequence[str]) -> str:
    return f" {' '.join(some)} "


def _stated(studied: Sequence[list[str]], golds: Sequence[list[str]]) -> int:
    everything = "\n".join(map(_line, studied))
    known = {word for document in studied for word in document}
    return sum(any(known.issuperset(gold.split()) and gold in everything for gold in some) for some in golds)


def _answered(document: list[str], sequences: set[_Words], golds: Sequence[str]) -> bool:
    """Whether a gold answer stands behind a place where the question, or what is copied of it, ends."""
    length = len(next(iter(sequences)))
    here = [run in sequences for run in _runs(document, length)]
    ends = [place + length for place, own in enumerate(here) if own and not (here[place + 1 : place + 2] or [False])[0]]
    longest = max((len(gold.split()) for gold in golds), default=0)
    behind = [_line(document[end : end + _BEHIND + longest]) for end in ends]
    return any(gold in line for gold in golds for line in behind)


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")  # a proto string has no lone surrogates
