"""Reads self-edits that people (or other programs) have written, and names every problem with its file, line and field.

* text: what a teacher writes (``preceptor.completions``), one document a line, a directive in the first if there is one
* ``.json``, ``.jsonl``: objects ``{"documents": [...], "directive": {...}, "name": "..."}``, or a teacher's
  ``{"completion": "...", "splitting": "lines", "title": ""}``: one, several (one a line, or a list of them)
* SEAL's: ``{"prompt": "...", "completion": "..."}``, ``{"title": "...", "completions": ["...", ...]}`` and of a result
  file ``{"articles": [...]}``; these are split like free text (see preceptor.splitting)
* of few-shot tasks, which need no documents: a ``directive`` with ``augmentations``, or SEAL's object of
  ``data_generation`` and ``training``
* ``-``: standard input, JSON if it begins with a brace or a bracket before a brace, else text
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preceptor.completions import Limits, MalformedSelfEdit, parse
from preceptor.few_shot.directives import parse_json_directive
from preceptor.limits import (
    MAX_DOCUMENTS,
    MAX_EPOCHS,
    MAX_FILE_BYTES,
    MAX_NAME_CHARACTERS,
    MAX_RANK,
    MAX_REPLAY_SHARE,
    MAX_SELF_EDITS,
    MAX_TEXT_CHARACTERS,
)
from preceptor.splitting import SPLITTINGS
from preceptor.task_problems import (
    Problem,
    cut,
    field_name,
    kind,
    raise_problems,
    read_text,
    require_file,
    shown,
    text_fault,
)
from preceptor.tasks import TARGETS, Augmentations, Directive, FineTuning, LossMask, SelfEdit

STDIN = "-"
# By hand one may ask for all that the evaluator takes, not only for what a teacher is allowed.
LIMITS = Limits(
    learning_rate=(1e-12, 1.0),
    epochs=(1, MAX_EPOCHS),
    replay_share=(0.0, MAX_REPLAY_SHARE),
    rank=(1, MAX_RANK),
    documents=MAX_DOCUMENTS,
    document_chars=MAX_TEXT_CHARACTERS,
    allow_full=True,
)
_KEYS = {"name", "documents", "directive", "completion", "splitting", "title"}
_FEW_SHOT_KEYS = {"data_generation", "training"}
# Of SEAL's files. What is not in them is told as not read.
_SEAL_KEYS = {"title", "context", "prompt", "completions", "questions", "stats", "splitting"}
# What a setting may be that is a word, and what it becomes.
_WORDS: dict[str, tuple[str, ...]] = {
    "loss_mask": (LossMask.ALL, LossMask.AFTER_MARKER),
    "targets": tuple(TARGETS),
    "fine_tuning": tuple(FineTuning),
}
_CHOICES: dict[str, Callable[[str], object]] = {"loss_mask": LossMask, "fine_tuning": FineTuning}
_JSON_START = re.compile(r"\s*(\[\s*)?\{")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class ReadSelfEdit:
    """A self-edit and how people call it: its name in the file, or the file's, with the line where it has several."""

    name: str
    self_edit: SelfEdit
    file: str
    line: int  # from 1; 0: the file as a whole


@dataclass(frozen=True, slots=True)
class ReadSelfEdits:
    """All that was read, with notes for people."""

    self_edits: tuple[ReadSelfEdit, ...]
    notes: tuple[str, ...]


def read_self_edits(files: Sequence[str]) -> ReadSelfEdits:
    """The self-edits of all the files, in order. Raises PreceptorError(FILE_NOT_FOUND, BAD_SELF_EDIT)."""
    reader = _Reader()
    for file in files:
        reader.read(file)
    raise_problems(files[0] if files else "", reader.problems, "BAD_SELF_EDIT")
    ignored = cut(", ".join(sorted(reader.ignored)))
    notes = (f"keys of self-edits that are not read: {ignored}",) if reader.ignored else ()
    return ReadSelfEdits(tuple(_with_names_apart(reader.found)), notes)


