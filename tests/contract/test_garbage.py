"""What teacher and evaluator let go and what they keep, asked for over gRPC; with adapters on a disk and in a bucket of
a real S3-compatible server (moto's)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select

from evaluator.attempts import Ending, begin, end
from evaluator.database import (
    BASELINE_POSITION,
    LIVE,
    Database,
    State,
    evaluation_trials,
    evaluations,
    owners,
    requests,
    trials,
)
from evaluator.garbage import EvaluatorGarbage
from evaluator.graders.verdicts import VerdictStore
from preceptor.artifacts import ArtifactStore, FolderStore
from preceptor.channel import call
from preceptor.errors import PreceptorError
from preceptor.v1 import evaluator_pb2
from preceptor.v1 import teacher_pb2 as pb
from preceptor.v1 import types_pb2 as types
from tests.contract.test_teacher_service import Running, update_request, watched
from tests.contract.test_teacher_storage import made, policy, until, written
from tests.s3_server import BUCKET, S3Server, s3_server

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT

DAY = 86400.0


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    server.set_environment(monkeypatch)
    return server


@pytest.fixture(params=["disk", "bucket"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Of a teacher."""
    if request.param == "disk":
        return {"home": tmp_path}
    request.getfixturevalue("s3")
    return {"home": tmp_path, "artifacts_url": f"s3://{BUCKET}/{tmp_path.name}"}


def collected(running: Running, *, keep_days: int = 0, dry_run: bool = False, owners: tuple[str, ...] = ()) -> Any:
    request = pb.TeacherServiceCollectGarbageRequest(dry_run=dry_run, keep_days=keep_days, keep_owners=owners)
    return call(running.stub.CollectGarbage, request, deadline=60).garbage


def names(garbage: Any) -> set[str]:
    return {item.name for item in garbage if item.kind == "adapter"}


def test_an_old_adapter_goes_and_its_policy_is_trained_again_to_the_same(settings: dict[str, Any]) -> None:
    running = Running(**settings)
    first = made(running)
    text = written(running, first.id)
    assert not names(collected(running, dry_run=True)), "what this process has just used stays"
    assert not names(collected(running))
    running.stop()
    running = Running(**settings)
    try:
        assert not collected(running, keep_days=1), "it is not old"
        (adapter, *_) = would = collected(running, dry_run=True)
        assert names(would) == {first.id}
        assert adapter.bytes > 1000
        assert adapter.age_seconds < 600
        assert names(collected(running, dry_run=True)) == {first.id}, "a dry run removes nothing"
        assert names(collected(running)) == {first.id}
        assert not names(collected(running)), "twice is harmless"
        assert policy(running, first.id).state == pb.POLICY_STATE_READY
        assert written(running, first.id) == text
        assert policy(running, first.id).adapter.sha256 == first.adapter.sha256
    finally:
        running.stop()


def test_what_is_active_or_a_run_under_way_has_made_stays(settings: dict[str, Any]) -> None:
    running = Running(**settings)
    of_run = made(running, owner="run-1")
    child = made(running, request_id="second", parent_id=of_run.id, owner="run-2")
    active = made(running, request_id="third", parent_id=child.id, seed=8, activate=True)
    running.teacher.policies._artifacts.write_folder("another-house", lambda folder: (folder / "f").touch())
    running.stop()
    running = Running(**settings)
    try:
        assert names(collected(running, dry_run=True)) == {of_run.id, child.id}
        assert names(collected(running, dry_run=True, owners=("run-1",))) == {child.id}
        assert not names(collected(running, dry_run=True, owners=("run-2",))), "with its whole line"
        assert names(collected(running)) == {of_run.id, child.id}
        assert len(written(running, active.id)) == 2
        # Its parents are gone; whoever trains on it has it, and whoever trains on them gets them back.
        again = made(running, request_id="fourth", parent_id=child.id, seed=9)
        assert again.parent_id == child.id
    finally:
        running.stop()


def test_the_line_of_what_is_being_trained_stays(settings: dict[str, Any]) -> None:
    running = Running(**settings)
    parent = made(running)
    running.stop()
    running = Running(**settings)
    try:
        with running.device:
            request = update_request("second", parent_id=parent.id)
            started = call(running.stub.UpdatePolicy, request).policy
            assert not names(collected(running))
        assert watched(running, started.id)[-1].state == pb.POLICY_STATE_READY
    finally:
        running.stop()


def test_written_groups_go_by_age_and_are_written_again(tmp_path: Path) -> None:
    running = Running(tmp_path)
    try:
        text = written(running, "")
        time.sleep(0.01)
        assert not collected(running, keep_days=1)
        (item,) = collected(running, dry_run=True)
        assert (item.kind, item.count) == ("written groups", 2)
        assert item.bytes > 100
        assert [one.kind for one in collected(running)] == ["written groups"]
        assert not collected(running)
        assert written(running, "") == text
    finally:
        running.stop()


