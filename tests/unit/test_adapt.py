"""Adapting a student: which self-edits are kept, what the joint update trains, what the record and the table say."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from preceptor.adapt import lineage, weights
from preceptor.adapt.adaptation import joint_edit
from preceptor.adapt.joint import joint_config, joint_protocol
from preceptor.adapt.measure import Groups, PassageEdits, choose, passage_edits, race_settings
from preceptor.adapt.subject import Subject, read_config, read_subject
from preceptor.adapt.table import before_and_after, kept_share, passage_shares
from preceptor.cli.adapt import check_folder
from preceptor.config import RunConfig
from preceptor.convert import bank_to_proto, task_to_proto
from preceptor.errors import PreceptorError
from preceptor.protocols import evaluation_protocol
from preceptor.tasks import Bank, Passage, Question
from preceptor.union import union_task
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import types_pb2 as types
from student.kept import PROVENANCE_FILE

SEALED = bank_to_proto(Bank.SEALED)


def config(**changes: object) -> RunConfig:
    return RunConfig.model_validate({"tasks": {"world": "almanac"}, **changes})


def task(name: str, sealed: int = 2) -> types.Task:
    questions = [Question(f"Does {name} do what?", "yes")]
    questions += [Question(f"What is {number} of {name}?", "this", Bank.SEALED) for number in range(sealed)]
    return task_to_proto(Passage(name, f"All about {name}.", tuple(questions)))


def written(name: str, *documents: str) -> PassageEdits:
    """What a teacher wrote about one passage; an empty document is malformed."""
    group = teacher.GenerateSelfEditsResponse(task_id=name)
    for index, text in enumerate(documents):
        status = teacher.SELF_EDIT_STATUS_VALID if text else teacher.SELF_EDIT_STATUS_MALFORMED
        edit = types.SelfEdit(documents=[text]) if text else None
        group.self_edits.add(index=index, status=status, self_edit=edit, malformed_reason="" if text else "empty")
    return passage_edits(task(name), group)


class Worth:
    """Evaluations whose reward is the number in the document; "fails" fails, and "N shaky" is N on the seeds of the
    race and nothing on others."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []  # phase, groups, self-edits

    def __call__(
        self, phase: str, groups: Groups, protocol: evaluator.EvaluationProtocol
    ) -> list[list[evaluator.Evaluation]]:
        self.asked.append((phase, len(groups), sum(len(edits) for _, edits in groups)))
        return [[self._evaluation(edit.documents[0], phase, protocol) for edit in edits] for _, edits in groups]

    def _evaluation(self, text: str, phase: str, protocol: evaluator.EvaluationProtocol) -> evaluator.Evaluation:
        made = evaluator.Evaluation(id=f"{phase}:{text}", state=evaluator.EVALUATION_STATE_SUCCEEDED)
        if text == "fails":
            made.state = evaluator.EVALUATION_STATE_FAILED
            made.failure.reason = "TRIAL_DIVERGED"
            return made
        number, _, shaky = text.partition(" ")
        made.reward.value = 0.0 if shaky and phase == "best again" else float(number)
        made.reward.stderr = 0.1
        for seed in protocol.seeds:
            made.trials.add(seed=seed, value=made.reward.value, values=[made.reward.value] * 4, trained_tokens=10)
        return made


def chosen(*passages: PassageEdits, min_z: float = 1.0, settings: RunConfig | None = None) -> Worth:
    settings, worth = settings or config(), Worth()
    protocol = evaluation_protocol(
        settings, bank=types.QUESTION_BANK_REWARD, probes=[], replay_documents=[], seeds=[1, 2, 3]
    )
    choose(passages, settings, protocol, worth, min_z=min_z)
    return worth


def test_the_best_of_each_passage_is_kept_if_it_clearly_helps() -> None:
    good, poor, unclear = written("a", "0.2", "0.9", ""), written("b", "-0.1", "0"), written("c", "0.05", "0.09")
    chosen(good, poor, unclear)
    assert good.kept is not None
    assert good.kept.documents[0] == "0.9"
    assert (poor.kept, unclear.kept) == (None, None)
    assert "does not help (+0.000" in poor.refused
    assert "does not clearly help (+0.090 ± 0.100" in unclear.refused


