"""What FAILED can be seen and run again: dead letters, attempts, retries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select

from evaluator.database import attempts, dead_batches, dead_letters, evaluations
from preceptor.errors import PreceptorError
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types
from tests.evaluation_requests import group
from tests.evaluator_house import CANCELLED, FAILED, QUEUED, SUCCEEDED, House
from tests.fake_broker import FakeBroker
from tests.old_homes import old_home
from tests.scripted_trials import answer_batch


@pytest.fixture
def house(database_url: str) -> Iterator[House]:
    made = House(database_url, FakeBroker())
    yield made
    made.close()


def retry(house: House, *ids: str, request_id: str = "again", **chosen: str) -> int:
    request = pb.RetryEvaluationsRequest(request_id=request_id, evaluation_ids=ids, **chosen)
    return house.evaluations.retry(request)


def diverge(house: House) -> None:
    """Everything on the queue is answered, and every trial that trains fails."""

    def rule(batch: trial.TrialBatch) -> trial.TrialBatchResult:
        result = answer_batch(batch)
        for item, asked in zip(result.results, batch.trials, strict=True):
            if asked.documents:
                failure = types.Failure(reason="TRIAL_DIVERGED", message="scripted")
                item.CopyFrom(trial.TrialResult(trial_id=item.trial_id, failure=failure))
        return result

    house.step()
    house.broker.work(rule)
    house.step()


def work(house: House) -> None:
    house.step()
    house.broker.work()
    house.step()


def count(house: House, table: object) -> int:
    with house.database.read() as tx:
        return int(tx.execute(select(func.count()).select_from(table)).scalar_one())  # type: ignore[arg-type]


def test_a_failed_evaluation_goes_back_to_work_under_its_id_with_its_old_company(house: House) -> None:
    made = house.create("Ada lives in Lisbon.", "Ada is a baker.", "fail:TRIAL_DIVERGED")
    diverge(house)
    assert house.states(made) == [FAILED] * 3
    assert retry(house, made[0].id, made[1].id) == 2
    assert house.states(made) == [QUEUED, QUEUED, FAILED]
    assert not house.evaluations.get(made[0].id).HasField("failure")
    house.step()
    (batch,) = house.broker.waiting.values()  # together, and not the baseline
    assert [item.documents[0] for item in batch.trials] == ["Ada lives in Lisbon.", "Ada is a baker."]
    work(house)
    assert house.states(made) == [SUCCEEDED, SUCCEEDED, FAILED]
    assert house.evaluations.get(made[0].id).reward.value == 0.5
    assert count(house, dead_letters) == 1  # of the one that was left


def test_a_repeated_retry_does_nothing_again(house: House) -> None:
    made = house.create("a", "b")
    diverge(house)
    assert retry(house) == 2
    diverge(house)
    assert house.states(made) == [FAILED, FAILED]
    assert retry(house) == 2
    assert house.states(made) == [FAILED, FAILED]
    with pytest.raises(PreceptorError) as raised:
        retry(house, made[0].id)
    assert raised.value.reason == "REQUEST_ID_REUSED"
    assert retry(house, request_id="once more") == 2
    work(house)
    assert house.states(made) == [SUCCEEDED, SUCCEEDED]
    assert retry(house, request_id="all is well") == 0
    assert house.states(made) == [SUCCEEDED, SUCCEEDED]
    assert count(house, dead_letters) == count(house, dead_batches) == 0


def test_only_what_was_meant_is_retried(house: House) -> None:
    mine = house.create("a", "fail:RANK_TOO_LARGE")
    theirs = house.create("c", owner="run-2")
    house.step()
    house.broker.work(lambda batch: answer_batch(batch) if len(batch.trials) > 1 else _lost(batch))
    house.step()
    house.create("d", owner="run-3")
    diverge(house)
    states = house.states([*mine, *theirs])
    assert states[1] == FAILED
    assert retry(house, owner="run-2", reason="RANK_TOO_LARGE") == 0
    assert retry(house, owner="run-1", reason="RANK_TOO_LARGE", request_id="1") == 1
    assert retry(house, owner="run-3", request_id="2") == 1
    assert retry(house, owner="nobody", request_id="3") == 0


def _lost(batch: trial.TrialBatch) -> trial.TrialBatchResult:
    return trial.TrialBatchResult(batch_id=batch.id, failure=types.Failure(reason="TRIAL_DIVERGED", message="no"))


def test_an_unknown_evaluation_is_named_and_nothing_is_retried(house: House) -> None:
    made = house.create("a")
    diverge(house)
    with pytest.raises(PreceptorError) as raised:
        retry(house, made[0].id, "eval-none")
    assert raised.value.reason == "EVALUATION_NOT_FOUND"
    assert house.states(made) == [FAILED]
    with pytest.raises(PreceptorError) as raised:
        retry(house, *(["x"] * 1001))
    assert raised.value.metadata["field"] == "evaluation_ids"


def test_a_trial_that_two_evaluations_share_is_run_again_once(house: House) -> None:
    made = house.create("a", seeds=(1,)) + house.create("a", seeds=(1, 2), owner="run-2")
    diverge(house)
    assert house.states(made) == [FAILED, FAILED]
    assert retry(house, made[0].id) == 1
    assert retry(house, made[1].id, request_id="other") == 1
    house.broker.trained.clear()
    work(house)
    assert house.states(made) == [SUCCEEDED, SUCCEEDED]
    assert len(house.broker.trained) == len(set(house.broker.trained)) == 2


def test_a_retry_that_was_cancelled_can_be_retried(house: House) -> None:
    """The trial's row is gone then; its letter is not."""
    made = house.create("a", seeds=(1,)) + house.create("a", seeds=(1, 2), owner="run-2")
    diverge(house)
    assert retry(house, owner="run-1") == 1
    assert house.cancel() == 1
    assert house.states(made) == [CANCELLED, FAILED]
    assert retry(house, made[1].id, request_id="other") == 1
    work(house)
    assert house.states(made) == [CANCELLED, SUCCEEDED]


