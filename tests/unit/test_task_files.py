"""Promises of reading people's own files: all problems at once, each with file, line and field; nothing repaired."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.errors import PreceptorError
from preceptor.task_files import TaskFile, read_probes, read_replay, read_task_file
from preceptor.task_problems import SHOWN_PROBLEMS
from preceptor.tasks import Bank, Question

GOOD: list[dict[str, Any]] = [
    {"title": "One", "context": "Ada lives in Lisbon.", "questions": [{"question": "Where?", "answer": "Lisbon"}]},
    {
        "title": "Two",
        "context": "Bob keeps\na goat.",
        "questions": [
            {"question": "What?", "answer": "goat", "bank": "sealed", "aliases": ["a goat"]},
            {"question": "Who?", "answer": "Bob"},
        ],
    },
]


def json_file(tmp_path: Path, values: Any) -> Path:
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return path


def problems(path: Path) -> list[str]:
    return [str(problem) for problem in read_task_file(path).problems]


def changed(**first: Any) -> list[dict[str, Any]]:
    return [{**GOOD[0], **first}, GOOD[1]]


def asked(**question: Any) -> list[dict[str, Any]]:
    return changed(questions=[{"question": "Where?", "answer": "Lisbon", **question}])


def test_json_is_read_with_banks_and_aliases(tmp_path: Path) -> None:
    found = read_task_file(json_file(tmp_path, GOOD))
    assert not found.problems
    assert [read.passage.title for read in found.passages] == ["One", "Two"]
    assert found.passages[1].passage.questions == (
        Question("What?", "goat", Bank.SEALED, ("a goat",)),
        Question("Who?", "Bob", Bank.REWARD),
    )
    assert [read.named_banks for read in found.passages] == [False, True]


def test_json_lines_are_read_the_same(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n\n".join(json.dumps(entry) for entry in GOOD) + "\n", encoding="utf-8")
    found = read_task_file(path)
    assert not found.problems
    assert [read.passage for read in found.passages] == [
        read.passage for read in read_task_file(json_file(tmp_path, GOOD)).passages
    ]
    assert [read.line for read in found.passages] == [1, 3]


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert not read_task_file(path).problems


@pytest.mark.parametrize(
    ("values", "line", "said"),
    [
        (changed(context=" \n"), 4, "is empty [[0].context]"),
        (changed(context=7), 4, "must be a string, is a number [[0].context]"),
        ([{"title": "One", "questions": GOOD[0]["questions"]}], 2, "is missing [[0].context]"),
        (changed(title=None), 3, "must be a string, is null [[0].title]"),
        (changed(questions=[]), 5, "is empty: a passage needs at least one question [[0].questions]"),
        (changed(questions={"question": "x"}), 5, "must be a list, is an object [[0].questions]"),
        (changed(questions=["Where?"]), 6, "must be an object, is a string [[0].questions[0]]"),
        ([{"context": "x"}], 2, "is missing [[0].questions]"),
        (asked(answer=""), 8, "is empty [[0].questions[0].answer]"),
        (asked(answer=1987), 8, "must be a string, is a number [[0].questions[0].answer]"),
        (asked(question="\t"), 7, "is empty [[0].questions[0].question]"),
        (asked(bank="exam"), 9, 'must be one of reward, gate, sealed, is "exam" [[0].questions[0].bank]'),
        (asked(bank=["sealed"]), 9, 'must be one of reward, gate, sealed, is ["sealed"] [[0].questions[0].bank]'),
        (asked(aliases="LX"), 9, "must be a list, is a string [[0].questions[0].aliases]"),
        (asked(aliases=["LX", ""]), 11, "is empty [[0].questions[0].aliases[1]]"),
        (asked(answer="\ud800"), 8, "has half of a surrogate pair [[0].questions[0].answer]"),
        (changed(labels={"genre": 3}), 11, "must be an object of strings that are not empty [[0].labels]"),
        (changed(id=[]), 11, "must be a string, is a list [[0].id]"),
        (["text"], 2, "must be an object, is a string [[0]]"),
    ],
)
def test_each_fault_is_named_with_file_line_and_field(tmp_path: Path, values: Any, line: int, said: str) -> None:
    path = json_file(tmp_path, values)
    assert problems(path) == [f"{path}:{line}: {said}"]


def test_a_question_without_an_answer_is_named(tmp_path: Path) -> None:
    path = json_file(tmp_path, changed(questions=[{"question": "Where?"}]))
    assert problems(path) == [f"{path}:6: is missing [[0].questions[0].answer]"]


def test_all_problems_are_told_in_one_go(tmp_path: Path) -> None:
    path = json_file(tmp_path, [*asked(answer=""), {"context": "", "questions": []}, 3])
    assert len(problems(path)) == 4
    with pytest.raises(PreceptorError) as caught:
        read_task_file(path).raise_problems()
    assert caught.value.reason == "BAD_TASK_FILE"
    for problem in problems(path):
        assert problem in str(caught.value)


def test_one_problem_is_an_error_at_its_place(tmp_path: Path) -> None:
    path = json_file(tmp_path, asked(answer=""))
    with pytest.raises(PreceptorError) as caught:
        read_task_file(path).raise_problems()
    assert str(caught.value) == problems(path)[0]
    assert caught.value.metadata == {"file": str(path), "line": "8", "field": "[0].questions[0].answer"}


def test_a_message_with_very_many_problems_stays_readable(tmp_path: Path) -> None:
    path = json_file(tmp_path, [{"context": f"text {n}", "questions": []} for n in range(SHOWN_PROBLEMS + 5)])
    with pytest.raises(PreceptorError, match="and 5 more") as caught:
        read_task_file(path).raise_problems()
    assert str(caught.value).count("\n") == SHOWN_PROBLEMS + 1


def test_the_same_text_twice_and_the_same_id_twice_are_problems(tmp_path: Path) -> None:
    path = json_file(tmp_path, [{**GOOD[0], "id": "a"}, {**GOOD[1], "id": "a"}, {**GOOD[0], "id": "b"}])
    assert problems(path) == [
        f"{path}:13: id 'a' is taken by {path}:2 [[1].id]",
        f"{path}:32: has the same text as {path}:2; merge their questions [[2]]",
    ]


LISBON = {"question": "Where does Ada live?", "answer": "Lisbon"}


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"answer": "Porto"}, "has the answer 'Porto' here and 'Lisbon' before; ask it once"),
        ({"question": "where does  ada live", "answer": "Porto"}, "has the answer 'Porto' here and 'Lisbon' before"),
        ({"aliases": ["LX"]}, "is asked twice with other aliases; ask it once, with all of them"),
        ({"bank": "sealed"}, "is asked in bank reward, too; each bank has words of its own"),
        ({"bank": "gate", "question": "Where does Ada  live ?"}, "is asked in bank reward, too"),
    ],
)
def test_a_question_that_contradicts_another_or_is_in_two_banks_is_named(
    tmp_path: Path, second: dict[str, Any], said: str
) -> None:
    path = json_file(tmp_path, changed(questions=[LISBON, {**LISBON, **second}]))
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:10: ")
    assert said in problem
    assert problem.endswith("[[0].questions[1]]")


def test_a_question_that_is_asked_twice_is_read_once_with_a_note(tmp_path: Path) -> None:
    again = {"question": " where does Ada live", "answer": "lisbon "}
    first = {**LISBON, "aliases": ["LX"]}
    path = json_file(tmp_path, changed(questions=[first, again, {"question": "Who lives there?", "answer": "Ada"}]))
    found = read_task_file(path)
    assert not found.problems
    assert [question.text for question in found.passages[0].passage.questions] == [
        "Where does Ada live?",
        "Who lives there?",
    ]
    assert found.notes == (f"{path}:13: 'where does Ada live' is asked twice and read once",)
    assert [place().line for place in found.passages[0].questions_at] == [6, 17]


def test_in_a_folder_too_a_contradiction_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("Ada lives in Lisbon.")
    lines = [{"file": "a.md", **LISBON}, {"file": "a.md", **LISBON, "answer": "Porto"}]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (problem,) = problems(tmp_path)
    assert problem.startswith(f"{tmp_path}/questions.jsonl:2: 'Where does Ada live?' has the answer 'Porto' here")


@pytest.mark.parametrize("bank", list(Bank))
def test_a_question_that_the_teacher_could_read_in_the_passage_is_named(tmp_path: Path, bank: Bank) -> None:
    asked = {**LISBON, "bank": bank.value}
    text = "Questions we get:\n- where does  ADA live\n  In Lisbon."
    path = json_file(tmp_path, changed(context=text, questions=[asked]))
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:6: 'Where does Ada live?' stands in the passage, which the teacher reads")
    path = json_file(tmp_path, changed(title="Where does Ada live?", questions=[asked]))
    assert len(problems(path)) == 1
    path = json_file(tmp_path, changed(context="Nowhere does Ada live.", questions=[asked]))
    assert not problems(path)


def test_keys_that_are_not_read_are_noted(tmp_path: Path) -> None:
    found = read_task_file(json_file(tmp_path, [{**entry, "source": "x"} for entry in GOOD]))
    assert found.notes == ("key 'source' is not read (2 times)",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ": is empty"),
        (b" \n ", ": is empty"),
        (b"[]", ": has no passages"),
        (b"{}", ":1: must be a list of passages, is an object"),
        (b'[\n {"title": }]', ":2: is not valid JSON: Expecting value (column 12)"),
        (b'[\n"\xff"]', ":2: is not UTF-8: byte 0xff at offset 3"),
        (b"[" * 100_000, ": is nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", ": cannot be read: "),
    ],
)
def test_a_file_that_is_no_list_of_passages_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "tasks.json"
    path.write_bytes(content)
    (problem,) = problems(path)
    assert problem.startswith(f"{path}{said}")


def test_a_malformed_json_line_is_named_and_the_others_are_still_read(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(f'{json.dumps(GOOD[0])}\n{{"title": \n{json.dumps(GOOD[1])}\n', encoding="utf-8")
    found = read_task_file(path)
    assert [str(problem) for problem in found.problems] == [f"{path}:2: is not valid JSON: Expecting value (column 11)"]
    assert len(found.passages) == 2


def test_a_line_separator_inside_a_json_string_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    entry = {**GOOD[0], "context": "Ada\u2028lives"}
    path.write_text(json.dumps(entry, ensure_ascii=False), encoding="utf-8")
    assert not read_task_file(path).problems


def test_a_missing_path_and_an_unknown_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(PreceptorError) as caught:
        read_task_file(tmp_path / "nowhere.json")
    assert (caught.value.reason, caught.value.metadata["file"]) == ("FILE_NOT_FOUND", f"{tmp_path}/nowhere.json")
    path = tmp_path / "tasks.csv"
    path.write_text("a,b")
    assert problems(path) == [f"{path}: is neither .json nor .jsonl nor a folder"]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    os.mkfifo(path)
    assert problems(path) == [f"{path}: is not a regular file"]


def folder(tmp_path: Path, texts: dict[str, str], lines: list[Any] | None) -> Path:
    root = tmp_path / "notes"
    root.mkdir()
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    if lines is not None:
        (root / "questions.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return root


def test_a_folder_is_read_with_titles_from_headings_or_names(tmp_path: Path) -> None:
    root = folder(
        tmp_path,
        {"ada.md": "# Of Ada\n\nAda lives in Lisbon.\n", "deep/bob.txt": "Bob keeps a goat."},
        [
            {"file": "ada.md", "question": "Where?", "answer": "Lisbon", "bank": "sealed"},
            {"passage": "deep/bob", "question": "What?", "answer": "goat", "aliases": ["a goat"]},
        ],
    )
    found = read_task_file(root)
    assert not found.problems
    assert [(read.passage.title, read.named_banks) for read in found.passages] == [("Of Ada", True), ("bob", False)]
    assert found.passages[1].passage.questions == (Question("What?", "goat", Bank.REWARD, ("a goat",)),)


def test_a_folder_without_questions_file_says_what_to_write(tmp_path: Path) -> None:
    root = folder(tmp_path, {"ada.md": "Ada lives in Lisbon."}, None)
    assert problems(root) == [
        f'{root}/questions.jsonl: is missing; write one line {{"file": ..., "question": ..., "answer": ...}}'
        " for each question"
    ]


def test_every_fault_of_a_folder_is_named(tmp_path: Path) -> None:
    root = folder(
        tmp_path,
        {"ada.md": "Ada lives in Lisbon.", "bob.txt": "Bob.", "empty.md": " "},
        [
            {"file": "ada.md", "question": "Where?", "answer": ""},
            {"file": "carl.md", "question": "Who?", "answer": "Carl"},
            {"question": "Who?", "answer": "Carl"},
            17,
        ],
    )
    listed = f"{root}/questions.jsonl"
    assert sorted(problems(root)) == sorted(
        [
            f"{root}/empty.md: is empty",
            f"{listed}:1: is empty [answer]",
            f"{listed}:2: there is no file 'carl.md' in {root} [file]",
            f"{listed}:3: is missing [passage]",
            f"{listed}:4: must be an object, is a number",
            f"{root}/bob.txt: has no question in questions.jsonl",
        ]
    )


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path, {}, [])
    assert f"{root}: has no .md or .txt files" in problems(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = json_file(tmp_path, GOOD)
    path.chmod(0)
    assert problems(path) == [f"{path}: cannot be read: Permission denied"]


def test_probes_and_replay_are_read_and_their_faults_named(tmp_path: Path) -> None:
    probes = tmp_path / "probes.jsonl"
    probes.write_text('{"question": "Where?", "answer": "Lisbon"}\n{"question": "Who?"}\n')
    with pytest.raises(PreceptorError, match=r"probes.jsonl:2: is missing \[answer\]"):
        read_probes(probes)
    probes.write_text('{"question": "Where?", "answer": "Lisbon"}\n')
    assert read_probes(probes) == (Question("Where?", "Lisbon"),)
    replay = tmp_path / "replay.txt"
    replay.write_text("One.\n\n Two. \n")
    assert read_replay(replay) == ("One.", "Two.")
    for read in (read_probes, read_replay):
        with pytest.raises(PreceptorError) as caught:
            read(tmp_path / "nowhere")
        assert caught.value.reason == "FILE_NOT_FOUND"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["title", "context", "questions", "question", "answer", "bank", "aliases", "id", "labels"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=200)
@given(st.lists(_JSON, max_size=4), st.sampled_from([None, 2]))
def test_any_json_is_read_to_its_end(tmp_path_factory: pytest.TempPathFactory, values: Any, indent: int | None) -> None:
    path = tmp_path_factory.mktemp("any") / "tasks.json"
    path.write_text(json.dumps(values, indent=indent), encoding="utf-8")
    lines = path.read_text().count("\n") + 1
    found: TaskFile = read_task_file(path)
    assert found.problems or found.passages
    assert all(0 <= problem.line <= lines for problem in found.problems)
    with suppress(PreceptorError):
        found.raise_problems()


def squad(*qas: object, **paragraph: object) -> str:
    """A file as SQuAD publishes it."""
    value = {"context": "Ada lives in Rome. She bakes.", "qas": list(qas), **paragraph}
    return json.dumps({"version": "1.1", "data": [{"title": "Ada_Brook", "paragraphs": [value]}]}, indent=1)


ROME = [{"text": "Rome"}, {"text": "in Rome"}, {"text": "Rome"}]
WHERE = {"id": "1", "question": "Where does Ada live?", "answers": ROME}


def test_squad_is_read_as_it_is_published(tmp_path: Path) -> None:
    impossible = {"id": "2", "question": "How old is Ada?", "answers": [], "is_impossible": True}
    path = tmp_path / "squad.json"
    path.write_text(squad(WHERE, impossible))
    found = read_task_file(path)
    assert not found.problems
    (read,) = found.passages
    assert (read.passage.title, read.passage.text) == ("Ada_Brook", "Ada lives in Rome. She bakes.")
    assert read.passage.questions == (Question("Where does Ada live?", "Rome", aliases=("in Rome",)),)
    assert found.notes == (f"{path}:7: 1 question that the text does not answer: not asked",)
    assert read.line == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (squad({"question": "Where?", "answers": []}), "data[0].paragraphs[0].qas[0].answer: is missing"),
        (squad({"question": "Where?"}), "data[0].paragraphs[0].qas[0].answer: is missing"),
        (squad({"answers": [{"text": "Rome"}]}), "data[0].paragraphs[0].qas[0].question: is missing"),
        (squad("Where?"), "data[0].paragraphs[0].qas[0]: must be an object, is a string"),
        (squad(WHERE, qas={}), "data[0].paragraphs[0].qas: must be a list, is an object"),
        (squad(WHERE, qas=None), "data[0].paragraphs[0].qas: is missing"),
        (squad(WHERE, context=3), "data[0].paragraphs[0].context: must be a string, is a number"),
        ('{"data": ["a"]}', "data[0]: must be an object, is a string"),
        ('{"data": [{"title": "A"}]}', "data[0].paragraphs: must be a list, is null"),
        ('{"data": []}', ": has no passages"),
        ('{"paragraphs": []}', ": must be a list of passages, is an object"),
    ],
)
def test_what_is_wrong_with_squad_is_told_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "squad.json"
    path.write_text(text)
    first = read_task_file(path).problems[0]
    assert f"{first.field}: {first.message}" == expected
