"""What ``preceptor evaluate`` reads of tasks, and what it shows while it waits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from preceptor.cli.evaluate_view import BarProgress, PlainProgress
from preceptor.cli.measuring import Progress
from preceptor.cli.subject import Subject, read_config, read_subject
from preceptor.errors import PreceptorError
from preceptor.tasks import Bank


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def passage(title: str, text: str, answer: str = "tea") -> dict[str, object]:
    questions = [{"question": f"What is {word} of {text}?", "answer": answer} for word in ("A", "B", "C", "D")]
    return {"title": title, "context": f"About {text}.", "questions": questions}


def subject(
    wanted: str = "", bank: Bank = Bank.REWARD, overrides: tuple[str, ...] = (), task: str = "t.json"
) -> Subject:
    return read_subject(read_config(None, overrides, task, None), wanted, bank)


def write(*passages: dict[str, object]) -> None:
    Path("t.json").write_text(json.dumps(passages))


@pytest.mark.parametrize(
    ("wanted", "text"), [("1", "one"), ("Two", "two"), ("two", "two"), ("3", "three"), ("5", "three"), ("4", "four")]
)
def test_a_passage_is_chosen_by_title_or_number(wanted: str, text: str) -> None:
    # A title that looks like a number is a title first.
    titles = {"one": "One", "two": "Two", "three": "5", "four": "5x", "five": "Five"}
    write(*(passage(title, key) for key, title in titles.items()))
    assert subject(wanted).passage.text == f"About {text}."


def test_a_file_of_one_needs_no_choice_and_one_of_many_lists_what_there_is() -> None:
    write(passage("Only", "it"))
    assert subject().passage.title == "Only"
    write(*(passage(f"Title {number}", str(number)) for number in range(1, 13)))
    for wanted in ("", "0", "13", "nobody", "9" * 400, "\u0663"):
        with pytest.raises(PreceptorError) as caught:
            subject(wanted)
        assert caught.value.reason == "INVALID_REQUEST"
        for part in ("t.json: has", "\n  1 Title 1", "\n  ... 12 (`preceptor tasks check t.json` lists all)"):
            assert part in str(caught.value)


def test_equal_titles_are_told_apart_by_numbers() -> None:
    write(passage("Same", "one"), passage("Same", "two"), passage("Other", "three"))
    with pytest.raises(PreceptorError, match=r"has 2 passages with the title 'Same'; choose one by its number: 1, 2"):
        subject("Same")


def test_questions_without_a_bank_are_divided_as_in_a_run_and_it_is_said() -> None:
    write(passage("Only", "it"))
    found = subject(overrides=("seed=3",))
    assert [len(found.passage.questions_of(bank)) for bank in Bank] == [2, 1, 1]
    assert found.notes == (
        "its questions name no bank; they are divided by seed 3, as in a run: 2 reward, 1 gate, 1 sealed",
    )
    divisions = {subject(overrides=(f"seed={seed}",)).passage.questions_of(Bank.SEALED) for seed in range(12)}
    assert len(divisions) > 1


def test_a_gold_answer_that_no_student_can_give_is_refused_in_the_bank_that_is_asked() -> None:
    write(passage("Only", "it", answer="one two three"))
    with pytest.raises(PreceptorError) as caught:
        subject(overrides=("answers.max_new_tokens=2",))
    assert caught.value.reason == "BAD_TASK_FILE"
    assert "the gold answer has 3 words, and an answer may have 2 tokens" in str(caught.value)


def test_probes_and_replay_come_from_the_configs_files() -> None:
    write(passage("Only", "it"))
    Path("p.jsonl").write_text('{"question": "Old?", "answer": "yes"}\n')
    Path("r.txt").write_text("An old text.\n")
    found = subject(overrides=("tasks.probes_path=p.jsonl", "tasks.replay_path=r.txt"))
    assert [probe.text for probe in found.probes] == ["Old?"]
    assert found.replay_documents == ("An old text.",)


def test_a_path_with_any_characters_is_read_as_it_is() -> None:
    write(passage("Only", "it"))
    odd = 'a "quoted" \\ path = 3.json'
    Path("t.json").rename(odd)
    assert subject(task=odd).passage.title == "Only"


def test_the_worlds_passages_are_the_runs() -> None:
    from worlds.almanac.passages import passages

    config = read_config(None, ["seed=2"], None, "almanac:3")
    assert read_subject(config, "3", Bank.REWARD).passage == passages(2, "train", 3)[2]
    assert read_subject(config, "", Bank.SEALED).passage == passages(2, "train", 1)[0]


def test_progress_in_a_log_is_a_line_for_each_phase_and_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainProgress()
    for phase, done, total, workers in (
        ("measuring", 0, 3, None),
        ("measuring", 1, 3, 1),
        ("measuring", 3, 3, 1),
        ("measuring", 3, 3, 2),
        ("controls", 3, 4, 2),
    ):
        view.show(Progress(phase, done, total, workers))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "[0s] measuring: 0 of 3 evaluations",
        "[0s] measuring: 3 of 3 evaluations; 1 worker",
        "[0s] controls: 3 of 4 evaluations; 2 workers",
    ]


def test_progress_on_a_terminal_is_a_bar() -> None:
    console, view = Console(width=100, record=True), BarProgress()
    console.print(view)
    view.show(Progress("measuring", 1, 4, 0))
    console.print(view)
    starting, measuring = console.export_text().splitlines()
    assert starting == "starting (0s)"
    assert measuring.startswith("██████░░")
    assert measuring.endswith(" 25%   0s gone   measuring: 1 of 4 evaluations; 0 workers")
