"""Splits what a model wrote into study documents. The text decides little, the asked-for form most:

* ``lines``: every line that is not blank; nothing is dropped (what the tiny teacher was trained on)
* ``numbered``: the entries of a numbered or bulleted list, without their numbers
* ``qa``: pairs of question and answer, each one document
* ``rules``: what stands between lines of ``---``
* ``whole``: the text as one document
* ``auto``: the first of rules, qa, labelled versions, numbered that is there; else paragraphs, else lines

All but ``lines`` and ``whole`` drop what is no study material: an opening like "Sure! Here are ...", closing remarks,
code fences, labels, entries without text, and everything behind the place where a base model goes on with another
task (another list that starts at 1, a line of a chat). Repeated documents are kept once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# Changes whenever the same text would be split into other documents (but for ``lines`` and ``whole``).
VERSION = 1

_FENCE = re.compile(r"^\s*(```|~~~)[\w+-]*\s*$")
_RULE = re.compile(r"^\s*(-{3,}|\*{3,}|_{3,}|={3,})\s*$")
_ENTRY = re.compile(r"^\s*(?:\*\*)?(?:(?:\((\d{1,3})\)|(\d{1,3})[.):])(?!\d)|[-*•‣–](?![-*]))(?:\*\*)?(?:\s+|$)")
_LABEL = re.compile(
    r"^\W*(?:(?:re)?written |another |alternative )?(?:passage|version|rewrite|rewriting|paraphrase|variant|option)s?"
    r"\s*(?:\d{1,3}|[A-Z]|one|two|three|four|five)\b\W*(?P<rest>.*)$",
    re.IGNORECASE,
)
_QUESTION = re.compile(r"^\W*(?:question|q)\s*\d{0,3}\s*[:.)]\W*?(?P<rest>[^\s*].*)?$", re.IGNORECASE)
_ANSWER = re.compile(r"^\W*(?:answer|a)\s*\d{0,3}\s*[:.)]\W*?(?P<rest>[^\s*].*)?$", re.IGNORECASE)
_BLANKS = re.compile(r"(?<=\S)\s+")
_BOLD = re.compile(r"\*\*(\S(?:[^*\n]*\S)?)\*\*")
_NUMBER = re.compile(r"^\d{1,3}[.)]\s+")
_PAIR = re.compile(
    r"^\W*(?:question|q)\s*\d{0,3}\s*[:.)]\s*(?P<question>.+?)\s+(?:answer|a)\s*\d{0,3}\s*:\s*(?P<answer>.+)$",
    re.IGNORECASE,
)
# "Implications:", "**Rewritten passages:**", "### Facts"; not a sentence that ends in a colon.
_HEADING = re.compile(r"^\W*[\w'’ -]{1,48}:\W*$|^#{1,6}\s.*$|^\*\*[^*]{1,80}\*\*:?$")
_CHATTY = re.compile(
    r"^\W*(?:(?:sure|certainly|of course|absolutely|okay|ok|alright|great|no problem|understood)\b\W"
    r"|(?:here|below|the following)\b.{0,200}[:.]\W*$|here(?:'s| is| are)\b"
    r"|(?:let's|let us|let me|i will|i'll|i can|i have|i've|as requested)\b.{0,200}[:.!]\W*$)",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"^\W*(?:i hope\b|hope this\b|let me know\b|feel free\b|would you like\b|is there anything\b"
    r"|if you (?:need|want|have|would)\b|please\b|note(?: that)?:|do you (?:need|want)\b"
    r"|th(?:ese|is|e above) (?:are|is|list|implications|statements|rewrites|versions|questions|facts|points)\b"
    r".{0,60}\b(?:passage|text|above|list|provided|derived|based)\b)",
    re.IGNORECASE,
)
# Where a model begins to talk to itself.
_OTHER_TASK = re.compile(
    r"^\W*(?:you are an? (?:\w+ )?(?:ai|assistant|helpful)\b|<\|.{1,30}\|>|(?:human|user|assistant|system)\s*:"
    r"|###\s*(?:instruction|response|task)|you will be given\b|passage:\s*$|task \d*:?\s*$|given the (?:passage|text)\b"
    r"|(?:read|answer|rewrite|write|complete|generate) the (?:\w+ )?(?:passages?|texts?|lists?|questions?|essay)\b)",
    re.IGNORECASE,
)


def split(text: str, how: str, *, title: str = "", finished: bool = True) -> tuple[str, ...]:
    """The documents in a text; none where nothing in it is study material.

    A ``title`` that stands alone in a line is no document. Not ``finished``: the text was cut off, so its last document
    is left out, which would teach half of something.
    """
    if how == "lines":
        documents = [line.strip() for line in text.splitlines() if line.strip()]
    elif how == "whole":
        documents = [text.strip()] if text.strip() else []
    else:
        named = _plain(title)
        lines = [line for line in text.splitlines() if not named or _plain(line) != named]
        documents = list(dict.fromkeys(map(_unmarked, _SPLITTERS[how](_own_part(lines)))))
    return tuple(documents if finished else documents[:-1])


def _plain(text: str) -> str:
    """For comparing a line with a title: without marks, numbers of a list and case."""
    entry = _ENTRY.match(text)
    return (text[entry.end() :] if entry else text).strip(" \t#*_:.").casefold()


def _unmarked(document: str) -> str:
    """A document without bold marks, and without quotes around the whole."""
    document = _BOLD.sub(r"\1", document)
    if document.startswith('"') and document.endswith('"') and document.count('"') == 2:
        document = document[1:-1].strip()
    return document


def _own_part(lines: Sequence[str]) -> list[str]:
    """The lines without fences, without an opening and up to where another task begins."""
    # Without runs of blanks within a line, over which patterns would take their time.
    kept = [_BLANKS.sub(" ", line.rstrip()) for line in lines if not _FENCE.match(line)]
    start, end = 0, len(kept)
    while start < end and (not kept[start] or _is_opening(kept[start], start + 1 == end)):
        start += 1
    for at in range(start + 1, end):
        if _OTHER_TASK.match(kept[at]):
            end = at
            break
    while start < end and (not kept[end - 1] or _is_remark(kept[end - 1], start + 1 == end)):
        end -= 1
    return kept[start:end]


def _is_opening(first: str, alone: bool) -> bool:
    """Whether the first line only announces what follows."""
    if alone or _ENTRY.match(first) or _QUESTION.match(first) or _LABEL.match(first):
        return False
    return bool(_CHATTY.match(first) or (_HEADING.match(first) and first.rstrip(" *").endswith(":")))


def _is_remark(last: str, alone: bool) -> bool:
    """Whether the last line only says something about what stands before it."""
    return not alone and not _ENTRY.match(last) and bool(_REMARK.match(last) or _RULE.match(last))


def _rules(lines: Sequence[str]) -> list[str]:
    segments: list[list[str]] = [[]]
    for line in lines:
        if _RULE.match(line):
            segments.append([])
        else:
            segments[-1].append(line)
    return [document for segment in segments if (document := _body(segment))]


def _body(lines: Sequence[str]) -> str:
    """A segment's text without a label or heading before it, or a number."""
    kept = [line.strip() for line in lines if line.strip()]
    if len(kept) > 1 and (_HEADING.match(kept[0]) or _bare_label(kept[0])):
        kept = kept[1:]
    if kept and (label := _LABEL.match(kept[0])) and label["rest"] and _after_colon(kept[0]):
        kept[0] = label["rest"].strip(" *")
    if kept and (entry := _ENTRY.match(kept[0])) and not any(_ENTRY.match(line) for line in kept[1:]):
        kept[0] = kept[0][entry.end() :].strip()
    return "\n".join(line for line in kept if line) if not _only_heading(kept) else ""


