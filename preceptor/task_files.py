"""Reads passages from people's own files, and names every problem with its file, line and field.

Three forms, told apart by the path:

* ``.json``: ``[{"title", "context", "questions": [{"question", "answer"}]}]``, or SQuAD as it is published (``data``,
  ``paragraphs``, ``qas``, ``answers``: of the answers the first is gold, the others are right, too)
* ``.jsonl``: one such object a line
* a folder of ``.md``/``.txt`` files and a ``questions.jsonl`` of ``{"file", "question", "answer"}``

A question may have a ``bank`` (reward, gate, sealed) and ``aliases`` (further right answers); a passage may have an
``id`` and ``labels``. Nothing is repaired silently: what is wrong is a problem, what is passed over is a note. A
question that is asked twice in the same bank with the same answer is read once (real files have such), with a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from preceptor.few_shot.arc_files import is_few_shot
from preceptor.json_places import JsonPlaces
from preceptor.limits import (
    MAX_ALIASES,
    MAX_LABELS,
    MAX_NAME_CHARACTERS,
    MAX_PROBES,
    MAX_PROBLEMS,
    MAX_QUESTION_CHARACTERS,
    MAX_QUESTIONS,
    MAX_REPLAY_DOCUMENTS,
    MAX_TASKS,
    MAX_TEXT_CHARACTERS,
    MAX_TITLE_CHARACTERS,
)
from preceptor.question_faults import question_faults
from preceptor.task_problems import (
    InvalidJson,
    Place,
    Problem,
    field_name,
    join,
    json_lines,
    kind,
    parse_json,
    raise_problems,
    read_text,
    require_file,
    shown,
    text_fault,
)
from preceptor.tasks import Bank, Passage, Question

QUESTIONS_FILE = "questions.jsonl"
TEXT_SUFFIXES = (".md", ".txt")
# A folder with more in it is a disk.
MOST_ENTRIES = 2 * MAX_TASKS
_PASSAGE_KEYS = {"id", "title", "context", "questions", "labels"}
_QUESTION_KEYS = {"id", "question", "answer", "bank", "aliases"}
_LINK_KEYS = {"file", "passage"}

# Tells where something stands. Asked for only when there is something to say about it: lines of JSON are counted then.
Where = Callable[[], Place]


@dataclass(frozen=True, slots=True)
class ReadPassage:
    """A passage, and where it and each of its questions stand. ``named_banks``: at least one of its questions says
    which bank it is for."""

    passage: Passage
    file: str
    line: int
    field: str
    named_banks: bool
    questions_at: tuple[Where, ...]

    @property
    def place(self) -> Place:
        """Where it stands."""
        return Place(self.file, self.line, self.field)


@dataclass(frozen=True, slots=True)
class TaskFile:
    """Everything that was read from one path."""

    path: str
    passages: tuple[ReadPassage, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    def raise_problems(self) -> None:
        """Raises PreceptorError(BAD_TASK_FILE) if there are problems, naming them."""
        raise_problems(self.path, self.problems)


def read_task_file(path: Path, *, questions_needed: bool = True, answers_needed: bool = True) -> TaskFile:
    """Reads a file or folder, whatever is wrong in it, to its end or its ``MAX_PROBLEMS``th problem.

    Raises PreceptorError(FILE_NOT_FOUND).

    What is not needed may be missing: a passage's questions, a question's answer (which is empty then).
    """
    reader = _Reader(path, questions_needed, answers_needed)
    require_file(path, "task file")
    try:
        _read(path, reader)
    except _EnoughProblems:
        reader.problems.append(Problem(str(path), 0, "", f"has {MAX_PROBLEMS} problems; the rest of it is not read"))
    if not reader.passages and not reader.problems:
        reader.problem(str(path), 0, "", "has no passages")
    return TaskFile(str(path), tuple(reader.passages), tuple(reader.problems), tuple(reader.all_notes()))


def _read(path: Path, reader: _Reader) -> None:
    if path.is_dir():
        _read_folder(path, reader)
    elif path.suffix == ".json":
        _read_json(path, reader)
    elif path.suffix == ".jsonl":
        for line, value in json_lines(path, reader.problem):
            _Values(reader, str(path), _always(line)).passage(value, ())
    else:
        reader.problem(str(path), 0, "", "is neither .json nor .jsonl nor a folder")


def read_probes(path: Path) -> tuple[Question, ...]:
    """Questions about what the student knew before: JSON lines of ``{question, answer}``.

    Raises PreceptorError(FILE_NOT_FOUND, BAD_TASK_FILE).
    """
    reader = _Reader(path)
    require_file(path)
    found: list[Question] = []
    try:
        for line, value in json_lines(path, reader.problem):
            values = _Values(reader, str(path), _always(line))
            if values.is_object(value, ()) and (question := values.question(value, ())):
                found.append(question)
            if len(found) > MAX_PROBES:
                reader.problem(str(path), line, "", f"has more than {MAX_PROBES} questions")
                break
    except _EnoughProblems:
        pass
    if not found and not reader.problems:
        reader.problem(str(path), 0, "", "has no questions")
    raise_problems(str(path), reader.problems)
    return tuple(found)


def read_replay(path: Path) -> tuple[str, ...]:
    """What replay draws from: one document a line. Raises PreceptorError(FILE_NOT_FOUND, BAD_TASK_FILE)."""
    reader = _Reader(path)
    require_file(path)
    text = read_text(path, reader.problem)
    raise_problems(str(path), reader.problems)
    documents = tuple(line.strip() for line in (text or "").splitlines() if line.strip())
    if len(documents) > MAX_REPLAY_DOCUMENTS or sum(map(len, documents)) > MAX_TEXT_CHARACTERS:
        limits = f"{MAX_REPLAY_DOCUMENTS} documents or {MAX_TEXT_CHARACTERS} characters"
        reader.problem(str(path), 0, "", f"has more than {limits}")
        raise_problems(str(path), reader.problems)
    return documents


def _always(line: int) -> Callable[[Sequence[str | int]], int]:
    """Of JSON lines: every value of an object stands in the same line."""
    return lambda _path: line


class _EnoughProblems(Exception):
    """Reading ends here."""


@dataclass
class _Reader:
    """What has been read so far."""

    path: Path
    questions_needed: bool = True
    answers_needed: bool = True
    passages: list[ReadPassage] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ignored_keys: dict[str, int] = field(default_factory=dict)
    _texts: dict[str, str] = field(default_factory=dict)
    _ids: dict[str, str] = field(default_factory=dict)

    def problem(self, file: str, line: int, where: str, message: str) -> None:
        self.note(Problem(file, line, where, message))

    def note(self, problem: Problem) -> None:
        """Raises _EnoughProblems where there are too many."""
        self.problems.append(problem)
        if len(self.problems) >= MAX_PROBLEMS:
            raise _EnoughProblems

    def add(
        self,
        title: str,
        text: str,
        labels: dict[str, str],
        asked: Sequence[tuple[Question, Where]],
        at: Place,
        named_banks: bool,
        identity: str,
    ) -> None:
        """Keeps a passage with each of its questions once; what is wrong with them, or with its repeating an earlier
        one's text or id, is a problem."""
        if len(self.passages) >= MAX_TASKS:
            self.problem(at.file, at.line, at.field, f"is one more than {MAX_TASKS} passages; divide the file")
            raise _EnoughProblems
        if other := self._ids.get(identity) if identity else None:
            self.problem(at.file, at.line, join(at.field, "id"), f"id {identity!r} is taken by {other}")
        if other := self._texts.get(text):
            self.problem(at.file, at.line, at.field, f"has the same text as {other}; merge their questions")
        self._ids.setdefault(identity, str(at))
        self._texts.setdefault(text, str(at))
        repeats = set()
        if too_long := _length_fault(title, text):
            self.problem(at.file, at.line, at.field, too_long)
            return
        for fault in question_faults(title, text, [question for question, _ in asked]):
            place = asked[fault.index][1]()
            if fault.repeat:
                repeats.add(fault.index)
                self.notes.append(f"{place}: {fault.message} and read once")
            else:
                self.note(Problem.at(place, fault.message))
        kept = [one for index, one in enumerate(asked) if index not in repeats]
        passage = Passage(title, text, tuple(question for question, _ in kept), labels)
        places = tuple(place for _, place in kept)
        self.passages.append(ReadPassage(passage, at.file, at.line, at.field, named_banks, places))

    def all_notes(self) -> Iterator[str]:
        yield from self.notes
        for key, count in sorted(self.ignored_keys.items()):
            yield f"key {key!r} is not read ({count} time{'s' if count > 1 else ''})"


