from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preceptor.channel import call, new_request_id, stream
from preceptor.errors import PreceptorError
from preceptor.names import task_id
from preceptor.testing.scripted_evaluator import ScriptedEvaluator
from preceptor.testing.scripted_house import ScriptedHouse
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import types_pb2 as types
from tests.orchestrated import (
    Orchestrator,
    create_request,
    few_shot,
    few_shot_config,
    few_shot_request,
    orchestrator_here,
    passage,
    run_config,
)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[ScriptedHouse]:
    with ScriptedHouse(tmp_path) as standing:
        yield standing


@pytest.fixture
def orchestrator(house: ScriptedHouse, tmp_path: Path) -> Iterator[Orchestrator]:
    with orchestrator_here(house, tmp_path, max_running_runs=1) as client:
        yield client


SEALED = types.QUESTION_BANK_SEALED


def asked(*questions: tuple[str, str] | tuple[str, str, types.QuestionBank.ValueType]) -> types.Task:
    """A task with these questions, answers and (else reward) banks."""
    passage = types.Passage(title="t", text="This is what is all about it.")
    for text, answer, *bank in questions:
        passage.questions.add(text=text, answer=answer, bank=bank[0] if bank else types.QUESTION_BANK_REWARD)
    return types.Task(passage=passage)


def refused(orchestrator: Orchestrator, request: pb.CreateRunRequest) -> PreceptorError:
    with pytest.raises(PreceptorError) as caught:
        orchestrator.create(request)
    assert not call(orchestrator.stub.ListRuns, pb.ListRunsRequest()).runs
    return caught.value


def test_the_same_request_makes_one_run_and_another_body_is_refused(orchestrator: Orchestrator) -> None:
    request = create_request()
    first = orchestrator.create(request)
    assert orchestrator.create(request) == first
    request.tasks.pop()
    with pytest.raises(PreceptorError) as caught:
        orchestrator.create(request)
    assert caught.value.reason == "REQUEST_ID_REUSED"
    assert len(call(orchestrator.stub.ListRuns, pb.ListRunsRequest()).runs) == 1


def test_one_request_id_is_not_for_two_kinds_of_request(orchestrator: Orchestrator) -> None:
    run_id, request_id = orchestrator.create(create_request()), new_request_id()
    call(orchestrator.stub.CancelRun, pb.CancelRunRequest(request_id=request_id, run_id=run_id))
    call(orchestrator.stub.CancelRun, pb.CancelRunRequest(request_id=request_id, run_id=run_id))
    with pytest.raises(PreceptorError) as caught:
        call(orchestrator.stub.ResumeRun, pb.ResumeRunRequest(request_id=request_id, run_id=run_id))
    assert caught.value.reason == "REQUEST_ID_REUSED"


def test_a_bad_config_is_named_by_its_key(orchestrator: Orchestrator) -> None:
    request = create_request()
    request.config_json = '{"tasks": {"world": "almanac"}, "rounds": {"cuont": 3}}'
    error = refused(orchestrator, request)
    assert error.reason == "BAD_CONFIG"
    assert "rounds.cuont" in str(error)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (types.Task(passage=types.Passage(title="t", text="  ")), "empty text"),
        (
            types.Task(passage=types.Passage(text="x", questions=[types.Question(text="why?")])),
            "question without an answer: 'why?'",
        ),
        (types.Task(passage=types.Passage(text="x")), "no reward question"),
        (asked(("Which colour is it?", "red"), ("which colour is  it", "Red")), "is asked twice"),
        (
            asked(("Which colour is it?", "red"), ("Which colour is it?", "blue")),
            "has the answer 'blue' here and 'red'",
        ),
        (asked(("Which colour is it?", "red"), ("Which colour is it?", "red", SEALED)), "in bank reward, too"),
        (asked(("What is all about it?", "x")), "stands in the passage, which the teacher reads"),
        (asked(("Which words?", "word " * 40)), "the gold answer has 40 words, and an answer may have 32 tokens"),
        (types.Task(few_shot=types.FewShotTask(name="f")), "is of another kind"),
        (passage("town 0"), "is the same as task 1"),
    ],
)
def test_a_bad_task_is_named_by_its_place(orchestrator: Orchestrator, task: types.Task, words: str) -> None:
    request = create_request()
    task.id = task_id(task)
    request.tasks.append(task)
    error = refused(orchestrator, request)
    assert error.reason == "BAD_TASK_FILE"
    assert words in error.message
    assert "task 6" in error.message
    assert error.metadata["field"].startswith("tasks[5]")


