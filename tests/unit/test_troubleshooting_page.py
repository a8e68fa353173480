"""docs/troubleshooting.md quotes what the code says: a message that is worded anew fails here."""

from __future__ import annotations

import re
from pathlib import Path

from preceptor.errors import CATALOGUE
from preceptor.settings import ServiceSettings
from student.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")][1:]
# What others say: the system, Redis, PostgreSQL.
OTHERS = ("No such file or directory", "invalid username-password pair", "password authentication failed", ": ")


def source() -> str:
    """All our code, with strings that go over several lines joined."""
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for package in ("preceptor", "student", "teacher", "evaluator")
        for path in (ROOT / package).rglob("*.py")
    )
    return re.sub(r"\{[^{}]*\}", "...", re.sub(r'"\s*\n\s*f?"', "", code))


def test_each_message_is_one_that_the_code_makes() -> None:
    code, pieces = source(), 0
    for row in ROWS:
        for quoted in re.findall(r"`([^`]+)`", row[1]):
            for piece in re.split(r"\.\.\.|PRECEPTOR_\w+", quoted):
                piece = piece.strip(" ,:;/=")
                if len(piece) > 8 and not any(other in piece for other in OTHERS):
                    assert piece in code, (row[0], piece)
                    pieces += 1
    assert pieces >= 25


def test_each_reason_is_of_the_catalogue_and_each_variable_is_one() -> None:
    for row in ROWS:
        reason = row[2].strip("`")
        assert reason in CATALOGUE or reason.startswith("("), row
    known = {f"PRECEPTOR_{name.upper()}" for kind in (ServiceSettings, WorkerSettings) for name in kind.model_fields}
    known |= {"PRECEPTOR_DEDICATED_STUDENTS", "PRECEPTOR_TEACHER_SERVER_URL", "PRECEPTOR_TEACHER_SERVER_MODEL"}
    assert set(re.findall(r"PRECEPTOR_[A-Z][A-Z_]*[A-Z]", PAGE)) <= known
