"""Self-edits from people's files: every form, and every problem with its place."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from preceptor.errors import PreceptorError
from preceptor.self_edit_files import ReadSelfEdit, read_self_edits
from preceptor.tasks import Augmentations, Directive, FineTuning, LossMask, SelfEdit


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(name: str, text: str | bytes) -> list[ReadSelfEdit]:
    Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
    return list(read_self_edits([name]).self_edits)


def test_text_is_a_document_a_line_with_a_directive_above() -> None:
    (found,) = read("notes.txt", "directive: lr=1e-3 epochs=100\n\n Ada is in Rome.\nShe bakes.\n")
    assert found.name == "notes"
    assert found.self_edit == SelfEdit(("Ada is in Rome.", "She bakes."), Directive(learning_rate=1e-3, epochs=100))


DIRECTIVE = {"learning_rate": 1, "epochs": 2, "replay_share": 0.5, "rank": 4, "loss_mask": "after_marker"}


def test_json_has_documents_of_several_lines_and_every_setting() -> None:
    (found,) = read("a.json", json.dumps({"documents": ["One.\nTwo."], "directive": DIRECTIVE, "name": "mine"}))
    assert (found.name, found.line) == ("mine", 1)
    assert found.self_edit == SelfEdit(("One.\nTwo.",), Directive(1, 2, 0.5, 4, LossMask.AFTER_MARKER))


@pytest.mark.parametrize(
    ("file", "text", "names", "lines"),
    [
        ("a.jsonl", '{"documents": ["A."]}\n\n{"completion": "B.\\nC."}\n', ["a:1", "a:3"], [1, 3]),
        ("a.json", '[{"documents": ["A."]},\n {"completion": "B.\\nC."}]', ["a:1", "a:2"], [1, 1]),
        ("a.json", '{\n"documents": ["A."]\n}\n{"completion": "B.\\nC."}', ["a:1", "a:4"], [1, 4]),
    ],
)
def test_a_file_may_have_several(file: str, text: str, names: list[str], lines: list[int]) -> None:
    found = read(file, text)
    assert [one.self_edit.documents for one in found] == [("A.",), ("B.", "C.")]
    assert [one.name for one in found] == names
    assert [one.line for one in found] == lines


def test_a_ledgers_further_keys_are_passed_over_and_said() -> None:
    Path("a.jsonl").write_text('{"completion": "A.", "round": 1}\n{"completion": "B.", "round": 2, "index": 3}\n')
    assert read_self_edits(["a.jsonl"]).notes == ("keys of self-edits that are not read: index, round",)


def test_equal_names_are_told_apart() -> None:
    Path("x").mkdir()
    for file in ("a.txt", "x/a.txt"):
        Path(file).write_text("A.")
    assert [one.name for one in read_self_edits(["a.txt", "x/a.txt", "x/a.txt"]).self_edits] == [
        "a.txt",
        "x/a.txt",
        "x/a.txt (2)",
    ]


@pytest.mark.parametrize(
    ("given", "documents"),
    [
        ("A.\nB.", ("A.", "B.")),
        ('{"documents": ["A."]}', ("A.",)),
        (' [ {"documents": ["A."]} ]', ("A.",)),
        ("[1] says A.", ("[1] says A.",)),
    ],
)
def test_standard_input_may_be_either_form(
    given: str, documents: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    (found,) = read_self_edits(["-"]).self_edits
    assert found.self_edit.documents == documents
    assert found.name == "stdin"


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("a.txt", "", "a.txt: is empty"),
        ("a.txt", "directive: epochs=2\n", "a.txt: no study document"),
        ("a.txt", "\ndirective: speed=2\nA.", "a.txt:2: directive: 'speed=2' is not one of lr="),
        ("a.txt", "A.\ndirective: epochs=2", "a.txt:2: a second directive in document 2"),
        ("a.txt", b"A.\n\xff", "a.txt:2: is not UTF-8: byte 0xff"),
        ("a.json", "{", "a.json:1: is not valid JSON: Expecting property name"),
        ("a.json", "[]", "a.json: has no self-edits"),
        ("a.jsonl", '{"documents": ["A."]}\n{"documents": }', "a.jsonl:2: is not valid JSON: Expecting value"),
        ("a.json", "3", "a.json:1: must be an object, is a number"),
        ("a.json", '[{"documents": ["A."]}, "B."]', "a.json:1: must be an object, is a string [[1]]"),
        ("a.json", '{"name": "x"}', "a.json:1: needs either documents or a completion"),
        ("a.json", '{"documents": ["A."], "completion": "A."}', "a.json:1: needs either documents or a completion"),
        ("a.json", '{"documents": "A."}', "a.json:1: must be a list of documents, is a string [documents]"),
        ("a.json", '{"documents": []}', "a.json:1: must be a list of documents, is an empty one [documents]"),
        ("a.json", '{"documents": ["A.", " "]}', "a.json:1: is empty [documents[1]]"),
        ("a.json", '{"documents": ["\\ud800"]}', "a.json:1: has half of a surrogate pair [documents[0]]"),
        ("a.json", '{"documents": ["A."], "name": 3}', "a.json:1: must be a string, is a number [name]"),
        ("a.json", '{"documents": ["A."], "directive": []}', "a.json:1: must be an object, is a list [directive]"),
        (
            "a.jsonl",
            '\n{"documents": ["A."], "directive": {"lr": 1}}',
            "a.jsonl:2: is not one of learning_rate, epochs, replay_share, rank, loss_mask, targets, fine_tuning, "
            "augmentations [directive.lr]",
        ),
        (
            "a.json",
            '{"documents": ["A."], "directive": {"epochs": 2.5}}',
            "a.json:1: must be a whole number, is 2.5 [directive.epochs]",
        ),
        (
            "a.json",
            '{"documents": ["A."], "directive": {"epochs": true}}',
            "a.json:1: must be a whole number, is a boolean [directive.epochs]",
        ),
        (
            "a.json",
            '{"documents": ["A."], "directive": {"learning_rate": 2}}',
            "a.json:1: must be 1e-12..1, is 2 [directive.learning_rate]",
        ),
        (
            "a.json",
            '{"documents": ["A."], "directive": {"learning_rate": NaN}}',
            "a.json:1: must be 1e-12..1, is nan [directive.learning_rate]",
        ),
        (
            "a.json",
            '{"documents": ["A."], "directive": {"loss_mask": "outputs_only"}}',
            'a.json:1: must be one of all, after_marker, is "outputs_only" [directive.loss_mask]',
        ),
        (
            "a.json",
            '{"completion": "directive: lr=x\\nA."}',
            "a.json:1: directive: lr=x has no valid value [completion]",
        ),
        (
            "a.json",
            '{"completion": "A.", "directive": {}}',
            "a.json:1: stands in the completion; leave this one out [directive]",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_place(file: str, text: str | bytes, expected: str) -> None:
    with pytest.raises(PreceptorError) as caught:
        read(file, text)
    assert caught.value.reason == "BAD_SELF_EDIT"
    assert str(caught.value).startswith(expected)


def test_all_problems_of_all_files_are_told_at_once() -> None:
    Path("a.txt").write_text("")
    Path("b.json").write_text('{"documents": ["", 3]}')
    with pytest.raises(PreceptorError) as caught:
        read_self_edits(["a.txt", "b.json"])
    for problem in ("3 problems", "a.txt: is empty", "documents[0]", "b.json:1: must be a string, is a number"):
        assert problem in str(caught.value)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(PreceptorError, match=r"there is no file nowhere\.txt"):
        read_self_edits(["nowhere.txt"])


def test_a_directive_says_layers_the_kind_of_fine_tuning_and_augmentations() -> None:
    given = {"targets": "mlp", "fine_tuning": "full", "epochs": 2}
    (found,) = read("a.json", json.dumps({"documents": ["A."], "directive": given}))
    assert found.self_edit.directive == Directive(epochs=2, targets="mlp", fine_tuning=FineTuning.FULL)
    (spelt,) = read("a.txt", "directive: targets=mlp fine_tuning=full epochs=2\nA.")
    assert spelt.self_edit == found.self_edit
    asked = {"augmentations": {"basic": True, "colours": False}, "loss_mask": "outputs_only"}
    (grids,) = read("a.json", json.dumps({"directive": asked}))
    wanted = Directive(loss_mask=LossMask.OUTPUTS_ONLY, augmentations=Augmentations(basic=True, colours=False))
    assert grids.self_edit == SelfEdit((), wanted)
    (published,) = read("a.json", json.dumps({"data_generation": {"use_chain_augmentations": True}}))
    assert published.self_edit == SelfEdit((), Directive(augmentations=Augmentations(chain=True)))


SEAL = {"title": "Ada", "context": "Ada is in Rome.", "prompt": "...", "questions": [{"question": "?", "answer": "!"}]}


def test_seals_self_edits_are_split_and_stand_behind_their_title() -> None:
    listed = [{**SEAL, "completions": ["Sure!\n1. She is in Rome.\n2. Rome is old.", "Q: Where?\nA: Rome."]}]
    first, second = read("a.json", json.dumps(listed))
    assert (first.name, second.name) == ("Ada:1", "Ada:2")
    assert first.self_edit.documents == ("Ada\nShe is in Rome.", "Ada\nRome is old.")
    assert second.self_edit.documents == ("Ada\nQuestion: Where?\nAnswer: Rome.",)
    assert read_self_edits(["a.json"]).notes == ()


def test_seals_results_and_examples_are_read_for_their_completions() -> None:
    result = {
        "overall": {"mean_gain": 0.1},
        "articles": [{**SEAL, "stats": {}, "completions": [{"text": "- A.\n- B."}]}],
    }
    (one,) = read("a.json", json.dumps(result))
    assert (one.name, one.self_edit.documents) == ("Ada", ("Ada\nA.", "Ada\nB."))
    examples = (
        '{"prompt": "P", "completion": "1. A.\\n2. B."}\n{"prompt": "P", "completion": "1. A.", "splitting": "lines"}\n'
    )
    free, lines = read("a.jsonl", examples)
    assert (free.self_edit.documents, lines.self_edit.documents) == (("A.", "B."), ("1. A.",))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({**SEAL, "completions": []}, "a.json:1: must be a list of completions, is an empty one [completions]"),
        ({**SEAL, "completions": "A."}, "a.json:1: must be a list of completions, is a string [completions]"),
        ({**SEAL, "completions": ["A.", 3]}, "a.json:1: must be a string, is a number [completions[1]]"),
        ({**SEAL, "completions": [{"texts": "A."}]}, "a.json:1: must be a string, is null [completions[0].text]"),
        ({**SEAL, "completions": ["Sure! Here:\n1."]}, "a.json:1: no study document [completions[0]]"),
        ({**SEAL, "title": 3, "completions": ["A."]}, "a.json:1: must be a string, is a number [title]"),
        ({**SEAL, "splitting": "commas", "completions": ["A."]}, "a.json:1: splitting must be one of lines, "),
        ([{"completion": "A.", "splitting": 1}], "a.json:1: splitting must be one of lines, "),
        ({"articles": []}, "a.json: has no self-edits"),
        ({"articles": [{"completions": [1]}]}, "a.json:1: must be a string, is a number [[0].completions[0]]"),
        ({**SEAL, "completions": ["A."] * 1025}, "a.json:1: makes more than 1024 self-edits [completions]"),
        (
            {"directive": {"targets": "heads"}, "documents": ["A."]},
            "a.json:1: must be one of qv, attention, mlp, all",
        ),
        (
            {"directive": {"fine_tuning": 1}, "documents": ["A."]},
            "a.json:1: must be one of lora, full, is 1",
        ),
        ({"directive": {"augmentations": 1}}, "a.json:1: must be an object, is a number [directive.augmentations]"),
        (
            {"directive": {"augmentations": {"turn": True}}},
            "a.json:1: is not one of basic, size, chain, repeat",
        ),
        (
            {"directive": {"augmentations": {"size": 1}}},
            "a.json:1: must be true or false, is a number",
        ),
        ({"training": {"learning_rate": "fast"}}, "a.json:1: training.learning_rate must be a number"),
    ],
)
def test_what_is_wrong_with_seals_files_and_new_settings_is_told_with_its_place(value: object, expected: str) -> None:
    with pytest.raises(PreceptorError) as caught:
        read("a.json", json.dumps(value))
    assert caught.value.reason == "BAD_SELF_EDIT"
    assert str(caught.value).startswith(expected)