def no_query() -> types.Task:
    task = few_shot("bad")
    del task.few_shot.queries[:]
    return task


def ragged() -> types.Task:
    task = few_shot("bad")
    del task.few_shot.demonstrations[1].input.rows[0].cells[:2]
    return task


def unknown_output() -> types.Task:
    task = few_shot("bad")
    task.few_shot.queries[1].ClearField("output")
    return task


def large_output() -> types.Task:
    task = few_shot("bad")
    for _ in range(4):
        task.few_shot.queries[0].output.rows.add(cells=[0] * 6)
    return task


def with_documents() -> types.Task:
    task = few_shot("bad")
    task.reference_edits["oracle"].documents.append("Input: 1")
    return task


def strange_targets() -> types.Task:
    task = few_shot("bad")
    task.reference_edits["oracle"].directive.targets = "everything"
    return task


@pytest.mark.parametrize(
    ("task", "words", "place"),
    [
        (no_query(), "has 0 queries", "few_shot.queries"),
        (ragged(), "few_shot.demonstrations[1].input has rows of 4 to 6 cells", "few_shot.demonstrations[1].input"),
        (unknown_output(), "few_shot.queries[1].output is empty", "few_shot.queries[1].output"),
        (large_output(), "few_shot.queries[0].output", "few_shot.queries[0].output"),
        (with_documents(), "it has documents", ""),
        (strange_targets(), "targets 'everything' is not one of qv, attention, mlp, all", ""),
        (passage("town"), "is of another kind than the tasks before it", "kind"),
        (few_shot("rule 1"), "is the same as task 2", ""),
        (types.Task(), "is neither a passage nor a few-shot task", "kind"),
    ],
)
def test_a_bad_few_shot_task_is_named_by_its_place(
    orchestrator: Orchestrator, task: types.Task, words: str, place: str
) -> None:
    request = few_shot_request()
    task.id = task_id(task)
    request.tasks.append(task)
    error = refused(orchestrator, request)
    assert error.reason == "BAD_TASK_FILE"
    assert words in error.message
    assert error.metadata["field"] == f"tasks[5]{'.' if place else ''}{place}"


def test_a_heldout_few_shot_task_whose_demonstrations_are_trained_on_is_refused(orchestrator: Orchestrator) -> None:
    request = few_shot_request()
    seen = few_shot("rule 2", queries=1)
    seen.few_shot.name = "another name"
    seen.id = task_id(seen)
    request.heldout_tasks.append(seen)
    assert "is among the training tasks" in refused(orchestrator, request).message


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"heldout": {"in_context": True}}, "heldout.in_context"),
        ({"heldout": {"formats": ["copy"]}}, "heldout.formats"),
        ({"training": {"include_passage": True}}, "training.include_passage"),
        ({"tasks": {"questions": "written"}}, "tasks.questions"),
    ],
)
def test_what_few_shot_tasks_have_not_is_not_asked_of_them(
    orchestrator: Orchestrator, changes: dict[str, Any], field: str
) -> None:
    error = refused(orchestrator, few_shot_request(few_shot_config(**changes)))
    assert (error.reason, error.metadata["field"]) == ("BAD_CONFIG", field)


def test_directives_of_few_shot_tasks_are_not_for_passages(orchestrator: Orchestrator) -> None:
    error = refused(orchestrator, create_request(few_shot_config()))
    assert error.metadata["field"] == "heldout.fixed_strategies.1.augmentations"
    assert "few-shot tasks alone" in error.message


def test_an_unknown_format_of_an_arm_is_found_before_the_run_exists(orchestrator: Orchestrator) -> None:
    error = refused(orchestrator, create_request(run_config(heldout={"formats": ["copy", "song"]})))
    assert (error.reason, error.metadata["field"]) == ("UNKNOWN_PROMPT_FORMAT", "heldout.formats.1")


def test_a_heldout_passage_that_is_trained_on_is_refused(orchestrator: Orchestrator) -> None:
    request = create_request()
    seen = passage("town 2", questions=1)  # other questions, the same text
    request.heldout_tasks.append(seen)
    assert "among the training tasks" in refused(orchestrator, request).message