def _only_heading(lines: Sequence[str]) -> bool:
    """Whether there is nothing but what a document could begin with."""
    if len(lines) != 1:
        return not lines
    heading = _HEADING.match(lines[0]) and (lines[0].startswith("#") or lines[0].rstrip(" *").endswith(":"))
    return bool(heading) or _bare_label(lines[0])


def _bare_label(line: str) -> bool:
    """Whether a line is a label and nothing else (a heading may say more)."""
    label = _LABEL.match(line)
    return label is not None and (not label["rest"] or line.lstrip().startswith("#"))


def _after_colon(line: str) -> bool:
    """Whether what follows a label is set off from it, so that it is no sentence that begins with the word."""
    label = _LABEL.match(line)
    return label is not None and ":" in line[: label.start("rest")]


def _labelled(lines: Sequence[str]) -> list[str]:
    """Versions that each begin with "Version 2:", "**Passage 2:**" and the like."""
    segments: list[list[str]] = []
    for line in lines:
        if _starts_version(line):
            segments.append([])
        if segments:
            segments[-1].append(line)
    return [document for segment in segments if (document := _body(segment))]


def _starts_version(line: str) -> bool:
    return bool(_LABEL.match(line)) and (_bare_label(line) or _after_colon(line))


def _qa(lines: Sequence[str]) -> list[str]:
    """Pairs as "Question: ...", a line end, "Answer: ...". A question without an answer is no document."""
    pairs: list[tuple[str, str]] = []
    question, answer, in_answer = "", "", False

    def close() -> None:
        if question and answer:
            pairs.append((question, answer))

    blank = False
    for line in lines:
        stripped = line.strip()
        if not stripped:
            blank = True
            continue
        if found := _PAIR.match(stripped):
            close()
            question, answer, in_answer = found["question"].strip(" *"), found["answer"].strip(" *"), True
        elif found := _ANSWER.match(stripped):
            if question and not answer:
                answer, in_answer = (found["rest"] or "").strip(" *"), True
        elif found := _QUESTION.match(stripped):
            close()
            question, answer, in_answer = (found["rest"] or "").strip(" *"), "", False
        elif in_answer and (not answer or not blank):
            answer = f"{answer}\n{stripped}" if answer else stripped
        elif in_answer:  # a remark between two pairs, or behind the last
            close()
            question, answer, in_answer = _plain_question(stripped), "", False
        elif question and not answer and _CHATTY.match(stripped):
            pass  # what it announces is the answer
        elif question.rstrip(' "*').endswith("?") and not stripped.rstrip(' "*').endswith("?"):
            answer, in_answer = stripped, True  # an answer without the word
        elif not question or not pairs:  # a list whose first "Question 1:" stood in the prompt
            question = f"{question}\n{stripped}" if question else stripped
        blank = False
    close()
    if not pairs and not any(_QUESTION.match(line) for line in lines):
        return _fallback(lines)  # what was asked for is not there, and something else is
    return [f"Question: {_NUMBER.sub('', asked)}\nAnswer: {said}" for asked, said in pairs]