def test_luck_is_not_kept_the_best_is_measured_again_on_seeds_that_did_not_choose_it() -> None:
    lucky = written("a", "0.9 shaky", "0.5")
    chosen(lucky)
    assert lucky.best is not None
    assert lucky.best.written.index == 0
    assert "does not help (+0.000 on fresh seeds)" in lucky.refused


def test_all_races_take_their_steps_together() -> None:
    worth = chosen(*(written(name, "0.1", "0.2", "0.3", "0.4", "0.5", "0.6") for name in "abc"))
    assert worth.asked == [("first look", 3, 18), ("race, seed 1", 3, 9), ("best again", 3, 3)]


def test_what_fails_or_is_malformed_is_a_reason_and_no_end_of_the_others() -> None:
    nothing, broken, half, good = (
        written("a", "", ""),
        written("b", "fails"),
        written("c", "fails", "0.7"),
        written("d", "0.8"),
    )
    chosen(nothing, broken, half, good)
    assert nothing.refused == "none of 2 completions is a self-edit"
    assert broken.refused == "no evaluation succeeded (TRIAL_DIVERGED)"
    assert half.kept is not None
    assert good.kept is not None


def test_the_same_self_edit_twice_runs_once() -> None:
    twice = written("a", "0.5", "0.5", "0.4")
    assert len(twice.runners) == 2
    chosen(twice)
    assert twice.kept is not None


def test_without_labels_there_is_no_look_at_gold_answers() -> None:
    unlabelled = config(reward={"gain": 0.0, "certainty_gain": 1.0})
    assert race_settings(unlabelled).look_steps == 0
    assert race_settings(config()).look_steps > 0
    assert race_settings(config(reward={"race": {"look_steps": 7, "max_seeds": 2}})).max_seeds == 2


# ---- the joint update


def test_the_joint_update_replays_and_asks_for_its_weights() -> None:
    settings = config(training={"max_train_tokens": 1500, "learning_rate": 2e-3})
    joint = joint_config(settings, ["epochs=3", "training.rank=32"], replay=True)
    training = joint.training
    assert (training.replay_share, training.loss_mask, training.max_train_tokens) == (0.5, "after_marker", 0)
    assert (training.learning_rate, training.epochs, training.rank) == (2e-3, 3, 32)
    protocol = joint_protocol(joint, [Question("Who?", "he")], ["old"])
    assert protocol.training.keep
    assert (protocol.bank, len(protocol.seeds), len(protocol.probes)) == (types.QUESTION_BANK_SEALED, 1, 1)


def test_a_recipe_is_what_a_trial_follows_the_joint_update_has_its_own_settings() -> None:
    joint = joint_config(config(training={"recipe": "seal-compat"}), [], replay=False)
    assert (joint.training.recipe, joint.training.replay_share) == (None, 0.0)
    assert joint.training.rank == config(training={"recipe": "seal-compat"}).training.rank


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("epochs=many", "epochs"),
        ("speed=3", "speed"),
        ("reward.gain=3", "no key of"),
        ("replay_share=0.5", "nothing to"),
    ],
)
def test_a_wrong_key_of_the_joint_update_is_named(override: str, words: str) -> None:
    with pytest.raises(PreceptorError, match=words) as caught:
        joint_config(config(), [override], replay=False)
    assert caught.value.reason == "BAD_CONFIG"


def test_the_joint_edit_is_the_union_of_what_is_kept() -> None:
    tasks = [task("a"), task("b"), task("c")]
    kept = [types.SelfEdit(documents=["1", "2"]), None, types.SelfEdit(documents=["3"])]
    edit = joint_edit(tasks, kept, config())
    assert edit is not None
    assert list(edit.documents) == ["1", "2", "3"]
    with_text = joint_edit(tasks, kept, config(training={"include_passage": True}))
    assert with_text is not None
    assert list(with_text.documents) == ["All about a.", "1", "2", "All about c.", "3"]
    assert joint_edit(tasks, [None, None, None], config()) is None


# ---- the table


def evaluated(before: Sequence[bool], after: Sequence[bool], probes: Sequence[bool] = ()) -> evaluator.Evaluation:
    made = evaluator.Evaluation(id="eval-joint", state=evaluator.EVALUATION_STATE_SUCCEEDED)
    made.baseline.correct.extend(before)
    made.baseline.probes_correct.extend([True] * len(probes))
    trial = made.trials.add(seed=5, correct=after, probes_correct=probes, steps=3, trained_tokens=40)
    trial.adapter.uri, trial.adapter.sha256 = "file:///x", "ab" * 32
    return made


