"""Promises of gathering a run's tasks: the seed decides, held-out is never trained on, banks are divided once."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.config import RunConfig
from preceptor.errors import PreceptorError
from preceptor.task_sources import bank_sizes, gather_tasks, heldout_count
from preceptor.tasks import Bank


def entries(count: int, questions: int = 4, word: str = "text") -> list[dict[str, Any]]:
    return [
        {
            "title": f"{word} {n}",
            "context": f"{word} number {n}",
            "questions": [{"question": f"q{q}?", "answer": f"a{q}"} for q in range(questions)],
        }
        for n in range(count)
    ]


def write(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path


def config(path: Path, seed: int = 0, **tasks: Any) -> RunConfig:
    return RunConfig.model_validate({"seed": seed, "tasks": {"path": str(path), **tasks}})


def test_the_world_gives_what_the_config_asks_for() -> None:
    found = gather_tasks(RunConfig.model_validate({"seed": 5, "tasks": {"world": "almanac", "train": 6, "heldout": 4}}))
    assert (len(found.train), len(found.heldout)) == (6, 4)
    assert found.probes
    assert found.replay_documents
    assert all(task.questions_of(Bank.REWARD) for task in found.train)
    assert all(task.questions_of(Bank.SEALED) for task in found.heldout)
    assert not {task.text for task in found.train} & {task.text for task in found.heldout}


def test_the_seed_governs_the_worlds_passages() -> None:
    def texts(seed: int) -> list[str]:
        world = {"seed": seed, "tasks": {"world": "almanac", "train": 6, "heldout": 0}}
        return [task.text for task in gather_tasks(RunConfig.model_validate(world)).train]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


def test_own_files_are_split_into_train_and_heldout_without_overlap(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", entries(50))
    found = gather_tasks(config(path, train=20, heldout=10))
    assert (len(found.train), len(found.heldout)) == (20, 10)
    assert not {task.text for task in found.train} & {task.text for task in found.heldout}
    assert (found.probes, found.replay_documents, found.notes) == ((), (), ())


def test_the_split_depends_on_the_seed_and_not_on_the_order_in_the_file(tmp_path: Path) -> None:
    values = entries(30)
    first = gather_tasks(config(write(tmp_path / "a.json", values), seed=1))
    random.Random(0).shuffle(values)
    again = gather_tasks(config(write(tmp_path / "b.json", values), seed=1))
    assert (first.train, first.heldout) == (again.train, again.heldout)
    other = gather_tasks(config(tmp_path / "b.json", seed=2))
    assert other.heldout != first.heldout


@pytest.mark.parametrize(
    ("passages", "train", "heldout", "expected"),
    [(5, 48, 0, 0), (5, 5, 0, 0), (5, 48, 32, 2), (80, 48, 32, 32), (79, 48, 32, 32), (2, 48, 1, 1), (1, 48, 32, 0),
     (2, 1, 99, 1), (100, 48, 32, 32)],
)  # fmt: skip
def test_small_files_are_shared_out(passages: int, train: int, heldout: int, expected: int) -> None:
    assert heldout_count(passages, train, heldout) == expected


def test_five_passages_without_heldout_are_all_for_training(tmp_path: Path) -> None:
    found = gather_tasks(config(write(tmp_path / "t.json", entries(5)), heldout=0))
    assert (len(found.train), len(found.heldout)) == (5, 0)


def test_a_file_that_is_too_small_is_said_to_be(tmp_path: Path) -> None:
    found = gather_tasks(config(write(tmp_path / "t.json", entries(5))))
    assert (len(found.train), len(found.heldout)) == (3, 2)
    assert "has 5 passages: 3 to train on and 2 held out (asked for: 48 and 32)" in found.notes[0]


def test_questions_without_a_bank_are_divided_by_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", entries(6, questions=5))
    found = gather_tasks(config(path, heldout=2))
    for task in found.train:
        assert [len(task.questions_of(bank)) for bank in (Bank.REWARD, Bank.GATE, Bank.SEALED)] == [3, 1, 1]
    for task in found.heldout:
        assert len(task.questions_of(Bank.SEALED)) == 5
    assert gather_tasks(config(path, heldout=2)) == found
    assert gather_tasks(config(path, heldout=2, seed=9)).train != found.train
    assert found.banks == "divided once by seed 0"


def test_banks_depend_on_the_seed_and_the_passage_and_not_on_its_neighbours(tmp_path: Path) -> None:
    def banks(count: int, seed: int) -> list[Bank]:
        path = write(tmp_path / "t.json", entries(count, questions=12))
        (passage,) = [p for p in gather_tasks(config(path, seed, heldout=0)).train if p.title == "text 0"]
        return [question.bank for question in passage.questions]

    assert banks(3, seed=5) == banks(9, seed=5)
    assert banks(3, seed=5) != banks(3, seed=6)


@given(st.integers(0, 500))
def test_every_question_has_a_bank_and_reward_is_the_largest(questions: int) -> None:
    sizes = bank_sizes(questions)
    assert sum(sizes.values()) == questions
    assert sizes[Bank.REWARD] >= sizes[Bank.SEALED] >= sizes[Bank.GATE] >= 0
    assert sum(size > 0 for size in sizes.values()) == min(questions, 3)
    if questions >= 4:
        assert sizes[Bank.REWARD] >= questions / 2


def test_a_single_question_gives_the_reward_and_the_notes_say_so(tmp_path: Path) -> None:
    found = gather_tasks(config(write(tmp_path / "t.json", entries(3, questions=1)), heldout=0))
    assert all(task.questions_of(Bank.REWARD) for task in found.train)
    assert "training passages with fewer questions than the 3 banks: 3" in found.notes[0]
    assert f"{tmp_path}/t.json:1 has 1" in found.notes[0]


def test_named_banks_are_kept(tmp_path: Path) -> None:
    values = entries(4, questions=2)
    for entry in values:
        entry["questions"][0]["bank"] = "sealed"
    found = gather_tasks(config(write(tmp_path / "t.json", values), heldout=2))
    for task in (*found.train, *found.heldout):
        assert [question.bank for question in task.questions] == [Bank.SEALED, Bank.REWARD]
    assert found.banks == "named in the file"


def test_a_file_that_names_some_banks_is_said_to(tmp_path: Path) -> None:
    values = entries(4, questions=4)
    values[0]["questions"][0]["bank"] = "sealed"
    found = gather_tasks(config(write(tmp_path / "t.json", values), heldout=0))
    assert found.banks == "named in the file for 1 passages, divided once by seed 0 for 3"


def test_a_gold_answer_that_no_student_may_give_is_named_by_its_place(tmp_path: Path) -> None:
    values = entries(3)
    values[1]["questions"][2]["answer"] = "one two three four five"
    path = tmp_path / "t.json"
    path.write_text(json.dumps(values, indent=0))
    limited: dict[str, Any] = {"tasks": {"path": str(path), "heldout": 3}, "answers": {"max_new_tokens": 4}}
    with pytest.raises(PreceptorError, match="has 5 words, and an answer may have 4 tokens") as caught:
        gather_tasks(RunConfig.model_validate(limited))
    line = path.read_text().splitlines().index('"answer": "one two three four five"') + 1
    assert caught.value.metadata == {"file": str(path), "line": str(line - 2), "field": "[1].questions[2]"}
    limited["answers"]["max_new_tokens"] = 5
    gather_tasks(RunConfig.model_validate(limited))


def test_without_labels_questions_need_no_answers_but_the_final_measurement_does(tmp_path: Path) -> None:
    values = entries(4)
    for entry in values:
        for question in entry["questions"]:
            del question["answer"]
    path = write(tmp_path / "t.json", values)
    with pytest.raises(PreceptorError, match="is missing"):
        gather_tasks(config(path, heldout=0))
    label_free = {"reward": {"gain": 0.0, "certainty_gain": 1.0}}
    found = gather_tasks(RunConfig.model_validate({"tasks": {"path": str(path), "heldout": 0}, **label_free}))
    assert {question.answer for task in found.train for question in task.questions} == {""}
    with pytest.raises(PreceptorError, match="is asked in the final measurement and has no answer"):
        gather_tasks(RunConfig.model_validate({"tasks": {"path": str(path), "heldout": 2}, **label_free}))


def test_where_questions_are_written_for_it_a_text_needs_none(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("a", "b"):
        (tmp_path / "texts" / f"{name}.md").write_text(f"All about {name}.")
    tasks = {"path": str(tmp_path / "texts"), "heldout": 0}
    with pytest.raises(PreceptorError, match=r"questions.jsonl: is missing"):
        gather_tasks(config(tmp_path / "texts", heldout=0))
    found = gather_tasks(RunConfig.model_validate({"tasks": {**tasks, "questions": "written"}}))
    assert [task.questions for task in found.train] == [(), ()]
    assert found.notes == ()


def test_a_heldout_file_of_its_own_is_used_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", entries(5))
    other = write(tmp_path / "h.json", entries(4, word="other"))
    found = gather_tasks(config(path, heldout_path=str(other)))
    assert (len(found.train), len(found.heldout)) == (5, 4)
    assert all(task.text.startswith("other") for task in found.heldout)


def test_a_heldout_passage_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", entries(5))
    with pytest.raises(PreceptorError, match="is also a training passage") as caught:
        gather_tasks(config(path, heldout_path=str(write(tmp_path / "h.json", entries(1)))))
    assert caught.value.metadata["file"] == str(tmp_path / "h.json")


@pytest.mark.parametrize(
    ("bank", "said"),
    [
        ("gate", "without a question of bank reward"),
        ("reward", "is a held-out passage without a question of bank sealed"),
    ],
)
def test_passages_that_lack_the_bank_they_need_are_named(tmp_path: Path, bank: str, said: str) -> None:
    values = entries(4)
    for entry in values:
        for question in entry["questions"]:
            question["bank"] = bank
    path = write(tmp_path / "t.json", values)
    with pytest.raises(PreceptorError, match=said) as caught:
        gather_tasks(config(path, heldout=2))
    assert caught.value.reason == "BAD_TASK_FILE"


def test_problems_of_both_files_are_told_together(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", [{"context": "", "questions": []}])
    other = write(tmp_path / "h.json", [3])
    with pytest.raises(PreceptorError) as caught:
        gather_tasks(config(path, heldout_path=str(other)))
    for name in (path, other):
        assert str(name) in caught.value.message


def test_probes_and_replay_of_ones_own_are_used(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", entries(5))
    (tmp_path / "p.jsonl").write_text('{"question": "Old?", "answer": "yes"}')
    (tmp_path / "r.txt").write_text("An old text.\n")
    extra = {"probes_path": str(tmp_path / "p.jsonl"), "replay_path": str(tmp_path / "r.txt")}
    found = gather_tasks(config(path, **extra))
    assert (found.probes[0].text, found.replay_documents) == ("Old?", ("An old text.",))


def test_a_canary_that_leaves_nothing_to_train_on_is_refused() -> None:
    config = RunConfig.model_validate({"tasks": {"world": "almanac", "train": 4, "heldout": 1, "canary": 4}})
    with pytest.raises(PreceptorError, match="none is left to train on") as refused:
        gather_tasks(config)
    assert refused.value.metadata["field"] == "tasks.canary"