def test_a_retry_that_died_half_way_goes_on_where_it_was(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluator.dead_letters.PAGE", 2)
    made = [house.create(f"{number}")[0] for number in range(5)]
    for _ in range(3):
        diverge(house)
    assert house.states(made) == [FAILED] * 5
    settled: list[int] = []

    def die(ids: list[str]) -> None:
        settled.append(len(ids))
        if len(settled) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(house.marking, "settle_known", die)
        with pytest.raises(KeyboardInterrupt):
            retry(house)
    assert house.states(made) == [QUEUED] * 4 + [FAILED]
    diverge(house)
    assert FAILED in house.states(made)[:4]
    failed_again = house.states(made)[:4].count(FAILED)
    house.restart()
    assert retry(house) == 5
    assert house.states(made)[:4].count(FAILED) == failed_again  # each is looked at once
    assert house.states(made)[4] == QUEUED


def test_a_new_request_for_what_failed_leaves_no_letter_when_it_succeeds(house: House) -> None:
    made = house.create("a")
    diverge(house)
    assert count(house, dead_letters) == 1
    house.create("a", owner="run-2")
    work(house)
    assert house.states(made) == [SUCCEEDED]
    assert count(house, dead_letters) == count(house, dead_batches) == 0


def test_what_failed_before_there_were_letters_is_passed_over(house: House) -> None:
    made = house.create("a")
    diverge(house)
    with house.database.write() as tx:
        tx.execute(dead_letters.delete())
    assert retry(house) == 0
    assert house.states(made) == [FAILED]


def test_attempts_tell_who_was_at_it_when_and_why_it_ended(house: House) -> None:
    made = house.create("fail:TRIAL_FAILED", "Ada lives in Lisbon.")
    house.step()
    (_, task_id) = house.broker.take()
    house.broker.steps[task_id] = 7
    house.step(1)
    baseline, batch = sorted(house.evaluations.attempts(made[0].id), key=lambda one: one.trials)
    assert (batch.worker, batch.steps_done, batch.trials, batch.number) == ("fake:1", 7, 2, 1)
    assert batch.begin_time.seconds - batch.submit_time.seconds == 1
    assert not batch.HasField("end_time")
    house.broker.finish()
    house.step(1)
    work(house)
    known = [one for one in house.evaluations.attempts(made[0].id) if one.batch_id != baseline.batch_id]
    assert [(one.trials, one.failure.reason, one.failure.message) for one in known] == [
        (2, "TRIAL_FAILED", "scripted"),
        (1, "TRIAL_FAILED", "scripted"),
    ]
    assert known[0].end_time.seconds - known[0].submit_time.seconds == 2
    assert known[0].worker == "scripted:1"
    house.broker.down = True
    assert len(house.evaluations.attempts(made[0].id)) == 3
    with pytest.raises(PreceptorError) as raised:
        house.evaluations.attempts("eval-none")
    assert raised.value.reason == "EVALUATION_NOT_FOUND"


def test_attempts_before_a_cut_and_before_a_retry_are_known(house: House) -> None:
    made = house.create("a", "b")
    house.step()
    failure = types.Failure(reason="TRIAL_OUT_OF_MEMORY", message="two at once")
    house.broker.work(lambda batch: trial.TrialBatchResult(batch_id=batch.id, failure=failure))
    house.step()
    house.now += 1
    diverge(house)
    house.now += 1
    retry(house)
    work(house)
    assert house.states(made) == [SUCCEEDED] * 2
    reasons = [one.failure.reason for one in house.evaluations.attempts(made[1].id) if one.trials <= 2]
    assert reasons.count("TRIAL_OUT_OF_MEMORY") == 2  # the baseline's and the pair's
    assert reasons.count("TRIAL_DIVERGED") == 1
    assert reasons[-1] == ""


def test_a_cancelled_attempt_has_ended(house: House) -> None:
    made = house.create("a")
    house.step()
    house.cancel()
    house.step()
    house.pass_time(2)
    with house.database.read() as tx:
        assert {row.reason for row in tx.execute(select(attempts))} == {"CANCELLED"}
    assert house.states(made) == [CANCELLED]


def test_history_is_forgotten_after_its_time(house: House) -> None:
    made = house.create("a")
    work(house)
    house.create("b", owner="run-2")
    house.step()
    house.now += 31 * 86400
    house.step()
    house.step(61)
    assert count(house, attempts) == 1  # the one under way
    assert house.evaluations.attempts(made[0].id) == []


def test_an_evaluation_whose_grading_failed_is_only_graded_again(database_url: str) -> None:
    house = House(database_url, FakeBroker())
    made = house.create("Ada lives in Lisbon.")
    good = house.evaluations.get(made[0].id)
    house.step()
    house.broker.work()
    with house.database.write() as tx:  # as a judge that was away for too long leaves it
        good.failure.CopyFrom(types.Failure(reason="JUDGE_UNREACHABLE", message="away", attempts=1))
        tx.execute(evaluations.update().values(state="FAILED", body=good.SerializeToString()))
    house.step()
    trained = len(house.broker.trained)
    assert house.states(made) == [FAILED]
    assert retry(house, reason="JUDGE_UNREACHABLE") == 1
    assert house.evaluations.get(made[0].id).reward.value == 0.5
    assert len(house.broker.trained) == trained
    house.close()


def test_as_many_as_wait_already_are_refused_and_nothing_is_changed(database_url: str) -> None:
    house = House(database_url, FakeBroker(), max_waiting=3)
    house.create("a", "b")
    request = group("c", "d", request_id="later")
    with pytest.raises(PreceptorError) as raised:
        house.evaluations.create(request)
    assert raised.value.reason == "QUEUE_FULL"
    assert len(house.evaluations.page(pb.ListEvaluationsRequest())[0]) == 2
    house.create("a", "b", owner="run-2")  # known ones are welcome
    house.create("a", "b", "e")
    work(house)
    assert len(house.evaluations.create(request)) == 2  # the same id, now that there is room
    house.restart()
    with pytest.raises(PreceptorError):
        house.create("f", "g")
    house.close()


def test_a_home_of_before_goes_on(tmp_path: Path) -> None:
    """It has none of the tables that came with attempts, letters and turns."""
    tables = ("attempts", "origins", "dead_letters", "dead_batches", "owner_turns")
    house = House(old_home(tmp_path, "evaluator", without=tables), FakeBroker())
    made, _ = house.evaluations.page(pb.ListEvaluationsRequest())
    late = house.create("fail:TRIAL_DIVERGED", request_id="late")
    house.pass_time(130)  # nobody is at the old ones any more
    work(house)
    assert house.states([*made, *late]) == [SUCCEEDED, SUCCEEDED, FAILED]
    assert retry(house) == 1
    house.close()