def test_unknown_student_and_unknown_prompt_format_are_found_before_the_run_exists(orchestrator: Orchestrator) -> None:
    request = create_request(run_config(student={"name": "nobody"}))
    assert refused(orchestrator, request).reason == "STUDENT_NOT_FOUND"
    request = create_request(run_config(teacher={"prompt_format": "sonnet"}))
    error = refused(orchestrator, request)
    assert error.reason == "UNKNOWN_PROMPT_FORMAT"
    assert error.metadata["field"] == "teacher.prompt_format"


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"teacher": {"prompt_format": "augmentations"}}, "teacher.prompt_format", "is for few-shot tasks, which this"),
        ({"heldout": {"formats": ["copy", "augmentations"]}}, "heldout.formats.1", "is for few-shot tasks, which this"),
        (
            {"teacher": {"prompt_format": "none"}},
            "teacher.prompt_format",
            "nobody writes, so there is nothing to learn",
        ),
    ],
)
def test_a_format_that_is_not_for_the_run_is_found_before_it_exists(
    orchestrator: Orchestrator, changes: dict[str, Any], field: str, said: str
) -> None:
    error = refused(orchestrator, create_request(run_config(**changes)))
    assert (error.reason, error.metadata["field"]) == ("BAD_CONFIG", field)
    assert said in error.message


def test_a_task_that_no_prompt_can_hold_is_found_before_the_run_exists(orchestrator: Orchestrator) -> None:
    long = create_request(run_config(heldout={"in_context": True}))
    long.heldout_tasks[2].passage.text += " Word" * 40_000
    long.heldout_tasks[2].id = task_id(long.heldout_tasks[2])
    grids = few_shot_request(few_shot_config(few_shot={"separator": " "}, answers={"max_new_tokens": 1024}))
    rows = [types.GridRow(cells=[i % 10] * 30) for i in range(30)]
    for _ in range(80):
        pair = grids.tasks[1].few_shot.demonstrations.add()
        pair.input.rows.extend(rows)
        pair.output.rows.extend(rows)
    grids.tasks[1].id = task_id(grids.tasks[1])
    for request, field in ((long, "heldout_tasks[2].passage.text"), (grids, "tasks[1].few_shot")):
        error = refused(orchestrator, request)
        assert (error.reason, error.metadata["field"]) == ("BAD_TASK_FILE", field)
        assert "makes a prompt of" in error.message


def test_a_judge_that_is_not_set_is_found_before_the_run_exists(orchestrator: Orchestrator) -> None:
    for grader in ("judge", "cascade"):
        error = refused(orchestrator, create_request(run_config(reward={"grader": grader})))
        assert error.reason == "JUDGE_NOT_SET"
        assert error.metadata["field"] == "reward.grader"


def test_a_probe_whose_answer_is_too_long_is_named(orchestrator: Orchestrator) -> None:
    request = create_request()
    request.probes[3].answer = "word " * 40
    error = refused(orchestrator, request)
    assert "probe 4: the gold answer has 40 words" in error.message
    assert error.metadata["field"] == "probes[3]"


def test_gold_answers_are_needed_where_the_reward_or_the_measurement_needs_them(orchestrator: Orchestrator) -> None:
    request = create_request(run_config(reward={"gain": 0.0, "certainty_gain": 1.0}))
    for task in request.tasks:
        for question in task.passage.questions:
            question.answer = ""
        task.id = task_id(task)
    orchestrator.create(request)
    task = request.heldout_tasks[1]
    task.passage.questions[-1].answer = ""
    task.id = task_id(task)
    request.request_id = new_request_id()
    with pytest.raises(PreceptorError, match="has a question without an answer") as caught:
        orchestrator.create(request)
    assert caught.value.metadata["field"].startswith("heldout_tasks[1].passage.questions")


def test_where_questions_are_written_a_task_needs_none(orchestrator: Orchestrator) -> None:
    request = create_request()
    for task in request.tasks:
        del task.passage.questions[:]
        task.id = task_id(task)
    assert "has no reward question" in refused(orchestrator, request).message
    request.config_json = run_config(tasks={"questions": "written"}).to_json()
    orchestrator.create(request)


def test_a_run_pins_the_active_student_and_a_swap_is_for_the_next_run(
    house: ScriptedHouse, orchestrator: Orchestrator
) -> None:
    first = orchestrator.create(create_request())
    house.students.active = "second"
    second = orchestrator.create(create_request())
    named = orchestrator.create(create_request(run_config(student={"name": "first"})))
    for run_id, commit in ((first, "commit-of-first"), (second, "commit-of-second"), (named, "commit-of-first")):
        assert orchestrator.finish(run_id).student.commit == commit
        asked = {r.student.commit for r in house.evaluator.requests if r.owner == run_id}
        assert asked == {commit}