def _length_fault(title: str, text: str) -> str:
    """Why this is too long for a passage; empty if it is not."""
    if len(text) > MAX_TEXT_CHARACTERS:
        return f"has a text of {len(text)} characters; at most {MAX_TEXT_CHARACTERS} are allowed"
    if len(title) > MAX_TITLE_CHARACTERS:
        return f"has a title of {len(title)} characters; at most {MAX_TITLE_CHARACTERS} are allowed"
    return ""


def _read_json(path: Path, reader: _Reader) -> None:
    text = read_text(path, reader.problem)
    if text is None:
        return
    try:
        values = parse_json(text)
    except InvalidJson as error:
        reader.problem(str(path), error.line, "", str(error))
        return
    if is_few_shot(values):
        reader.problem(str(path), 1, "", "holds few-shot tasks, and passages are needed here")
        return
    places = _Values(reader, str(path), JsonPlaces(text).line)
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        _read_squad(values["data"], places)
        return
    if not isinstance(values, list):
        reader.problem(str(path), 1, "", f"must be a list of passages, is {kind(values)}")
        return
    for index, value in enumerate(values):
        places.passage(value, (index,))


def _read_squad(articles: list[Any], places: _Values) -> None:
    """SQuAD as it is published: articles of paragraphs, and questions with several answers. Of a paragraph whose
    questions have no answer in it nothing is left to ask; it is passed over with a note."""
    for number, article in enumerate(articles):
        at: tuple[str | int, ...] = ("data", number)
        if not places.is_object(article, at):
            continue
        paragraphs = article.get("paragraphs")
        if not isinstance(paragraphs, list):
            places.wrong((*at, "paragraphs"), f"must be a list, is {kind(paragraphs)}")
            continue
        for place, paragraph in enumerate(paragraphs):
            here = (*at, "paragraphs", place)
            if not places.is_object(paragraph, here):
                continue
            entries = paragraph.get("qas")
            asked, impossible = entries, 0
            if isinstance(entries, list):
                given = [one for one in entries if not (isinstance(one, dict) and one.get("is_impossible") is True)]
                asked, impossible = [_squad_question(one) for one in given], len(entries) - len(given)
            if impossible:
                questions = f"{impossible} question{'s' if impossible > 1 else ''}"
                places.note(here, f"{questions} that the text does not answer: not asked")
                if not asked:
                    continue
            value = {"title": article.get("title", ""), "context": paragraph.get("context"), "questions": asked}
            places.passage({key: one for key, one in value.items() if one is not None}, here, asked_as="qas")


