"""A judge that cannot be meant is refused at the start, by the name of its variable; its key is shown to nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluator.settings import EvaluatorSettings
from preceptor.launch import launch

URL, MODEL = "http://127.0.0.1:8000/v1", "tiny"


def start(monkeypatch: pytest.MonkeyPatch, **variables: str) -> tuple[int, EvaluatorSettings | None]:
    for name, value in variables.items():
        monkeypatch.setenv(f"PRECEPTOR_JUDGE_{name.upper()}", value)
    seen: list[EvaluatorSettings] = []
    return launch("evaluator", EvaluatorSettings, lambda settings, _telemetry: seen.append(settings)), seen[
        0
    ] if seen else None


def test_without_an_address_there_is_no_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    code, settings = start(monkeypatch)
    assert code == 0
    assert settings is not None
    assert settings.judge is None


def test_a_judge_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    code, settings = start(
        monkeypatch,
        url=URL,
        model=MODEL,
        api_key=" secret\n",
        concurrency="3",
        requests_per_second="2.5",
        timeout_seconds="7",
    )
    assert code == 0
    assert settings is not None
    judge = settings.judge
    assert judge is not None
    assert (judge.url, judge.model, judge.api_key) == (URL, MODEL, "secret")
    limits = judge.limits
    assert (limits.concurrency, limits.requests_per_second, limits.timeout_seconds) == (3, 2.5, 7.0)
    assert "secret" not in repr(settings) + repr(judge)


def test_a_judges_key_may_lie_in_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "key"
    file.write_text("secret\n")
    _, settings = start(monkeypatch, url=URL, model=MODEL, api_key_file=str(file))
    assert settings is not None
    assert settings.judge is not None
    assert settings.judge.api_key == "secret"
    assert "secret" not in settings.model_dump_json() + repr(settings)

    file.write_text("")
    assert start(monkeypatch) == (2, None)
    assert start(monkeypatch, api_key="other") == (2, None)
    assert start(monkeypatch, api_key="", api_key_file=str(tmp_path / "gone")) == (2, None)
    assert "gone cannot be read: No such file" in capsys.readouterr().err
    code, _ = start(monkeypatch, api_key_file="")  # as compose says that it is not set
    assert code == 0


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("url", "127.0.0.1:8000/v1"),
        ("url", "ftp://127.0.0.1/v1"),
        ("url", "http://"),
        ("url", "http://host:port/v1"),
        ("url", "http://[::1/v1"),
        ("url", "http://host/v 1"),
        ("url", "http://host/v1?key=1"),
        ("url", "https://me:secret@host/v1"),
        ("model", ""),
        ("concurrency", "0"),
        ("requests_per_second", "-1"),
        ("requests_per_second", "nan"),
        ("timeout_seconds", "0"),
        ("timeout_seconds", "fast"),
        ("repeat_share", "2"),
        ("api_key", "a\nsecret"),
        ("api_key", "sécret"),
    ],
)
def test_what_cannot_be_meant_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str
) -> None:
    code, settings = start(monkeypatch, **{"url": URL, "model": MODEL, variable: value})
    said = capsys.readouterr().err
    assert (code, settings) == (2, None)
    assert f"evaluator: PRECEPTOR_JUDGE_{variable.upper()}: " in said
    assert len(said.splitlines()) == 1
    assert "secret" not in said


def test_a_model_without_an_address_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(monkeypatch, model=MODEL)[0] == 2
    assert "PRECEPTOR_JUDGE_URL and PRECEPTOR_JUDGE_MODEL need each other" in capsys.readouterr().err


def test_the_dispatcher_s_numbers_are_set_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        **{"TRIAL_ATTEMPTS": "7", "LEASE_STALL_SECONDS": "90", "HISTORY_DAYS": "2", "BATCHES_IN_FLIGHT": "9"},
        **{"STALL_SECONDS": "5", "MAX_WAITING": "10"},
    }
    for name, value in names.items():
        monkeypatch.setenv(f"PRECEPTOR_{name}", value)
    settings = EvaluatorSettings()
    limits = settings.dispatch_limits
    assert (limits.max_attempts, limits.stall_seconds, limits.in_flight) == (7, 90.0, 9)  # the worker's own 5 s apart
    assert limits.history_seconds == 2 * 86400
    assert settings.max_waiting == 10


def test_a_stuck_worker_has_time_to_end_itself_before_its_batch_is_given_to_another() -> None:
    from student.settings import WorkerSettings

    worker = WorkerSettings()
    assert EvaluatorSettings().lease_stall_seconds > worker.load_seconds + worker.stall_seconds
