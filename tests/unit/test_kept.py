"""What a trial has learnt, kept as an artifact and merged into the student that later trials begin with."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from preceptor.artifact_cache import ArtifactCache
from preceptor.artifacts import folder_sha256
from preceptor.convert import questions_from_proto
from preceptor.errors import PreceptorError
from preceptor.tasks import TARGETS
from preceptor.v1 import trial_pb2 as wire
from preceptor.v1 import types_pb2 as types
from student.answering import answer, encode_questions
from student.base import LoadedBase
from student.base_cache import BaseCache
from student.full import NoAdapters
from student.kept import PROVENANCE_FILE, KeptEdits, fetch_edits
from student.lora_bank import LoraBank
from student.payload import trials_of
from student.peft_format import CONFIG_FILE, WEIGHTS_FILE, bank_of
from student.source import inspect
from student.trial import AnsweringSettings
from student.worker_job import TrialJob
from tests.unit.tiny_students import save_student

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks
FACTS = ("Ada is in Rome.", "Tom is a smith.", "Question: Where is Ada?\nAnswer: Rome")
QUESTIONS = (
    types.Question(text="Where is Ada?", answer="Rome"),
    types.Question(text="What is Tom?", answer="a smith"),
)


class House:
    """A student, a store of edits and a worker without its queue."""

    def __init__(self, folder: Path, shape: str = "llama") -> None:
        source = save_student(folder / "student", shape)
        self.artifacts = folder / "artifacts"
        self.student = types.PinnedStudent(name="tiny", source=str(source), commit=folder_sha256(source))
        self.cache = BaseCache(2, "cpu")
        self.kept = KeptEdits(str(self.artifacts), ArtifactCache(folder / "cache"))
        self.job = TrialJob(self.cache, "here", 60, kept=self.kept)

    def with_edits(self, *edits: types.Artifact) -> types.PinnedStudent:
        student = types.PinnedStudent()
        student.CopyFrom(self.student)
        student.adapters.extend(edits)
        return student

    def run(self, student: types.PinnedStudent, *trials: wire.Trial) -> wire.TrialBatchResult:
        batch = wire.TrialBatch(
            id="batch",
            student=student,
            trials=[wire.Trial(id="baseline"), *trials],
            question_sets=[wire.QuestionSet(questions=QUESTIONS)],
            protocol_version=1,
        )
        return self.job.run(batch, 1, lambda _step: None, threading.Event())

    def keep(self, student: types.PinnedStudent, **settings: Any) -> wire.TrialResult:
        result = self.run(student, edit(**settings))
        assert not result.HasField("failure"), result.failure
        assert not result.results[1].HasField("failure"), result.results[1].failure
        return result.results[1]


def edit(name: str = "edit", seed: int = 7, **settings: Any) -> wire.Trial:
    training: dict[str, Any] = {"epochs": 6, "learning_rate": 1e-2, "batch_size": 2, "keep": True, **settings}
    return wire.Trial(id=name, documents=FACTS, settings=wire.TrainingSettings(**training), seed=seed)


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def answers_of(base: LoadedBase) -> list[tuple[str, float]]:
    asked = encode_questions(base, questions_from_proto(QUESTIONS, "questions"), AnsweringSettings())
    (answers,) = answer(base, NoAdapters(), [0], [asked], AnsweringSettings())
    return [(one.text, one.gold_logprob) for one in answers]


def assert_says(base: LoadedBase, answers: Iterable[wire.Answer], tolerance: float = 1e-4) -> None:
    for (text, logprob), one in zip(answers_of(base), answers, strict=True):
        assert text == one.text
        assert logprob == pytest.approx(one.gold_logprob, abs=tolerance)


def weights_of(base: LoadedBase) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in base.model.state_dict().items()}


@pytest.mark.parametrize("shape", ["llama", "qwen2"])
@pytest.mark.parametrize("targets", ["all", "qv"])
def test_a_merged_edit_answers_as_the_trial_that_learnt_it(tmp_path: Path, shape: str, targets: str) -> None:
    house = House(tmp_path, shape)
    learnt = house.keep(house.student, target_modules=TARGETS[targets], rank=4, alpha=6)
    merged = house.cache.get(house.with_edits(learnt.adapter))
    untouched = answers_of(house.cache.get(house.student))
    assert_says(merged, learnt.answers)
    for (_, before), after in zip(untouched, learnt.answers, strict=True):
        assert abs(after.gold_logprob - before) > 0.1  # it has learnt something


def test_the_baseline_of_a_student_with_an_edit_is_the_trial_that_learnt_it(house: House) -> None:
    learnt = house.keep(house.student)
    baseline = house.run(house.with_edits(learnt.adapter)).results[0]
    assert [one.text for one in baseline.answers] == [one.text for one in learnt.answers]
    golds = [one.gold_logprob for one in learnt.answers]
    assert [one.gold_logprob for one in baseline.answers] == pytest.approx(golds, abs=1e-4)
    assert not baseline.HasField("adapter")


def test_two_edits_stack_as_peft_merges_them(house: House) -> None:
    first = house.keep(house.student, target_modules=TARGETS["attention"])
    second = house.keep(house.with_edits(first.adapter), rank=3, alpha=5)
    stacked = house.cache.get(house.with_edits(first.adapter, second.adapter))
    model = AutoModelForCausalLM.from_pretrained(house.student.source)
    for folder in fetch_edits(house.with_edits(first.adapter, second.adapter), None)[1]:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    theirs = model.state_dict()
    for name, ours in stacked.model.state_dict().items():
        assert torch.equal(ours, theirs[name]), name
    assert_says(stacked, second.answers)


def test_the_same_adapter_twice_is_merged_twice(house: House) -> None:
    learnt = house.keep(house.student)
    once = weights_of(house.cache.get(house.with_edits(learnt.adapter)))
    twice = weights_of(house.cache.get(house.with_edits(learnt.adapter, learnt.adapter)))
    base = weights_of(house.cache.get(house.student))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(twice[name] - base[name], 2 * (once[name] - base[name]), atol=1e-5)


def test_a_batch_trained_twice_leaves_one_artifact_and_others_beside_it(house: House) -> None:
    first = house.keep(house.student).adapter
    assert house.keep(house.student).adapter == first
    others = house.run(house.student, edit("a"), edit("b", seed=8), edit("c", keep=False))
    a, b, c = others.results[1:]
    assert not c.HasField("adapter")
    assert a.adapter.uri != b.adapter.uri
    # what was trained among others may differ in the last bits, and then has a name of its own
    assert len(list((house.artifacts / "edits").iterdir())) == len({first.uri, a.adapter.uri, b.adapter.uri})
    assert folder_sha256(Path(first.uri.removeprefix("file://"))) == first.sha256


def test_an_edit_says_what_it_stands_on_and_loads_in_peft(house: House) -> None:
    first = house.keep(house.student).adapter
    second = house.keep(house.with_edits(first)).adapter
    folder = fetch_edits(house.with_edits(second), None)[1][0]
    provenance = json.loads((folder / PROVENANCE_FILE).read_text())
    assert provenance == {"kind": "adapter", "commit": house.student.commit, "adapters": [first.sha256]}
    assert {path.name for path in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE}
    bank: LoraBank = bank_of(house.cache.get(house.with_edits(first)), [folder])
    assert len(bank) == 1


def test_a_trial_that_learnt_nothing_or_failed_keeps_nothing(house: House) -> None:
    result = house.run(
        house.student,
        wire.Trial(id="nothing", settings=wire.TrainingSettings(keep=True)),
        edit("diverged", learning_rate=1.0, max_grad_norm=1e30, epochs=400, schedule="constant"),
        wire.Trial(id="too long", documents=["word " * 100], settings=wire.TrainingSettings(keep=True)),
        edit("kept"),
    )
    kept = {one.trial_id: one.HasField("adapter") for one in result.results}
    assert kept.pop("kept")
    if not result.results[2].HasField("failure"):  # this student may be too small to break
        kept.pop("diverged")
    assert not any(kept.values())


def test_nothing_is_trained_to_be_kept_where_there_is_no_place(house: House) -> None:
    house.job = TrialJob(house.cache, "here", 60)
    failure = house.run(house.student, edit()).results[1].failure
    assert (failure.reason, "no place" in failure.message) == ("INVALID_REQUEST", True)


def test_a_store_that_does_not_take_it_fails_the_trial_and_not_its_neighbour(house: House) -> None:
    house.artifacts.write_text("a file where the folder should be")
    result = house.run(house.student, edit("kept"), edit("not kept", keep=False))
    assert result.results[1].failure.reason == "ARTIFACT_STORE_REFUSED"
    assert "artifacts/edits" in result.results[1].failure.message
    assert not result.results[1].answers
    assert len(result.results[2].answers) == 2


@pytest.mark.parametrize("full", [False, True])
def test_damaged_missing_and_foreign_edits_are_failures_of_the_batch(tmp_path: Path, full: bool) -> None:
    house = House(tmp_path / "one")
    learnt = house.keep(house.student, full=full, learning_rate=1e-3).adapter
    folder = Path(learnt.uri.removeprefix("file://"))

    def reason(student: types.PinnedStudent) -> tuple[str, str]:
        result = house.run(student, edit())
        assert not result.results
        return result.failure.reason, result.failure.message

    gone = types.Artifact(uri=f"{learnt.uri}-gone", sha256=learnt.sha256)
    assert reason(house.with_edits(gone))[0] == "ARTIFACT_NOT_FOUND"
    assert reason(house.with_edits(types.Artifact(uri=learnt.uri, sha256="0" * 64)))[0] == "ARTIFACT_CORRUPT"
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    (nothing / "readme.txt").write_text("no edit")
    no_edit = types.Artifact(uri=nothing.as_uri(), sha256=folder_sha256(nothing))
    assert reason(house.with_edits(no_edit))[0] == "ADAPTER_MISMATCH"

    other = House(tmp_path / "other", "qwen2")
    found, message = reason(other.with_edits(learnt))
    assert found == "ADAPTER_MISMATCH"
    assert learnt.sha256 not in message
    assert house.student.commit[:12] in message
    assert other.student.commit[:12] in message

    file = folder / ("model.safetensors" if full else WEIGHTS_FILE)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert reason(house.with_edits(learnt))[0] == "ARTIFACT_CORRUPT"
    assert not house.run(house.student).HasField("failure")  # the worker lives on


def test_an_adapter_that_people_made_is_merged_if_its_layers_fit(house: House, tmp_path: Path) -> None:
    learnt = house.keep(house.student).adapter
    folder = Path(learnt.uri.removeprefix("file://"))
    (folder / PROVENANCE_FILE).unlink()
    bare = types.Artifact(uri=folder.as_uri(), sha256=folder_sha256(folder))
    assert house.cache.get(house.with_edits(bare)).adapters == (bare.sha256,)
    wider = save_student(tmp_path / "wider", "gemma")
    other = types.PinnedStudent(source=str(wider), commit=folder_sha256(wider), adapters=[bare])
    before = weights_of(house.cache.get(types.PinnedStudent(source=str(wider), commit=other.commit)))
    house.cache.get(other)  # of the same shape: nobody can tell
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "use_dora": True}))
    changed = types.Artifact(uri=folder.as_uri(), sha256=folder_sha256(folder))
    with pytest.raises(PreceptorError, match="use_dora") as told:
        house.cache.get(house.with_edits(changed))
    assert told.value.reason == "ADAPTER_MISMATCH"
    assert before.keys()


def test_the_cache_holds_students_with_edits_within_its_capacity_and_reports_none_as_the_base(house: House) -> None:
    learnt = house.keep(house.student).adapter
    cache = BaseCache(2, "cpu")
    edited = house.with_edits(learnt)
    assert cache.get(edited) is cache.get(edited)
    assert cache.commits() == ()
    base = cache.get(house.student)
    assert cache.commits() == (house.student.commit,)
    cache.get(house.with_edits(learnt, learnt))  # the least recently used, `edited`, leaves
    assert cache.get(house.student) is base
    before = weights_of(base)
    cache.get(edited)
    assert all(torch.equal(before[name], value) for name, value in base.model.state_dict().items())


def test_a_worker_refuses_more_edits_than_there_may_be(house: House) -> None:
    one = types.Artifact(uri="file:///nowhere", sha256="0" * 64)
    batch = wire.TrialBatch(student=house.with_edits(*[one] * 65), protocol_version=1)
    with pytest.raises(PreceptorError, match="at most 64"):
        trials_of(batch)


def test_all_weights_are_kept_as_a_student_that_can_be_registered(house: House) -> None:
    before = house.keep(house.student).adapter
    learnt = house.keep(house.with_edits(before), full=True, learning_rate=1e-3)
    folder = Path(learnt.adapter.uri.removeprefix("file://"))
    facts = inspect(str(folder))
    assert facts.commit == learnt.adapter.sha256
    provenance = json.loads((folder / PROVENANCE_FILE).read_text())
    assert provenance == {"kind": "weights", "commit": house.student.commit, "adapters": [before.sha256]}
    assert_says(house.cache.get(house.with_edits(before, learnt.adapter)), learnt.answers, 1e-6)
    # what stood before all weights is in them, and need not be there any more
    gone = types.Artifact(uri="file:///nowhere", sha256=before.sha256)
    after = house.keep(house.with_edits(gone, learnt.adapter), rank=4)
    stacked = house.cache.get(house.with_edits(gone, learnt.adapter, after.adapter))
    assert_says(stacked, after.answers)
    registered = types.PinnedStudent(source=str(folder), commit=facts.commit)
    assert_says(house.cache.get(registered), learnt.answers, 1e-6)


def test_all_weights_kept_from_two_places_are_one_artifact(tmp_path: Path) -> None:
    one, other = House(tmp_path / "one"), House(tmp_path / "other")
    assert one.student.commit == other.student.commit
    hashes = {house.keep(house.student, full=True).adapter.sha256 for house in (one, other)}
    assert len(hashes) == 1
