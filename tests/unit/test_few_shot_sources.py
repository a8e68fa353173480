"""Few-shot tasks of a run: which files, whose solutions, what is held out, and what is left out and said."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from preceptor.cli.run_request import create_request, dry_run_json, dry_run_text, with_place
from preceptor.cli.tasks import tasks as command
from preceptor.config import RunConfig
from preceptor.convert import task_from_proto, task_to_proto
from preceptor.errors import PreceptorError
from preceptor.few_shot.sources import holds_few_shot
from preceptor.task_sources import RunTasks, gather_tasks, passages_of
from preceptor.tasks import FewShotTask, title_of

DATA = Path(os.environ.get("PRECEPTOR_TEST_DATA", ""))


def challenge(number: int, solved: bool = False) -> dict[str, Any]:
    made: dict[str, Any] = {
        "train": [
            {"input": [[number // 10, number % 10]], "output": [[number % 10, number // 10]]},
            {"input": [[0]], "output": [[1]]},
        ],
        "test": [{"input": [[5, 6]]}],
    }
    if solved:
        made["test"][0]["output"] = [[6, 5]]
    return made


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def kaggle(folder: Path, count: int, first: int = 0, name: str = "own") -> Path:
    """Two files beside each other, as Kaggle names them."""
    numbers = range(first, first + count)
    write(folder / f"{name}_solutions.json", {f"t{number:02}": [[[6, 5]]] for number in numbers})
    return write(folder / f"{name}_challenges.json", {f"t{number:02}": challenge(number) for number in numbers})


def config(path: Path | str | None, seed: int = 0, **more: Any) -> RunConfig:
    sections = {name: more.pop(name) for name in ("answers", "reward") if name in more}
    return RunConfig.model_validate({"seed": seed, "tasks": {"path": str(path), **more}, **sections})


def names(found: RunTasks) -> tuple[list[str], list[str]]:
    return [title_of(task) for task in found.train], [title_of(task) for task in found.heldout]


def test_kaggles_files_are_divided_by_the_seed_and_solutions_beside_them_are_found(tmp_path: Path) -> None:
    path = kaggle(tmp_path, 12)
    found = gather_tasks(config(path, train=8, heldout=4))
    train, heldout = names(found)
    assert (len(train), len(heldout), set(train) & set(heldout)) == (8, 4, set())
    assert all(isinstance(task, FewShotTask) and task.queries[0].output == ((6, 5),) for task in found.train)
    assert (found.probes, found.replay_documents, found.notes) == ((), (), ())
    assert names(gather_tasks(config(path, train=8, heldout=4))) == (train, heldout)
    assert names(gather_tasks(config(path, seed=1, train=8, heldout=4))) != (train, heldout)


def test_solutions_may_lie_anywhere(tmp_path: Path) -> None:
    path = write(tmp_path / "c.json", {"a": challenge(1), "b": challenge(2)})
    solutions = write(tmp_path / "s.json", {"a": [[[6, 5]]], "b": [[[6, 5]]]})
    found = gather_tasks(config(path, solutions_path=str(solutions), heldout=0))
    assert sorted(names(found)[0]) == ["a", "b"]
    with pytest.raises(PreceptorError, match="no solution gives it"):
        gather_tasks(config(path))


def test_a_folder_of_tasks_is_read(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"x{number}.json", challenge(number, solved=True))
    train, heldout = names(gather_tasks(config(tmp_path, heldout=1)))
    assert sorted(train + heldout) == ["x0", "x1", "x2"]
    assert len(heldout) == 1


def test_too_few_for_both_are_divided_in_proportion_and_that_is_said(tmp_path: Path) -> None:
    found = gather_tasks(config(kaggle(tmp_path, 5), train=48, heldout=32))
    assert [len(part) for part in names(found)] == [3, 2]
    assert "5 usable tasks: 3 to train on and 2 held out" in found.notes[0]


def test_held_out_tasks_come_from_a_file_of_their_own(tmp_path: Path) -> None:
    path, other = kaggle(tmp_path, 6), kaggle(tmp_path, 4, first=50, name="other")
    train, heldout = names(gather_tasks(config(path, heldout_path=str(other), train=6, heldout=3)))
    assert (len(train), len(heldout)) == (6, 3)
    assert all(name >= "t50" for name in heldout)
    moved = (tmp_path / "other_solutions.json").rename(tmp_path / "elsewhere.json")
    again = names(gather_tasks(config(path, heldout_path=str(other), heldout_solutions_path=str(moved), heldout=3)))
    assert again[1] == heldout


def test_a_held_out_task_that_is_trained_on_is_a_problem(tmp_path: Path) -> None:
    path = kaggle(tmp_path, 6)
    other = write(tmp_path / "h.json", {"renamed": challenge(3, solved=True), "new": challenge(77, solved=True)})
    with pytest.raises(PreceptorError, match="is also a training task") as raised:
        gather_tasks(config(path, heldout_path=str(other)))
    assert raised.value.metadata["file"] == str(other)
    assert raised.value.metadata["field"] == "renamed"


def test_what_is_no_task_is_left_out_and_counted_and_the_rest_goes_on(tmp_path: Path) -> None:
    values = {f"t{number}": challenge(number, solved=True) for number in range(4)}
    values["ragged"] = {**challenge(9, solved=True), "train": [{"input": [[1], [2, 3]], "output": [[1]]}]}
    values["blind"] = challenge(8)
    values["again"] = challenge(2, solved=True)
    found = gather_tasks(config(write(tmp_path / "c.json", values), heldout=0))
    assert sorted(names(found)[0]) == ["t0", "t1", "t2", "t3"]
    (note,) = found.notes
    assert "3 of 7 tasks left out" in note
    assert "ragged.train[0].input" in note
    assert "blind.test[0].output" in note
    assert "has the same demonstrations as t2" in note


def test_a_grid_that_no_answer_can_hold_is_named_and_what_to_raise(tmp_path: Path) -> None:
    large = challenge(1, solved=True)
    large["test"][0]["output"] = [[1] * 6] * 6
    path = write(tmp_path / "c.json", {"a": large})
    with pytest.raises(PreceptorError, match=r"6 x 6, 41 tokens.*answers.max_new_tokens") as raised:
        gather_tasks(config(path, answers={"max_new_tokens": 40}))
    assert raised.value.metadata["field"] == "a.test[0].output"
    assert gather_tasks(config(path, answers={"max_new_tokens": 41})).train


@pytest.mark.parametrize(
    ("more", "field"), [({"questions": "written"}, "tasks.questions"), ({"canary": 4}, "tasks.canary")]
)
def test_what_is_for_passages_alone_is_refused(tmp_path: Path, more: dict[str, Any], field: str) -> None:
    with pytest.raises(PreceptorError, match="few-shot tasks") as raised:
        gather_tasks(config(kaggle(tmp_path, 6), **more))
    assert (raised.value.reason, raised.value.metadata["field"]) == ("BAD_CONFIG", field)
    with pytest.raises(PreceptorError, match="few-shot tasks"):
        gather_tasks(RunConfig.model_validate({"tasks": {"world": "mosaic", **more}}))


def test_passages_are_not_held_out_of_few_shot_tasks(tmp_path: Path) -> None:
    passages = write(tmp_path / "p.json", [{"context": "x", "questions": [{"question": "q?", "answer": "a"}]}])
    with pytest.raises(PreceptorError, match="holds no few-shot tasks"):
        gather_tasks(config(kaggle(tmp_path, 6), heldout_path=str(passages)))
    with pytest.raises(PreceptorError, match="holds few-shot tasks, and passages are needed"):
        gather_tasks(config(passages, heldout_path=str(kaggle(tmp_path, 2))))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": challenge(1)}, True),
        (challenge(1), True),
        ({"data": []}, False),
        ([{"context": "x"}], False),
        ("{", False),
    ],
)
def test_few_shot_files_are_known_by_what_is_in_them(tmp_path: Path, value: Any, expected: bool) -> None:
    path = tmp_path / "x.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    assert holds_few_shot(path) is expected
    (tmp_path / "x.json").rename(tmp_path / "x.jsonl")
    assert not holds_few_shot(tmp_path / "x.jsonl")
    with pytest.raises(PreceptorError) as raised:
        holds_few_shot(path)
    assert raised.value.reason == "FILE_NOT_FOUND"


def test_the_world_mosaic_gives_few_shot_tasks() -> None:
    asked = RunConfig.model_validate({"seed": 3, "tasks": {"world": "mosaic", "train": 6, "heldout": 4}})
    found = gather_tasks(asked)
    assert [len(part) for part in names(found)] == [6, 4]
    assert all(isinstance(task, FewShotTask) for task in (*found.train, *found.heldout))
    assert not set(found.train[0].reference_edits) - {"oracle", "shuffled_facts"}
    with pytest.raises(PreceptorError, match="for passages"):
        passages_of(found.train)


def test_the_world_can_be_measured_on_files(tmp_path: Path) -> None:
    own = {"world": "mosaic", "train": 2, "heldout": 3, "heldout_path": str(kaggle(tmp_path, 5))}
    found = gather_tasks(RunConfig.model_validate({"tasks": own}))
    assert [len(part) for part in names(found)] == [2, 3]
    assert all(name.startswith("t") for name in names(found)[1])


def test_a_run_is_asked_for_with_its_few_shot_tasks(tmp_path: Path) -> None:
    asked = config(kaggle(tmp_path, 6), train=4, heldout=2)
    found = gather_tasks(asked)
    request = create_request(asked, found)
    assert tuple(map(task_from_proto, request.tasks)) == found.train
    assert tuple(map(task_from_proto, request.heldout_tasks)) == found.heldout
    shown = dry_run_json(asked, found)["tasks"]
    assert (shown["train"], shown["heldout"]) == names(found)
    assert "# tasks: 4 to train on, 2 held out" in dry_run_text(asked, found)


def test_what_a_service_says_of_a_few_shot_task_gets_its_place(tmp_path: Path) -> None:
    path = kaggle(tmp_path, 3)
    found = gather_tasks(config(path, heldout=0))
    said = PreceptorError("INVALID_REQUEST", f"the task {task_to_proto(found.train[1]).id} is too long")
    assert with_place(said, found).metadata == {"file": str(path), "line": "1"}


def check(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(command, ["check", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_check_lists_few_shot_tasks(tmp_path: Path) -> None:
    code, out, err = check(str(kaggle(tmp_path, 3)))
    assert (code, err) == (0, "")
    assert "3 few-shot tasks, 3 queries, 0 problems" in out
    assert "t02" in out
    assert "answers.max_new_tokens must be 2 or more" in out


def test_the_check_ends_with_2_where_a_task_would_be_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "c.json", {"a": challenge(1, solved=True), "b": challenge(2)})
    code, out, err = check(str(path))
    assert code == 2
    assert "1 few-shot tasks, 1 queries, 1 problems" in out
    assert "b.test[0].output" in err
    solutions = write(tmp_path / "s.json", {"b": [[[6, 5]]]})
    code, out, err = check(str(path), "--solutions", str(solutions), "--json")
    assert code == 0
    assert [task["name"] for task in json.loads(out)["few_shot"]] == ["a", "b"]


def test_the_check_of_the_same_fault_says_it_once(tmp_path: Path) -> None:
    code, _, err = check(str(write(tmp_path / "c.json", {"b": challenge(2)})))
    assert code == 2
    assert err.count("b.test[0].output") == 1


def test_tasks_of_a_world_are_written_as_kaggle_has_them_and_read_again(tmp_path: Path) -> None:
    toml = tmp_path / "c.toml"
    toml.write_text('seed = 3\n[tasks]\nworld = "mosaic"\ntrain = 4\nheldout = 2\n')
    result = CliRunner().invoke(command, ["arc", str(toml), "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    assert (json.loads(result.stdout)["train"], json.loads(result.stdout)["heldout"]) == (4, 2)
    own = tmp_path / "out/train_challenges.json"
    again = gather_tasks(config(own, heldout_path=str(tmp_path / "out/heldout_challenges.json")))
    made = gather_tasks(RunConfig.model_validate({"seed": 3, "tasks": {"world": "mosaic", "train": 4, "heldout": 2}}))

    def bare(tasks: Any) -> set[Any]:
        return {(task.name, task.demonstrations, task.queries) for task in tasks}

    assert bare(again.train) == bare(made.train)
    assert bare(again.heldout) == bare(made.heldout)


def test_passages_are_not_written_as_few_shot_tasks(tmp_path: Path) -> None:
    toml = tmp_path / "c.toml"
    toml.write_text('[tasks]\nworld = "almanac"\ntrain = 1\nheldout = 0\n')
    result = CliRunner().invoke(command, ["arc", str(toml), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, PreceptorError)
    assert "this is for few-shot tasks" in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not (DATA / "arc/challenges.json").is_file(), reason="PRECEPTOR_TEST_DATA has no arc")
def test_the_real_tasks_are_a_run() -> None:
    asked = config(DATA / "arc/challenges.json", train=100, heldout=20, answers={"max_new_tokens": 929})
    found = gather_tasks(asked)
    assert [len(part) for part in names(found)] == [100, 20]
    assert found.notes == ()
    assert create_request(asked, found).ByteSize() < 4 * 2**20
