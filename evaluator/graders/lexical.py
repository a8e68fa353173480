"""Right, wrong or unsure by words alone: no model, no network, under half a millisecond an answer.

An answer is compared with the gold answer and each alias; the best comparison counts. What is compared is in
``evidence``: above all how much of the gold's meaning that the question did not already say is in the answer, words by
stem, numbers by value. The observations add up to points (``POINTS``), in units of log-odds: above zero is right, and
within ``UNSURE_BELOW`` of zero is unsure.

A few things are certain without points: an answer with nothing in it is wrong, one that equals the gold is right
whatever its word order, and what says the opposite of the gold ("not Lisbon") is never right. Nor is a bare list of
answers with the gold among them ("Porto or Lisbon", "Porto, Lisbon, Faro") where the gold is no list: who names all
that it could be has not answered. It may be another name for the same, so such a verdict is unsure.

The points are a logistic regression of GPT-4.1's verdicts on half of the answers that SEAL published (MIT), rounded;
``bench/graders.py --fit`` repeats it and the other half checks it. They know no word of those answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import pairwise

from evaluator.graders.exact import is_equal
from evaluator.graders.grader import Given, Verdict
from evaluator.graders.words import content, fold, is_negation, is_number, read, stem
from preceptor.tasks import Question

# Log-odds. "All of it", "part of it" and "none of it" say how much of the gold's new meaning is in the answer.
POINTS = {
    "always": -1.8,
    "share": 3.0,
    "most of it": 0.4,
    "none of it": -1.3,
    "none of it, one plain word": 1.1,
    "none of it, both negated": 2.7,
    "none of it, other names": -0.2,
    "all of it, a number": 0.7,
    "all of it, a name": 0.8,
    "all of it, one word": -0.8,
    "all of it, late": -0.8,
    "all of it, together": 0.7,
    "all of it, far from the question": -0.6,
    "all of it, hedged": -0.6,
    "all of it, other numbers": -0.7,
    "all of it, other names": -0.1,
    "all of a name, other words": -0.6,
    "in one piece": 1.0,
    "part of it, a number": -1.6,
    "part of it, share of numbers": 1.6,
    "part of it, other words": -0.7,
    "a name": -0.5,
    "the question again": 1.0,
    "a whole sentence": -0.2,
}
# Sends a little less than a quarter of the answers that the points were made from on to a judge.
UNSURE_BELOW = 1.75

# Shares of the gold's new meaning.
_ALL, _MOST, _NONE = 0.85, 0.7, 0.15
# Letters that a number is worth beside words, which are worth their length: longer words say more.
_NUMBER_WEIGHT = 6
# From here on two words are one word misspelt: one letter in ten may differ. Short words are too easily alike.
_ALIKE, _ALIKE_LETTERS = 0.82, 5
_HEDGES = frozenset(map(stem, ("but", "however", "although", "though", "while", "instead", "rather", "or")))
# A negation reaches over one word of content: "not in the old Lisbon", "did not celebrate".
_NEGATION_REACH = 2
# Longer answers than this beyond question and gold say many things, the right one among them.
_RAMBLING = 30
# Others that stand beside the gold in a list: one where they are alternatives, two where nothing else is said, which
# leaves "Paris, France" alone, three in a sentence, and of words in a row that nothing separates four for each of the
# gold's, or one where the gold does not come last.
_OTHERS_OR, _OTHERS_ALONE, _OTHERS, _OTHERS_IN_A_ROW, _OTHERS_BEHIND = 1, 2, 3, 4, 1

# A longer question, gold or answer is cut here, as the judge's is: what comes later answers nothing.
_MOST_CHARACTERS = 4000
# A pair of words takes 20 us. Where there are more than so many (200 words in the gold and 100 in the answer), nobody
# has misspelt a word; looking for it would take minutes.
_MOST_PAIRS = 20_000
_MOST_SIDES = 16  # of a gold that is a choice

_ASKING = re.compile(r"[^.!?\n]*\?+")
_NAME = re.compile(r"(?<![.!?:\"“(] )(?<!^)\b[A-ZÀ-ÖØ-Þ][^\W\d_]+")
_CAPITALS = re.compile(r"\b[A-Z]{3,}\b")
_LETTERS = re.compile(r"[^\W\d_]+")
_ASIDE = re.compile(r"\s*\([^()]*\)")
_OR = re.compile(r"[,;]?\s+or\s+")
_BETWEEN = re.compile(
    r"[;/|\n]|\s\s+|,(?!\d{3}\b)|(?<=\w\w\w)[.?!](?!\w)|\b(?:or|and|maybe|perhaps|possibly|alternatively)\b",
    re.IGNORECASE,
)
_INSTEAD = re.compile(r"[/|]|\b(?:or|maybe|perhaps|possibly|alternatively)\b", re.IGNORECASE)


class Lexical:
    """The grader without a model."""

    name = "lexical"
    version = "2"
    waits = False

    def grade(self, given: Sequence[Given]) -> list[Verdict]:
        """A verdict for each; unsure where points are few."""
        return [_grade(question, answer) for question, answer in given]


def _grade(question: Question, answer: str) -> Verdict:
    if not answer.strip():
        return Verdict(False)
    if is_equal(question, answer):
        return Verdict(True)
    return max(
        (_compare(question.text, gold, answer) for gold in golds(question)),
        key=lambda verdict: (verdict.right, verdict.sure == verdict.right),
    )


def golds(question: Question) -> Iterator[str]:
    """The gold answer, its aliases, and what each of them says by itself: without asides, each side of an "or"."""
    for gold in (question.answer, *question.aliases):
        yield gold
        if (bare := _ASIDE.sub("", gold).strip()) and bare != gold:
            yield bare
        if len(sides := [side for side in _OR.split(gold) if side.strip()]) > 1:
            yield from sides[:_MOST_SIDES]


def _compare(question: str, gold: str, answer: str) -> Verdict:
    question, gold, answer = (text[:_MOST_CHARACTERS] for text in (question, gold, answer))
    gold_words, words = read(gold), read(statements(answer))
    if not gold_words or not words:  # symbols alone, which did not equal
        return Verdict(False)
    asked_words = read(question)
    if sorted(gold_words) == sorted(words):
        return Verdict(True)
    new = content(words)
    wanted = _wanted(asked_words, gold_words)
    opposite = _is_negated(words, wanted) and not any(map(is_negation, [*gold_words, *asked_words]))
    if opposite:
        return Verdict(False, sure=set(new) <= set(gold_words))
    points = sum(POINTS[name] * value for name, value in evidence(question, gold, answer).items())
    if points > 0 and _names_several(asked_words, gold, gold_words, statements(answer)):
        return Verdict(False, sure=False)
    extra = len(set(new) - set(gold_words) - set(asked_words))
    return Verdict(points > 0, sure=abs(points) >= UNSURE_BELOW and not (points > 0 and extra > _RAMBLING))


def evidence(question: str, gold: str, answer: str) -> dict[str, float]:
    """What speaks for and against an answer, by the names in ``POINTS``; all zero or one where nothing else is said."""
    said = statements(answer)
    asked_words, gold_words, words = read(question), read(gold), read(said)
    asked, known, present = dict.fromkeys(content(asked_words)), {*asked_words, *gold_words}, set(words)
    wanted = _wanted(asked_words, gold_words)
    found = _found(gold, gold_words, wanted, said, words, asked_words)
    share = sum(map(_weight, found)) / sum(map(_weight, wanted))
    all_of_it, none_of_it = share > _ALL, share < _NONE
    part_of_it = not all_of_it and not none_of_it
    numbers = [word for word in wanted if is_number(word)]
    named = not numbers and bool(_NAME.search(f"x x {gold}"))  # not at a sentence's start: every capital counts
    places = [place for place, word in enumerate(words) if word in found]
    far = min((abs(here - there) for here in places for there, word in enumerate(words) if word in asked), default=0)
    extra = min(len(set(content(words)) - known), 40) / 10
    others = len({stem(fold(name)) for name in _NAME.findall(said)} - known)
    negated_gold, negated = (any(map(is_negation, some)) for some in (gold_words, words))
    return {
        "always": 1.0,
        "share": share,  # of the gold's new meaning
        "most of it": float(share >= _MOST),
        "none of it": float(none_of_it),
        "none of it, one plain word": float(none_of_it and not numbers and not named and len(wanted) == 1),
        "none of it, both negated": float(none_of_it and negated_gold and negated),
        "none of it, other names": float(none_of_it) * min(others, 4),
        "all of it, a number": float(all_of_it and bool(numbers)),
        "all of it, a name": float(all_of_it and named),
        "all of it, one word": float(all_of_it and len(wanted) == 1),
        "all of it, late": all_of_it * min(places, default=0) / max(1, len(words)),  # 0: at once, 1: at the end
        "all of it, together": float(all_of_it and _stand_together(places, found)),
        "all of it, far from the question": all_of_it * min(far, 10) / 10,  # 1: ten words or more
        "all of it, hedged": float(all_of_it and not present.isdisjoint(_HEDGES)),
        "all of it, other numbers": float(all_of_it and bool(numbers)) * min(_other_numbers(present, known), 5),
        "all of it, other names": float(all_of_it) * min(others, 8),
        "all of a name, other words": float(all_of_it and named) * extra,  # tens
        "in one piece": float(_contains(words, gold_words)),
        "part of it, a number": float(part_of_it and bool(numbers)),
        "part of it, share of numbers": part_of_it * sum(map(is_number, found)) / max(1, len(numbers)),
        "part of it, other words": float(part_of_it) * extra,  # tens
        "a name": float(named),
        "the question again": sum(word in present for word in asked) / max(1, len(asked)),
        "a whole sentence": float(answer.rstrip().endswith((".", "!", "?", ")", '"'))),
    }


def statements(answer: str) -> str:
    """The answer without its questions: who asks has not said anything. All of it where nothing would be left."""
    rest = _ASKING.sub(" ", answer)
    return rest if rest.strip() else answer


def _wanted(asked_words: list[str], gold_words: list[str]) -> list[str]:
    """What the gold says beyond the question; all of it where that is nothing."""
    meaning = content(gold_words) or list(dict.fromkeys(gold_words))
    return [word for word in meaning if word not in asked_words] or meaning


def _found(
    gold: str, gold_words: list[str], wanted: list[str], said: str, words: list[str], asked_words: list[str]
) -> list[str]:
    if _is_acronym(gold, said, asked_words):
        return wanted
    present = {*words, *(first + second for first, second in pairwise(words))}
    spelt_as_one = {
        word for first, second in pairwise(gold_words) if first + second in present for word in (first, second)
    }
    few = len(wanted) * len(words) <= _MOST_PAIRS
    return [word for word in wanted if word in present or word in spelt_as_one or (few and _is_misspelt(word, words))]


def _is_misspelt(word: str, words: list[str]) -> bool:
    if is_number(word) or len(word) < _ALIKE_LETTERS:
        return False
    return any(abs(len(word) - len(other)) <= 2 and not is_number(other) and _is_alike(word, other) for other in words)


@lru_cache(maxsize=100_000)
def _is_alike(word: str, other: str) -> bool:
    return SequenceMatcher(None, word, other, autojunk=False).ratio() >= _ALIKE


def _is_acronym(gold: str, said: str, asked_words: list[str]) -> bool:
    """Whether one has, in capitals, the initials of the other (of all its words or of those that matter)."""
    for short, long, whole in ((gold, said, False), (said, gold, True)):
        words = _LETTERS.findall(fold(long))
        initials = ["".join(word[0] for word in some) for some in (words, content(words))]
        for capitals in _CAPITALS.findall(short):
            letters = fold(capitals)
            if stem(letters) in asked_words or (short is gold and fold(gold).strip() != letters):
                continue
            if any(letters == some if whole else letters in some for some in initials):
                return True
    return False


def _names_several(asked_words: list[str], gold: str, gold_words: list[str], said: str) -> bool:
    """Whether the answer is a list of things like the gold, which is no list, with others in it than the gold."""
    if len([part for part in _BETWEEN.split(gold) if part.strip()]) > 1:
        return False
    size = len(content(gold_words))
    read_parts = [part for text in _BETWEEN.split(said) if (part := read(text))]
    parts = [some for part in read_parts if (some := content(part))]
    if len(parts) == 1:  # words in a row: "grey wolf" and "Juan Madero" end with what they are
        part = parts[0]
        new = [word for word in part if word not in gold_words and word not in asked_words]
        if len(part) < len(set(read_parts[0])) or all(map(is_number, gold_words)) > any(map(is_number, new)):
            return False  # somebody who says a sentence, or a number with its unit
        return len(new) >= (_OTHERS_IN_A_ROW if part[-1] in gold_words else _OTHERS_BEHIND) * size
    if any(len(part) > max(2, size + 1) for part in parts):  # somebody who explains
        return False
    others = [part for part in parts if set(part).isdisjoint(gold_words) and not set(part) <= set(asked_words)]
    if _INSTEAD.search(said):
        return len(others) >= _OTHERS_OR
    alone = all(len(part) <= len(gold_words) + 1 for part in read_parts)
    if alone and others == parts[:1]:  # "Lisbon, Porto": of two, who knows the right one says it first
        return True
    return len(others) >= (_OTHERS_ALONE if alone else _OTHERS)


def _is_negated(words: list[str], wanted: list[str]) -> bool:
    """Whether a negation stands right before something wanted; "but" ends what it reaches."""
    reach = 0
    few = len(wanted) * len(words) <= _MOST_PAIRS
    for word in words:
        if is_negation(word):
            reach = _NEGATION_REACH
        elif word == "but":
            reach = 0
        elif reach and (word in wanted or (few and any(_is_misspelt(one, [word]) for one in wanted))):
            return True
        elif reach and content([word]):
            reach -= 1
    return False


def _contains(words: list[str], part: list[str]) -> bool:
    return any(words[start : start + len(part)] == part for start in range(len(words) - len(part) + 1))


def _stand_together(places: list[int], found: list[str]) -> bool:
    return bool(places) and max(places) - min(places) <= len(found)


def _other_numbers(present: set[str], known: set[str]) -> int:
    return sum(is_number(word) for word in present - known)


def _weight(word: str) -> int:
    return _NUMBER_WEIGHT if is_number(word) else len(word)
