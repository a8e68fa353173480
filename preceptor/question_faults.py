"""What is wrong with the questions of one passage, whoever brings them: a file, or a request.

Three things make a measurement mean something else than it says: a question that is asked twice (counted double, or in
two banks that are to be apart), one that has two answers, and one that the teacher can read in the passage. A fourth
makes it impossible: a gold answer longer than any answer may be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from preceptor.tasks import Grid, Question

# A question of fewer words ("Who was he?") may stand in a passage by chance.
LEAST_WORDS = 4


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with the question at ``index``. ``repeat``: it says nothing that an earlier one does not, so it can
    be left out."""

    index: int
    message: str
    repeat: bool = False


def question_faults(title: str, text: str, questions: Sequence[Question]) -> Iterator[Fault]:
    """Every fault of a passage's questions, in their order. Case, spacing and the final mark make no difference."""
    seen: dict[str, tuple[int, Question]] = {}
    shown = [f" {_words(title)} ", f" {_words(text)} "]
    beginnings = {run for known in shown for run in _runs(known.split())}
    for index, question in enumerate(questions):
        at, first = seen.setdefault(_wording(question.text), (index, question))
        if at != index:
            yield _second(index, first, question)
        asked = _words(question.text)
        # Searching a long text for every question would take minutes; few begin as something in it does.
        begins = tuple(asked.split(" ", LEAST_WORDS)[:LEAST_WORDS])
        if begins in beginnings and any(f" {asked} " in known for known in shown):
            message = f"{_short(question.text)} stands in the passage, which the teacher reads; ask in other words"
            yield Fault(index, message)


def answer_fault(question: Question, max_new_tokens: int) -> str:
    """Why no student can give this gold answer; empty if one may be able to.

    A token is at most a word, so an answer of more words than tokens cannot be given. One of fewer words may still not
    fit, but only the student's tokenizer can tell.
    """
    words = min(len(answer.split()) for answer in (question.answer, *question.aliases))
    if words <= max_new_tokens:
        return ""
    return (
        f"the gold answer has {words} words, and an answer may have {max_new_tokens} tokens"
        f" (answers.max_new_tokens); raise that or shorten the answer: {_short(question.answer)}"
    )


def grid_tokens(grid: Grid) -> int:
    """What an answer with this grid takes where a digit and the end of a row are a token each."""
    return sum(map(len, grid)) + len(grid) - 1


def grid_answer_fault(grid: Grid, max_new_tokens: int) -> str:
    """Why this grid is no answer that a student could give; empty if it is one.

    Students' tokenizers mostly take a token for a digit; one that merges them gets along with fewer.
    """
    needed = grid_tokens(grid)
    if needed <= max_new_tokens:
        return ""
    return (
        f"the gold answer is a grid of {len(grid)} x {len(grid[0])}, {needed} tokens with one for a cell and one"
        f" between rows, and an answer may have {max_new_tokens} (answers.max_new_tokens); raise that"
    )


def _second(index: int, first: Question, again: Question) -> Fault:
    """What it means that ``again`` asks what ``first`` did."""
    if _fold(again.answer) not in _golds(first):
        message = (
            f"{_short(again.text)} has the answer {_short(again.answer)} here and {_short(first.answer)} before;"
            " ask it once, with further right answers as aliases"
        )
        return Fault(index, message)
    if not _golds(again) <= _golds(first):
        return Fault(index, f"{_short(again.text)} is asked twice with other aliases; ask it once, with all of them")
    if again.bank is not first.bank:
        return Fault(index, f"{_short(again.text)} is asked in bank {first.bank}, too; each bank has words of its own")
    return Fault(index, f"{_short(again.text)} is asked twice", repeat=True)


def _golds(question: Question) -> set[str]:
    return {_fold(answer) for answer in (question.answer, *question.aliases)}


def _wording(text: str) -> str:
    return _fold(text).rstrip(" ?.!")


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _runs(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every ``LEAST_WORDS`` words in a row."""
    return zip(*(words[start:] for start in range(LEAST_WORDS)), strict=False)


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