def test_leftovers_go_when_their_writer_must_be_dead(tmp_path: Path) -> None:
    running = Running(tmp_path)
    try:
        left = tmp_path / "artifacts" / "policies" / ".draft-x-1"
        left.mkdir(parents=True)
        (left / "f").write_text("half")
        assert not collected(running)
        hours_ago = time.time() - 2 * 3600
        for path in (left / "f", left):
            os.utime(path, (hours_ago, hours_ago))
        (item,) = collected(running, keep_days=30)
        assert (item.kind, item.name) == ("leftover", ".draft-x-1")
        assert not left.exists()
    finally:
        running.stop()


def test_an_update_waits_for_a_bucket_that_is_away_and_says_so(s3: S3Server, tmp_path: Path) -> None:
    running = Running(tmp_path, artifacts_url=f"s3://{BUCKET}/{tmp_path.name}")
    try:
        s3.proxy.refuse(600)
        started = call(running.stub.UpdatePolicy, update_request("first")).policy
        until(lambda: policy(running, started.id).failure.reason == "ARTIFACT_STORE_UNREACHABLE", seconds=60)
        assert policy(running, started.id).state == pb.POLICY_STATE_TRAINING
        s3.proxy.heal()
        first = watched(running, started.id)[-1]
        assert first.state == pb.POLICY_STATE_READY
        assert first.adapter.uri == f"s3://{BUCKET}/{tmp_path.name}/policies/{first.id}"
    finally:
        s3.proxy.heal()
        running.stop()
    s3.proxy.refuse(600)  # a teacher that starts meanwhile serves what needs no bucket
    running = Running(tmp_path / "another-machine", artifacts_url=f"s3://{BUCKET}/{tmp_path.name}")
    try:
        assert len(written(running, "")) == 2
    finally:
        s3.proxy.heal()
        running.stop()


