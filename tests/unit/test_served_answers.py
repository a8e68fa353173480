"""Answering through a server that is not there, and the settings of it; the real one is asked by tests/e2e."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from preceptor.errors import PreceptorError
from preceptor.tasks import Question
from student.answering import Prompt, answer, encode_questions, read_answer
from student.base import LoadedBase
from student.lora_bank import LoraBank
from student.served_answers import ServedAnswers
from student.settings import WorkerSettings
from student.trial import ALL_LINEAR, AnsweringSettings
from student.worker import _answer_server
from tests.unit.tiny_students import tiny_base

QUESTIONS = [Question("Where is Ada?", "Rome"), Question("What is Tom?", "a smith"), Question("Who knows?", "")]
SETTINGS = AnsweringSettings(max_new_tokens=6)


@pytest.fixture
def nowhere() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def base() -> LoadedBase:
    return tiny_base()


@pytest.fixture
def bank(base: LoadedBase) -> Iterator[LoraBank]:
    bank = LoraBank(base.model, ALL_LINEAR, [4, 8], [8.0, 8.0], [1, 2])
    with bank.attached():
        yield bank


def asked(base: LoadedBase, settings: AnsweringSettings = SETTINGS) -> list[list[Prompt]]:
    return [encode_questions(base, QUESTIONS, settings), encode_questions(base, QUESTIONS[:1], settings)]


def test_while_the_server_is_away_everything_is_answered_here(
    base: LoadedBase, bank: LoraBank, nowhere: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = ServedAnswers(nowhere, tmp_path / "answers", patience_seconds=0.2)
    ticks: list[int] = []
    settings = AnsweringSettings(max_new_tokens=6, samples=2, certainty=True)
    for one in (SETTINGS, settings):
        rows = asked(base, one)
        expected = answer(base, bank, [1, 0], rows, one)
        assert served(base, bank, [1, 0], rows, one, lambda: ticks.append(1)) == expected
    assert ticks
    (told,) = [record.getMessage() for record in caplog.records if record.name == "student.served_answers"]
    assert told.startswith(f"4 of 4 questions are answered here: {nowhere} has not answered")
    assert served(base, bank, [], [], SETTINGS) == []
    served.close()
    assert list((tmp_path / "answers").iterdir()) == []


def test_where_only_the_server_may_answer_its_absence_is_an_error(
    base: LoadedBase, bank: LoraBank, nowhere: str, tmp_path: Path
) -> None:
    served = ServedAnswers(nowhere, tmp_path, min_questions=4, only=True, patience_seconds=0.2)
    rows = asked(base)
    with pytest.raises(PreceptorError) as caught:
        served(base, bank, [0, 1], rows, SETTINGS)
    assert caught.value.reason == "SERVER_UNREACHABLE"
    assert served(base, bank, [0], rows[:1], SETTINGS) == answer(base, bank, [0], rows[:1], SETTINGS), "they are few"
    served.close()


def test_a_student_with_edits_is_asked_here_whatever_is_set(
    base: LoadedBase, bank: LoraBank, nowhere: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server has the student as it was, under the same commit."""
    served = ServedAnswers(nowhere, tmp_path, only=True, patience_seconds=0.2)
    edited = replace(base, adapters=("0" * 64,))
    rows = asked(edited)
    assert served(edited, bank, [0, 1], rows, SETTINGS) == answer(base, bank, [0, 1], rows, SETTINGS)
    assert not caplog.records
    served.close()


@pytest.mark.parametrize(
    ("text", "ended", "expected"),
    [
        ("Rome\nand", False, "Rome"),
        ("Ro", False, None),
        ("Ro", True, "Ro"),
        ("Romeand", False, "Romean"),
        ("", True, ""),
    ],
)
def test_an_answer_is_read_where_ours_would_end(base: LoadedBase, text: str, ended: bool, expected: str | None) -> None:
    tokens = base.encode([text])[0].ids
    assert read_answer(base, tokens, SETTINGS, ended=ended) == expected
    if ended:
        assert read_answer(base, (*tokens, base.eos_id, 65), SETTINGS) == expected


def test_a_worker_has_an_answer_server_where_its_settings_name_one(tmp_path: Path, nowhere: str) -> None:
    assert _answer_server(WorkerSettings(home=tmp_path)) is None
    key = tmp_path / "key"
    key.write_text("secret\n")
    settings = WorkerSettings(
        home=tmp_path, answer_server_url=nowhere, answer_server_api_key_file=key, answer_server_adapters=None
    )
    assert settings.answer_server_api_key.get_secret_value() == "secret"
    assert "secret" not in repr(settings)
    served = _answer_server(settings)
    assert served is not None
    assert list((tmp_path / "answers").glob("*.lock"))
    served.close()
    with pytest.raises(PreceptorError, match="PRECEPTOR_ANSWER_SERVER_ADAPTERS=") as caught:
        _answer_server(WorkerSettings(home=tmp_path, answer_server_url=nowhere, answer_server_adapters=key))
    assert caught.value.reason == "OUTPUT_NOT_WRITABLE"
    with pytest.raises(ValidationError, match="no HTTP address"):
        WorkerSettings(answer_server_url="127.0.0.1:8000")
    with pytest.raises(ValidationError, match="give one of the two"):
        WorkerSettings(answer_server_api_key="x", answer_server_api_key_file=key)  # type: ignore[arg-type]
