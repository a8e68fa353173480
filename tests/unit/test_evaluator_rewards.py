"""From a request to rewards: what is measured, what is known already, and what a failure is."""

from __future__ import annotations

from collections.abc import Iterator
from math import exp

import pytest

from evaluator import marking
from evaluator.graders.rack import Graders
from evaluator.scoring import score
from evaluator.store import Sitting
from preceptor.errors import PreceptorError
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types
from tests.evaluation_requests import group, two_tasks
from tests.evaluator_house import FAILED, QUEUED, RUNNING, SUCCEEDED, House
from tests.fake_broker import FakeBroker
from tests.scripted_trials import answer_batch


@pytest.fixture
def house(database_url: str) -> Iterator[House]:
    made = House(database_url, FakeBroker())
    yield made
    made.close()


def test_a_look_measures_log_probabilities_and_grades_nothing(house: House) -> None:
    request = group("Ada lives in Lisbon.", "Bread.")
    request.protocol.answers.logprobs_only = True
    request.protocol.training.max_steps = 2
    request.protocol.weights.CopyFrom(pb.RewardWeights(gold_logprob_gain=1.0))
    made = house.evaluations.create(request)
    house.step()
    house.broker.take()
    house.broker.finish()
    house.step()
    good, bad = (house.evaluations.get(item.id).reward for item in made)
    assert (good.value, bad.value) == (1.25, 0.0)
    assert "gain" not in good.terms
    assert not good.HasField("retention")


def test_a_copied_question_costs_what_the_weights_say(house: House) -> None:
    request = group("Where does Ada live? Lisbon", "Ada lives in Lisbon.")
    request.protocol.weights.overlap = 1.0
    made = house.evaluations.create(request)
    house.step()
    house.broker.take()
    house.broker.finish()
    house.step()
    copied, honest = (house.evaluations.get(item.id) for item in made)
    assert (copied.overlap.copied, honest.overlap.copied) == (1, 0)
    assert (copied.reward.value, honest.reward.value) == (0.0, 0.5)


def test_a_written_question_may_be_copied_for_its_writer_is_the_teachers_own_base(house: House) -> None:
    request = group("Where does Ada live? Lisbon")
    request.protocol.weights.overlap = 1.0
    for question in request.task.passage.questions:
        question.written = True
    (made,) = house.evaluations.create(request)
    house.step()
    house.broker.take()
    house.broker.finish()
    house.step()
    copied = house.evaluations.get(made.id)
    assert copied.overlap.copied == 1  # shown, and not paid for
    assert copied.reward.value == 0.5
    assert copied.reward.label_free


def test_an_evaluation_goes_from_queued_over_running_to_its_reward(house: House) -> None:
    made = house.create("Ada lives in Lisbon.", "Nothing, and forget", seeds=(1, 2))
    assert [item.state for item in made] == [QUEUED, QUEUED]
    house.step()
    house.broker.take()
    house.step(1)
    assert house.states(made) == [RUNNING, RUNNING]
    house.broker.finish()
    house.step()
    good, bad = (house.evaluations.get(item.id) for item in made)
    assert (good.state, bad.state) == (SUCCEEDED, SUCCEEDED)
    assert good.reward.value == 0.5  # one of two questions, nothing forgotten
    terms = dict(good.reward.terms)
    assert terms.pop("gold_probability_gain") == pytest.approx((exp(-0.5) - exp(-3)) / 2)
    assert terms == {
        **{"gain": 0.5, "gold_logprob_gain": 1.25, "retention_loss": 0.0},
        **{"overlap": 0.0, "tokens": 0.03, "seconds": 0.0},
    }
    report, _ = good.trials
    assert (list(report.correct), list(report.gold_logprobs)) == ([True, False], [-0.5, -3.0])
    assert (report.value, list(report.values)) == (0.5, [1.0, 0.0])
    assert (list(good.baseline.correct), list(good.baseline.gold_logprobs)) == ([False, False], [-3.0, -3.0])
    assert bad.reward.value == -0.5  # nothing learnt, all forgotten, at half weight
    assert [report.seed for report in good.trials] == [1, 2]
    assert list(good.trials[0].correct) == [True, False]
    assert good.finish_time.seconds >= good.create_time.seconds > 0
    assert not good.HasField("failure")
    assert house.dispatcher.trials_done == 5  # four and the baseline


