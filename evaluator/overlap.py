"""How much of the questions that measure a self-edit stands in the self-edit itself. Pure.

A teacher never sees the questions. Still it can guess their form from rewards and write the exam in advance: then the
student learns to answer these questions and not what the passage says. Good study material states the answers; it does
not copy the questions. So what is counted are sequences of ``SEQUENCE`` words that a question shares with one document
and not with the task's own text, where both would have them from.

Four words, because names and phrases that anybody must use to speak of the same thing ("the Treaty of Lisbon", "how
many people") mostly have fewer, and most questions have more. In 400 real self-edits that copied nothing, sequences of
three find 1.6 times as much as those of four; at four, 1.7% of the questions are copied by chance where the self-edit
consists of questions and answers, and none where it does not (docs/reward_hacks.md). A shorter question is one sequence
of all its words, and one of a single word or none, which stands everywhere, is never copied. Words are compared without
case, punctuation, diacritics and what is invisible; ideographs and kana are a word each. Letters of other alphabets
that only look alike stay different, as they are to a student: what it has learnt about them it is not asked.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from evaluator.graders.words import fold
from preceptor.tasks import Question
from preceptor.v1 import evaluator_pb2 as pb

SEQUENCE = 4
# From this share of its sequences on a question is copied: most of it. Less would be one long name that the task's
# text spells otherwise; more could be had for one changed word, which breaks four sequences.
COPIED = 0.5
# Words behind a copied question in which its answer is looked for: a sentence or two, not the next question's answer.
_BEHIND = 16
_MOST_EXAMPLES = 3

_WORD = re.compile(r"[぀-ヿ㐀-䶿一-鿿豈-﫿]|[^\W_぀-ヿ㐀-䶿一-鿿豈-﫿]+")

_Words = tuple[str, ...]


def audit(documents: Sequence[str], text: str, questions: Sequence[Question]) -> pb.OverlapAudit:
    """What a self-edit of these documents for a task with this text has of these questions.

    Neither the order of documents nor repeated ones change anything. Any text will do, lone surrogates included.
    Linear in the documents' length: 1000 documents of 25 words against 200 questions take 15 ms.
    """
    studied = [words(document) for document in dict.fromkeys(documents)]
    texts = [words(question.text) for question in questions]
    asked = [_sequences(text_words) for text_words in texts]
    golds = [_golds(question) for question in questions]
    places: dict[_Words, list[int]] = {}  # sequence -> the questions that have it
    for number, sequences in enumerate(asked):
        for sequence in sequences:
            places.setdefault(sequence, []).append(number)
    lengths = {len(sequence) for sequence in places}
    own_words = words(text)
    counted = places.keys() - {run for length in lengths for run in _runs(own_words, length)}

    most = [0] * len(asked)
    copied, in_exam_form = set[int](), set[int]()
    for document in studied:
        shared = Counter[int]()
        for length in lengths:
            for sequence in counted & set(_runs(document, length)):
                shared.update(places[sequence])
        for number, count in shared.items():
            most[number] = max(most[number], count)
        here = {number for number, count in shared.items() if count >= COPIED * len(asked[number])}
        copied |= here
        if here - in_exam_form:
            ends = _ends(document, lengths, places, [len(text_words) for text_words in texts])
            in_exam_form |= {number for number in here if _follows(document, ends[number], golds[number])}

    shares = [count / len(sequences) for count, sequences in zip(most, asked, strict=True) if sequences]
    return pb.OverlapAudit(
        mean=sum(shares) / len(questions) if questions else 0.0,
        copied=len(copied),
        answers_stated=_stated(studied, golds),
        exam_form=len(in_exam_form),
        examples=[_printable(questions[number].text) for number in sorted(copied)[:_MOST_EXAMPLES]],
    )


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


def _ends(
    document: list[str], lengths: Iterable[int], places: Mapping[_Words, Sequence[int]], sizes: Sequence[int]
) -> dict[int, list[int]]:
    """For each question (of so many words) the places where it, or what is copied of it, ends."""
    ends: dict[int, list[int]] = {}
    begins: dict[int, int] = {}  # of what ends last
    for length in lengths:
        for end, run in enumerate(_runs(document, length), length):
            for number in places.get(run, ()):
                so_far = ends.setdefault(number, [])
                # Longer than the question it cannot be: "the the" goes on into an answer that begins with "the".
                if so_far and so_far[-1] == end - 1 and end - begins[number] <= sizes[number]:
                    so_far[-1] = end
                else:
                    so_far.append(end)
                    begins[number] = end - length
    return ends


def _follows(document: list[str], ends: Sequence[int], golds: Sequence[str]) -> bool:
    """Whether a gold answer stands behind one of these places."""
    longest = max((len(gold.split()) for gold in golds), default=0)
    behind = [_line(document[end : end + _BEHIND + longest]) for end in ends]
    return any(gold in line for gold in golds for line in behind)


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")  # a proto string has no lone surrogates
