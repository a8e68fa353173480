"""TeacherService over a real loopback socket, with a tiny random model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from sqlalchemy import create_engine, text

from preceptor.artifacts import verified_folder
from preceptor.channel import call, connect, is_serving, new_request_id, stream
from preceptor.convert import task_to_proto
from preceptor.errors import PreceptorError
from preceptor.server import Server
from preceptor.tasks import Passage, Question
from preceptor.v1 import teacher_pb2 as pb
from preceptor.v1 import teacher_pb2_grpc
from teacher.in_process import in_process
from teacher.prompts import Formats
from teacher.service import SERVICE, Teacher
from teacher.settings import TeacherSettings
from tests.unit.tiny_teachers import PASSAGE, tiny_teacher

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT


class Running:
    """A served teacher and a client of it."""

    def __init__(self, home: Path, **changes: Any) -> None:
        settings = TeacherSettings(home=home, port=0, grace_seconds=2, teacher_rows=8, **changes)
        self.teacher = Teacher(in_process(tiny_teacher()), settings)
        self.server = Server([SERVICE], self.teacher.add_to, settings)
        self.address = f"127.0.0.1:{self.server.port}"
        self.stub = connect(self.address, teacher_pb2_grpc.TeacherServiceStub)

    @property
    def device(self) -> Any:
        """Held, nothing is written or trained."""
        return self.teacher.writer._author._device  # type: ignore[attr-defined]

    def stop(self) -> None:
        self.teacher.stop()
        self.server.stop()
        self.teacher.store.close()


@pytest.fixture
def running(tmp_path: Path, database_setting: str) -> Iterator[Running]:
    made = Running(tmp_path, database_url=database_setting)
    yield made
    made.stop()


def tasks(count: int) -> list[Any]:
    question = Question("Where does Ada live?", "Lisbon")
    return [task_to_proto(Passage(f"Title {i}", f"{PASSAGE} Number {i}.", (question,))) for i in range(count)]


def generate_request(count: int = 5, tokens: int = 24, **changes: Any) -> pb.GenerateSelfEditsRequest:
    return pb.GenerateSelfEditsRequest(
        tasks=tasks(count), samples_per_task=4, seed=1, sampling=pb.SamplingSettings(max_new_tokens=tokens), **changes
    )


def update_request(request_id: str, *, rewards: tuple[float, ...] = (0.5, 0.1, -0.2), **changes: Any) -> Any:
    examples = [
        pb.RewardedSelfEdit(
            group_id=f"round-1/{task.id}",
            task=task,
            completion=f"directive: epochs={i + 1}\n{'Ada lives in Lisbon.' * (i + 1)}",
            prompt_format="open",
            reward=reward,
        )
        for task in tasks(3)
        for i, reward in enumerate(rewards)
    ]
    settings = pb.UpdateSettings(rank=4, alpha=8, learning_rate=3e-3, epochs=2, batch_size=2)
    return pb.UpdatePolicyRequest(
        **({"request_id": request_id, "examples": examples, "settings": settings, "seed": 7} | changes)
    )


def rewarded(**fields: Any) -> Any:
    """An update whose first example has these fields, too."""
    request = update_request("r")
    for name, value in fields.items():
        setattr(request.examples[0], name, value)
    return request


def watched(running: Running, policy_id: str) -> list[pb.Policy]:
    request = pb.WatchPolicyRequest(policy_id=policy_id)
    return [response.policy for response in stream(running.stub.WatchPolicy, request, deadline=60)]


def reason(error: pytest.ExceptionInfo[PreceptorError]) -> str:
    return error.value.reason


def test_health_says_serving(running: Running) -> None:
    assert is_serving(running.address)


def test_groups_stream_in_order_and_the_same_request_streams_the_same(running: Running) -> None:
    request = generate_request(max_resamples=1)
    first = list(stream(running.stub.GenerateSelfEdits, request, deadline=60))
    assert [group.task_id for group in first] == [task.id for task in request.tasks]
    assert {group.policy_id for group in first} == {call(running.stub.GetPolicy, pb.GetPolicyRequest()).policy.id}
    for group in first:
        assert [edit.index for edit in group.self_edits] == [0, 1, 2, 3]
        assert group.seconds > 0
        for edit in group.self_edits:
            if edit.status == pb.SELF_EDIT_STATUS_VALID:
                assert edit.self_edit.documents
                assert not edit.malformed_reason
            else:
                assert edit.status == pb.SELF_EDIT_STATUS_MALFORMED
                assert edit.malformed_reason
                assert edit.draws == 2
                assert not edit.HasField("self_edit")
    second = list(stream(running.stub.GenerateSelfEdits, request, deadline=60))
    assert [list(group.self_edits) for group in second] == [list(group.self_edits) for group in first]


def test_a_cancelled_stream_frees_the_teacher_at_once(running: Running) -> None:
    request = generate_request(count=64, tokens=120)
    began = time.monotonic()
    assert len(list(stream(running.stub.GenerateSelfEdits, request, deadline=120))) == 64
    whole = time.monotonic() - began
    other = generate_request(count=64, tokens=120)
    other.seed = 2
    groups = stream(running.stub.GenerateSelfEdits, other, deadline=120)
    next(groups)
    groups.close()  # type: ignore[attr-defined]
    began = time.monotonic()
    small = generate_request(count=1)
    small.seed = 3
    assert len(list(stream(running.stub.GenerateSelfEdits, small, deadline=60))) == 1
    assert time.monotonic() - began < whole / 4


def test_errors_arrive_as_they_were_raised(running: Running) -> None:
    long = generate_request(1)
    long.tasks[0].passage.text = PASSAGE * 20
    with pytest.raises(PreceptorError) as error:
        list(stream(running.stub.GenerateSelfEdits, long, deadline=60))
    assert reason(error) == "PASSAGE_TOO_LONG"
    assert error.value.metadata["task"] == long.tasks[0].id
    with pytest.raises(PreceptorError) as error:
        list(stream(running.stub.GenerateSelfEdits, generate_request(1, prompt_format="poem"), deadline=60))
    assert reason(error) == "UNKNOWN_PROMPT_FORMAT"
    with pytest.raises(PreceptorError) as error:
        list(stream(running.stub.GenerateSelfEdits, generate_request(1, policy_id="none"), deadline=60))
    assert reason(error) == "POLICY_NOT_FOUND"
    for bad, field in (
        (update_request(""), "request_id"),
        (update_request("r", rewards=(float("nan"),)), "examples[0].reward"),
        (update_request("r", settings=pb.UpdateSettings(algorithm="ppo")), "settings.algorithm"),
        (update_request("r", settings=pb.UpdateSettings(min_reward_z=-1)), "settings.min_reward_z"),
        (update_request("r", settings=pb.UpdateSettings(min_advantage_z=float("inf"))), "settings.min_advantage_z"),
        (rewarded(reward_stderr=float("nan")), "examples[0].reward_stderr"),
        (rewarded(advantage=float("nan")), "examples[0].advantage"),
        (rewarded(advantage=1, advantage_stderr=-1), "examples[0].advantage_stderr"),
    ):
        with pytest.raises(PreceptorError) as error:
            call(running.stub.UpdatePolicy, bad)
        assert reason(error) == "INVALID_REQUEST"
        assert error.value.metadata["field"] == field


def test_an_update_makes_a_policy_that_writes_otherwise_and_can_be_rolled_back(running: Running) -> None:
    base = call(running.stub.GetPolicy, pb.GetPolicyRequest()).policy
    assert base.active
    assert base.state == pb.POLICY_STATE_READY
    assert not base.HasField("adapter")
    started = call(running.stub.UpdatePolicy, update_request("r1")).policy
    assert started.parent_id == base.id
    assert (started.kept, started.offered, started.steps_planned) == (3, 9, 4)
    seen = watched(running, started.id)
    assert seen[-1].state == pb.POLICY_STATE_READY
    assert [policy.steps for policy in seen] == sorted(policy.steps for policy in seen)
    ended = seen[-1]
    assert ended.steps == 4
    assert ended.final_loss < ended.first_loss
    assert not ended.active
    folder = verified_folder(ended.adapter)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "probe.json",
    ]

    before = list(stream(running.stub.GenerateSelfEdits, generate_request(), deadline=60))
    active = call(running.stub.ActivatePolicy, pb.ActivatePolicyRequest(request_id="a1", policy_id=ended.id)).policy
    assert active.active
    after = list(stream(running.stub.GenerateSelfEdits, generate_request(), deadline=60))
    assert {group.policy_id for group in after} == {ended.id}
    assert [g.self_edits[0].completion for g in after] != [g.self_edits[0].completion for g in before]

    call(running.stub.ActivatePolicy, pb.ActivatePolicyRequest(request_id="a2", policy_id=base.id))
    back = list(stream(running.stub.GenerateSelfEdits, generate_request(), deadline=60))
    assert [list(group.self_edits) for group in back] == [list(group.self_edits) for group in before]


def test_a_second_update_stands_on_the_first(running: Running) -> None:
    first = watched(running, call(running.stub.UpdatePolicy, update_request("r1", activate=True)).policy.id)[-1]
    assert first.active
    second = watched(running, call(running.stub.UpdatePolicy, update_request("r2")).policy.id)[-1]
    assert second.parent_id == first.id
    assert second.id != first.id
    assert second.first_loss == pytest.approx(first.final_loss, abs=1e-4)
    assert second.final_loss < second.first_loss
    listed = call(running.stub.ListPolicies, pb.ListPoliciesRequest(page_size=2))
    assert [policy.id for policy in listed.policies] == [second.id, first.id]
    rest = call(running.stub.ListPolicies, pb.ListPoliciesRequest(page_size=2, page_token=listed.next_page_token))
    assert [policy.id for policy in rest.policies] == [first.parent_id]
    assert not rest.next_page_token


def test_retry_with_same_request_id_returns_the_first_policy_and_another_body_is_refused(running: Running) -> None:
    first = call(running.stub.UpdatePolicy, update_request("r1", activate=True)).policy
    watched(running, first.id)
    # "" meant the base then and would mean the new policy now; the answer stays
    assert call(running.stub.UpdatePolicy, update_request("r1", activate=True)).policy.id == first.id
    with pytest.raises(PreceptorError) as error:
        call(running.stub.UpdatePolicy, update_request("r1", seed=8))
    assert reason(error) == "REQUEST_ID_REUSED"
    with pytest.raises(PreceptorError) as error:
        call(running.stub.ActivatePolicy, pb.ActivatePolicyRequest(request_id="r1", policy_id=first.id))
    assert reason(error) == "REQUEST_ID_REUSED"


def test_the_same_update_is_the_same_policy_in_any_order_of_its_examples(running: Running, tmp_path: Path) -> None:
    request = update_request("r1")
    first = watched(running, call(running.stub.UpdatePolicy, request).policy.id)[-1]
    shuffled = update_request("r2", parent_id=first.parent_id)
    shuffled.examples.reverse()
    assert call(running.stub.UpdatePolicy, shuffled).policy.id == first.id
    assert len(call(running.stub.ListPolicies, pb.ListPoliciesRequest()).policies) == 2
    elsewhere = Running(tmp_path / "elsewhere")
    shuffled.parent_id = ""
    again = watched(elsewhere, call(elsewhere.stub.UpdatePolicy, shuffled).policy.id)[-1]
    elsewhere.stop()
    assert again.id == first.id
    assert again.adapter.sha256 == first.adapter.sha256


def test_an_update_that_keeps_nothing_is_the_parent_under_another_id(running: Running) -> None:
    request = update_request("r1", rewards=(-0.1, -0.2))
    policy = watched(running, call(running.stub.UpdatePolicy, request).policy.id)[-1]
    assert policy.state == pb.POLICY_STATE_READY
    assert (policy.kept, policy.offered, policy.steps) == (0, 6, 0)
    assert not policy.HasField("adapter")
    base = list(stream(running.stub.GenerateSelfEdits, generate_request(2), deadline=60))
    same = list(stream(running.stub.GenerateSelfEdits, generate_request(2, policy_id=policy.id), deadline=60))
    assert [list(group.self_edits) for group in same] == [list(group.self_edits) for group in base]
    trained = watched(running, call(running.stub.UpdatePolicy, update_request("r2", parent_id=policy.id)).policy.id)[-1]
    nothing = update_request("r3", rewards=(-0.1, -0.2), parent_id=trained.id)
    child = watched(running, call(running.stub.UpdatePolicy, nothing).policy.id)[-1]
    assert child.adapter == trained.adapter


def test_a_group_of_which_nothing_is_kept_is_dropped_and_counted(running: Running) -> None:
    request = update_request("r1")
    for example in request.examples[3:6]:
        example.reward_stderr = 0.6  # of the second of three groups nothing is above 0 by its own error
    request.settings.min_reward_z = 1
    policy = watched(running, call(running.stub.UpdatePolicy, request).policy.id)[-1]
    assert (policy.kept, policy.offered, policy.groups, policy.groups_dropped) == (2, 9, 3, 1)
    (listed, _base) = call(running.stub.ListPolicies, pb.ListPoliciesRequest()).policies
    assert (listed.groups, listed.groups_dropped) == (3, 1)


def test_the_best_of_a_group_on_fresh_seeds_is_kept_and_those_for_comparison_are_not(running: Running) -> None:
    request = update_request("r1", rewards=(0.2, 0.5, -0.2))
    for example in request.examples:
        example.only_compared = example.reward != 0.2
        example.advantage, example.advantage_stderr = example.reward - 1 / 6, 0.01
    policy = watched(running, call(running.stub.UpdatePolicy, request).policy.id)[-1]
    assert (policy.kept, policy.groups, policy.groups_dropped) == (3, 3, 0)


def test_a_store_of_before_groups_were_counted_is_served(tmp_path: Path) -> None:
    before = Running(tmp_path)
    made = watched(before, call(before.stub.UpdatePolicy, update_request("r1")).policy.id)[-1]
    url = before.teacher.store._engine.url  # the database, without what came with a table of its own
    before.stop()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM policy_groups"))
    engine.dispose()
    after = Running(tmp_path)
    found = call(after.stub.GetPolicy, pb.GetPolicyRequest(policy_id=made.id)).policy
    after.stop()
    assert (found.kept, found.offered, found.groups) == (made.kept, made.offered, 0)


def test_a_failed_update_says_why_leaves_the_parent_and_can_be_tried_again(running: Running) -> None:
    wild = pb.UpdateSettings(rank=4, alpha=1e6, learning_rate=1, epochs=40, batch_size=2)
    policy = watched(running, call(running.stub.UpdatePolicy, update_request("r1", settings=wild)).policy.id)[-1]
    assert policy.state == pb.POLICY_STATE_FAILED
    assert policy.failure.reason == "UPDATE_DIVERGED"
    assert not policy.active
    for refused in (
        lambda: call(running.stub.ActivatePolicy, pb.ActivatePolicyRequest(request_id="a", policy_id=policy.id)),
        lambda: list(stream(running.stub.GenerateSelfEdits, generate_request(1, policy_id=policy.id), deadline=60)),
        lambda: call(running.stub.UpdatePolicy, update_request("r2", parent_id=policy.id)),
    ):
        with pytest.raises(PreceptorError) as error:
            refused()
        assert reason(error) == "POLICY_NOT_READY"
    # the same request is answered as before; a new one starts the same update again
    assert call(running.stub.UpdatePolicy, update_request("r1", settings=wild)).policy.state == policy.state
    again = call(running.stub.UpdatePolicy, update_request("r3", settings=wild)).policy
    assert again.id == policy.id
    assert again.state == pb.POLICY_STATE_TRAINING
    # and the thread lives on
    good = watched(running, call(running.stub.UpdatePolicy, update_request("r4")).policy.id)[-1]
    assert good.state == pb.POLICY_STATE_READY


def test_an_update_cut_short_by_a_drain_is_finished_after_the_restart(tmp_path: Path) -> None:
    whole = Running(tmp_path / "whole")
    settings = pb.UpdateSettings(rank=4, learning_rate=3e-3, epochs=40, batch_size=1)
    expected = watched(whole, call(whole.stub.UpdatePolicy, update_request("r1", settings=settings)).policy.id)[-1]
    whole.stop()
    cut = Running(tmp_path / "cut")
    policy = call(cut.stub.UpdatePolicy, update_request("r1", settings=settings)).policy
    errors: list[str] = []

    def watch() -> None:
        try:
            watched(cut, policy.id)
        except PreceptorError as error:
            errors.append(error.reason)

    watcher = threading.Thread(target=watch)
    watcher.start()
    while call(cut.stub.GetPolicy, pb.GetPolicyRequest(policy_id=policy.id)).policy.steps < 3:
        time.sleep(0.01)
    cut.stop()
    watcher.join(timeout=10)
    assert errors == ["SHUTTING_DOWN"]
    again = Running(tmp_path / "cut")
    ended = watched(again, policy.id)[-1]
    again.stop()
    assert ended.state == pb.POLICY_STATE_READY
    assert ended.id == expected.id
    ours = load_file(verified_folder(ended.adapter) / "adapter_model.safetensors")
    theirs = load_file(verified_folder(expected.adapter) / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_the_formats_are_listed_as_they_are(running: Running) -> None:
    listed = call(running.stub.ListPromptFormats, pb.ListPromptFormatsRequest()).formats
    assert {f.name: (f.version, f.instruction, f.splitting, f.kind) for f in listed} == {
        f.name: (f.version, f.instruction, f.splitting, f.kind) for f in Formats()
    }
    assert all("{text}" in f.template and not f.file for f in listed)


def test_bad_page_tokens_and_unknown_policies_are_named(running: Running) -> None:
    with pytest.raises(PreceptorError) as error:
        call(running.stub.ListPolicies, pb.ListPoliciesRequest(page_token="x"))
    assert reason(error) == "INVALID_REQUEST"
    with pytest.raises(PreceptorError) as error:
        call(running.stub.GetPolicy, pb.GetPolicyRequest(policy_id="none"))
    assert reason(error) == "POLICY_NOT_FOUND"
    with pytest.raises(PreceptorError) as error:
        watched(running, "none")
    assert reason(error) == "POLICY_NOT_FOUND"


# Cancelling


def long_update(request_id: str, **changes: Any) -> Any:
    request = update_request(request_id, **changes)
    request.settings.epochs = 400
    return request


def cancel(running: Running, owner: str, request_id: str = "") -> int:
    request = pb.CancelUpdatesRequest(request_id=request_id or new_request_id(), owner=owner)
    return call(running.stub.CancelUpdates, request).cancelled


def test_an_update_that_nobody_waits_for_any_more_ends_within_a_step_and_can_be_asked_for_again(
    running: Running,
) -> None:
    policy = call(running.stub.UpdatePolicy, long_update("a", owner="run-1")).policy
    queued = call(running.stub.UpdatePolicy, update_request("b", owner="run-1", seed=8)).policy
    watch = pb.WatchPolicyRequest(policy_id=policy.id)
    for response in stream(running.stub.WatchPolicy, watch, deadline=60):
        if response.policy.steps == 3:
            assert cancel(running, "run-1") == 2
    ended = response.policy
    assert (ended.state, ended.failure.reason) == (pb.POLICY_STATE_FAILED, "CANCELLED")
    assert watched(running, queued.id)[-1].failure.reason == "CANCELLED"
    # The thread is free at once: a short update does not wait for the rest of the long one.
    began = time.monotonic()
    again = call(running.stub.UpdatePolicy, update_request("c", owner="run-2", seed=8)).policy
    assert again.id == queued.id
    assert watched(running, again.id)[-1].state == pb.POLICY_STATE_READY
    assert time.monotonic() - began < 5
    assert call(running.stub.GetPolicy, pb.GetPolicyRequest(policy_id=policy.id)).policy.state == pb.POLICY_STATE_FAILED
    assert cancel(running, "run-1") == cancel(running, "run-2") == 0  # what is READY stays


def test_an_update_goes_on_while_somebody_waits_for_it(running: Running) -> None:
    with running.device:
        shared = call(running.stub.UpdatePolicy, update_request("a", owner="run-1")).policy
        assert call(running.stub.UpdatePolicy, update_request("b", owner="run-2")).policy.id == shared.id
        kept = call(running.stub.UpdatePolicy, update_request("c", seed=8)).policy  # of nobody in particular
        assert cancel(running, "run-1") == 0
    assert watched(running, shared.id)[-1].state == pb.POLICY_STATE_READY
    assert watched(running, kept.id)[-1].state == pb.POLICY_STATE_READY
    with pytest.raises(PreceptorError) as refused:
        cancel(running, "")
    assert reason(refused) == "INVALID_REQUEST"


def test_names_may_be_as_long_as_the_contract_says(running: Running) -> None:
    assert cancel(running, "o" * 256, "r" * 256) == cancel(running, "o" * 256, "r" * 256) == 0
    with pytest.raises(PreceptorError) as refused:
        cancel(running, "o", "r" * 257)
    assert reason(refused) == "INVALID_REQUEST"


def test_a_cancelled_update_stays_so_over_a_restart(tmp_path: Path) -> None:
    running = Running(tmp_path)
    with running.device:
        policy = call(running.stub.UpdatePolicy, update_request("a", owner="run-1")).policy
        assert cancel(running, "run-1", "cancel-1") == 1
    running.stop()
    running = Running(tmp_path)
    try:
        found = call(running.stub.GetPolicy, pb.GetPolicyRequest(policy_id=policy.id)).policy
        assert (found.state, found.failure.reason) == (pb.POLICY_STATE_FAILED, "CANCELLED")
        with running.device:
            again = call(running.stub.UpdatePolicy, update_request("b", owner="run-1")).policy
            # A repetition that comes late ends nothing of what was asked for since.
            assert cancel(running, "run-1", "cancel-1") == 1
        assert watched(running, again.id)[-1].state == pb.POLICY_STATE_READY
    finally:
        running.stop()
