"""``preceptor formats`` against a real teacher with templates of its user."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from preceptor.cli import main
from preceptor.errors import PreceptorError
from preceptor.server import Server
from teacher.in_process import in_process
from teacher.service import SERVICE, Teacher
from teacher.settings import TeacherSettings
from tests.unit.tiny_teachers import tiny_teacher


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "templates"
    made.mkdir()
    (made / "mine.toml").write_text(
        'about = "every fact twice"\nsplitting = "rules"\ntitled = true\ntemplate = "Twice, of {title}: {text}"\n'
    )
    return made


@pytest.fixture
def teacher(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    settings = TeacherSettings(home=tmp_path / "home", port=0, teacher_templates=folder)
    made = Teacher(in_process(tiny_teacher()), settings)
    server = Server([SERVICE], made.add_to, settings)
    monkeypatch.setenv("PRECEPTOR_TEACHER_ADDRESS", f"127.0.0.1:{server.port}")
    yield
    server.stop()
    made.stop()
    made.store.close()


@pytest.mark.usefixtures("teacher")
def test_what_ships_and_what_is_ones_own_is_listed_and_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats", "list", "--json"]) == 0
    found = {form["name"]: form for form in json.loads(capsys.readouterr().out)["formats"]}
    assert {"open", "none", "augmentations", "lecture", "mine"} <= found.keys()
    mine = found["mine"]
    assert (mine["splitting"], mine["titled"], mine["kind"]) == ("rules", True, "passage")
    assert mine["file"] == str(folder / "mine.toml")
    assert mine["template"] == "Twice, of {title}: {text}\n"
    assert (found["question_answers"]["splitting"], found["question_answers"]["opening"]) == ("qa", "Question 1:")
    assert found["augmentations"]["kind"] == "few_shot"
    assert main(["formats", "list"]) == 0
    assert "every fact twice" in capsys.readouterr().out
    assert main(["formats", "show", "mine"]) == 0
    assert "Twice, of {title}: {text}" in capsys.readouterr().out
    assert main(["formats", "show", "open", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["template"].startswith("# {title}\n{text}\n\nWrite a directive")
    assert main(["formats", "show", "mien"]) == 2
    assert "no prompt format named 'mien'; there are: open," in capsys.readouterr().err


def test_templates_are_checked_without_a_teacher(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats", "check", str(folder)]) == 0
    assert "mine" in capsys.readouterr().out
    (folder / "bad.toml").write_text("template = 'nothing in it'\n")
    assert main(["formats", "check", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "has no {text}" in error
    assert "docs/formats.md" in error
    assert main(["formats", "check", str(folder / "nowhere")]) == 2
    assert "FILE_NOT_FOUND" in capsys.readouterr().err


def test_a_teacher_with_a_bad_template_does_not_start(tmp_path: Path, folder: Path) -> None:
    (folder / "open.toml").write_text('template = "{text}"\n')
    settings = TeacherSettings(home=tmp_path / "home", port=0, teacher_templates=folder)
    with pytest.raises(PreceptorError, match="a format named 'open' ships"):
        Teacher(in_process(tiny_teacher()), settings)
