"""Templates: what ships, and a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from preceptor.errors import PreceptorError
from preceptor.prompt_formats import PromptFormat, read_templates, shipped_templates
from preceptor.splitting import SPLITTINGS
from teacher.prompts import FORMATS, Formats, prompt_format

GOOD = 'template = "{title}: {text}"\n'


def written(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


def test_the_prompts_the_tiny_teacher_was_taught_on_are_what_they_were() -> None:
    said = "# Ada\nAda is in Rome.\n\nWrite a directive, then every fact of this passage as a short statement.\n"
    assert FORMATS["implications"].render("Ada", " Ada is in Rome.\n") == said
    assert list(FORMATS) == ["open", "implications", "rewrite", "self_qa", "copy"]
    grids = "# turn\nInput: 0\n\nWrite a directive as JSON for this task.\n"
    assert prompt_format("augmentations").render("turn", "Input: 0") == grids


def test_every_format_that_ships_can_be_asked_and_read() -> None:
    for form in Formats():
        said = form.render("THE TITLE", "THE {text} TEXT")
        assert said.count("THE TITLE") == said.count("THE {text} TEXT") == 1 or not form.asks
        assert said.endswith(form.opening)
        assert form.splitting in (*SPLITTINGS, "directive")
        assert form.version >= 1
    assert {"implications_long", "chain_of_thought", "two_readers", "entity_triples"} <= shipped_templates().keys()


def test_an_opening_belongs_to_the_completion_and_is_said_once() -> None:
    form = prompt_format("question_answers")
    assert form.whole(" Who?") == "Question 1: Who?"
    assert form.whole("Question 1: Who?") == "Question 1: Who?"


def test_a_users_template_has_its_contents_hash_for_a_version(tmp_path: Path) -> None:
    folder = written(tmp_path, mine=GOOD, long="titled = true\nsplitting = 'numbered'\nopening = '1.'\n" + GOOD)
    found = read_templates(folder, {})
    assert list(found) == ["long", "mine"]
    assert found["mine"].render("T", " {title} x ") == "T: {title} x\n"
    assert found["long"].render("T", "x") == "T: x\n1."
    assert (found["long"].titled, found["long"].splitting) == (True, "numbered")
    assert found["mine"].file == str(tmp_path / "mine.toml")
    before = found["mine"].version
    assert read_templates(folder, {})["mine"].version == before
    written(tmp_path, mine=GOOD + "# a remark\n")
    assert read_templates(folder, {})["mine"].version != before


@pytest.mark.parametrize(
    ("text", "line", "field", "message"),
    [
        ("", 0, "", "is empty"),
        ("template = \n", 1, "", "is not valid TOML"),
        ("titled = true\n", 0, "template", "is missing"),
        ('about = "x"\ntemplate = "List the facts."\n', 2, "template", "has no {text}"),
        ('template = "{context} {text}"\n', 1, "template", "has {context}; there are {title} and {text}"),
        ('template = ["{text}"]\n', 1, "template", "must be a string, is a list"),
        ('template = "{text}' + "x" * 20_001 + '"\n', 1, "template", "has 20007 characters"),
        (GOOD + 'splitting = "commas"\n', 2, "splitting", "must be one of 'lines', 'numbered'"),
        (GOOD + "splitting = 1979-05-27\n", 2, "splitting", "must be one of"),
        (GOOD + 'titled = "yes"\n', 2, "titled", "must be true or false, is a string"),
        (GOOD + "version = 3\n", 2, "version", "is the content's hash; leave it out"),
        (GOOD + 'temperature = "hot"\n', 2, "temperature", "is not one of about, kind, opening"),
        (GOOD + 'kind = "grids"\n', 2, "kind", "must be one of 'passage', 'few_shot'"),
        (GOOD + 'kind = "few_shot"\nsplitting = "lines"\n', 3, "splitting", "must be one of 'directive'"),
        (GOOD + 'kind = "few_shot"\ntitled = true\n', 3, "titled", "is about documents"),
        (GOOD + 'separator = " "\n', 2, "separator", "is for few_shot templates"),
        (GOOD + 'kind = "few_shot"\nseparator = ","\n', 3, "separator", "must be one of"),
    ],
)
def test_what_is_wrong_with_a_template_is_told_with_its_place(
    tmp_path: Path, text: str, line: int, field: str, message: str
) -> None:
    with pytest.raises(PreceptorError) as caught:
        read_templates(written(tmp_path, mine=text), {})
    error = caught.value
    assert error.reason == "BAD_PROMPT_TEMPLATE"
    assert message in error.message
    assert error.metadata["file"] == str(tmp_path / "mine.toml")
    assert error.metadata.get("line", "0") == str(line)
    assert error.metadata.get("field", "") == field


def test_all_problems_of_a_folder_are_told_at_once(tmp_path: Path) -> None:
    folder = written(tmp_path, a="titled = true\n", b=GOOD, c="titled = 1\ntemplate = 'x'\n", open=GOOD)
    (tmp_path / "BAD NAME.toml").write_text(GOOD)
    (tmp_path / "latin.toml").write_bytes(b'template = "\xe9 {text}"')
    with pytest.raises(PreceptorError) as caught:
        Formats(folder)
    said = str(caught.value)
    for part in (
        "a.toml: is missing [template]",
        "c.toml:1: must be true or false, is a number [titled]",
        "c.toml:2: has no {text}",
        "BAD NAME.toml: a template's file is named with",
        "latin.toml:1: is not UTF-8",
        "open.toml: a format named 'open' ships with Preceptor",
    ):
        assert part in said


def test_a_folder_that_is_none_and_one_without_templates_are_told(tmp_path: Path) -> None:
    with pytest.raises(PreceptorError) as missing:
        Formats(tmp_path / "nowhere")
    assert missing.value.reason == "FILE_NOT_FOUND"
    for folder in (tmp_path, tmp_path / "file"):
        (tmp_path / "file").write_text("x")
        with pytest.raises(PreceptorError) as caught:
            Formats(folder)
        assert caught.value.reason == "BAD_PROMPT_TEMPLATE"


def test_a_passage_with_braces_is_told_as_it_is() -> None:
    form = PromptFormat("x", 1, "", template="{title}|{text}|{other}")
    assert form.render("{text}", "{title} {}") == "{text}|{title} {}|{other}"