def test_the_same_evaluation_asked_twice_trains_once(house: House) -> None:
    first = house.create("Ada lives in Lisbon.")
    under_way = house.create("Ada lives in Lisbon.", owner="run-2")
    house.step()
    house.broker.work()
    house.step()
    later = house.create("Ada lives in Lisbon.", "Ada is a baker.", owner="run-3")
    assert [item.cached for item in (*first, *under_way, *later)] == [False, False, True, False]
    assert later[0].reward.value == 0.5
    house.step()
    house.broker.work()
    house.step()
    assert house.states(later) == [SUCCEEDED, SUCCEEDED]
    assert len(house.broker.trained) == len(set(house.broker.trained)) == 3  # two self-edits and one baseline


def test_repeated_self_edits_of_a_group_share_one_evaluation(house: House) -> None:
    made = house.create("a", "b", "a")
    assert made[0].id == made[2].id != made[1].id
    house.step()
    house.broker.work()
    house.step()
    assert len(house.broker.trained) == 3


def test_other_weights_are_scored_from_known_answers_without_training(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.work()
    house.step()
    request = group("Ada lives in Lisbon.")
    request.protocol.weights.CopyFrom(pb.RewardWeights(gold_logprob_gain=1.0))
    other = house.evaluations.create(request)
    assert other[0].id != made[0].id
    assert other[0].state == SUCCEEDED
    assert other[0].reward.value == 1.25
    assert len(house.broker.submitted) == 2


def test_further_seeds_train_only_themselves(house: House) -> None:
    house.create("Ada lives in Lisbon.", seeds=(1,))
    house.step()
    house.broker.work()
    house.step()
    more = house.create("Ada lives in Lisbon.", seeds=(1, 2))
    house.step()
    house.broker.work()
    house.step()
    assert [report.seed for report in house.evaluations.get(more[0].id).trials] == [1, 2]
    assert len(house.broker.trained) == 3


def test_the_composition_of_batches_is_the_groups(house: House) -> None:
    house.create("a", "b", seeds=(2, 1))
    house.step()
    baseline, batch = house.broker.waiting.values()
    assert [list(item.documents) for item in baseline.trials] == [[]]
    assert [(item.documents[0], item.seed) for item in batch.trials] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


def test_tasks_of_one_request_are_trained_together_and_each_is_asked_its_own_questions(house: House) -> None:
    made = house.evaluations.create(two_tasks())
    house.step()
    assert [len(batch.trials) for batch in house.broker.waiting.values()] == [2, 4]  # baselines, trials
    house.broker.work()
    house.step()
    found = [house.evaluations.get(item.id) for item in made]
    assert [item.task_id for item in found] == ["task-ada", "task-ada", "task-tom", "task-ada"]
    assert [item.reward.value for item in found] == [0.5, 0.5, 1.0, 0.0]
    assert [len(item.trials[0].correct) for item in found] == [2, 2, 1, 2]


def test_a_failing_trial_fails_its_evaluation_with_the_reason_and_no_reward(house: House) -> None:
    made = house.create("fail:TRIAL_DIVERGED", "Ada lives in Lisbon.")
    house.step()
    house.broker.work()
    house.step()
    bad, good = (house.evaluations.get(item.id) for item in made)
    assert bad.state == FAILED
    assert bad.failure.reason == "TRIAL_DIVERGED"
    assert bad.failure.attempts == 1
    assert not bad.HasField("reward")
    assert not bad.trials
    assert good.state == SUCCEEDED  # its batch mate is not harmed


def test_a_failing_baseline_fails_the_evaluation(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()

    def no_baseline(batch: trial.TrialBatch) -> trial.TrialBatchResult:
        if batch.trials[0].documents:
            return answer_batch(batch)
        failure = types.Failure(reason="BAD_STUDENT_SOURCE", message="no tokenizer")
        return trial.TrialBatchResult(batch_id=batch.id, failure=failure)

    house.broker.work(no_baseline)
    house.step()
    found = house.evaluations.get(made[0].id)
    assert (found.state, found.failure.reason) == (FAILED, "BAD_STUDENT_SOURCE")
    assert "baseline" in found.failure.message


@pytest.mark.parametrize(
    "spoil",
    [
        lambda result: result.results[0].answers.pop(),
        lambda result: result.results[0].probe_answers.pop(),
        lambda result: setattr(result.results[0].answers[0], "gold_logprob", float("nan")),
        lambda result: setattr(result.results[0].answers[0], "gold_logprob", 1e20),
        lambda result: setattr(result.results[0], "seconds", float("inf")),
        lambda result: result.ClearField("results"),
    ],
)
def test_an_incomplete_answer_is_a_failure_and_never_a_score(house: House, spoil: object) -> None:
    made = house.create("Ada lives in Lisbon.")

    def spoilt(batch: trial.TrialBatch) -> trial.TrialBatchResult:
        result = answer_batch(batch)
        spoil(result)  # type: ignore[operator]
        return result

    for _ in range(3):
        house.step()
        house.broker.work(spoilt)
    house.step()
    found = house.evaluations.get(made[0].id)
    assert found.state == FAILED
    assert not found.HasField("reward")


def test_what_cannot_be_scored_fails_alone_and_holds_nobody_up(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def buggy(sitting: Sitting, graders: Graders) -> pb.Evaluation:
        if "odd" in sitting.evaluation.self_edit.documents[0]:
            raise ZeroDivisionError("a bug")
        return score(sitting, graders)

    monkeypatch.setattr(marking, "score", buggy)
    odd, plain = house.create("Something odd.", "Ada lives in Lisbon.")
    house.step()
    house.broker.work()
    house.step()
    found = house.evaluations.get(odd.id)
    assert (found.state, found.failure.reason) == (FAILED, "INTERNAL")
    assert not found.HasField("reward")
    assert house.evaluations.get(plain.id).state == SUCCEEDED


def test_a_failed_evaluation_is_tried_anew_by_a_new_request_only(house: House) -> None:
    request = group("fail:TRIAL_DIVERGED")
    made = house.evaluations.create(request)
    house.step()
    house.broker.work()
    house.step()
    assert house.evaluations.create(request)[0].state == FAILED
    request.request_id = "another"
    assert house.evaluations.create(request)[0].state == QUEUED
    house.step()

    def healed(batch: trial.TrialBatch) -> trial.TrialBatchResult:
        for item in batch.trials:
            item.documents[:] = ["Ada lives in Lisbon."]
        return answer_batch(batch)

    house.broker.work(healed)
    house.step()
    found = house.evaluations.get(made[0].id)
    assert found.state == SUCCEEDED
    assert not found.HasField("failure")


def test_a_succeeded_evaluation_is_never_overwritten(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.work()
    house.step()
    before = house.evaluations.get(made[0].id)
    house.create("Ada lives in Lisbon.", owner="run-2")
    house.evaluations.cancel(pb.CancelEvaluationsRequest(request_id="c1", owner="run-1"))
    house.pass_time(70)
    assert house.evaluations.get(made[0].id) == before


def test_a_request_id_stands_for_one_request(house: House) -> None:
    request = group("a", "b")
    first = house.evaluations.create(request)
    assert [item.id for item in house.evaluations.create(request)] == [item.id for item in first]
    request.self_edits.pop()
    with pytest.raises(PreceptorError) as raised:
        house.evaluations.create(request)
    assert raised.value.reason == "REQUEST_ID_REUSED"
