"""What the evaluator promises while workers die, Redis forgets and it is itself restarted; with the clock in hand."""

from __future__ import annotations

from collections.abc import Iterator
from math import exp
from pathlib import Path

import pytest

from evaluator.batch_store import BatchStore, part_of
from evaluator.database import Database
from evaluator.dispatch import Dispatcher, DispatchLimits
from evaluator.evaluations import Evaluations
from evaluator.feed import Feed
from evaluator.graders.judge import Judge, JudgeSettings
from evaluator.graders.rack import Graders
from evaluator.graders.verdicts import VerdictStore
from evaluator.marking import Marking
from evaluator.store import EvaluationStore
from preceptor.errors import PreceptorError
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types
from tests.evaluation_requests import STUDENT, group, two_tasks
from tests.fake_broker import FakeBroker
from tests.scripted_trials import answer_batch

LIMITS = DispatchLimits(max_attempts=2, in_flight=4, lease_grace=4.0, orphan_seconds=60.0)
QUEUED, RUNNING = pb.EVALUATION_STATE_QUEUED, pb.EVALUATION_STATE_RUNNING
SUCCEEDED, FAILED, CANCELLED = (
    pb.EVALUATION_STATE_SUCCEEDED,
    pb.EVALUATION_STATE_FAILED,
    pb.EVALUATION_STATE_CANCELLED,
)


class House:
    """An evaluator whose dispatcher is stepped by hand."""

    def __init__(
        self, path: Path, broker: FakeBroker, judge: JudgeSettings | None = None, patience: float = 60.0
    ) -> None:
        self.path, self.broker, self.now = path, broker, 0.0
        self.judge_settings, self.patience = judge, patience
        self.open()

    def open(self) -> None:
        self.database = Database(f"sqlite:///{self.path}")
        self.feed = Feed()
        store = EvaluationStore(self.database, lambda: 1e9 + self.now)
        self.batches = BatchStore(self.database)
        asked = self.judge_settings
        self.judge = Judge(asked, VerdictStore(self.database)) if asked else None
        graders = Graders(self.judge)
        self.marking = Marking(store, self.feed, graders, self.patience, pause=0.02)
        self.dispatcher = Dispatcher(self.batches, store, self.broker, self.marking, LIMITS, lambda: self.now)
        self.evaluations = Evaluations(
            store,
            self.batches,
            self.dispatcher,
            self.broker,
            self.feed,
            lambda: STUDENT,
            batch_trials=8,
            graders=graders,
        )

    def close(self) -> None:
        self.marking.stop()
        if self.judge is not None:
            self.judge.close()
        self.marking.close()
        self.database.close()

    def restart(self) -> None:
        """As after SIGKILL: only what is in SQL and in the broker is left."""
        self.close()
        self.open()

    def step(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.dispatcher.step()

    def pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            self.step(1)

    def create(self, *documents: str, **options: object) -> list[pb.Evaluation]:
        return self.evaluations.create(group(*documents, **options))  # type: ignore[arg-type]

    def cancel(self, owner: str = "run-1", request_id: str = "c1") -> int:
        return self.evaluations.cancel(pb.CancelEvaluationsRequest(request_id=request_id, owner=owner))

    def told(self) -> set[str]:
        """The documents of the trials that workers were told to leave."""
        known = {item.id: "".join(item.documents) for batch in self.broker.batches for item in batch.trials}
        return {known[one] for left in self.broker.cancelled.values() for one in left}

    def states(self, made: list[pb.Evaluation]) -> list[int]:
        return [self.evaluations.get(item.id).state for item in made]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path / "evaluator.db", FakeBroker())
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