def test_an_adapter_that_was_damaged_in_the_bucket_is_made_again(s3: S3Server, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/{tmp_path.name}"
    running = Running(tmp_path / "one", artifacts_url=url)
    first = made(running)
    text = written(running, first.id)
    running.stop()
    s3.put(f"{tmp_path.name}/policies/{first.id}/adapter_model.safetensors", b"damaged")
    (tmp_path / "one" / "artifact-cache").rename(tmp_path / "gone")
    running = Running(tmp_path / "one", artifacts_url=url)
    try:
        running.teacher.store.forget_written(time.time() + 1)
        assert written(running, first.id) == text
        assert policy(running, first.id).adapter == first.adapter
        assert s3.read(f"{tmp_path.name}/policies/{first.id}/adapter_model.safetensors") != b"damaged"
    finally:
        running.stop()


def test_a_teacher_whose_key_is_wrong_says_so_at_once(s3: S3Server, tmp_path: Path) -> None:
    s3.check_keys()
    try:
        with pytest.raises(PreceptorError) as refused:
            Running(tmp_path, artifacts_url=f"s3://{BUCKET}/x")
    finally:
        s3.let_everybody_in()
    assert refused.value.reason == "ARTIFACT_STORE_REFUSED"


def test_limits_of_a_request_are_told(tmp_path: Path) -> None:
    running = Running(tmp_path)
    try:
        for changes in (
            {"keep_days": 36_501},
            {"owners": ("",)},
            {"owners": ("x" * 300,)},
            {"owners": ("a",) * 10_001},
        ):
            with pytest.raises(PreceptorError) as refused:
                collected(running, **changes)
            assert refused.value.reason == "INVALID_REQUEST"
    finally:
        running.stop()


def no_edits() -> ArtifactStore:
    raise AssertionError("nobody has asked about edits")


def test_an_edit_stays_as_long_as_an_evaluation_needs_it(database_url: str, tmp_path: Path) -> None:
    """Old ones that nobody younger has learnt or stands on go, with their evaluations and that they were asked for."""
    root = tmp_path / "edits"
    database, store = Database(database_url), FolderStore(root)
    now = time.time()

    def publish(name: str) -> types.Artifact:
        def write(folder: Path) -> None:
            (folder / "f").write_text(name)

        return store.write_folder(name, write)

    names = ("alone", "shared", "below", "running", "awaited", "foreign")
    alone, shared, below, running, awaited, _ = (publish(name) for name in names)
    with database.write() as tx:

        def put(name: str, state: State, days: float, learnt: types.Artifact | None, *on: types.Artifact) -> None:
            body = evaluator_pb2.Evaluation(id=name, student=types.PinnedStudent(adapters=on))
            body.trials.add(adapter=learnt)
            finished = None if state in LIVE else now - days * DAY
            row = {"id": name, "state": state, "exam_id": "exam", "created": now - 99 * DAY, "finished": finished}
            tx.execute(insert(evaluations).values(**row, body=body.SerializeToString()))
            for position in (BASELINE_POSITION, 0):
                one = {"evaluation_id": name, "position": position, "trial_id": f"trial-{name}-{position}", "seed": "0"}
                tx.execute(insert(evaluation_trials).values(one))
                trial = {"id": one["trial_id"], "state": "DONE", "batch_id": "batch", "result": b""}
                tx.execute(insert(trials).values(trial))
            tx.execute(insert(owners).values(owner="run", evaluation_id=name))
            tx.execute(insert(requests).values(id=f"request-{name}", body_sha256="0", reply=f'[["{name}", false]]'))

        put("old", State.SUCCEEDED, 40, alone)
        put("old and shared", State.SUCCEEDED, 40, shared)
        put("young", State.SUCCEEDED, 1, shared, below)
        put("old and below", State.SUCCEEDED, 40, below)
        put("old and run upon", State.SUCCEEDED, 40, running)
        put("live", State.RUNNING, 0, None, running)
        put("old and awaited", State.SUCCEEDED, 40, awaited)
        put("waiting", State.RUNNING, 0, None)  # has that trial, and another one that is not done
        link = {"evaluation_id": "waiting", "position": 1, "trial_id": "trial-old and awaited-0", "seed": "1"}
        tx.execute(insert(evaluation_trials).values(link))

    def left(table: Any, column: Any) -> set[str]:
        with database.read() as tx:
            return set(tx.execute(select(column).select_from(table)).scalars())

    garbage = EvaluatorGarbage(database, lambda: store)
    for path in root.rglob("*"):
        os.utime(path, (now - 40 * DAY, now - 40 * DAY))
    try:
        assert not garbage.collect(30 * DAY, dry_run=False)
        assert {item.name for item in garbage.collect(30 * DAY, dry_run=True, edits=True)} == {"alone"}
        assert {item.name for item in store.list()} == set(names)
        (item,) = garbage.collect(30 * DAY, dry_run=False, edits=True)
        assert (item.kind, item.name, item.count) == ("edit", "alone", 1)
        assert item.age_seconds == pytest.approx(40 * DAY, rel=0.01)
        assert {item.name for item in store.list()} == set(names) - {"alone"}
        assert not garbage.collect(30 * DAY, dry_run=False, edits=True)
        stays = {"old and shared", "young", "old and below", "old and run upon", "live", "old and awaited", "waiting"}
        assert left(evaluations, evaluations.c.id) == stays
        assert left(owners, owners.c.evaluation_id) == stays
        assert left(requests, requests.c.id) == {f"request-{name}" for name in stays}
        assert left(evaluation_trials, evaluation_trials.c.evaluation_id) == stays
        assert "trial-old-0" not in left(trials, trials.c.id)
        assert "trial-old--1" in left(trials, trials.c.id), "the untouched student is others' too"
        draft = root / ".draft-adapter-1"
        draft.mkdir()
        assert not garbage.collect(0, dry_run=True, edits=True)[3:], "it may be under way"
        os.utime(draft, (now - 7200, now - 7200))
        kinds = {item.name: item.kind for item in garbage.collect(30 * DAY, dry_run=False, edits=True)}
        assert kinds == {".draft-adapter-1": "leftover"}
    finally:
        database.close()


def test_an_evaluator_forgets_what_is_old_and_nothing_else(database_url: str) -> None:
    database = Database(database_url)
    now = time.time()
    with database.write() as tx:
        for number, ended in ((1, now - 40 * DAY), (2, now - DAY), (3, None)):
            begin(tx, "batch", number, 1, now - 50 * DAY)
            if ended is not None:
                end(tx, "batch", number, Ending(), ended)
    verdicts = VerdictStore(database)
    verdicts.put("old", True, None)
    later = EvaluatorGarbage(database, no_edits, clock=lambda: now + 31 * DAY)
    here = EvaluatorGarbage(database, no_edits)
    try:

        def told(found: list[types.Garbage]) -> list[tuple[str, int]]:
            return [(item.kind, item.count) for item in found]

        assert told(here.collect(30 * DAY, dry_run=True)) == [("attempts", 1)]
        assert told(here.collect(30 * DAY, dry_run=False)) == [("attempts", 1)]
        assert told(here.collect(30 * DAY, dry_run=False)) == []
        assert verdicts.known(["old"]) == {"old": True}
        assert told(later.collect(30 * DAY, dry_run=False)) == [("attempts", 1), ("verdicts", 1)]
        assert verdicts.known(["old"]) == {}
        assert told(later.collect(0, dry_run=True)) == [], "an attempt under way is no history"
    finally:
        database.close()