def test_before_and_after_by_what_was_studied() -> None:
    union = union_task([task("a"), task("b"), task("c")], SEALED)
    found = evaluated([False] * 5 + [True], [True, True, False, False, True, True], [True, False, True, True])
    rows = before_and_after(found, union, [True, False, True], seed=0, resamples=500)
    assert [(row.name, row.questions) for row in rows] == [
        ("sealed questions", 6),
        ("of passages it studied", 4),
        ("of the others", 2),
        ("what it knew", 4),
    ]
    assert [round(row.after.mean, 3) for row in rows] == [0.667, 1.0, 0.0, 0.75]
    assert rows[0].difference.mean == pytest.approx(0.5)
    assert rows[0].difference.low <= 0.5 <= rows[0].difference.high
    assert passage_shares(found, union) == [(0.0, 1.0), (0.0, 0.0), (0.5, 1.0)]


def test_a_row_without_questions_is_left_out() -> None:
    union = union_task([task("a"), task("b", sealed=0)], SEALED)
    rows = before_and_after(evaluated([False, False], [True, False]), union, [True, True], seed=0, resamples=100)
    assert [row.name for row in rows] == ["sealed questions"]
    assert passage_shares(evaluated([False, False], [True, False]), union)[1] == (None, None)


def test_what_was_kept_is_of_what_was_known() -> None:
    assert kept_share([True, True, False], [True, False, True]) == 0.5
    assert kept_share([False], [True]) is None


# ---- the record


def record(joint: evaluator.Evaluation | None) -> dict[str, Any]:
    good, poor = written("a", "0.9"), written("b", "0")
    chosen(good, poor)
    return lineage.record(
        asked="asked-1",
        student=types.PinnedStudent(
            name="s", source="/s", commit="c1", adapters=[types.Artifact(uri="file:///e", sha256="ee")]
        ),
        policy=teacher.Policy(id="policy-1", parent_id="base-1", base_source="/t", base_commit="t1"),
        prompt_format="open",
        passages=[good, poor],
        places={"All about a.": "mine.json:3"},
        config={"seed": 0},
        joint=joint,
        joint_training={"epochs": 8},
        results=[],
        shares=[(0.0, 1.0), (0.0, 0.5)] if joint is not None else [],
        time="2026-01-01T00:00:00+00:00",
        seconds=1.0,
        notes=[],
    )


def test_the_record_leads_from_the_old_student_to_the_new_one(tmp_path: Path) -> None:
    made = record(evaluated([], [True]))
    assert made["student"]["adapters"] == [{"uri": "file:///e", "sha256": "ee"}]
    assert [one["sha256"] for one in made["result"]["adapters"]] == ["ee", "ab" * 32]
    first, second = made["passages"]
    assert (first["kept"], first["place"], first["self_edit"]) == (True, "mine.json:3", {"documents": ["0.9"]})
    assert first["fresh"]["evaluation_id"] == "best again:0.9"
    assert first["candidates"][0]["evaluation"]["reward"] == 0.9
    assert (second["kept"], second["self_edit"]) == (False, None)
    assert second["refused"]
    assert made["joint"]["evaluation_id"] == "eval-joint"
    assert record(evaluated([], [True]))["id"] == made["id"]
    (tmp_path / lineage.FILE).write_text(json.dumps(made))
    assert lineage.read(tmp_path) == json.loads(json.dumps(made))


def test_where_nothing_helps_the_record_says_so_and_names_no_weights() -> None:
    made = record(None)
    assert (made["outcome"], made["id"], made["adapter"], made["result"]) == ("nothing_helped", None, None, None)


def test_a_file_that_is_no_record_is_not_written_over(tmp_path: Path) -> None:
    assert lineage.read(tmp_path) is None
    (tmp_path / lineage.FILE).write_text('{"schema": "mine"}')
    with pytest.raises(PreceptorError, match="is no record"):
        lineage.read(tmp_path)


# ---- folders


@pytest.mark.parametrize("name", [weights.ADAPTER, weights.MERGED])
def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("1")
    with pytest.raises(PreceptorError, match="would give way") as caught:
        check_folder(tmp_path, "asked")
    assert caught.value.reason == "OUTPUT_NOT_WRITABLE"
    (tmp_path / name / PROVENANCE_FILE).write_text("{}")  # what an interrupted adaptation has left
    check_folder(tmp_path, "asked")