def _squad_question(entry: Any) -> Any:
    """One question of SQuAD as one of ours; what is wrong with it stays wrong."""
    if not isinstance(entry, dict) or not isinstance(entry.get("answers"), list):
        return entry
    texts = [answer.get("text") if isinstance(answer, dict) else answer for answer in entry["answers"]]
    first, *others = dict.fromkeys(text for text in texts if isinstance(text, str)) or [None]
    value = {"question": entry.get("question"), "answer": first, "aliases": others[:MAX_ALIASES]}
    return {key: one for key, one in value.items() if one is not None}


def _read_folder(folder: Path, reader: _Reader) -> None:
    texts, listed = {}, folder / QUESTIONS_FILE
    try:
        entries = list(islice(folder.rglob("*"), MOST_ENTRIES + 1))
        files = sorted(p for p in entries if p.suffix in TEXT_SUFFIXES and p.is_file())
    except OSError as error:
        reader.problem(str(folder), 0, "", f"cannot be read: {error.strerror}")
        return
    if len(entries) > MOST_ENTRIES:
        reader.problem(str(folder), 0, "", f"holds more than {MOST_ENTRIES} files; name the folder of the passages")
        return
    for path in files:
        name = path.relative_to(folder).as_posix()
        if not any(part.startswith(".") for part in Path(name).parts):
            texts[name] = read_text(path, reader.problem)
    if not texts:
        reader.problem(str(folder), 0, "", f"has no {' or '.join(TEXT_SUFFIXES)} files")
    if not listed.is_file() and reader.questions_needed:
        form = '{"file": ..., "question": ..., "answer": ...}'
        reader.problem(str(listed), 0, "", f"is missing; write one line {form} for each question")
        return
    stems = {name.rsplit(".", 1)[0]: name for name in reversed(texts)}
    asked: dict[str, list[tuple[Question, Where]]] = {name: [] for name in texts}
    named_banks = set()
    named_anywhere = set()
    for line, value in json_lines(listed, reader.problem) if listed.is_file() else ():
        values = _Values(reader, str(listed), _always(line))
        if not values.is_object(value, ()):
            continue
        question = values.question(value, (), links=True)
        key = "file" if "file" in value else "passage"
        wanted = values.text(value, key, ())
        name = wanted if wanted in asked else stems.get(wanted or "", "")
        if wanted and not name:
            reader.problem(str(listed), line, key, f"there is no file {wanted!r} in {folder}")
        if name:
            named_anywhere.add(name)
        if question and name:
            asked[name].append((question, partial(Place, str(listed), line, "")))
            if "bank" in value:
                named_banks.add(name)
    for name, text in texts.items():
        path = folder / name
        if text is None:
            continue
        if name not in named_anywhere and reader.questions_needed:
            reader.problem(str(path), 0, "", f"has no question in {QUESTIONS_FILE}")
        title = text.strip().splitlines()[0].lstrip("#").strip() if text.lstrip().startswith("#") else path.stem
        title = (title or path.stem)[:MAX_TITLE_CHARACTERS]
        reader.add(title, text.strip(), {}, asked[name], Place(str(path), 0, ""), name in named_banks, "")


