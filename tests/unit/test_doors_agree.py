"""What one door lets in, the doors behind it let in, too: a run is refused when it is created, not an hour later."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from evaluator.request import read_request
from orchestrator.plan import heldout_bank
from orchestrator.validation import validated
from preceptor.config import parse_config_json
from preceptor.convert import for_teacher
from preceptor.errors import PreceptorError
from preceptor.names import task_id
from preceptor.protocols import as_trained, chosen_probes, evaluation_protocol
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import orchestrator_pb2 as orchestrator
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import types_pb2 as types
from student.payload import settings_of
from teacher.servicer import update, writing_request
from tests.doors import knock, messages
from tests.orchestrated import create_request, run_config
from tests.unit.test_doors_files import CONFIG, as_text

STUDENT = types.PinnedStudent(name="tiny", source="/models/tiny", commit="c0ffee")
# What only the evaluator knows: whether it has a judge.
ELSEWHERE = ("JUDGE_NOT_SET",)


def ask_all(request: orchestrator.CreateRunRequest) -> None:
    """Gives the other doors what such a run would ask of them."""
    config = parse_config_json(request.config_json)
    tasks = [(task, types.QUESTION_BANK_REWARD) for task in request.tasks if config.tasks.questions == "given"]
    tasks += [(task, heldout_bank(task)) for task in request.heldout_tasks]
    for task, bank in tasks:
        edits = [types.SelfEdit(documents=["a fact."]), *task.reference_edits.values()]
        asked = evaluator.CreateEvaluationsRequest(
            request_id="r",
            owner="run",
            task=task,
            self_edits=[as_trained(edit, config.training) for edit in edits],
            protocol=evaluation_protocol(
                config,
                bank=bank,
                probes=chosen_probes(config, request.probes),
                replay_documents=request.replay_documents,
                seeds=list(range(config.most_seeds)),
            ),
            student=STUDENT,
        )
        asked.task.ClearField("reference_edits")
        try:
            read = read_request(asked)
        except PreceptorError as error:
            if error.reason not in ELSEWHERE:
                raise
        else:
            for edit in read.tasks[0].edits:
                settings_of(edit.settings)
    sampling = config.teacher
    writing_request(
        teacher.GenerateSelfEditsRequest(
            tasks=[for_teacher(task) for task in request.tasks],
            samples_per_task=config.rounds.self_edits,
            sampling=teacher.SamplingSettings(
                temperature=sampling.temperature, top_p=sampling.top_p, max_new_tokens=sampling.max_new_tokens
            ),
            max_resamples=sampling.max_resamples,
        )
    )
    update(
        teacher.UpdatePolicyRequest(
            request_id="r", settings=teacher.UpdateSettings(**config.update.model_dump()), seed=config.seed
        )
    )


def answer(request: orchestrator.CreateRunRequest) -> str:
    try:
        validated(request)
    except PreceptorError as error:
        return error.reason
    ask_all(request)
    return "OK"


def test_what_a_run_brings_is_taken_by_all_that_it_asks() -> None:
    good = create_request(run_config(rounds={"count": 1}), train=2, heldout=1)
    good.request_id = "r"
    del good.probes[2:]
    known = {task.id for task in (*good.tasks, *good.heldout_tasks)}

    def healed(request: Any) -> Any:
        request.config_json = good.config_json
        for task in (*request.tasks, *request.heldout_tasks):
            if task.id in known:
                task.id = task_id(task)
        return request

    knock("tasks of a run, at all doors", messages(good).map(healed), answer)


def test_what_a_config_says_is_taken_by_all_that_it_configures() -> None:
    good = create_request(run_config(rounds={"count": 1}), train=2, heldout=1)
    good.request_id = "r"
    del good.probes[2:]
    world = {**CONFIG, "tasks": {"world": "almanac"}}

    def with_config(text: bytes) -> orchestrator.CreateRunRequest:
        request = orchestrator.CreateRunRequest()
        request.CopyFrom(good)
        request.config_json = text.decode("utf-8", "replace")
        return request

    knock("config of a run, at all doors", st.one_of(as_text(world), as_text(CONFIG)).map(with_config), answer)