class _Reader:
    def __init__(self) -> None:
        self.found: list[ReadSelfEdit] = []
        self.problems: list[Problem] = []
        self.ignored: set[str] = set()

    def read(self, file: str) -> None:
        before = len(self.found), len(self.problems)
        text = self._text(file)
        if text is None:
            return
        suffix = Path(file).suffix.lower()
        if suffix in (".json", ".jsonl") or (file == STDIN and _JSON_START.match(text)):
            values = list(self._values(file, text))
            for line, at, value in values:
                self._object(file, line, at, value, alone=len(values) == 1)
        elif (edit := self._completion(file, None, "", text)) is not None:
            self.found.append(ReadSelfEdit(_stem(file), edit, file, 0))
        if before == (len(self.found), len(self.problems)):
            self._wrong(file, 0, (), "has no self-edits")

    def _text(self, file: str) -> str | None:
        if file != STDIN:
            path = Path(file)
            require_file(path)
            return read_text(path, lambda *problem: self.problems.append(Problem(*problem)))
        try:
            data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            self._wrong(file, 0, (), "is not UTF-8")
            return None
        if len(data) > MAX_FILE_BYTES:
            self._wrong(file, 0, (), f"has more than {MAX_FILE_BYTES // 2**20} MiB")
            return None
        if not text.strip():
            self._wrong(file, 0, (), "is empty")
            return None
        return text

    def _values(self, file: str, text: str) -> Iterator[tuple[int, tuple[int, ...], Any]]:
        """Each JSON value's line, its place in a list if it stands in one, and itself."""
        decoder, at, line, counted, values = json.JSONDecoder(), 0, 1, 0, 0
        while (at := _after_space(text, at)) < len(text):
            line, counted = line + text.count("\n", counted, at), at
            try:
                value, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                self._wrong(file, error.lineno, (), f"is not valid JSON: {error.msg} (column {error.colno})")
                return
            except (RecursionError, ValueError):  # nested too deeply; a number with thousands of digits
                self._wrong(file, line, (), "is not JSON that can be read")
                return
            if isinstance(value, dict) and isinstance(value.get("articles"), list):
                value = value["articles"]  # a result file; its numbers are not what is read here
            values += len(value) if isinstance(value, list) else 1
            if values > MAX_SELF_EDITS:
                self._wrong(file, line, (), f"has more than {MAX_SELF_EDITS} self-edits")
                return
            if isinstance(value, list):
                yield from ((line, (place,), entry) for place, entry in enumerate(value))
            else:
                yield line, (), value

    def _object(self, file: str, line: int, at: tuple[int, ...], value: Any, alone: bool) -> None:
        if not isinstance(value, dict):
            self._wrong(file, line, at, f"must be an object, is {kind(value)}")
            return
        if "completions" in value:
            self._completions(file, line, at, value, alone)
            return
        self.ignored |= value.keys() - _KEYS - _FEW_SHOT_KEYS - ({"prompt"} if "completion" in value else set())
        count = len(self.problems)
        name = value.get("name", _stem(file) if alone else f"{_stem(file)}:{at[0] + 1 if at else line}")
        if fault := text_fault(name, MAX_NAME_CHARACTERS) if "name" in value else "":
            self._wrong(file, line, (*at, "name"), fault)
        edit = None
        given = value.get("directive", {})
        if seal := value.keys() & _FEW_SHOT_KEYS:
            edit = self._few_shot(file, line, at, {key: value[key] for key in value if key in seal})
        elif isinstance(given, dict) and "augmentations" in given and not value.keys() & {"completion", "documents"}:
            edit = SelfEdit((), self._directive(file, line, (*at, "directive"), given))
        elif ("completion" in value) == ("documents" in value):
            self._wrong(file, line, at, "needs either documents or a completion")
        elif "completion" in value:
            if "directive" in value:
                self._wrong(file, line, (*at, "directive"), "stands in the completion; leave this one out")
            edit = self._completion_of(file, line, at, value)
        else:
            documents = self._documents(file, line, (*at, "documents"), value["documents"])
            directive = self._directive(file, line, (*at, "directive"), given)
            edit = SelfEdit(documents, directive)
        if count == len(self.problems) and edit is not None:
            self.found.append(ReadSelfEdit(name.strip(), edit, file, line))

    def _few_shot(self, file: str, line: int, at: tuple[str | int, ...], value: dict[str, Any]) -> SelfEdit | None:
        try:
            return SelfEdit((), parse_json_directive(json.dumps(value), LIMITS))
        except MalformedSelfEdit as error:
            self._wrong(file, line, at, str(error))
        except RecursionError:
            self._wrong(file, line, at, "is nested too deeply")
        return None

    def _completions(self, file: str, line: int, at: tuple[str | int, ...], value: dict[str, Any], alone: bool) -> None:
        """SEAL's passage with several completions, each of them a text or, of a result file, ``{"text": ...}``."""
        self.ignored |= value.keys() - _SEAL_KEYS
        given = value["completions"]
        if not isinstance(given, list) or not given:
            found = "an empty one" if given == [] else kind(given)
            self._wrong(file, line, (*at, "completions"), f"must be a list of completions, is {found}")
            return
        if len(self.found) + len(given) > MAX_SELF_EDITS:
            self._wrong(file, line, (*at, "completions"), f"makes more than {MAX_SELF_EDITS} self-edits")
            return
        title = value.get("title", "")
        if fault := text_fault(title, MAX_NAME_CHARACTERS) if title != "" else "":
            self._wrong(file, line, (*at, "title"), fault)
            return
        name = title.strip() or _stem(file)
        for place, entry in enumerate(given):
            where = (*at, "completions", place)
            if isinstance(entry, dict):
                where, entry = (*where, "text"), entry.get("text")
            one = {"completion": entry, "title": title, "splitting": value.get("splitting", "auto")}
            if (edit := self._completion_of(file, line, where, one, "")) is not None:
                called = name if len(given) == 1 else f"{name}:{place + 1}"
                self.found.append(ReadSelfEdit(called, edit, file, line))

    def _completion_of(
        self, file: str, line: int, at: tuple[str | int, ...], value: dict[str, Any], key: str = "completion"
    ) -> SelfEdit | None:
        """``key``: where the text stands below ``at``."""
        text, here = value["completion"], (*at, key) if key else at
        if fault := text_fault(text, MAX_TEXT_CHARACTERS):
            self._wrong(file, line, here, fault)
            return None
        # Who has a prompt beside it was written by a model that knows no form of ours.
        splitting = value.get("splitting", "auto" if "prompt" in value else "lines")
        if splitting not in SPLITTINGS:
            self._wrong(file, line, (*at, "splitting") if key else at[:-1], _splitting_fault(splitting))
            return None
        title = value.get("title", "")
        if fault := text_fault(title, MAX_NAME_CHARACTERS) if title != "" else "":
            self._wrong(file, line, (*at, "title"), fault)
            return None
        return self._completion(file, line, field_name(here), text, splitting, title.strip())

    def _completion(
        self, file: str, line: int | None, where: str, text: str, splitting: str = "lines", title: str = ""
    ) -> SelfEdit | None:
        """``line``: where the text stands; None where it is the whole file."""
        try:
            return parse(text, LIMITS, splitting=splitting, title=title)
        except MalformedSelfEdit as error:
            self.problems.append(Problem(file, error.line if line is None else line, where, str(error)))
            return None

    def _documents(self, file: str, line: int, at: tuple[str | int, ...], value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not value:
            found = "an empty one" if value == [] else kind(value)
            self._wrong(file, line, at, f"must be a list of documents, is {found}")
            return ()
        if len(value) > LIMITS.documents:
            self._wrong(file, line, at, f"has {len(value)} documents; at most {LIMITS.documents} are allowed")
            return ()
        for place, document in enumerate(value):
            if fault := text_fault(document):
                self._wrong(file, line, (*at, place), fault)
            elif len(document) > LIMITS.document_chars:
                self._wrong(file, line, (*at, place), f"has {len(document)} characters, limit {LIMITS.document_chars}")
        documents = tuple(str(document) for document in value)
        if sum(map(len, documents)) > LIMITS.document_chars:
            self._wrong(file, line, at, f"have more than {LIMITS.document_chars} characters together")
        return documents

    def _directive(self, file: str, line: int, at: tuple[str | int, ...], value: Any) -> Directive:
        if not isinstance(value, dict):
            self._wrong(file, line, at, f"must be an object, is {kind(value)}")
            return Directive()
        values: dict[str, Any] = {}
        for key, given in value.items():
            if key == "augmentations" and isinstance(given, dict):
                if (asked := self._augmentations(file, line, (*at, key), given)) is not None:
                    values[key] = asked
            elif key == "loss_mask" and given == LossMask.OUTPUTS_ONLY and "augmentations" in value:
                values[key] = LossMask.OUTPUTS_ONLY  # what a few-shot task makes has outputs
            elif problem := directive_fault(key, given):
                self._wrong(file, line, (*at, key), problem)
            else:
                values[key] = _CHOICES[key](given) if key in _CHOICES else given
        return Directive(**values) if len(values) == len(value) else Directive()

    def _augmentations(
        self, file: str, line: int, at: tuple[str | int, ...], value: dict[str, Any]
    ) -> Augmentations | None:
        known = tuple(Augmentations.__dataclass_fields__)
        before = len(self.problems)
        for key, given in value.items():
            if key not in known:
                self._wrong(file, line, (*at, key), f"is not one of {', '.join(known)}")
            elif not isinstance(given, bool):
                self._wrong(file, line, (*at, key), f"must be true or false, is {kind(given)}")
        return Augmentations(**value) if before == len(self.problems) else None

    def _wrong(self, file: str, line: int, at: Sequence[str | int], message: str) -> None:
        self.problems.append(Problem(file, line, field_name(at), message))


def directive_fault(key: str, value: Any) -> str:
    """Why this is no setting of a directive; empty if it is one."""
    names = tuple(Directive.__dataclass_fields__)
    if key not in names:
        return f"is not one of {', '.join(names)}"
    if key in _WORDS:
        said = isinstance(value, str) and value in _WORDS[key]
        return "" if said else f"must be one of {', '.join(_WORDS[key])}, is {shown(value)}"
    if key == "augmentations":
        return f"must be an object, is {kind(value)}"
    whole = key in ("epochs", "rank")
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        wanted = "a whole number" if whole else "a number"
        return f"must be {wanted}, is {shown(value) if isinstance(value, float) else kind(value)}"
    low, high = getattr(LIMITS, key)
    return "" if low <= value <= high else f"must be {low:g}..{high:g}, is {value}"


def _with_names_apart(found: Sequence[ReadSelfEdit]) -> Iterator[ReadSelfEdit]:
    """Where two have the same name, each is called by its place."""
    counts: dict[str, int] = {}
    for read in found:
        counts[read.name] = counts.get(read.name, 0) + 1
    taken: dict[str, int] = {}
    for read in found:
        name = read.name
        if counts[name] > 1:
            name = f"{read.file}:{read.line}" if read.line else read.file
        taken[name] = taken.get(name, 0) + 1
        yield replace(read, name=name if taken[name] == 1 else f"{name} ({taken[name]})")


def _splitting_fault(value: Any) -> str:
    return f"splitting must be one of {', '.join(SPLITTINGS)}, is {shown(value)}"


def _stem(file: str) -> str:
    return "stdin" if file == STDIN else Path(file).stem


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