def test_runs_beyond_the_bound_wait_and_then_run(tmp_path: Path) -> None:
    slow = ScriptedEvaluator(seconds=0.3)
    with ScriptedHouse(tmp_path, evaluator=slow) as house, orchestrator_here(house, tmp_path, max_running_runs=1) as o:
        first, second = o.create(create_request()), o.create(create_request())
        assert o.run(second).state == pb.RUN_STATE_PENDING
        assert o.finish(first).state == pb.RUN_STATE_SUCCEEDED
        assert o.finish(second).state == pb.RUN_STATE_SUCCEEDED


def test_lists_are_paged_newest_first(orchestrator: Orchestrator) -> None:
    made = [orchestrator.create(create_request(run_config(rounds={"count": 0}))) for _ in range(3)]
    page = call(orchestrator.stub.ListRuns, pb.ListRunsRequest(page_size=2))
    rest = call(orchestrator.stub.ListRuns, pb.ListRunsRequest(page_size=2, page_token=page.next_page_token))
    assert [run.id for run in (*page.runs, *rest.runs)] == made[::-1]
    assert not rest.next_page_token
    with pytest.raises(PreceptorError) as caught:
        call(orchestrator.stub.ListRuns, pb.ListRunsRequest(page_token="x"))
    assert caught.value.metadata["field"] == "page_token"


def test_a_watch_ends_with_the_final_state_and_sees_rewards_on_the_way(tmp_path: Path) -> None:
    slow = ScriptedEvaluator(seconds=0.3)
    with ScriptedHouse(tmp_path, evaluator=slow) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(create_request())
        seen = list(stream(o.stub.WatchRun, pb.WatchRunRequest(run_id=run_id), deadline=60))
    assert seen[-1].run.state == seen[-1].progress.state == pb.RUN_STATE_SUCCEEDED
    assert seen[-1].progress.done_share == 1
    shares = [watched.progress.done_share for watched in seen]
    assert shares == sorted(shares)
    assert any(0 < share < 1 for share in shares)
    assert any(watched.progress.phase.startswith("round 1") for watched in seen)
    assert any(watched.progress.evaluations_running for watched in seen)
    assert seen[-1].progress.first_reward_seconds > 0
    assert {reward.round for reward in seen[-1].progress.rewards} == {1, 2}


def test_what_is_not_there_is_said(orchestrator: Orchestrator) -> None:
    for method, request in (
        (orchestrator.stub.GetRun, pb.GetRunRequest(run_id="x")),
        (orchestrator.stub.GetRunReport, pb.GetRunReportRequest(run_id="x")),
        (orchestrator.stub.CancelRun, pb.CancelRunRequest(request_id="1", run_id="x")),
    ):
        with pytest.raises(PreceptorError) as caught:
            call(method, request)
        assert caught.value.reason == "RUN_NOT_FOUND"


def test_a_report_comes_only_from_a_run_that_succeeded(tmp_path: Path) -> None:
    slow = ScriptedEvaluator(seconds=5)
    with ScriptedHouse(tmp_path, evaluator=slow) as house, orchestrator_here(house, tmp_path) as o:
        run_id = o.create(create_request())
        with pytest.raises(PreceptorError) as caught:
            o.summary(run_id)
    assert caught.value.reason == "RUN_NOT_FINISHED"


def test_a_finished_run_is_neither_cancelled_nor_resumed(orchestrator: Orchestrator) -> None:
    run_id = orchestrator.create(create_request())
    orchestrator.finish(run_id)
    for act in (orchestrator.cancel, orchestrator.resume):
        with pytest.raises(PreceptorError) as caught:
            act(run_id)
        assert caught.value.reason == "RUN_ALREADY_FINISHED"


def test_the_ledger_lists_every_self_edit_of_the_rounds_with_what_became_of_it(orchestrator: Orchestrator) -> None:
    run_id = orchestrator.create(create_request())
    orchestrator.finish(run_id)
    lines = orchestrator.self_edits(run_id)
    assert len(lines) == 2 * 3 * 4
    assert all(line.task_title.startswith("town") for line in lines)
    for line in lines:
        assert line.malformed != line.HasField("reward")
        assert bool(line.malformed_reason) == line.malformed == (not line.evaluation_id)
    second = call(orchestrator.stub.ListSelfEdits, pb.ListSelfEditsRequest(run_id=run_id, round=2)).self_edits
    assert list(second) == lines[12:]
    assert len({line.policy_id for line in lines}) == 2
