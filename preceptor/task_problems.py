"""How people's files are read: every problem is noted with its file, line and field, and reading goes on.

``preceptor.task_files`` knows what passages look like; this knows texts, JSON lines and places.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.errors import PreceptorError
from preceptor.limits import MAX_FILE_BYTES

# An error message stays readable; `preceptor tasks check` lists all.
SHOWN_PROBLEMS = 20
# So does a line of it, whatever the file repeats in it.
MOST_CHARACTERS = 500

# Notes a problem: file, line (0: the file as a whole), field (may be empty), message.
Report = Callable[[str, int, str, str], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands. ``line`` counts from 1; 0: the file as a whole. ``field`` may be empty."""

    file: str
    line: int
    field: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and where. ``line`` counts from 1; 0: the file as a whole. ``field`` may be empty."""

    file: str
    line: int
    field: str
    message: str

    @staticmethod
    def at(place: Place, message: str) -> Problem:
        """A problem with what stands at a place."""
        return Problem(place.file, place.line, place.field, message)

    def __str__(self) -> str:
        place = Place(self.file, self.line, self.field)
        return f"{place}: {cut(self.message)}" + (f" [{cut(self.field)}]" if self.field else "")


def raise_problems(path: str, problems: Sequence[Problem], reason: str = "BAD_TASK_FILE") -> None:
    """Raises a PreceptorError with all the problems, if there are any."""
    if len(problems) == 1:
        only = problems[0]
        place: dict[str, str | int] = {"line": only.line} if only.line else {}
        place |= {"field": cut(only.field)} if only.field else {}
        raise PreceptorError(reason, cut(only.message), file=only.file, **place)
    if problems:
        lines = [f"\n  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
        if (more := len(problems) - SHOWN_PROBLEMS) > 0:
            lines.append(f"\n  and {more} more")
        raise PreceptorError(reason, f"{len(problems)} problems" + "".join(lines), file=path)


def json_lines(path: Path, problem: Report) -> Iterator[tuple[int, Any]]:
    """Each line's number and value; lines that are not JSON are problems, blank ones are passed over."""
    text = read_text(path, problem)
    # Not splitlines(): JSON strings may hold U+2028, which is no line end in this format.
    for number, line in enumerate((text or "").split("\n"), 1):
        if line.strip():
            try:
                value = parse_json(line)
            except InvalidJson as error:
                problem(str(path), number, "", str(error))
            else:
                yield number, value


class InvalidJson(ValueError):
    """A text that is not JSON. ``line`` counts from 1 within it; 0: unknown."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def parse_json(text: str) -> Any:
    """The value in a text. Raises InvalidJson."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidJson(f"is not valid JSON: {error.msg} (column {error.colno})", error.lineno) from None
    except RecursionError:
        raise InvalidJson("is nested too deeply", 0) from None
    except ValueError as error:  # a number with thousands of digits
        raise InvalidJson(f"cannot be read: {error}", 0) from None


def read_text(path: Path, problem: Report) -> str | None:
    """The file as UTF-8 text that is not blank; else None, and a problem."""
    if not path.is_file():
        problem(str(path), 0, "", "is not a regular file")
        return None
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        problem(str(path), 0, "", f"cannot be read: {error.strerror}")
        return None
    if len(data) > MAX_FILE_BYTES:
        problem(str(path), 0, "", f"has more than {MAX_FILE_BYTES // 2**20} MiB; divide it")
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem(str(path), line, "", f"is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}")
        return None
    if not text.strip():
        problem(str(path), 0, "", "is empty")
        return None
    return text


def require_file(path: Path, what: str = "file") -> None:
    """Raises PreceptorError(FILE_NOT_FOUND), also for what no file can be called."""
    try:
        if path.exists():
            return
        why = ""
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be looked into, a NUL
        why = f" that can be looked at: {error}"
    raise PreceptorError("FILE_NOT_FOUND", f"there is no {what} {cut(str(path))}{cut(why)}", file=cut(str(path)))


def cut(text: str, most: int = MOST_CHARACTERS) -> str:
    """The beginning of a text that somebody else wrote."""
    return text if len(text) <= most else text[:most] + "..."


def text_fault(value: Any, most: int = 0) -> str:
    """Why this is no usable text (of at most so many characters, where a number is given); empty if it is one."""
    if not isinstance(value, str):
        return f"must be a string, is {kind(value)}"
    if not value.strip():
        return "is empty"
    if most and len(value) > most:
        return f"has {len(value)} characters; at most {most} are allowed"
    # JSON can spell it, UTF-8 (so protobuf) cannot.
    return "has half of a surrogate pair" if any("\ud800" <= char <= "\udfff" for char in value) else ""


def field_name(at: Sequence[str | int]) -> str:
    """``(3, "questions", 1, "answer")`` as ``[3].questions[1].answer``."""
    name = ""
    for step in at:
        name = f"{name}[{step}]" if isinstance(step, int) else join(name, step)
    return name


def join(name: str, key: str) -> str:
    """A key below a field's name, which may be empty."""
    return f"{name}.{key}" if name else key


def shown(value: Any) -> str:
    """A JSON value as it was written, or the beginning of it."""
    try:
        return cut(json.dumps(value), 60)
    except RecursionError:  # it could just be parsed
        return kind(value)


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