def test_a_passing_failure_is_tried_again_alone_and_a_bounded_number_of_times(house: House) -> None:
    made = house.create("fail:TRIAL_FAILED", "Ada lives in Lisbon.")
    house.step()
    house.broker.work()
    house.step()
    assert house.states(made) == [QUEUED, SUCCEEDED]
    (batch,) = house.broker.waiting.values()
    assert [list(item.documents) for item in batch.trials] == [["fail:TRIAL_FAILED"]]
    house.broker.work()
    house.step()
    found = house.evaluations.get(made[0].id)
    assert (found.state, found.failure.reason, found.failure.attempts) == (FAILED, "TRIAL_FAILED", 2)
    assert not house.broker.waiting


def test_a_batch_that_fails_as_a_whole_and_then_works_succeeds(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    failure = types.Failure(reason="MODEL_UNREACHABLE", message="hub")
    house.broker.work(lambda batch: trial.TrialBatchResult(batch_id=batch.id, failure=failure))
    house.step()
    assert house.states(made) == [QUEUED]
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]


def test_what_does_not_fit_together_is_tried_in_halves(house: House) -> None:
    made = house.create("a", "b", "Ada lives in Lisbon.")
    house.step()

    def small_memory(batch: trial.TrialBatch) -> trial.TrialBatchResult:
        if len(batch.trials) <= 2:
            return answer_batch(batch)
        failure = types.Failure(reason="TRIAL_OUT_OF_MEMORY", message="3 at once")
        return trial.TrialBatchResult(batch_id=batch.id, failure=failure)

    for _ in range(2):
        house.broker.work(small_memory)
        house.step()
    assert house.states(made) == [SUCCEEDED] * 3


