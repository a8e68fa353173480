"""``preceptor adapt`` against scripted services over real gRPC."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preceptor.adapt import weights
from preceptor.artifacts import FolderStore
from preceptor.cli import main
from preceptor.testing.scripted_evaluator import ScriptedEvaluator
from preceptor.testing.scripted_house import ScriptedHouse
from preceptor.testing.scripted_teacher import ScriptedTeacher
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import types_pb2 as types

TOWNS = ("Ulm", "Bonn", "Trier", "Worms")
ASKED = ("What is {} known for?", "Who founded {}?", "Which river flows past {}?", "How many towers has {}?")


def passage(town: str) -> dict[str, Any]:
    questions = [
        {"question": f"{question.format(town)} ({bank})", "answer": f"{town} {number}", "bank": bank}
        for bank in ("reward", "sealed")
        for number, question in enumerate(ASKED)
    ]
    return {"title": town, "context": f"A text about {town}.", "questions": questions}


class KeepingEvaluator(ScriptedEvaluator):
    """Whoever asks to keep gets an adapter: a folder with two files."""

    def __init__(self, store: FolderStore, **how: Any) -> None:
        super().__init__(**how)
        self._store = store
        self.kept: list[pb.CreateEvaluationsRequest] = []

    def _queue(self, name: str, request: pb.CreateEvaluationsRequest, task: types.Task, edit: types.SelfEdit) -> None:
        super()._queue(name, request, task, edit)
        found = self._results[name]
        if not request.protocol.training.keep or found.state != pb.EVALUATION_STATE_SUCCEEDED:
            return

        def write(folder: Path) -> None:
            (folder / "adapter_config.json").write_text("{}")
            (folder / "adapter_model.safetensors").write_text(name)
            (folder / weights.EDIT_FILE).write_text("{}")

        self.kept.append(request)
        found.trials[0].adapter.CopyFrom(self._store.write_folder(f"adapter-{name}", write))
        found.trials[0].probes_correct.extend([True] * len(request.protocol.probes))
        found.baseline.probes_correct.extend([True] * len(request.protocol.probes))


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedHouse]:
    for name in list(os.environ):
        if name.startswith("PRECEPTOR_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.json").write_text(json.dumps([passage(town) for town in TOWNS]))
    (tmp_path / "old.txt").write_text("old one\nold two\n")
    (tmp_path / "probes.jsonl").write_text('{"question": "What was known before?", "answer": "this"}\n')
    monkeypatch.setenv("PRECEPTOR_HOME", str(tmp_path / "home"))
    evaluator = KeepingEvaluator(FolderStore(tmp_path / "home" / "artifacts" / "edits"))  # type: ignore[abstract]
    with ScriptedHouse(tmp_path / "house", evaluator=evaluator) as made:
        for name in ("teacher", "student", "evaluator"):
            monkeypatch.setenv(f"PRECEPTOR_{name.upper()}_ADDRESS", made.address(name))
        yield made


def adapt(*arguments: str) -> int:
    material = ("--replay", "old.txt", "--probes", "probes.jsonl", "--set", "teacher.prompt_format=self_qa")
    return main(["adapt", "t.json", "--connect", *material, *arguments])


def record(folder: str = "out") -> Any:
    return json.loads(Path(folder, "lineage.json").read_text())


def test_what_helps_is_learnt_in_one_update_and_recorded(
    house: ScriptedHouse, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt("--out", "out", "--joint", "epochs=5", "--self-edits", "6") == 0
    assert isinstance(house.evaluator, KeepingEvaluator)
    (joint,) = house.evaluator.kept
    assert (joint.protocol.training.epochs, joint.protocol.training.replay_share) == (5, 0.5)
    assert list(joint.protocol.replay_documents) == ["old one", "old two"]
    assert joint.protocol.bank == types.QUESTION_BANK_SEALED
    assert len(joint.task.passage.questions) == len(TOWNS) * len(ASKED)  # of those that learn nothing, too
    assert joint.student.name == "first"
    looks = [request for request in house.evaluator.requests if request.protocol.answers.logprobs_only]
    assert len(looks) == 1  # all passages' races together
    assert not any(request.task.reference_edits for request in house.evaluator.requests)

    made = record()
    kept = [one for one in made["passages"] if one["kept"]]
    assert kept
    studied = [document for one in kept for document in one["self_edit"]["documents"]]
    assert list(joint.self_edits[0].documents) == studied
    assert made["joint"]["training"]["epochs"] == 5
    assert made["student"]["commit"] == "commit-of-first"
    assert made["policy"]["id"] == "base-scripted"
    assert [artifact["sha256"] for artifact in made["result"]["adapters"]] == [made["adapter"]["sha256"]]
    assert made["passages"][0]["place"] == "t.json:1"
    assert all(len(one["candidates"]) == 6 for one in made["passages"])
    assert made["results"][0]["name"] == "sealed questions"
    assert {path.name for path in Path("out").iterdir()} == {"adapter", "lineage.json"}
    assert (Path("out") / "adapter" / "adapter_config.json").read_text() == "{}"
    out = capsys.readouterr().out
    for part in ("sealed questions", "what it knew", "95% interval", "one update:", "Worms", "adapter: out/adapter"):
        assert part in out


def test_asked_again_nothing_is_measured_twice_and_another_adaptation_is_not_written_over(
    house: ScriptedHouse, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt("--out", "out", "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert isinstance(house.evaluator, KeepingEvaluator)
    assert adapt("--out", "out", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert len(house.evaluator.kept) == 1
    assert (again["id"], again["adapter"], again["results"]) == (first["id"], first["adapter"], first["results"])
    assert adapt("--out", "out", "--joint", "epochs=2") == 2
    assert "another adaptation lies there" in capsys.readouterr().err
    assert record()["id"] == first["id"]


def test_merged_weights_come_from_a_child_that_is_given_every_edit(
    house: ScriptedHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged: list[tuple[str, list[Path]]] = []

    def merge(student: types.PinnedStudent, adapters: list[Path], target: Path) -> str:
        merged.append((student.commit, adapters))
        return "ab" * 32

    monkeypatch.setattr(weights, "merge", merge)
    earlier = house.evaluator._store.write_folder("earlier", lambda folder: (folder / "x").write_text("x"))  # type: ignore[attr-defined]
    house.students._students["first"].pinned.adapters.append(earlier)
    assert adapt("--out", "out", "--merged") == 0
    ((commit, adapters),) = merged
    assert commit == "commit-of-first"
    first, _ = adapters
    assert first.name == "earlier"
    made = record()
    assert made["merged_sha256"] == "ab" * 32
    assert made["result"]["adapters"][0]["sha256"] == earlier.sha256


def test_where_nothing_helps_the_command_says_so_and_what_it_measured_is_there(
    house: ScriptedHouse, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt("--out", "out", "--set", "update.min_reward=5") == 2
    err = capsys.readouterr().err
    assert "of 4 passages none has a self-edit that clearly helps" in err
    assert "(NOTHING_HELPED)" in err
    made = record()
    assert (made["outcome"], made["adapter"]) == ("nothing_helped", None)
    assert all(one["refused"] for one in made["passages"])
    assert any(candidate["evaluation"] for one in made["passages"] for candidate in one["candidates"])
    assert adapt("--out", "out") == 0  # such a record gives way
    assert record()["outcome"] == "adapted"


def test_a_passage_whose_evaluations_fail_is_left_out_and_the_rest_goes_on(
    house: ScriptedHouse, capsys: pytest.CaptureFixture[str]
) -> None:
    house.evaluator.fails = lambda task, _edit: task.passage.title == "Bonn"
    assert adapt("--out", "out") == 0
    made = record()
    bonn = next(one for one in made["passages"] if one["title"] == "Bonn")
    assert bonn["refused"] == "no evaluation succeeded (TRIAL_LOST)"
    assert bonn["after"] is not None  # it is asked all the same
    assert any("evaluations failed (TRIAL_LOST)" in note for note in made["notes"])


def test_a_joint_update_that_fails_is_an_error_and_leaves_no_folder(
    house: ScriptedHouse, capsys: pytest.CaptureFixture[str]
) -> None:
    house.evaluator.fails = lambda task, _edit: "passages" in task.passage.title
    assert adapt("--out", "out") == 2
    assert "the joint update failed: the worker vanished" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--student", "nobody"), "STUDENT_NOT_FOUND"),
        (("--policy", "policy-none"), "POLICY_NOT_FOUND"),
        (("--joint", "speed=3"), "unknown key training.speed"),
        (("--set", "rounds.self_edits=0"), "rounds.self_edits"),
        (("--replay", "nowhere.txt"), "FILE_NOT_FOUND"),
    ],
)
def test_bad_input_is_named(
    house: ScriptedHouse, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert adapt("--out", "out", *arguments) == 2
    assert words in capsys.readouterr().err
    assert not Path("out").exists()


def test_completions_that_are_none_are_counted(house: ScriptedHouse, capsys: pytest.CaptureFixture[str]) -> None:
    house.teacher = ScriptedTeacher(malformed_share=0.5)  # type: ignore[abstract]
    for _ in range(2):
        house.stop("teacher")
        house.start("teacher")
    assert adapt("--out", "out") == 0
    made = record()
    malformed = [one for p in made["passages"] for one in p["candidates"] if one["status"] == "malformed"]
    assert any(note.startswith(f"{len(malformed)} of 32 completions") for note in made["notes"])


def test_a_dry_run_starts_nothing(house: ScriptedHouse, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapt("--dry-run") == 0
    out = capsys.readouterr().out
    assert "# 4 passages, 8 self-edits each" in out
    assert "16 sealed questions, 1 probes" in out
    assert "replay_share = 0.5" in out
    assert adapt("--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["joint_training"]["loss_mask"] == "after_marker"
    assert not house.evaluator.requests
    assert main(["adapt"]) == 2
    assert main(["adapt", "t.json", "--world", "almanac"]) == 2