def test_a_folder_is_put_whole_in_place_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a").write_text("1")
    weights.put(tmp_path / "new", tmp_path / "out")
    (tmp_path / "out" / "stale").write_text("2")
    weights.put(tmp_path / "new", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


_MERGE = "import sys, pathlib; a = sys.argv; pathlib.Path(a[a.index('--out') + 1]).mkdir(); "
_WRITE = "pathlib.Path(a[a.index('--out') + 1], 'args').write_text(' '.join(a[1:]))"


def test_a_merge_is_a_child_that_is_told_source_commit_and_edits_in_order(tmp_path: Path) -> None:
    student = types.PinnedStudent(name="s", source="/models/s", commit="c1")
    sha = weights.merge(
        student, [Path("/e/1"), Path("/e/2")], tmp_path / "merged", (sys.executable, "-c", _MERGE + _WRITE)
    )
    said = (tmp_path / "merged" / "args").read_text()
    assert said.startswith("--source /models/s --commit c1 --out ")
    assert said.endswith("--adapter /e/1 --adapter /e/2")
    assert len(sha) == 64
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_merge_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    words = "print('ADAPTER_MISMATCH: no layer x', file=sys.stderr); sys.exit(2)"
    with pytest.raises(PreceptorError, match="the merge failed: no layer x") as caught:
        weights.merge(types.PinnedStudent(), [], tmp_path / "merged", (sys.executable, "-c", _MERGE + words))
    assert caught.value.reason == "ADAPTER_MISMATCH"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PreceptorError, match="boom") as caught:
        weights.merge(types.PinnedStudent(), [], tmp_path / "merged", (sys.executable, "-c", "raise OSError('boom')"))
    assert caught.value.reason == "INTERNAL"


# ---- what is read


def subject(folder: Path, *passages: dict[str, object]) -> Subject:
    (folder / "t.json").write_text(json.dumps(passages))
    return read_subject(read_config(None, [], folder / "t.json", None))


QUESTIONS = [{"question": f"What did she say about number {number}?", "answer": "yes"} for number in range(4)]


def test_every_passage_is_read_and_its_questions_divided(tmp_path: Path) -> None:
    found = subject(tmp_path, {"title": "Ada", "context": "Ada.", "questions": QUESTIONS})
    (passage,) = found.passages
    assert {bank: len(passage.questions_of(bank)) for bank in Bank} == {Bank.REWARD: 2, Bank.GATE: 1, Bank.SEALED: 1}
    assert any("--probes" in note for note in found.notes)
    assert any("--replay" in note for note in found.notes)


def test_passages_without_questions_are_named(tmp_path: Path) -> None:
    with pytest.raises(PreceptorError, match="questions") as caught:
        subject(tmp_path, {"title": "Ada", "context": "Ada.", "questions": []})
    assert caught.value.reason == "BAD_TASK_FILE"
    sealed = [{**QUESTIONS[0], "bank": "sealed"}]
    with pytest.raises(PreceptorError, match="no question of bank reward"):
        subject(tmp_path, {"title": "Ada", "context": "Ada.", "questions": sealed})
    with pytest.raises(PreceptorError, match="no passage has a sealed question"):
        subject(tmp_path, {"title": "Ada", "context": "Ada.", "questions": QUESTIONS[:1]})


def test_a_passage_without_a_sealed_question_is_learnt_and_noted(tmp_path: Path) -> None:
    found = subject(
        tmp_path,
        {"title": "Ada", "context": "Ada.", "questions": QUESTIONS},
        {"title": "Bela", "context": "Bela.", "questions": [{"question": "What did Bela want?", "answer": "no"}]},
    )
    assert len(found.passages) == 2
    assert any("does not tell of 'Bela'" in note for note in found.notes)


def test_the_world_gives_passages_that_no_teacher_is_trained_on() -> None:
    found = read_subject(read_config(None, [], None, "almanac:3"))
    assert len(found.passages) == 3
    assert found.probes
    assert found.replay_documents
    with pytest.raises(PreceptorError, match="almanac:COUNT"):
        read_config(None, [], None, "almanac:0")
    with pytest.raises(PreceptorError, match="almanac:COUNT"):
        read_config(None, [], None, "valley")