@pytest.mark.parametrize(
    "spoil",
    [
        lambda result: result.results[0].answers.pop(),
        lambda result: result.results[0].probe_answers.pop(),
        lambda result: setattr(result.results[0].answers[0], "gold_logprob", float("nan")),
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


def test_a_lost_worker_s_batch_is_given_again(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.take()
    house.step(1)
    house.broker.die()
    house.pass_time(4)
    assert len(house.broker.submitted) == 2  # not yet: a beat may be late
    house.pass_time(2)
    assert [task_id.rpartition(".")[2] for task_id in house.broker.submitted] == ["1", "1", "2", "2"]
    house.broker.work()
    house.step()
    assert house.evaluations.get(made[0].id).reward.value == 0.5


def test_a_batch_that_kills_every_worker_is_given_up(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    for _ in range(2):
        house.step()
        house.broker.take()
        house.step(1)
        house.broker.die()
        house.pass_time(6)
    found = house.evaluations.get(made[0].id)
    assert (found.state, found.failure.reason, found.failure.attempts) == (FAILED, "TRIAL_LOST", 2)
    assert not found.HasField("reward")
    assert len(house.broker.submitted) == 4


def test_a_trial_that_kills_its_workers_does_not_take_its_neighbours_along(house: House) -> None:
    documents = ["Ada lives in Lisbon.", "poison", "Bread.", "Ada is a baker.", "Nothing."]
    made = house.create(*documents)
    house.step()
    for _ in range(12):  # every worker that has the poison dies; the others work
        house.broker.take()
        house.step(1)
        deadly = {
            task_id: batch
            for task_id, batch in house.broker.taken.items()
            if any("poison" in item.documents for item in batch.trials)
        }
        house.broker.taken = {task: batch for task, batch in house.broker.taken.items() if task not in deadly}
        house.broker.finish()
        house.broker.leased -= deadly.keys()
        house.pass_time(6)
    found = [house.evaluations.get(item.id) for item in made]
    assert [one.state for one in found] == [SUCCEEDED, FAILED, SUCCEEDED, SUCCEEDED, SUCCEEDED]
    # Together, twice; then in a half, a quarter and alone.
    assert (found[1].failure.reason, found[1].failure.attempts) == ("TRIAL_LOST", 5)
    assert len(house.broker.trained) == len(set(house.broker.trained))  # nobody was trained twice


def test_a_late_result_of_a_lost_attempt_is_taken(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.take()
    house.step(1)
    asleep = dict(house.broker.taken)
    house.broker.die()
    house.pass_time(6)
    for task_id, batch in asleep.items():
        house.broker.done[task_id] = answer_batch(batch)
    house.step()
    assert house.states(made) == [SUCCEEDED]


def test_a_failure_that_an_old_attempt_brings_late_does_not_end_the_new_one(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.take()
    house.step(1)
    asleep = dict(house.broker.taken)
    house.broker.die()
    house.pass_time(6)
    failure = types.Failure(reason="TRIAL_FAILED", message="late")
    for task_id, batch in asleep.items():
        house.broker.done[task_id] = trial.TrialBatchResult(batch_id=batch.id, failure=failure)
    house.broker.take()
    house.step(1)
    assert house.states(made) == [RUNNING]
    house.broker.finish()
    house.step()
    assert house.states(made) == [SUCCEEDED]


def test_a_batch_waiting_behind_others_is_not_lost(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.pass_time(300)
    assert len(house.broker.submitted) == 2
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]


def test_a_queue_that_lost_its_data_is_filled_again(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.flush()
    house.pass_time(59)
    assert len(house.broker.submitted) == 2
    house.pass_time(3)
    assert len(house.broker.submitted) == 4
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]


def test_while_the_broker_is_away_nothing_is_lost_and_one_line_is_logged(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.take()
    house.step(1)
    house.broker.down = True
    with caplog.at_level("WARNING"):
        pauses = [house.dispatcher.step() for _ in range(8)]
        house.pass_time(100)
    late = house.create("Ada is a baker.", owner="run-2")  # accepted all the same
    assert pauses[:3] == [0.25, 0.5, 1.0]
    assert pauses[-1] == 5.0
    assert len([record for record in caplog.records if "waiting for it" in record.message]) == 1
    house.broker.down = False
    house.step(1)
    house.broker.finish()
    house.step()
    house.broker.work()
    house.step()
    assert house.states([*made, *late]) == [SUCCEEDED, SUCCEEDED]
    assert len(house.broker.submitted) == 3  # nothing counted as lost


@pytest.mark.parametrize("moment", ["before submission", "on the queue", "with a worker", "answered"])
def test_a_killed_evaluator_goes_on_where_it_was(house: House, moment: str) -> None:
    made = house.create("Ada lives in Lisbon.")
    if moment != "before submission":
        house.step()
    if moment in ("with a worker", "answered"):
        house.broker.take()
        house.step(1)
    if moment == "answered":
        house.broker.finish()
    house.restart()
    house.step(1)
    house.broker.work()
    house.step(1)
    assert house.states(made) == [SUCCEEDED]
    assert len(house.broker.trained) == 2


def test_a_worker_that_died_while_the_evaluator_was_away_is_noticed(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.take()
    house.step(1)
    house.broker.die()
    house.restart()
    house.pass_time(7)
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]


def test_the_queue_holds_a_bounded_number_of_batches(house: House) -> None:
    made = [house.create(f"Document {number}.", seeds=(number,))[0] for number in range(10)]
    house.step()
    assert len(house.broker.waiting) == LIMITS.in_flight
    for _ in range(4):
        house.broker.work()
        house.step()
    assert house.states(made) == [SUCCEEDED] * 10


def test_cancelling_ends_what_nobody_else_waits_for(house: House) -> None:
    mine = house.create("a", "b")
    shared = house.create("b", owner="run-2")
    house.step()
    assert house.cancel() == 1
    assert house.states(mine) == [CANCELLED, QUEUED]
    assert house.cancel() == 1  # the same answer
    assert house.cancel(request_id="c2") == 0
    house.step()
    assert house.told() == {"a"}  # neither the other trial nor the baseline
    house.broker.work()
    house.step()
    assert house.states(shared) == [SUCCEEDED]
    assert house.states(mine) == [CANCELLED, SUCCEEDED]
    assert len(house.broker.trained) == 2


def test_whoever_has_cancelled_does_not_wait_for_what_another_asks_for_again(house: House) -> None:
    made = house.create("a")
    house.step()
    assert house.cancel() == 1
    house.create("a", owner="run-2")
    house.step()
    assert house.cancel(owner="run-2", request_id="c2") == 1
    assert house.states(made) == [CANCELLED]


def test_a_trial_that_another_evaluation_wants_is_not_cancelled(house: House) -> None:
    mine = house.create("a", seeds=(1, 2))
    other = house.create("a", seeds=(1,), owner="run-2")
    house.step()
    house.broker.take()
    house.step(1)
    house.cancel()
    house.step()
    (left,) = house.broker.cancelled.values()
    assert left == {item.id for batch in house.broker.batches for item in batch.trials if item.seed == 2}
    house.broker.finish()
    house.step()
    assert house.states([*mine, *other]) == [CANCELLED, SUCCEEDED]


def test_batches_of_cancelled_evaluations_do_not_run(house: House) -> None:
    made = house.create("a")
    house.step()
    house.cancel()
    house.step()
    assert sorted(house.broker.cancelled) == sorted(house.broker.submitted)
    again = house.create("a")
    assert again[0].state == QUEUED
    house.step()
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]
    assert [task_id[-2:] for task_id in house.broker.submitted] == [
        ".1",
        ".1",
        ".2",
        ".2",
    ]  # never a cancelled id again
    assert len(house.broker.trained) == 2


@pytest.mark.parametrize("told", [True, False])
def test_what_is_asked_for_again_after_a_cancel_is_run_anew_and_never_failed(house: House, told: bool) -> None:
    """The worker is at the old attempt, and hears of the cancel before or after the same is asked for again."""
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.take()
    house.step(1)
    house.cancel()
    if told:
        house.step()
    house.create("Ada lives in Lisbon.")
    assert house.states(made) == [QUEUED]
    house.step()
    house.broker.finish()  # the old attempt says CANCELLED
    house.pass_time(10)
    assert house.states(made) == [QUEUED]
    house.broker.work()
    house.step()
    assert house.evaluations.get(made[0].id).reward.value == 0.5
    assert [task_id[-2:] for task_id in house.broker.submitted] == [".1", ".1", ".2", ".2"]


def test_a_trial_asked_for_again_while_its_batch_goes_on_for_others_is_run_in_another(house: House) -> None:
    mine = house.create("Ada lives in Lisbon.", "b")
    house.create("b", owner="run-2")
    house.step()
    house.broker.take()
    house.step(1)
    house.cancel()
    house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.finish()
    house.step()
    assert house.states(mine) == [QUEUED, SUCCEEDED]
    (batch,) = house.broker.waiting.values()
    assert [list(item.documents) for item in batch.trials] == [["Ada lives in Lisbon."]]
    house.broker.work()
    house.step()
    assert house.evaluations.get(mine[0].id).reward.value == 0.5
    assert sorted(house.broker.trained) == sorted(set(house.broker.trained))


def test_a_result_that_comes_after_the_cancel_changes_nothing(house: House) -> None:
    made = house.create("Ada lives in Lisbon.")
    house.step()
    house.broker.take()
    house.step(1)
    house.cancel()
    for task_id, batch in house.broker.taken.items():
        house.broker.done[task_id] = answer_batch(batch)  # it was done before it heard
    house.step(1)
    assert house.states(made) == [CANCELLED]
    house.create("Ada lives in Lisbon.")
    house.step(1)
    assert house.states(made) == [QUEUED]
    assert len(house.broker.submitted) == 4


@pytest.mark.parametrize("moment", ["the evaluator is killed", "the broker is away"])
def test_a_cancel_reaches_the_worker_whatever_dies_in_between(house: House, moment: str) -> None:
    house.create("a")
    house.step()
    house.broker.take()
    house.step(1)
    house.broker.down = moment == "the broker is away"
    house.cancel()
    if moment == "the evaluator is killed":
        house.restart()
    else:
        house.step()
    house.broker.down = False
    house.step(1)
    assert house.told() == {"a", ""}  # the baseline, too
    house.broker.cancelled.clear()
    house.pass_time(10)
    assert not house.broker.cancelled  # once


@pytest.mark.parametrize("moment", ["before submission", "its worker dies"])
def test_a_batch_that_is_sent_later_says_what_of_it_was_cancelled(house: House, moment: str) -> None:
    mine = house.create("a", "b")
    shared = house.create("b", owner="run-2")
    if moment == "its worker dies":
        house.step()
        house.broker.take()
        house.step(1)
    house.cancel()
    if moment == "its worker dies":
        house.broker.die()
        house.pass_time(7)
    house.step()
    assert house.told() == {"a"}
    if moment == "its worker dies":
        assert sorted(task_id[-2:] for task_id in house.broker.cancelled) == [".1", ".2"]
    house.broker.work()
    house.step()
    assert house.states([*mine, *shared]) == [CANCELLED, SUCCEEDED, SUCCEEDED]
    assert len(house.broker.trained) == 2


@pytest.mark.parametrize("reason", ["TRIAL_FAILED", "TRIAL_OUT_OF_MEMORY"])
def test_what_was_cancelled_is_not_tried_again(house: House, reason: str) -> None:
    mine = house.create("a", "b", "c")
    shared = house.create("b", "c", owner="run-2")
    house.step()
    house.broker.take()
    house.step(1)
    house.cancel()  # the worker does not hear of it in time
    failure = types.Failure(reason=reason, message="all of them")
    house.broker.finish(lambda batch: trial.TrialBatchResult(batch_id=batch.id, failure=failure))
    house.broker.trained.clear()
    house.step()
    house.step()
    house.broker.work()
    house.step()
    assert house.states([*mine, *shared]) == [CANCELLED, SUCCEEDED, SUCCEEDED, SUCCEEDED, SUCCEEDED]
    assert len(house.broker.trained) == 3  # b, c and the baseline


def test_a_cancel_between_a_result_and_its_record_counts(house: House) -> None:
    """The dispatcher has read what is wanted when the cancel comes, and the same is asked for again."""
    house.create("Ada lives in Lisbon.", "b")
    house.create("b", owner="run-2")
    house.step()
    _, batch = house.broker.batches
    ada, b = (item.id for item in batch.trials)
    house.cancel()
    assert house.batches.record(batch.id, 1, answer_batch(batch).results[:1], [part_of(batch, [ada]), batch], 1) == []
    (again,) = house.batches.waiting(9)
    assert [item.id for item in again.payload.trials] == [b]
    house.create("Ada lives in Lisbon.")
    assert house.batches.record(again.payload.id, 1, answer_batch(batch).results) == [b]
    assert [[item.id for item in one.payload.trials] for one in house.batches.waiting(9)] == [[ada]]


def test_a_result_of_a_discarded_attempt_is_not_recorded(house: House) -> None:
    house.create("Ada lives in Lisbon.")
    house.step()
    house.cancel()
    house.create("Ada lives in Lisbon.")
    _, batch = house.broker.batches
    assert house.batches.record(batch.id, 1, answer_batch(batch).results) == []
    assert house.batches.record(batch.id, 2, answer_batch(batch).results) == [batch.trials[0].id]


def test_a_wanted_trial_that_comes_back_cancelled_is_tried_again(house: House) -> None:
    """It cannot happen; if it does, it is no reason to fail."""
    made = house.create("Ada lives in Lisbon.")
    house.step()
    cancelled = types.Failure(reason="CANCELLED", message="nobody wants it any more")
    house.broker.work(lambda batch: trial.TrialBatchResult(batch_id=batch.id, failure=cancelled))
    house.step()
    assert house.states(made) == [QUEUED]
    house.broker.work()
    house.step()
    assert house.states(made) == [SUCCEEDED]


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
