"""Prompt formats: how a task is put before a teacher, and how what it answers is read. The templates of users are read
here, from a folder of ``.toml`` files, one format each; the formats for real models that ship are such files, too:

    about = "what it is for"        # optional, as all but the template
    splitting = "auto"              # see preceptor.splitting
    titled = true                   # every document begins with the passage's title
    opening = "1."                  # the beginning of the completion, given to the teacher as the end of its prompt
    template = '''
    ... {title} ... {text} ...
    '''

The name is the file's. A template of a user has its content's hash for a version, so that what was written with
another content is never taken for its work.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.limits import MAX_QUESTION_CHARACTERS
from preceptor.names import sha256
from preceptor.splitting import SPLITTINGS
from preceptor.task_problems import Problem, cut, kind, raise_problems, read_text, require_file, shown, text_fault

# Together with a directory listing of a few hundred at most; a folder with more in it is not one of templates.
MOST_TEMPLATES = 500
_SHIPPED = Path(__file__).parent / "prompt_templates"
_NAME = re.compile(r"^[a-z0-9][a-z0-9_-]{0,63}$")
_PLACE = re.compile(r"\{([a-zA-Z_]+)\}")
_LINE = re.compile(r"\(at line (\d+)")
_FEW_SHOT_SEPARATORS = ("", " ")


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """One way to ask for a self-edit. Without a ``template`` the ``instruction`` stands behind the passage."""

    name: str
    version: int
    instruction: str
    splitting: str = "lines"
    titled: bool = False  # each document begins with the passage's title
    kind: str = "passage"  # or "few_shot"
    separator: str = ""  # between the cells of a few-shot task's rows
    opening: str = ""  # the prompt ends in it, and it belongs to the completion
    template: str = ""
    about: str = ""
    file: str = ""  # of a user's template
    digest: str = ""  # of a template's content
    asks: bool = True  # False: nobody writes, the passage itself is the self-edit

    def render(self, title: str, text: str) -> str:
        """The prompt for one task; the completion starts right after it."""
        if not self.template:
            return f"# {title}\n{text.strip()}\n\n{self.instruction}\n"
        values = {"title": title, "text": text.strip()}
        return _PLACE.sub(lambda place: values.get(place[1], place[0]), self.template)

    def whole(self, completion: str) -> str:
        """The completion with the opening that stands in the prompt (a chat model says it again)."""
        return completion if completion.lstrip().startswith(self.opening) else self.opening + completion


def shipped_templates() -> dict[str, PromptFormat]:
    """The formats for real models, by name."""
    found, problems = _read_folder(_SHIPPED, shipped=True)
    raise_problems(str(_SHIPPED), problems, "BAD_PROMPT_TEMPLATE")
    return found


def read_templates(folder: Path, taken: Mapping[str, PromptFormat]) -> dict[str, PromptFormat]:
    """The formats of a user's folder, by name; none may have the name of one that is ``taken``.

    Raises PreceptorError(FILE_NOT_FOUND, BAD_PROMPT_TEMPLATE) naming file, line and field of all that is wrong.
    """
    require_file(folder, "folder of prompt templates")
    found, problems = _read_folder(folder, shipped=False)
    for name in found.keys() & taken.keys():
        file = found[name].file
        problems.append(
            Problem(file, 0, "", f"a format named {name!r} ships with Preceptor; give the file another name")
        )
    raise_problems(
        str(folder), sorted(problems, key=lambda problem: (problem.file, problem.line)), "BAD_PROMPT_TEMPLATE"
    )
    return found


def _read_folder(folder: Path, *, shipped: bool) -> tuple[dict[str, PromptFormat], list[Problem]]:
    problems: list[Problem] = []
    found: dict[str, PromptFormat] = {}
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix == ".toml" and not path.name.startswith("."))
    except OSError as error:
        return {}, [Problem(str(folder), 0, "", f"cannot be read as a folder: {error.strerror}")]
    if not files:
        problems.append(Problem(str(folder), 0, "", "holds no prompt templates (.toml)"))
    if len(files) > MOST_TEMPLATES:
        return {}, [Problem(str(folder), 0, "", f"holds more than {MOST_TEMPLATES} templates")]
    for path in files:
        template = _Template(path, shipped)
        if (form := template.read()) is not None:
            found[form.name] = form
        problems += template.problems
    return found, problems


class _Template:
    """Reads one file."""

    def __init__(self, path: Path, shipped: bool) -> None:
        self._path, self._shipped = path, shipped
        self._text = ""
        self.problems: list[Problem] = []

    def read(self) -> PromptFormat | None:
        """The format; None where anything is wrong with it, which ``problems`` then says."""
        path = self._path
        if not _NAME.match(path.stem):
            self._wrong("", "a template's file is named with 1..64 of a-z, 0-9, - and _, like my_list.toml")
        text = read_text(path, lambda *problem: self.problems.append(Problem(*problem)))
        if text is None:
            return None
        self._text = text
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            at = _LINE.search(str(error))
            self.problems.append(Problem(str(path), int(at[1]) if at else 0, "", f"is not valid TOML: {error}"))
            return None
        except RecursionError:
            self._wrong("", "is nested too deeply")
            return None
        return self._format(values)

    def _format(self, values: dict[str, Any]) -> PromptFormat | None:
        known = {"about", "splitting", "titled", "kind", "separator", "opening", "template"}
        for key in values.keys() - known - ({"version"} if self._shipped else set()):
            why = (
                "is the content's hash; leave it out"
                if key == "version"
                else f"is not one of {', '.join(sorted(known))}"
            )
            self._wrong(key, why)
        form = self._choice(values, "kind", ("passage", "few_shot"), "passage")
        template = self._words(values, "template", MAX_QUESTION_CHARACTERS, needed=True).strip("\n")
        opening = self._words(values, "opening", 200)
        about = self._words(values, "about", 500)
        splittings = ("directive",) if form == "few_shot" else SPLITTINGS
        splitting = self._choice(values, "splitting", splittings, "directive" if form == "few_shot" else "auto")
        separator = self._choice(values, "separator", _FEW_SHOT_SEPARATORS, "")
        titled = values.get("titled", False)
        if not isinstance(titled, bool):
            self._wrong("titled", f"must be true or false, is {kind(titled)}")
        if form == "few_shot" and titled:
            self._wrong("titled", "is about documents, which a few-shot task's directive has none of")
        if form == "passage" and "separator" in values:
            self._wrong("separator", "is for few_shot templates: it stands between the cells of a row")
        if template and "{text}" not in template:
            self._wrong("template", "has no {text}: the teacher would not see what to write about")
        for name in dict.fromkeys(_PLACE.findall(template)):
            if name not in ("title", "text"):
                self._wrong("template", f"has {{{cut(name, 60)}}}; there are {{title}} and {{text}}")
        if self.problems:
            return None
        digest = sha256(self._text)
        return PromptFormat(
            name=self._path.stem,
            version=values["version"] if self._shipped else int(digest[:8], 16),
            instruction=template.replace("{title}", "").replace("{text}", "").strip(),
            splitting=splitting,
            titled=titled,
            kind=form,
            separator=separator,
            opening=opening,
            template=template + ("\n" if template else "") + opening,
            about=about,
            file="" if self._shipped else str(self._path),
            digest=digest,
        )

    def _choice(self, values: dict[str, Any], key: str, choices: Sequence[str], default: str) -> str:
        value = values.get(key, default)
        if value not in choices:
            self._wrong(key, f"must be one of {', '.join(map(repr, choices))}, is {shown_safely(value)}")
            return default
        return str(value)

    def _words(self, values: dict[str, Any], key: str, most: int, *, needed: bool = False) -> str:
        if key not in values:
            if needed:
                self._wrong(key, "is missing")
            return ""
        value = values[key]
        if not needed and value == "":
            return ""
        if fault := text_fault(value, most):
            self._wrong(key, fault)
            return ""
        return str(value)

    def _wrong(self, key: str, message: str) -> None:
        self.problems.append(Problem(str(self._path), self._line(key) if key else 0, key, message))

    def _line(self, key: str) -> int:
        """Where a key is set; 0 where it is not."""
        at = re.search(rf"^[ \t]*[\"']?{re.escape(key)}[\"']?[ \t]*=", self._text, re.MULTILINE)
        return self._text.count("\n", 0, at.start()) + 1 if at else 0


def shown_safely(value: object) -> str:
    """A value of a TOML file as people wrote it, which may be a date."""
    try:
        return shown(value)
    except (TypeError, ValueError):
        return cut(str(value), 60)
