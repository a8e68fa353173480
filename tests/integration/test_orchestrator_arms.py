"""Whole runs against scripted services: the arms that a run asks for, few-shot tasks, and where the rounds begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from preceptor.channel import call, connect, new_request_id
from preceptor.errors import PreceptorError
from preceptor.testing.scripted_evaluator import ScriptedEvaluator
from preceptor.testing.scripted_house import ScriptedHouse
from preceptor.testing.scripted_teacher import ScriptedTeacher
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import teacher_pb2_grpc
from preceptor.v1 import types_pb2 as types
from tests.orchestrated import (
    Orchestrator,
    create_request,
    few_shot_config,
    few_shot_request,
    orchestrator_here,
    run_config,
)

ALL = [
    "no_edit",
    "passage_only",
    "format:self_qa",
    "format:copy",
    "untrained_teacher",
    "fixed_strategy",
    "external_teacher",
    "trained_teacher",
    "in_context",
    "oracle",
    "shuffled_facts",
]


def asking(**changes: Any) -> dict[str, Any]:
    return {"formats": ["self_qa", "copy"], "in_context": True, "external_teacher": True, **changes}


def finished(o: Orchestrator, request: pb.CreateRunRequest) -> dict[str, Any]:
    run_id = o.create(request)
    run = o.finish(run_id)
    assert run.state == pb.RUN_STATE_SUCCEEDED, run.failure
    return o.summary(run_id)


def heldout_requests(
    house: ScriptedHouse, bank: types.QuestionBank.ValueType
) -> list[evaluator.CreateEvaluationsRequest]:
    return [request for request in house.evaluator.requests if request.protocol.bank == bank]


@pytest.mark.usefixtures("databases")
def test_every_arm_is_measured_at_the_same_seeds_and_compared_with_the_trained_teacher(tmp_path: Path) -> None:
    config = run_config(heldout=asking(), training={"max_train_tokens": 900}, reward={"trials_together": 1})
    perfect, another = (ScriptedTeacher(malformed_share=0.0) for _ in range(2))  # type: ignore[abstract]
    other = ScriptedHouse(tmp_path / "outside", another)
    with (
        other,
        ScriptedHouse(tmp_path, perfect) as house,
        orchestrator_here(house, tmp_path, external=other.address("teacher")) as o,
    ):
        heldout = finished(o, create_request(config))["heldout"]
        asked = heldout_requests(house, types.QUESTION_BANK_SEALED)
    assert list(heldout["arms"]) == ALL
    assert all(arm["passages"] == 4 for arm in heldout["arms"].values())
    assert heldout["left_out"] == {}
    pairs = [name for name in heldout["differences"] if name.startswith("trained_minus_")]
    assert len(pairs) == len(ALL) - 1
    assert heldout["differences"]["trained_minus_format:self_qa"]["passages"] == 4
    assert len({tuple(request.protocol.seeds) for request in asked}) == 1
    # The text in the prompt is the ceiling, and the untouched student of the table is one without it.
    assert heldout["arms"]["in_context"]["accuracy"] > heldout["arms"]["no_edit"]["accuracy"] == 0
    assert heldout["arms"]["in_context"]["trained_tokens"] == 0
    in_context = [request for request in asked if request.protocol.in_context]
    assert [len(edit.documents) for request in in_context for edit in request.self_edits] == [0] * 4
    # Fixed formats: the untrained teacher's documents, no directive of its own, as many tokens as others may have.
    formats = [request for request in asked if ".format:" in request.request_id]
    assert {edit.directive.epochs for request in formats for edit in request.self_edits} == {1024}
    assert not any(edit.directive.HasField("learning_rate") for request in formats for edit in request.self_edits)
    written = [generation for generation in house.teacher.generations if generation.prompt_format == "copy"]
    assert {generation.policy_id for generation in written} == {"base-scripted"}
    assert [generation.prompt_format for generation in other.teacher.generations] == ["open"]


def test_a_run_that_asks_for_no_further_arm_has_those_of_before_and_asks_the_same(tmp_path: Path) -> None:
    with ScriptedHouse(tmp_path) as house, orchestrator_here(house, tmp_path) as o:
        summary = finished(o, create_request())
        assert not any(generation.HasField("limits") for generation in house.teacher.generations)
        assert not any(request.protocol.in_context for request in house.evaluator.requests)
    assert list(summary["heldout"]["arms"]) == [
        name for name in ALL if name not in ("external_teacher", "in_context") and not name.startswith("format:")
    ]
    assert summary["kind"] == "passages"


def test_an_external_teacher_that_is_away_costs_its_arm_and_nothing_else(tmp_path: Path) -> None:
    config = run_config(heldout=asking(formats=[], in_context=False))
    outside = ScriptedHouse(tmp_path / "outside")
    with outside:
        address = outside.address("teacher")
    with (
        ScriptedHouse(tmp_path) as house,
        orchestrator_here(house, tmp_path, external=address, patience_seconds=2) as o,
    ):
        summary = finished(o, create_request(config))
    heldout = summary["heldout"]
    assert heldout["arms"]["external_teacher"] is None
    assert heldout["differences"]["trained_minus_external"] is None
    assert heldout["left_out"]["external_teacher"]["reason"] == "SERVICE_UNREACHABLE"
    assert heldout["arms"]["trained_teacher"]["passages"] == 4
    assert any(
        "external teacher could not be had and was left out: SERVICE_UNREACH" in note for note in summary["notes"]
    )


class Refuses(ScriptedTeacher):
    """Writes for some tasks, then its endpoint refuses."""

    def GenerateSelfEdits(self, request: teacher.GenerateSelfEditsRequest, context: Any) -> Any:
        for number, group in enumerate(super().GenerateSelfEdits(request, context)):
            if number == 2:
                raise PreceptorError("SERVER_REFUSED", "the endpoint answered HTTP 401")
            yield group


def test_what_an_external_teacher_wrote_before_it_refused_is_no_arm(tmp_path: Path) -> None:
    config = run_config(heldout=asking(formats=[], in_context=False))
    outside = ScriptedHouse(tmp_path / "outside", Refuses(malformed_share=1.0))  # type: ignore[abstract]
    with (
        outside,
        ScriptedHouse(tmp_path) as house,
        orchestrator_here(house, tmp_path, external=outside.address("teacher")) as o,
    ):
        summary = finished(o, create_request(config))
    heldout = summary["heldout"]
    assert heldout["arms"]["external_teacher"] is None
    assert heldout["left_out"]["external_teacher"] == {
        "reason": "SERVER_REFUSED",
        "message": "the endpoint answered HTTP 401",
    }
    measured = sum(arm["malformed"] for arm in heldout["arms"].values() if arm and arm["malformed"])
    assert heldout["evaluations"]["malformed"] == measured


def test_without_an_external_teacher_the_arm_is_refused_before_the_run_exists(tmp_path: Path) -> None:
    request = create_request(run_config(heldout={"external_teacher": True}))
    with (
        ScriptedHouse(tmp_path) as house,
        orchestrator_here(house, tmp_path) as o,
        pytest.raises(PreceptorError) as caught,
    ):
        o.create(request)
    assert caught.value.reason == "EXTERNAL_TEACHER_NOT_SET"
    assert caught.value.metadata["field"] == "heldout.external_teacher"


def test_a_run_on_few_shot_tasks_learns_a_directive(tmp_path: Path) -> None:
    with ScriptedHouse(tmp_path) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(few_shot_request(few_shot_config(tasks={"canary": 0})))
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        summary, lines = o.summary(run_id), o.self_edits(run_id)
        report = call(o.stub.GetRunReport, pb.GetRunReportRequest(run_id=run_id)).report_html
        held = [request for request in house.evaluator.requests if request.task.few_shot.name.startswith("other")]
    heldout = summary["heldout"]
    assert summary["kind"] == "few_shot"
    assert "passage_only" not in heldout["arms"]
    assert list(heldout["arms"]) == [name for name in ALL if name in heldout["arms"]]
    assert all(arm["passages"] == 4 for arm in heldout["arms"].values())
    assert (heldout["questions"], heldout["bank"]) == (8, "queries")
    assert heldout["fixed_strategy"]["augmentations"]["basic"]  # by trials on training tasks, the one that helps
    assert heldout["arms"]["fixed_strategy"]["accuracy"] > 0.7
    assert heldout["arms"]["oracle"]["accuracy"] > 0.7 > heldout["arms"]["shuffled_facts"]["accuracy"]
    assert {line.task_title for line in lines} <= {f"rule {i}" for i in range(5)}
    assert house.teacher.updates[0].examples[0].task.few_shot.demonstrations
    assert not any(question.bank for request in held for question in request.task.passage.questions)
    fixed = [edit for request in held if ".fixed." in request.request_id for edit in request.self_edits]
    assert fixed
    assert all(edit.directive.rank == 4 and edit.directive.loss_mask == types.LOSS_MASK_OUTPUTS_ONLY for edit in fixed)
    assert "best fixed strategy" in report
    assert "augmentations basic, colours" in report
    assert "other rule" not in report  # of held-out tasks nothing is shown
    assert not any("sealed questions" in note for note in summary["notes"])


def test_a_format_of_few_shot_tasks_is_taken_where_the_held_out_ones_are_all_there_are(tmp_path: Path) -> None:
    format_ = {"prompt_format": "augmentations"}
    config = few_shot_config(
        teacher=format_, rounds={"count": 0}, tasks={"canary": 0}, heldout={"fixed_strategies": ()}
    )
    request = few_shot_request(config)
    del request.tasks[:]
    with ScriptedHouse(tmp_path) as house, orchestrator_here(house, tmp_path) as o:
        assert finished(o, request)["kind"] == "few_shot"


def policy_of_a_run(o: Orchestrator) -> str:
    return str(finished(o, create_request())["policies"][-1])


def test_rounds_begin_with_the_policy_that_is_named_and_the_untrained_teacher_stays_the_base(tmp_path: Path) -> None:
    with ScriptedHouse(tmp_path) as house, orchestrator_here(house, tmp_path) as o:
        start = policy_of_a_run(o)
        del house.teacher.updates[:]
        del house.teacher.generations[:]
        summary = finished(o, create_request(run_config(teacher={"policy": start}, seed=1)))
        first, *_ = [each for each in house.teacher.generations if each.samples_per_task == 4]
        assert first.policy_id == start
        assert house.teacher.updates[0].parent_id == start
    assert summary["policies"][:2] == ["base-scripted", start]
    assert len(summary["policies"]) == 4


def test_without_rounds_the_named_policy_is_the_trained_teacher_and_is_not_activated(tmp_path: Path) -> None:
    with ScriptedHouse(tmp_path) as house, orchestrator_here(house, tmp_path) as o:
        start = policy_of_a_run(o)
        call(
            teacher_stub(house).ActivatePolicy,
            teacher.ActivatePolicyRequest(request_id=new_request_id(), policy_id="base-scripted"),
        )
        config = run_config(teacher={"policy": start}, rounds={"count": 0}, seed=1)
        run_id = o.create(create_request(config))
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        summary = o.summary(run_id)
        active = call(teacher_stub(house).GetPolicy, teacher.GetPolicyRequest()).policy.id
        held = [each for each in house.teacher.generations if each.samples_per_task == 1 and len(each.tasks) == 4]
    assert {each.policy_id for each in held[-3:]} == {"base-scripted", start}
    assert summary["policies"] == ["base-scripted", start]
    assert active == "base-scripted"
    differing = summary["heldout"]["differences"]["trained_minus_untrained"]
    assert differing["ci95"] != [0, 0]


def teacher_stub(house: ScriptedHouse) -> teacher_pb2_grpc.TeacherServiceStub:
    return connect(house.address("teacher"), teacher_pb2_grpc.TeacherServiceStub)


@pytest.mark.parametrize(
    ("policy", "reason"), [("policy-nowhere", "POLICY_NOT_FOUND"), ("stranger", "POLICY_OF_ANOTHER_BASE")]
)
def test_a_policy_that_no_round_can_begin_with_is_refused_before_the_run_exists(
    tmp_path: Path, policy: str, reason: str
) -> None:
    scripted = ScriptedTeacher()  # type: ignore[abstract]
    scripted.add_policy(teacher.Policy(id="base-other", state=teacher.POLICY_STATE_READY))
    scripted.add_policy(teacher.Policy(id="stranger", parent_id="base-other", state=teacher.POLICY_STATE_READY))
    request = create_request(run_config(teacher={"policy": policy}))
    with (
        ScriptedHouse(tmp_path, scripted) as house,
        orchestrator_here(house, tmp_path) as o,
        pytest.raises(PreceptorError) as caught,
    ):
        o.create(request)
    assert caught.value.reason == reason
    assert caught.value.metadata["field"] == "teacher.policy"


def test_what_is_too_costly_is_counted_by_itself_and_teaches_nothing(tmp_path: Path) -> None:
    scripted = ScriptedTeacher(too_costly_share=0.4)  # type: ignore[abstract]
    config = run_config(teacher={"limits": {"max_trained_characters": 500, "max_epochs": 16}}, training={"epochs": 5})
    with ScriptedHouse(tmp_path, scripted) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(create_request(config))
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        summary, lines, progress = o.summary(run_id), o.self_edits(run_id), o.progress(run_id)
        report = call(o.stub.GetRunReport, pb.GetRunReportRequest(run_id=run_id)).report_html
        (limits,) = {each.limits.SerializeToString() for each in house.teacher.generations}
    costly = [line for line in lines if line.too_costly]
    assert costly
    assert not any(line.malformed or line.HasField("reward") or line.evaluation_id for line in costly)
    assert sum(of["evaluations"]["too_costly"] for of in summary["rounds"]) == len(costly)
    for of, update in zip(summary["rounds"], house.teacher.updates, strict=True):
        assert of["evaluations"]["succeeded"] == len(update.examples)
        assert sum(of["evaluations"][key] for key in ("succeeded", "malformed", "too_costly")) == of["self_edits"]
    held = sum(arm["too_costly"] for arm in summary["heldout"]["arms"].values())
    assert held == summary["heldout"]["evaluations"]["too_costly"] > 0
    assert all(arm["passages"] == 4 for arm in summary["heldout"]["arms"].values())
    assert progress.self_edits_too_costly >= len(costly) + held
    assert "too costly: 64 epochs of 90 characters" in report
    assert any("would have cost more to train than the run allows" in note for note in summary["notes"])
    asked = teacher.DirectiveLimits.FromString(limits)
    assert (asked.max_trained_characters, asked.max_epochs, asked.default_epochs) == (500, 16, 5)
    assert (asked.max_learning_rate, asked.max_rank) == (0, 0)  # what is not said is not sent


def test_diversity_and_divergence_of_every_round_are_in_summary_report_and_ledger(tmp_path: Path) -> None:
    with ScriptedHouse(tmp_path) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(create_request())
        o.finish(run_id)
        summary, lines = o.summary(run_id), o.self_edits(run_id)
        report = call(o.stub.GetRunReport, pb.GetRunReportRequest(run_id=run_id)).report_html
        commit = o.run(run_id).student.commit
    assert [of["diversity"] for of in summary["rounds"]] == [1.0, 0.5]
    assert [of["kl"] for of in summary["rounds"]] == [0.0, pytest.approx(0.1)]
    assert "diversity of a group by round" in report
    assert "KL from the untrained teacher, nats a token by round" in report
    measured = [line for line in lines if line.HasField("reward")]
    assert {line.student_commit for line in measured} == {commit}
    assert all(line.policy_id for line in measured)


def test_an_in_context_arm_that_fails_leaves_the_untouched_student_known(tmp_path: Path) -> None:
    scripted = ScriptedEvaluator(fails=lambda _task, edit: not edit.documents)  # type: ignore[abstract]
    config = run_config(heldout={"in_context": True})
    with ScriptedHouse(tmp_path, evaluator=scripted) as house, orchestrator_here(house, tmp_path) as o:
        arms = finished(o, create_request(config))["heldout"]["arms"]
    assert (arms["in_context"]["failed"], arms["in_context"]["accuracy"]) == (4, None)
    assert arms["no_edit"]["passages"] == 4
