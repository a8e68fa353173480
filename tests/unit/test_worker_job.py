"""A batch on a worker without the queue: when it ends early, and what its result then says."""

from __future__ import annotations

import threading

import pytest

from preceptor.artifacts import folder_sha256
from preceptor.v1 import trial_pb2 as wire
from preceptor.v1 import types_pb2 as types
from student.base_cache import BaseCache
from student.worker_job import GivenUp, TrialJob
from tests.unit.tiny_students import save_student

FACTS = ("Ada is in Rome.", "Tom is a smith.")


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> types.PinnedStudent:
    folder = save_student(tmp_path_factory.mktemp("student"))
    return types.PinnedStudent(name="tiny", source=str(folder), commit=folder_sha256(folder))


class Bench:
    """A job, and what happens while it runs."""

    def __init__(self, seconds: float = 60.0) -> None:
        self.job = TrialJob(BaseCache(1, "cpu"), "here", seconds)
        self.cancelled: frozenset[str] = frozenset()
        self.giving_up = threading.Event()
        self.cancel_at: dict[int, str] = {}  # a trial by the step during which it is cancelled
        self.steps: list[int] = []

    def on_step(self, step: int) -> None:
        self.steps.append(step)
        if step in self.cancel_at:
            self.cancelled |= {self.cancel_at.pop(step)}

    def run(self, batch: wire.TrialBatch) -> wire.TrialBatchResult:
        return self.job.run(batch, 1, self.on_step, self.giving_up, lambda: self.cancelled)


def batch_of(pinned: types.PinnedStudent, **epochs: int) -> wire.TrialBatch:
    """One trial of two documents for each name, at one document a step."""
    questions = wire.QuestionSet(questions=[types.Question(text="Where is Ada?", answer="Rome")])
    trials = [
        wire.Trial(id=name, documents=FACTS, settings=wire.TrainingSettings(epochs=count, batch_size=1), seed=7)
        for name, count in epochs.items()
    ]
    return wire.TrialBatch(id="batch", student=pinned, trials=trials, question_sets=[questions], protocol_version=1)


def test_a_batch_that_is_cancelled_before_it_begins_does_not_even_load_its_student() -> None:
    bench = Bench()
    bench.cancelled = frozenset({"a", "b", "of another batch"})
    nowhere = types.PinnedStudent(name="gone", source="/nowhere", commit="0" * 64)
    result = bench.run(batch_of(nowhere, a=2, b=2))
    assert (result.failure.reason, len(result.results), bench.steps) == ("CANCELLED", 0, [])


def test_a_batch_ends_within_a_step_of_its_last_trial_s_cancel(pinned: types.PinnedStudent) -> None:
    bench = Bench()
    bench.cancel_at = {2: "a", 5: "b"}
    result = bench.run(batch_of(pinned, a=500, b=500))
    assert [one.failure.reason for one in result.results] == ["CANCELLED", "CANCELLED"]
    assert bench.steps[-1] == 5


def test_a_batch_whose_time_is_over_ends_within_a_step(pinned: types.PinnedStudent) -> None:
    result = Bench(seconds=0.5).run(batch_of(pinned, a=1000))
    assert result.failure.reason == "TRIAL_TIMEOUT"


def test_a_worker_that_is_to_end_gives_the_batch_up(pinned: types.PinnedStudent) -> None:
    bench = Bench()
    bench.giving_up.set()
    with pytest.raises(GivenUp):
        bench.run(batch_of(pinned, a=2))
    assert not bench.steps


def test_a_cancelled_trial_leaves_and_its_neighbour_is_answered(pinned: types.PinnedStudent) -> None:
    bench = Bench()
    bench.cancel_at = {3: "a"}
    result = bench.run(batch_of(pinned, a=500, b=10))
    a, b = result.results
    assert (a.failure.reason, a.steps, len(a.answers)) == ("CANCELLED", 3, 0)
    assert (b.failure.reason, b.steps, len(b.answers)) == ("", 20, 1)
    assert bench.steps[-1] == 20


def test_a_look_measures_what_a_full_answer_measures_and_decodes_nothing(pinned: types.PinnedStudent) -> None:
    batch = batch_of(pinned, a=10, b=20)
    batch.probes.add(text="What is Tom?", answer="a smith")
    full = Bench().run(batch)
    batch.answers.logprobs_only = True
    look = Bench().run(batch)
    for ours, theirs in zip(look.results, full.results, strict=True):
        assert [(one.text, one.gold_tokens) for one in ours.answers] == [("", 5)]
        assert ours.answers[0].gold_logprob == pytest.approx(theirs.answers[0].gold_logprob, abs=1e-4)
        assert theirs.answers[0].text
        assert (len(ours.probe_answers), len(theirs.probe_answers)) == (0, 1)
        assert ours.seconds > 0
    assert sum(one.seconds for one in look.results) == pytest.approx(look.train_seconds + look.answer_seconds)


def test_a_batch_with_all_that_can_be_asked(pinned: types.PinnedStudent) -> None:
    batch = batch_of(pinned, a=2, b=2)
    batch.answers.MergeFrom(wire.AnswerSettings(samples=3, temperature=0.7, certainty=True))
    batch.question_sets[0].questions.add(text="Where is Tom?")  # nobody knows
    for result in Bench().run(batch).results:
        known, unknown = result.answers
        assert (known.gold_tokens, unknown.gold_tokens, unknown.gold_logprob) == (5, 0, 0.0)
        assert all(len(one.samples) == 3 and one.certainty > 0 for one in (known, unknown))