class _Values:
    """Reads values of one file. ``line_of`` tells the line of the value at a path of keys and indexes."""

    def __init__(self, reader: _Reader, file: str, line_of: Callable[[Sequence[str | int]], int]) -> None:
        self._reader, self._file, self._line_of = reader, file, line_of

    def passage(self, value: Any, at: tuple[str | int, ...], asked_as: str = "questions") -> None:
        """Reads one passage object and keeps it if it has text. ``asked_as``: how the file calls its questions."""
        if not self.is_object(value, at):
            return
        self._note_ignored(value, _PASSAGE_KEYS)
        text = self.text(value, "context", at)
        title = self.text(value, "title", at) if value.get("title", "") != "" else ""
        labels = self._labels(value.get("labels", {}), (*at, "labels"))
        identity = value.get("id", "")
        if not isinstance(identity, (str, int)):
            self.wrong((*at, "id"), f"must be a string, is {kind(identity)}")
            identity = ""
        entries = value.get("questions", None if self._reader.questions_needed else [])
        asked: list[tuple[Question, Where]] = []
        named = False
        if entries is None:
            self.wrong((*at, asked_as), "is missing")
        elif not isinstance(entries, list):
            self.wrong((*at, asked_as), f"must be a list, is {kind(entries)}")
        elif not entries and self._reader.questions_needed:
            self.wrong((*at, asked_as), "is empty: a passage needs at least one question")
        elif len(entries) > MAX_QUESTIONS:
            self.wrong((*at, asked_as), f"are {len(entries)}; at most {MAX_QUESTIONS} are asked about a passage")
        else:
            for index, entry in enumerate(entries):
                here = (*at, asked_as, index)
                if self.is_object(entry, here) and (question := self.question(entry, here)):
                    asked.append((question, partial(self._place, here)))
                    named = named or "bank" in entry
        if text is not None:
            title = title or " ".join(text.split(maxsplit=6)[:6])[:MAX_TITLE_CHARACTERS]
            self._reader.add(title, text, labels, asked, self._place(at), named, str(identity))

    def question(self, value: dict[str, Any], at: tuple[str | int, ...], links: bool = False) -> Question | None:
        """Reads one question object; None if something is wrong with it. ``links``: it may name its passage."""
        self._note_ignored(value, _QUESTION_KEYS | (_LINK_KEYS if links else set()))
        wanted = "answer" in value or self._reader.answers_needed
        text, answer = self.text(value, "question", at), self.text(value, "answer", at) if wanted else ""
        bank, aliases = value.get("bank", Bank.REWARD.value), value.get("aliases", [])
        right = True
        if bank not in tuple(Bank):
            right = self.wrong((*at, "bank"), f"must be one of {', '.join(Bank)}, is {shown(bank)}")
        if not isinstance(aliases, list):
            right = self.wrong((*at, "aliases"), f"must be a list, is {kind(aliases)}")
        elif len(aliases) > MAX_ALIASES:
            right = self.wrong((*at, "aliases"), f"are {len(aliases)}; at most {MAX_ALIASES} are allowed")
        else:
            for index, alias in enumerate(aliases):
                if fault := text_fault(alias, MAX_QUESTION_CHARACTERS):
                    right = self.wrong((*at, "aliases", index), fault)
        if text is None or answer is None or not right:
            return None
        return Question(text, answer, Bank(bank), tuple(alias.strip() for alias in aliases))

    def text(self, value: dict[str, Any], key: str, at: tuple[str | int, ...]) -> str | None:
        """A text that is there and not blank, stripped; else None, and a problem."""
        here, found = (*at, key), value.get(key)
        if key not in value:
            self.wrong(here, "is missing")
        elif fault := text_fault(found, MAX_QUESTION_CHARACTERS if key in ("question", "answer") else 0):
            self.wrong(here, fault)
        else:
            return str(found).strip()
        return None

    def note(self, at: tuple[str | int, ...], message: str) -> None:
        """Says what is passed over, and where."""
        self._reader.notes.append(f"{self._place(at)}: {message}")

    def is_object(self, value: Any, at: tuple[str | int, ...]) -> bool:
        """Whether it is an object; a problem if not."""
        return isinstance(value, dict) or self.wrong(at, f"must be an object, is {kind(value)}")

    def _labels(self, value: Any, at: tuple[str | int, ...]) -> dict[str, str]:
        if not isinstance(value, dict) or any(text_fault(text) for item in value.items() for text in item):
            self.wrong(at, "must be an object of strings that are not empty")
        elif len(value) > MAX_LABELS or any(len(text) > MAX_NAME_CHARACTERS for item in value.items() for text in item):
            self.wrong(at, f"must be at most {MAX_LABELS} labels of at most {MAX_NAME_CHARACTERS} characters")
        else:
            return value
        return {}

    def _note_ignored(self, value: dict[str, Any], known: set[str]) -> None:
        for key in value.keys() - known:
            self._reader.ignored_keys[key] = self._reader.ignored_keys.get(key, 0) + 1

    def wrong(self, at: tuple[str | int, ...], message: str) -> bool:
        """Notes a problem; always False."""
        self._reader.note(Problem.at(self._place(at), message))
        return False

    def _place(self, at: tuple[str | int, ...]) -> Place:
        return Place(self._file, self._line_of(at), field_name(at))