def _plain_question(line: str) -> str:
    """A line that is a question by itself (numbered, or bare), or nothing."""
    entry = _ENTRY.match(line)
    text = line[entry.end() :] if entry else line
    return text.strip(" *") if text.rstrip(" *").endswith("?") else ""


def _numbered(lines: Sequence[str]) -> list[str]:
    """Entries with the lines that belong to them, up to the end of the first list that has any text."""
    entries: list[list[str]] = []
    numbers: list[int | None] = []
    before: list[str] = []
    for at, line in enumerate(lines):
        entry = _ENTRY.match(line)
        if entry and _is_nested(line, lines, at, numbers):
            entries[-1].append(line.strip())
        elif entry:
            number = next((int(digits) for digits in entry.groups() if digits), None)
            if _restarts(number, numbers):
                if any(map(_entry_text, entries)):
                    break
                entries, numbers = [], []
            entries.append([line[entry.end() :].strip()])
            numbers.append(number)
        elif not entries:
            before.append(line)
        elif line.strip():
            if not lines[at - 1].strip() and not _goes_on(lines[at:], numbers):
                break  # what follows a list behind an empty line, and is not part of it
            entries[-1].append(line.strip())
    if not entries:
        return _fallback(lines)
    if numbers[0] not in (None, 0, 1) and (first := " ".join(line.strip() for line in before if line.strip())):
        entries.insert(0, [first])  # a list whose "1." stood in the prompt
    return [document for said in entries if (document := _entry_text(said))]


def _entry_text(lines: Sequence[str]) -> str:
    kept = [line for line in lines if line]
    if len(kept) > 1 and (_HEADING.match(kept[0]) or _bare_label(kept[0])):
        kept = kept[1:]
    if kept and (label := _LABEL.match(kept[0])) and label["rest"] and _after_colon(kept[0]):
        kept[0] = label["rest"]
    return "" if _only_heading(kept) else "\n".join(kept).strip()


def _is_nested(line: str, lines: Sequence[str], at: int, numbers: Sequence[int | None]) -> bool:
    """Whether an entry is part of the one above it: indented more than the list's, or bullets below numbers."""
    if not numbers:
        return False
    bullet = not line.lstrip()[:1].isdigit() and not line.lstrip().startswith(("(", "**"))
    return numbers[-1] is not None and bullet and (line[:1].isspace() or bool(lines[at - 1].strip()))


def _restarts(number: int | None, numbers: Sequence[int | None]) -> bool:
    """Whether another list begins: its number does not go on (all of them 1 is a way to write a list, too)."""
    if not numbers or number is None:
        return bool(numbers) and numbers[-1] is not None and number is None
    last = numbers[-1]
    if last is None:
        return True
    return number <= last and not number == last == numbers[0]


def _goes_on(lines: Sequence[str], numbers: Sequence[int | None]) -> bool:
    """Whether the list goes on behind a paragraph without number."""
    last = numbers[-1]
    for line in lines:
        if entry := _ENTRY.match(line):
            number = next((int(digits) for digits in entry.groups() if digits), None)
            return number == last + 1 if number is not None and last is not None else number is last
    return False


def _fallback(lines: Sequence[str]) -> list[str]:
    """Paragraphs; lines, where there is no empty line."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line.strip())
        elif blocks[-1]:
            blocks.append([])
    blocks = [block for block in blocks if block]
    if len(blocks) <= 1:
        return [line for block in blocks for line in block if not _only_heading([line])]
    return [document for block in blocks if (document := _body(block))]


def _auto(lines: Sequence[str]) -> list[str]:
    if sum(bool(_RULE.match(line)) for line in lines) and len(found := _rules(lines)) > 1:
        return found
    if any(_ANSWER.match(line) or _PAIR.match(line) for line in lines) and any(
        _QUESTION.match(line) or _PAIR.match(line) for line in lines
    ):
        return _qa(lines)
    if sum(_starts_version(line) for line in lines) > 1:
        return _labelled(lines)
    entries = [line for line in lines if _ENTRY.match(line)]
    if len(entries) > 1 or (entries and entries[0] is lines[0]):
        return _numbered(lines)
    return _fallback(lines)


_SPLITTERS: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "numbered": _numbered,
    "qa": _qa,
    "rules": _rules,
    "auto": _auto,
}
SPLITTINGS = ("lines", *_SPLITTERS, "whole")
