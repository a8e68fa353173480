"""Whole runs whose labels are missing, against scripted services: written questions, and the canary that stops them."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from preceptor.config import RunConfig
from preceptor.errors import PreceptorError
from preceptor.testing.scripted_evaluator import ScriptedEvaluator
from preceptor.testing.scripted_house import ScriptedHouse
from preceptor.testing.scripted_teacher import ScriptedTeacher
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import teacher_pb2
from preceptor.v1 import types_pb2 as types
from tests.integration.test_orchestrator_runs import results, until
from tests.orchestrated import OrchestratorProcess, create_request, orchestrator_here, run_config

WRITTEN = {"questions": "written"}
# In the passages of tests.orchestrated stand "All about NAME." and "More about NAME.".
SOUND = (
    "Question: Which word begins the first line? Answer: All",
    "Question: Which word begins the second line? Answer: More",
    "Question: Which word is in both lines? Answer: about",
)


class AskingTeacher(ScriptedTeacher):
    """Under the format for questions it writes three sound ones and one whose answer nobody can find."""

    def _write(
        self, request: teacher_pb2.GenerateSelfEditsRequest, policy: teacher_pb2.Policy, task: types.Task, index: int
    ) -> teacher_pb2.WrittenSelfEdit:
        if request.prompt_format != "self_qa" or request.samples_per_task == 1:
            return super()._write(request, policy, task, index)
        documents = [*SOUND, "Question: Who wrote it? Answer: nobody"]
        return teacher_pb2.WrittenSelfEdit(
            index=index,
            status=teacher_pb2.SELF_EDIT_STATUS_VALID,
            self_edit=types.SelfEdit(documents=documents),
            completion="\n".join(documents),
            draws=1,
        )


class FallingTeacher(ScriptedTeacher):
    """Good before the second update, bad after it."""

    def _write(
        self, request: teacher_pb2.GenerateSelfEditsRequest, policy: teacher_pb2.Policy, task: types.Task, index: int
    ) -> teacher_pb2.WrittenSelfEdit:
        written = super()._write(request, policy, task, index)
        word = "poor" if self._generation(policy) > 1 else "good"
        for number, document in enumerate(written.self_edit.documents):
            written.self_edit.documents[number] = f"{word} {document.partition(' ')[2]}"
        return written


def questions_asked(house: ScriptedHouse) -> list[teacher_pb2.GenerateSelfEditsRequest]:
    """The requests for questions that the teacher got."""
    return [one for one in house.teacher.generations if one.prompt_format == "self_qa" and one.samples_per_task == 4]


def trained_on(house: ScriptedHouse) -> list[types.Task]:
    """The tasks of every evaluation with reward questions."""
    requests = [r for r in house.evaluator.requests if r.protocol.bank != types.QUESTION_BANK_SEALED]
    return [task for request in requests for task in (request.task, *(group.task for group in request.more))]


@pytest.mark.usefixtures("databases")
def test_written_questions_reward_the_rounds_and_nobody_trains_on_the_given_ones(tmp_path: Path) -> None:
    house = ScriptedHouse(tmp_path, AskingTeacher())
    with house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(create_request(run_config(tasks=WRITTEN)))
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        summary = o.summary(run_id)
    (asked,) = questions_asked(house)
    assert asked.policy_id == "base-scripted"
    assert len(asked.tasks) == 5
    for task in trained_on(house):
        assert all(question.written for question in task.passage.questions)
        banks = [question.bank for question in task.passage.questions]
        assert sorted(banks) == [types.QUESTION_BANK_REWARD, types.QUESTION_BANK_REWARD, types.QUESTION_BANK_GATE]
    sealed = [r for r in house.evaluator.requests if r.protocol.bank == types.QUESTION_BANK_SEALED]
    assert sealed
    assert not any(question.written for r in sealed for question in r.task.passage.questions)
    assert summary["questions_written"]["asked"] == 10
    assert summary["questions_written"]["kept_apart"] == 5
    assert sum(summary["questions_written"]["dropped"].values()) == 5


def test_a_task_for_which_nothing_can_be_asked_is_not_trained_on(tmp_path: Path) -> None:
    class HalfAsking(AskingTeacher):
        def _write(
            self,
            request: teacher_pb2.GenerateSelfEditsRequest,
            policy: teacher_pb2.Policy,
            task: types.Task,
            index: int,
        ) -> teacher_pb2.WrittenSelfEdit:
            written = super()._write(request, policy, task, index)
            if task.passage.title == "town 1" and "Question: Who wrote it? Answer: nobody" in written.completion:
                del written.self_edit.documents[:3]
            return written

    house = ScriptedHouse(tmp_path, HalfAsking())
    with house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(create_request(run_config(tasks=WRITTEN)))
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
    assert {task.passage.title for task in trained_on(house)} == {"town 0", "town 2", "town 3", "town 4"}


def test_a_run_for_which_nothing_at_all_can_be_asked_fails_and_says_why(tmp_path: Path) -> None:
    with ScriptedHouse(tmp_path) as house, orchestrator_here(house, tmp_path) as o:
        run = o.finish(o.create(create_request(run_config(tasks=WRITTEN))))
    assert run.state == pb.RUN_STATE_FAILED
    assert run.failure.reason == "NO_QUESTIONS"
    assert not house.evaluator.requests


def test_a_run_that_is_killed_does_not_ask_for_its_questions_again_and_ends_alike(tmp_path: Path) -> None:
    request = create_request(run_config(tasks=WRITTEN))
    undisturbed = ScriptedHouse(tmp_path / "undisturbed", AskingTeacher())
    with undisturbed, orchestrator_here(undisturbed, tmp_path / "undisturbed") as o:
        run_id = o.create(request)
        o.finish(run_id)
        expected = results(o.summary(run_id))
    house = ScriptedHouse(tmp_path, AskingTeacher(), ScriptedEvaluator(seconds=30))
    with house:
        process = OrchestratorProcess(house, tmp_path)
        process.start()
        try:
            run_id = process.client.create(request)
            until(lambda: bool(house.evaluator.requests))
            process.kill()
            house.evaluator.seconds = 0.0
            with house.evaluator._changed:
                house.evaluator._ends = dict.fromkeys(house.evaluator._ends, 0.0)
            process.start()
            assert process.client.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
            assert results(process.client.summary(run_id)) == expected
        finally:
            process.terminate()
    assert len(questions_asked(house)) == 1


def watched(**more: object) -> RunConfig:
    return run_config(tasks={"canary": 4}, rounds={"count": 4}, **more)


def canary_requests(house: ScriptedHouse) -> list[evaluator.CreateEvaluationsRequest]:
    """Evaluations of what was written for the canary tasks."""
    return [request for request in house.evaluator.requests if ".canary-" in request.request_id]


@pytest.mark.usefixtures("databases")
def test_the_canary_ends_the_rounds_and_the_best_policy_is_the_one_that_is_measured(tmp_path: Path) -> None:
    house = ScriptedHouse(tmp_path, FallingTeacher(malformed_share=0.0))
    with house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(create_request(watched(), train=9))
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        summary = o.summary(run_id)
        active = house.teacher.GetPolicy(teacher_pb2.GetPolicyRequest(), None).policy  # type: ignore[arg-type]
    assert [look["round"] for look in summary["canary"]] == [0, 1, 2]
    assert [look["stopped"] for look in summary["canary"]] == [False, False, True]
    assert len(summary["rounds"]) == 2
    best = summary["canary"][-1]["best_round"]
    assert best < 2
    assert summary["canary"][-1]["difference"] < 0
    assert active.id == summary["canary"][best]["policy_id"]


def test_canary_tasks_are_not_trained_on_and_are_measured_with_labels_and_plain_weights(tmp_path: Path) -> None:
    config = watched(reward={"gain": 0.0, "gold_probability_gain": 2.0, "retention_loss": 0.5, "overlap": 1.0})
    with ScriptedHouse(tmp_path, FallingTeacher()) as house, orchestrator_here(house, tmp_path) as o:
        assert o.finish(o.create(create_request(config, train=9))).state == pb.RUN_STATE_SUCCEEDED
    looks = canary_requests(house)
    canaries = {task.id for request in looks for task in (request.task, *(group.task for group in request.more))}
    assert len(canaries) == 4
    assert not canaries & {example.group_id for update in house.teacher.updates for example in update.examples}
    for request in looks:
        assert request.protocol.weights == evaluator.RewardWeights(gain=1.0, retention_loss=0.5)
        assert request.protocol.bank == types.QUESTION_BANK_REWARD
        assert request.protocol.seeds == looks[0].protocol.seeds


@pytest.mark.parametrize("looks_before", [0, 2])
def test_a_run_that_is_killed_at_a_look_ends_alike(tmp_path: Path, looks_before: int) -> None:
    request = create_request(watched(), train=9)
    undisturbed = ScriptedHouse(tmp_path / "undisturbed", FallingTeacher())
    with undisturbed, orchestrator_here(undisturbed, tmp_path / "undisturbed") as o:
        run_id = o.create(request)
        o.finish(run_id)
        expected, looks = results(o.summary(run_id)), o.summary(run_id)["canary"]
    house = ScriptedHouse(tmp_path, FallingTeacher())
    with house:
        process = OrchestratorProcess(house, tmp_path)
        process.start()
        try:
            run_id = process.client.create(request)
            until(lambda: len({r.request_id.split(".")[2] for r in canary_requests(house)}) > looks_before)
            process.kill()
            process.start()
            assert process.client.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
            summary = process.client.summary(run_id)
        finally:
            process.terminate()
    assert results(summary) == expected
    assert summary["canary"] == looks


def test_a_teacher_that_cannot_be_asked_for_questions_is_found_before_the_run(tmp_path: Path) -> None:
    class Copyist(ScriptedTeacher):
        def ListPromptFormats(
            self, request: teacher_pb2.ListPromptFormatsRequest, context: grpc.ServicerContext
        ) -> teacher_pb2.ListPromptFormatsResponse:
            return teacher_pb2.ListPromptFormatsResponse(formats=[teacher_pb2.PromptFormat(name="open", version=1)])

    config = run_config(tasks=WRITTEN, heldout={"fixed_strategies": ()})
    house = ScriptedHouse(tmp_path, Copyist())
    with house, orchestrator_here(house, tmp_path) as o, pytest.raises(PreceptorError) as refused:
        o.create(create_request(config))
    assert refused.value.reason == "UNKNOWN_PROMPT_FORMAT"
    assert refused.value.metadata["field"] == "tasks.questions"
