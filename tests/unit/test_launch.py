from pathlib import Path

import pytest
from sqlalchemy import text

from preceptor.database import open_database
from preceptor.errors import PreceptorError
from preceptor.launch import launch
from preceptor.settings import HouseSettings, ServiceSettings
from preceptor.telemetry import Telemetry


def _refuse(_settings: HouseSettings, _telemetry: Telemetry) -> None:
    raise PreceptorError("PORT_IN_USE", "cannot listen on 127.0.0.1:1", port=1)


def test_a_process_runs_with_the_settings_of_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECEPTOR_PORT", "7")
    seen: list[int] = []
    assert launch("x", ServiceSettings, lambda settings, _telemetry: seen.append(settings.port)) == 0
    assert seen == [7]


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("PRECEPTOR_PORT", "70000", "less than or equal to 65535"),
        ("PRECEPTOR_BROKER_URL", "http://x", "is not a Redis URL"),
        ("PRECEPTOR_BROKER_URL", "redis://:hunter[2@h/0", "%5B"),
        ("PRECEPTOR_DATABASE_URL", "postgresql://u:hunter[2@h/db", "%5B"),
        ("PRECEPTOR_LOG_LEVEL", "LOUD", "'INFO'"),
    ],
)
def test_a_wrong_setting_is_one_line_with_the_variable_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert launch("teacher", ServiceSettings, lambda _settings, _telemetry: pytest.fail("it ran")) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"teacher: {variable}: ")
    assert said in line
    assert "hunter" not in line
    assert line.count("\n") == 1


def test_a_process_that_cannot_start_says_why_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("teacher", HouseSettings, _refuse) == 2
    said = capsys.readouterr().err
    assert "cannot listen on 127.0.0.1:1" in said
    assert "choose another port (PORT_IN_USE)" in said


def test_a_database_is_made_with_its_tables_and_waits_for_other_writers(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'x'}.db", "tests.things")
    with engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA busy_timeout")).scalar() == 30000
        assert connection.execute(text("SELECT count(*) FROM things")).scalar() == 0
    engine.dispose()


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "nosuch://x",
        "mysql://u:hunter2@h/db",
        "postgres://u@h/db",
        "sqlite+aiosqlite:////tmp/x.db",
        "sqlite:////nowhere/at/all.db",
    ],
)
def test_a_database_that_cannot_be_opened_is_named(url: str) -> None:
    with pytest.raises(PreceptorError) as raised:
        open_database(url, "tests.things")
    assert raised.value.reason == "DATABASE_UNREACHABLE"
    assert "PRECEPTOR_DATABASE_URL" in raised.value.message
    assert "hunter" not in raised.value.message
