"""A batch on a worker without the queue: when it ends early, and what its result then says."""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import Any

import pytest
import torch

from preceptor.artifacts import folder_sha256
from preceptor.v1 import trial_pb2 as wire
from preceptor.v1 import types_pb2 as types
from student import trial_runner, worker_job
from student.base import LoadedBase
from student.base_cache import BaseCache
from student.lora_bank import LoraBank
from student.worker_job import GivenUp, TrialJob
from tests.unit.tiny_students import save_student

FACTS = ("Ada is in Rome.", "Tom is a smith.")


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> types.PinnedStudent:
    folder = save_student(tmp_path_factory.mktemp("student"))
    return types.PinnedStudent(name="tiny", source=str(folder), commit=folder_sha256(folder))


class Bench:
    """A job, and what happens while it runs."""

    def __init__(self, seconds: float = 60.0, cache: BaseCache | None = None, **limits: float) -> None:
        self.job = TrialJob(cache or BaseCache(1, "cpu"), "here", seconds, **limits)
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
    assert bench.steps[:2] == [0, 1]  # the first says that the student is loaded
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


def test_a_batch_may_take_as_long_as_its_trials_together_and_no_longer_than_a_batch(
    pinned: types.PinnedStudent,
) -> None:
    stopped = Bench(seconds=60, trial_seconds=0.2).run(batch_of(pinned, a=1000, b=1000)).failure
    assert (stopped.reason, stopped.message[:34]) == ("TRIAL_TIMEOUT", "2 trials were stopped after 0.4 s,")
    stopped = Bench(seconds=0.3, trial_seconds=60).run(batch_of(pinned, a=1000, b=1000)).failure
    assert (stopped.reason, stopped.message[:34]) == ("TRIAL_TIMEOUT", "2 trials were stopped after 0.3 s,")


def test_the_time_that_its_student_takes_to_load_is_not_the_batch_s(pinned: types.PinnedStudent) -> None:
    class SlowCache(BaseCache):
        def get(self, student: types.PinnedStudent) -> LoadedBase:
            time.sleep(4)
            return super().get(student)

    result = Bench(seconds=3.5, cache=SlowCache(1, "cpu")).run(batch_of(pinned, a=1))
    assert not result.HasField("failure"), result.failure
    assert result.load_seconds >= 4


# There is no GPU here: these are the types and texts that torch raises on one (c10/cuda/CUDAException.h, ATen's checks
# of cuDNN and cuBLAS), and what the system raises where a disk is full.
BROKEN = [
    (
        torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel errors ..."),
        "DEVICE_FAILED",
    ),
    (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "DEVICE_FAILED"),
    (torch.AcceleratorError("CUDA error: unspecified launch failure"), "DEVICE_FAILED"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"), "DEVICE_FAILED"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "DEVICE_FAILED"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "TRIAL_OUT_OF_MEMORY"),
    (torch.AcceleratorError("CUDA error: out of memory"), "TRIAL_OUT_OF_MEMORY"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "TRIAL_OUT_OF_MEMORY"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "TRIAL_OUT_OF_MEMORY"),
    (MemoryError(), "TRIAL_OUT_OF_MEMORY"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/model.safetensors"), "DISK_FULL"),
    (RuntimeError("NCCL error: unhandled cuda error"), "TRIAL_FAILED"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), "TRIAL_FAILED"),
    (OSError(errno.EACCES, os.strerror(errno.EACCES)), "TRIAL_FAILED"),
]


@pytest.mark.parametrize(("raised", "reason"), BROKEN, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("where", ["loading", "training"])
def test_what_breaks_is_the_batch_s_failure_under_its_own_reason(
    pinned: types.PinnedStudent, monkeypatch: pytest.MonkeyPatch, where: str, raised: Exception, reason: str
) -> None:
    def break_down(*_: Any, **__: Any) -> Any:
        raise raised

    bench = Bench()
    with monkeypatch.context() as patch:
        if where == "loading":
            patch.setattr(BaseCache, "get", break_down)
        else:
            patch.setattr(worker_job, "run_trials", break_down)
        failure = bench.run(batch_of(pinned, a=1)).failure
    assert failure.reason == reason
    assert str(raised)[:20] in failure.message or reason == "DISK_FULL"
    # This process has no broken device, so its job goes on.
    assert not bench.run(batch_of(pinned, a=1)).HasField("failure")


def test_trials_that_do_not_fit_together_are_trained_apart(
    pinned: types.PinnedStudent, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_bank = trial_runner.train_bank
    sizes = []

    def two_are_too_many(base: LoadedBase, bank: LoraBank, plans: Any, *rest: Any, **more: Any) -> Any:
        sizes.append(len(plans))
        if len(plans) > 1:
            raise torch.AcceleratorError("CUDA error: out of memory")
        return train_bank(base, bank, plans, *rest, **more)

    monkeypatch.setattr(trial_runner, "train_bank", two_are_too_many)
    results = Bench().run(batch_of(pinned, a=2, b=2, c=2, d=2)).results
    assert [len(one.answers) for one in results] == [1, 1, 1, 1]
    assert sizes == [4, 2, 1, 1, 2, 1, 1]


def test_a_trial_that_diverges_fails_alone(pinned: types.PinnedStudent) -> None:
    batch = batch_of(pinned, mad=20, sane=2)
    batch.trials[0].settings.learning_rate = 1.0
    batch.trials[0].settings.weight_decay = 100.0  # every step multiplies the values by -99
    mad, sane = Bench().run(batch).results
    assert (mad.failure.reason, len(mad.answers)) == ("TRIAL_DIVERGED", 0)
    assert len(sane.answers) == 1


def test_a_student_whose_files_changed_is_not_trained(pinned: types.PinnedStudent) -> None:
    batch = batch_of(pinned, a=2)
    batch.student.commit = "0" * 64
    assert Bench().run(batch).failure.reason == "STUDENT_CHANGED"
