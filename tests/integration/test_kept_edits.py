"""Edits that are kept and stacked, and directives that choose what is trained: evaluator, real Redis, real worker."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from preceptor.artifacts import folder_sha256, local_folder, verified_folder
from preceptor.tasks import TARGETS
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import types_pb2 as types
from tests.evaluation_requests import group
from tests.integration.test_evaluator_queue import Stack
from tests.unit.tiny_students import save_student


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("kept")
    made = Stack(folder)
    try:
        made.spawn(
            *(sys.executable, "-m", "student.worker"),
            PRECEPTOR_HOME=str(folder),
            PRECEPTOR_BROKER_URL=made.server.url,
            PRECEPTOR_DEVICE="cpu",
        )
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> types.PinnedStudent:
    source = save_student(tmp_path_factory.mktemp("student"))
    return types.PinnedStudent(name="tiny", source=str(source), commit=folder_sha256(source))


def stacked(student: types.PinnedStudent, *edits: types.Artifact) -> types.PinnedStudent:
    made = types.PinnedStudent()
    made.CopyFrom(student)
    made.adapters.extend(edits)
    return made


def evaluate(
    stack: Stack, student: types.PinnedStudent, *edits: types.SelfEdit, keep: bool = True
) -> list[pb.Evaluation]:
    request = group("unused")
    request.student.CopyFrom(student)
    request.protocol.training.keep = keep
    request.protocol.training.learning_rate = 1e-2
    del request.self_edits[:]
    request.self_edits.extend(edits)
    ids = [item.id for item in stack.stub.CreateEvaluations(request, timeout=20).evaluations]
    return stack.results(ids, 120)


def edit(document: str = "Ada lives in Lisbon.", **directive: object) -> types.SelfEdit:
    return types.SelfEdit(documents=[document], directive=types.Directive(**directive))  # type: ignore[arg-type]


def test_what_is_kept_is_what_the_next_evaluation_begins_with(stack: Stack, student: types.PinnedStudent) -> None:
    (first,) = evaluate(stack, student, edit())
    assert first.state == pb.EVALUATION_STATE_SUCCEEDED, first.failure
    (learnt,) = first.trials
    assert verified_folder(learnt.adapter) == stack.folder / "artifacts" / "edits" / learnt.adapter.uri.split("/")[-1]
    assert not first.baseline.HasField("adapter")

    then = stacked(student, learnt.adapter)
    (second,) = evaluate(stack, then, edit("Ada is a baker."))
    assert second.student.adapters == then.adapters
    assert second.baseline.gold_logprobs == pytest.approx(learnt.gold_logprobs, abs=1e-4)
    assert second.baseline.correct == learnt.correct
    assert second.trials[0].gold_logprobs != pytest.approx(learnt.gold_logprobs, abs=1e-2)

    (third,) = evaluate(stack, stacked(student, learnt.adapter, second.trials[0].adapter), edit(), keep=False)
    assert third.baseline.gold_logprobs == pytest.approx(second.trials[0].gold_logprobs, abs=1e-4)
    assert not third.trials[0].HasField("adapter")
    assert len({first.id, second.id, third.id}) == 3


def test_each_self_edit_is_trained_as_its_directive_says(stack: Stack, student: types.PinnedStudent) -> None:
    choices = [types.Directive(targets=name) for name in TARGETS]
    edits = [types.SelfEdit(documents=["Ada lives in Lisbon."], directive=one) for one in choices]
    found = evaluate(stack, student, *edits, edit(rank=2), edit(fine_tuning=types.FINE_TUNING_FULL))
    assert {item.state for item in found} == {pb.EVALUATION_STATE_SUCCEEDED}, [item.failure for item in found]
    folders = [local_folder(item.trials[0].adapter.uri) for item in found]
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders[:-1]]
    wanted = [sorted(modules) for modules in TARGETS.values()]
    assert [sorted(config["target_modules"]) for config in configs] == [*wanted, sorted(TARGETS["all"])]
    assert [(config["r"], config["lora_alpha"]) for config in configs] == [(4, 16)] * len(TARGETS) + [(2, 8)]
    assert (folders[-1] / "model.safetensors").is_file()
    learnt = [tuple(item.trials[0].gold_logprobs) for item in found]
    assert len(set(learnt)) == len(learnt)  # they are different trainings indeed
    (after,) = evaluate(stack, stacked(student, found[-1].trials[0].adapter), edit(), keep=False)
    assert after.baseline.gold_logprobs == pytest.approx(learnt[-1], abs=1e-4)


def test_kept_edits_go_only_where_it_is_asked_for_and_are_learnt_again(
    stack: Stack, student: types.PinnedStudent
) -> None:
    def collected(**changes: object) -> set[str]:
        request = pb.EvaluatorServiceCollectGarbageRequest(keep_days=0, **changes)  # type: ignore[arg-type]
        return {item.name for item in stack.stub.CollectGarbage(request, timeout=20).garbage if item.kind == "edit"}

    (first,) = evaluate(stack, student, edit("Ada was in Rome."))
    learnt = first.trials[0].adapter
    folder = local_folder(learnt.uri)
    assert not collected()
    assert folder.name in collected(edits=True, dry_run=True)
    assert folder.is_dir()
    assert folder.name in collected(edits=True)
    assert not folder.exists()
    assert not collected(edits=True)
    (again,) = evaluate(stack, student, edit("Ada was in Rome."))
    assert again.id == first.id
    assert again.trials[0].adapter == learnt
    assert verified_folder(learnt) == folder


def test_an_edit_that_cannot_be_used_is_a_failure_and_no_reward(
    stack: Stack, student: types.PinnedStudent, tmp_path: Path
) -> None:
    (first,) = evaluate(stack, student, edit("Ada bakes bread."))
    learnt = first.trials[0].adapter
    wider = save_student(tmp_path / "other", "qwen2")
    other = types.PinnedStudent(name="other", source=str(wider), commit=folder_sha256(wider))
    damaged = types.Artifact(uri=learnt.uri, sha256="0" * 64)
    gone = types.Artifact(uri=f"{learnt.uri}-gone", sha256=learnt.sha256)
    for edited, reason in (
        (stacked(other, learnt), "ADAPTER_MISMATCH"),
        (stacked(student, damaged), "ARTIFACT_CORRUPT"),
        (stacked(student, gone), "ARTIFACT_NOT_FOUND"),
    ):
        (failed,) = evaluate(stack, edited, edit())
        assert (failed.state, failed.failure.reason) == (pb.EVALUATION_STATE_FAILED, reason)
        assert not failed.HasField("reward")
