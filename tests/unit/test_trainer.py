"""A trial depends on nothing but itself: its plan, its training, its failure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from preceptor.errors import PreceptorError
from preceptor.tasks import Directive, FineTuning, LossMask, Question
from student import trial_runner
from student.base import LoadedBase
from student.buckets import like_lengths
from student.lora_bank import LoraBank, adapter_values
from student.memory import plan_memory
from student.packed_decoder import PackedDecoder
from student.plan import Lesson, TrainingPlan, lesson, make_plan, replayed_per_epoch
from student.trainer import StepLimits, TrainingResult, train_bank
from student.trial import ALL_LINEAR, TrainingSettings, Trial, TrialOutcome
from student.trial_runner import run_trials
from tests.unit.tiny_students import tiny_base

FACTS = ("Ada is in Rome.", "Tom is a smith.", "Ada has a cat.", "Tom has two dogs and a boat.", "Eve sings.")
REPLAY = tuple(f"Old fact {number}." for number in range(6))
QUESTIONS = (Question("Where is Ada?", "Rome"), Question("What is Tom?", "a smith"))
SETTINGS = TrainingSettings(epochs=3, batch_size=2, learning_rate=1e-2)
EOS = 256


def as_lesson(text: str, settings: TrainingSettings = SETTINGS, context: int = 128) -> Lesson:
    return lesson(text, list(text.encode()), list(range(len(text))), settings, EOS, context)


OWN = [as_lesson(text) for text in FACTS]
OLD = [as_lesson(text) for text in REPLAY]


@given(
    share=some.floats(0, 0.9), documents=some.integers(1, 12), batch=some.integers(1, 9), seed=some.integers(0, 2**63)
)
def test_every_epoch_holds_each_own_document_once_and_its_share_of_replay(
    share: float, documents: int, batch: int, seed: int
) -> None:
    own = [as_lesson(f"own {number}") for number in range(documents)]
    settings = replace(SETTINGS, replay_share=share, batch_size=batch, epochs=2)
    plan = make_plan(own, OLD, settings, seed)
    wanted = replayed_per_epoch(documents, share)
    per_epoch = -(-(documents + wanted) // batch)
    assert len(plan.steps) == 2 * per_epoch
    for epoch in (plan.steps[:per_epoch], plan.steps[per_epoch:]):
        items = [item for step in epoch for item in step]
        assert sorted(item.ids for item in items if item in own) == sorted(item.ids for item in own)
        replayed = [item for item in items if item in OLD]
        assert len(replayed) == wanted
        uses = [replayed.count(item) for item in OLD]
        assert max(uses) - min(uses) <= 1, "no repetition before the corpus is used up"
    assert all(len(step) <= batch for step in plan.steps)


def test_replay_leaves_the_order_of_the_own_documents_alone() -> None:
    def own_order(share: float) -> list[Lesson]:
        plan = make_plan(OWN, OLD, replace(SETTINGS, replay_share=share), 7)
        return [item for step in plan.steps for item in step if item in OWN]

    assert own_order(0.0) == own_order(0.5)


def test_the_plan_is_the_seeds() -> None:
    assert make_plan(OWN, OLD, SETTINGS, 7) == make_plan(OWN, OLD, SETTINGS, 7)
    assert make_plan(OWN, OLD, SETTINGS, 7).steps != make_plan(OWN, OLD, SETTINGS, 8).steps


@given(limit=some.integers(1, 300))
def test_no_step_begins_after_the_token_budget(limit: int) -> None:
    plan = make_plan(OWN, [], replace(SETTINGS, max_train_tokens=limit), 0)
    sizes = [sum(len(item.ids) for item in step) for step in plan.steps]
    assert sum(sizes[:-1]) < limit
    unlimited = make_plan(OWN, [], SETTINGS, 0)
    assert plan.steps == unlimited.steps[: len(plan.steps)]
    assert sum(sizes) >= limit or plan.steps == unlimited.steps
    assert plan.tokens == sum(sizes)


@given(lengths=some.lists(some.integers(1, 300), min_size=1, max_size=40), pass_tokens=some.integers(0, 500))
def test_sequences_are_split_by_length_only_where_that_saves_work(lengths: list[int], pass_tokens: int) -> None:
    groups = like_lengths(lengths, pass_tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))

    def cost(some_groups: list[list[int]]) -> int:
        return sum(len(group) * max(lengths[i] for i in group) + pass_tokens for group in some_groups)

    assert cost(groups) <= cost([list(range(len(lengths)))])
    assert like_lengths(lengths, 300 * 40) == [list(range(len(lengths)))]
    ranges = sorted((min(lengths[i] for i in g), max(lengths[i] for i in g)) for g in groups)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(ranges)), "groups do not overlap in length"


@given(steps=some.integers(1, 60), share=some.floats(0, 1), schedule=some.sampled_from(["linear", "constant"]))
def test_the_learning_rate_peaks_at_its_setting_and_no_step_is_wasted(steps: int, share: float, schedule: str) -> None:
    settings = replace(SETTINGS, warmup_share=share, schedule=schedule, batch_size=1, epochs=steps)  # type: ignore[arg-type]
    rates = make_plan(OWN[:1], [], settings, 0).learning_rates
    assert len(rates) == steps
    assert max(rates) == pytest.approx(settings.learning_rate)
    assert min(rates) > 0


def test_the_loss_begins_behind_the_last_marker() -> None:
    after = replace(SETTINGS, loss_mask=LossMask.AFTER_MARKER)
    text = "Answer: this. Question: Where?\nAnswer: Rome"
    item = as_lesson(text, after)
    assert bytes(item.ids[item.loss_from : -1]).decode() == " Rome"
    assert as_lesson("No marker here.", after).loss_from == 1
    assert as_lesson("Question: Where?\nAnswer:", after).labels == 1  # the end of the sequence alone
    assert as_lesson(text).loss_from == 1


def test_a_directive_overrides_only_what_it_names() -> None:
    changed = SETTINGS.under(Directive(learning_rate=5e-4, replay_share=0.3))
    assert changed == replace(SETTINGS, learning_rate=5e-4, replay_share=0.3)
    assert SETTINGS.under(Directive(rank=32)).alpha / 32 == SETTINGS.alpha / SETTINGS.rank
    assert SETTINGS.under(Directive(targets="qv")) == replace(SETTINGS, target_modules=("q_proj", "v_proj"))
    whole = SETTINGS.under(Directive(fine_tuning=FineTuning.FULL))
    assert whole == replace(SETTINGS, full=True)
    assert whole.under(Directive(fine_tuning=FineTuning.LORA)) == SETTINGS


def trials(**changes: object) -> list[Trial]:
    """Different lengths, rates and seeds; without documents is the baseline."""
    return [
        Trial("baseline", (), 0, SETTINGS),
        Trial("short", FACTS[:2], 1, replace(SETTINGS, epochs=2)),
        Trial("long", FACTS, 2, replace(SETTINGS, epochs=8, replay_share=0.4)),
        Trial("other rank", FACTS, 3, replace(SETTINGS, rank=2, learning_rate=3e-3, **changes)),  # type: ignore[arg-type]
    ]


def run(some_trials: list[Trial]) -> list[TrialOutcome]:
    return run_trials(
        tiny_base(),
        some_trials,
        [QUESTIONS] * len(some_trials),
        probes=[Question("Who?", "Eve")],
        replay_documents=REPLAY,
    )


def without_times(outcome: TrialOutcome) -> TrialOutcome:
    return replace(outcome, train_seconds=0.0, answer_seconds=0.0)


def test_the_same_batch_gives_the_same_bits() -> None:
    assert [without_times(one) for one in run(trials())] == [without_times(one) for one in run(trials())]


def test_neighbours_do_not_matter() -> None:
    for trial, among in zip(trials(), run(trials()), strict=True):
        alone = run([trial])[0]
        assert among.losses == pytest.approx(alone.losses, abs=1e-4)
        assert among.trained_tokens == alone.trained_tokens
        for ours, theirs in zip(
            (*among.answers, *among.probe_answers), (*alone.answers, *alone.probe_answers), strict=True
        ):
            assert ours.gold_logprob == pytest.approx(theirs.gold_logprob, abs=1e-2)


def test_training_helps_and_the_baseline_is_the_untouched_student() -> None:
    base = tiny_base()
    qa = ("Question: Where is Ada?\nAnswer: Rome", "Question: What is Tom?\nAnswer: a smith")
    learnt = Trial("learnt", qa, 0, replace(SETTINGS, epochs=60))
    nothing, something = run_trials(base, [Trial("none", (), 5), learnt], [QUESTIONS, QUESTIONS])
    assert [one.text for one in something.answers] == ["Rome", "a smith"]
    assert something.final_loss is not None
    assert something.first_loss is not None
    assert something.final_loss < something.first_loss / 2
    assert nothing.steps == 0
    assert nothing.trained_tokens == 0
    again = run_trials(base, [Trial("none", (), 99)], [QUESTIONS])[0]  # no seed can matter where nothing is trained
    assert [one.gold_logprob for one in again.answers] == pytest.approx([one.gold_logprob for one in nothing.answers])


def test_a_diverged_trial_fails_alone() -> None:
    sound = run(trials())
    broken = run(trials(max_grad_norm=0.0, weight_decay=1e30))
    assert broken[3].failure is not None
    assert broken[3].failure[0] == "TRIAL_DIVERGED"
    assert broken[3].answers == ()
    for before, after in zip(sound[:3], broken[:3], strict=True):
        assert after.failure is None
        assert after.losses == pytest.approx(before.losses, abs=1e-4)


def test_a_document_that_is_too_long_fails_its_own_trial_only() -> None:
    outcomes = run([Trial("fits", FACTS, 0, SETTINGS), Trial("too long", ("word " * 40,), 0, SETTINGS)])
    assert outcomes[0].failure is None
    assert outcomes[1].failure is not None
    assert outcomes[1].failure[0] == "SEQUENCE_TOO_LONG"
    assert "201 tokens, the limit is 128" in outcomes[1].failure[1]


def test_targets_are_each_trials_own_and_unknown_ones_fail_by_name() -> None:
    narrow = replace(SETTINGS, target_modules=("q_proj", "v_proj"))
    unknown = replace(SETTINGS, target_modules=("Wqkv",))
    mixed = run([Trial(str(n), FACTS, 0, one) for n, one in enumerate((SETTINGS, narrow, unknown))])
    assert mixed[0].losses == pytest.approx(run([Trial("0", FACTS, 0, SETTINGS)])[0].losses, abs=1e-4)
    assert mixed[1].losses == pytest.approx(run([Trial("1", FACTS, 0, narrow)])[0].losses, abs=1e-4)
    assert mixed[0].losses[-1] != pytest.approx(mixed[1].losses[-1], abs=1e-3)
    assert mixed[2].failure is not None
    assert mixed[2].failure[0] == "TARGET_MODULES_UNMATCHED"
    assert "Wqkv" in mixed[2].failure[1]


def test_a_batch_that_does_not_fit_is_run_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(trials())
    real = trial_runner.train_bank

    def narrow(base: LoadedBase, bank: LoraBank, plans: list[TrainingPlan], *rest: object, **options: object) -> object:
        if len(plans) > 1:
            raise torch.OutOfMemoryError(f"{len(plans)} do not fit")
        return real(base, bank, plans, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(trial_runner, "train_bank", narrow)
    for one, other in zip(run(trials()), expected, strict=True):
        assert one.failure is None
        assert one.losses == pytest.approx(other.losses, abs=1e-4)


def test_a_batch_can_be_stopped_between_steps() -> None:
    class Stop(Exception):
        pass

    def stop(step: int) -> None:
        if step == 2:
            raise Stop

    base = tiny_base()
    with pytest.raises(Stop):
        run_trials(base, trials(), [QUESTIONS] * 4, replay_documents=REPLAY, on_step=stop)
    # the student is whole again
    assert run_trials(base, [Trial("none", (), 0)], [QUESTIONS])[0].answers == run([Trial("none", (), 0)])[0].answers


# Taking seats over, leaving early: five adapters, two seats.
COURSES = (6, 14, 9, 3, 8)  # steps of each


class Watch:
    """Which adapters sat in each step, and whom nobody wants any more from which step on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cancel_after: dict[int, tuple[int, ...]] | None = None) -> None:
        self.seated: list[frozenset[int]] = []
        self._cancel_after = cancel_after or {}
        self._bound: frozenset[int] = frozenset()
        bind = PackedDecoder.bind

        def watched(decoder: PackedDecoder, adapters: Sequence[int], *rest: torch.Tensor) -> None:
            assert len(set(adapters)) == len(adapters) <= 2
            self._bound = frozenset(adapters)
            bind(decoder, adapters, *rest)

        monkeypatch.setattr(PackedDecoder, "bind", watched)

    def on_step(self, step: int) -> None:
        assert step == len(self.seated) + 1
        self.seated.append(self._bound)

    def cancelled(self) -> list[int]:
        done = len(self.seated)
        return [adapter for step, adapters in self._cancel_after.items() if done >= step for adapter in adapters]


def train_two_at_a_time(
    watch: Watch | None = None, broken: int | None = None
) -> tuple[list[TrainingResult], torch.Tensor]:
    """Results and final values; adapter ``broken`` goes wild after some steps."""
    base = tiny_base()
    bank = LoraBank(base.model, ALL_LINEAR, [8, 4, 2, 8, 3], [8.0] * 5, range(5))
    plans = []
    for seed, steps in enumerate(COURSES):
        settings = replace(SETTINGS, batch_size=1, epochs=3, max_steps=steps, learning_rate=3e-3)
        plan = make_plan(OWN, [], settings, seed)
        assert len(plan.steps) == steps
        if seed == broken:
            rates = (*plan.learning_rates[:3], 1e30, *plan.learning_rates[4:])
            plan = replace(plan, learning_rates=rates)
        plans.append(plan)
    with bank.attached():
        options: dict[str, Any] = {"on_step": watch.on_step, "cancelled": watch.cancelled} if watch else {}
        return train_bank(base, bank, plans, StepLimits(seats=2), **options), bank.values_KP


def assert_as_if_alone(adapters: Iterable[int], results: list[TrainingResult], values: torch.Tensor) -> None:
    expected, expected_values = train_two_at_a_time()
    for adapter in adapters:
        assert results[adapter].losses == pytest.approx(expected[adapter].losses, abs=1e-5)
        assert len(results[adapter].losses) == COURSES[adapter]
        assert (results[adapter].diverged, results[adapter].cancelled) == (False, False)
        torch.testing.assert_close(values[adapter], expected_values[adapter], atol=1e-5, rtol=0)


def test_seats_are_taken_over_longest_plan_first(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    results, _ = train_two_at_a_time(watch)
    assert [len(result.losses) for result in results] == list(COURSES)
    # 1 (14 steps) and 2 (9) begin; 4 (8) follows 2, 0 (6) follows 1, 3 (3) follows 4
    expected = [{1, 2}] * 9 + [{1, 4}] * 5 + [{0, 4}] * 3 + [{0, 3}] * 3
    assert watch.seated == expected


def test_a_cancelled_adapter_leaves_and_a_waiting_one_takes_its_seat(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch, cancel_after={4: (1,)})
    results, values = train_two_at_a_time(watch)
    assert results[1].cancelled
    assert len(results[1].losses) == 4
    assert watch.seated[:5] == [{1, 2}] * 4 + [{4, 2}]
    assert sum(map(len, watch.seated)) == sum(COURSES) - 14 + 4
    assert_as_if_alone((0, 2, 3, 4), results, values)


def test_a_cancelled_adapter_that_waits_never_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch, cancel_after={0: (4,), 2: (3, 2)})
    results, values = train_two_at_a_time(watch)
    assert [result.cancelled for result in results] == [False, False, True, True, True]
    assert [len(result.losses) for result in results] == [6, 14, 2, 0, 0]
    assert not any({3, 4} & seated for seated in watch.seated)
    untouched = LoraBank(tiny_base().model, ALL_LINEAR, [8, 4, 2, 8, 3], [8.0] * 5, range(5)).values_KP
    assert torch.equal(values[[3, 4]], untouched[[3, 4]])
    assert_as_if_alone((0, 1), results, values)


def test_training_ends_when_everyone_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch, cancel_after={3: (0, 1, 2, 3, 4)})
    results, _ = train_two_at_a_time(watch)
    assert len(watch.seated) == 3
    assert [len(result.losses) for result in results] == [0, 3, 3, 0, 0]


@pytest.mark.parametrize("broken", [1, 4])
def test_a_diverged_adapter_leaves_and_a_waiting_one_takes_its_seat(
    broken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    results, values = train_two_at_a_time(watch, broken)
    assert results[broken].diverged
    *sound, last = results[broken].losses
    assert len(sound) == 4, "the fifth step is the first with the wild values"
    assert all(loss < 10 for loss in sound)
    assert not last < 1000
    # one step late, so that a GPU need not be waited for
    assert sum(broken in seated for seated in watch.seated) == 6
    assert all(len(seated) == 2 for seated in watch.seated[:12])
    assert_as_if_alone(set(range(5)) - {broken}, results, values)


def test_a_cancelled_trial_ends_as_cancelled_and_changes_no_other() -> None:
    steps: list[int] = []
    long = Trial("long", FACTS, 2, replace(SETTINGS, epochs=8))
    some_trials = [Trial("baseline", (), 0), long, Trial("short", FACTS, 1, replace(SETTINGS, epochs=2))]
    asked = [QUESTIONS] * 3
    outcomes = run_trials(
        tiny_base(), some_trials, asked, on_step=steps.append, cancelled=lambda: ["long", "no one"] if steps else []
    )
    assert outcomes[1].failure == ("CANCELLED", "nobody wanted it any more after step 1")
    assert outcomes[1].answers == ()
    assert len(outcomes[1].losses) == 1
    for ours, theirs in zip(outcomes, run_trials(tiny_base(), some_trials, asked), strict=True):
        if ours.trial_id != "long":
            assert ours.failure is None
            assert ours.losses == pytest.approx(theirs.losses, abs=1e-5)
            assert [one.text for one in ours.answers] == [one.text for one in theirs.answers]


def test_a_batch_that_nobody_wants_ends_without_an_answer() -> None:
    outcomes = run_trials(
        tiny_base(),
        trials(),
        [QUESTIONS] * 4,
        replay_documents=REPLAY,
        cancelled=lambda: [t.trial_id for t in trials()],
    )
    assert [one.failure and one.failure[0] for one in outcomes] == ["CANCELLED"] * 4
    assert not any(one.losses or one.answers for one in outcomes)


def test_a_trial_that_breaks_in_its_last_step_has_diverged() -> None:
    wild = replace(SETTINGS, learning_rate=1e30, max_steps=1)
    last, sound = run([Trial("last", FACTS, 0, wild), Trial("sound", FACTS, 1, SETTINGS)])
    assert last.failure is not None
    assert last.failure[0] == "TRIAL_DIVERGED"
    assert last.answers == ()
    assert sound.answers == run([Trial("sound", FACTS, 1, SETTINGS)])[0].answers


def test_a_rank_that_the_student_cannot_carry_fails_its_own_trial_only() -> None:
    wide, sound = run(
        [Trial("wide", FACTS, 0, replace(SETTINGS, rank=17)), Trial("sound", FACTS, 0, SETTINGS)],
    )
    assert wide.failure == (
        "RANK_TOO_LARGE",
        "rank 17 is above the width of model.layers.0.self_attn.k_proj, which is 16",
    )
    assert sound.failure is None


def least(base: LoadedBase, *some_trials: Trial) -> int:
    """Free memory with which these trials, and no more, are planned side by side."""
    plans = [trial_runner._plan(base, trial, []) for trial in some_trials]
    values = adapter_values(base.model, ALL_LINEAR, max(trial.settings.rank for trial in some_trials))
    low, high = 0, 1 << 34
    while high - low > 1:
        middle = (low + high) // 2
        try:
            enough = plan_memory(base, values, plans, middle).bank >= len(plans)
        except PreceptorError:
            enough = False
        low, high = (low, middle) if enough else (middle, high)
    return high


def test_where_memory_holds_few_adapters_there_are_several_banks_with_the_same_results(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    some_trials = [Trial(str(seed), FACTS[: 2 + seed % 3], seed, SETTINGS) for seed in range(5)]
    expected = run(some_trials)
    free = least(tiny_base(), *some_trials[:2])
    monkeypatch.setattr(trial_runner, "free_bytes", lambda device: free)
    banks: list[int] = []
    real = trial_runner.train_bank

    def counted(base: LoadedBase, bank: LoraBank, *rest: Any, **options: Any) -> object:
        banks.append(len(bank))
        return real(base, bank, *rest, **options)

    monkeypatch.setattr(trial_runner, "train_bank", counted)
    outcomes = run(some_trials)
    assert sum(banks) == 5
    assert len(banks) > 1
    assert "adapters at a time, not 5" in caplog.text
    for ours, theirs in zip(outcomes, expected, strict=True):
        assert ours.failure is None
        assert ours.losses == pytest.approx(theirs.losses, abs=1e-5)
        assert [one.text for one in ours.answers] == [one.text for one in theirs.answers]


def test_what_does_not_fit_even_alone_fails_with_numbers_and_its_neighbours_live_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = [Trial(str(seed), FACTS[:2], seed, SETTINGS) for seed in range(3)]
    large = Trial("large", (*FACTS, "word " * 24), 9, SETTINGS)
    expected = run(small)
    free = least(tiny_base(), small[0])
    assert free < least(tiny_base(), large)
    monkeypatch.setattr(trial_runner, "free_bytes", lambda device: free)
    outcomes = run([small[0], large, *small[1:]])
    failure = outcomes.pop(1).failure
    assert failure is not None
    assert failure[0] == "TRIAL_OUT_OF_MEMORY"
    assert re.search(r"one adapter of [\d,]+ values with a document of 121 tokens needs [\d.]+ GiB", failure[1])
    for ours, theirs in zip(outcomes, expected, strict=True):
        assert ours.failure is None
        assert ours.losses == pytest.approx(theirs.losses, abs=1e-5)


def test_memory_that_is_not_there_after_all_fails_only_what_does_not_fit_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(trials())
    real = trial_runner.train_bank

    def narrow(base: LoadedBase, bank: LoraBank, plans: list[TrainingPlan], *rest: Any, **options: Any) -> object:
        if len(plans) > 1 or bank.ranks == (2,):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 999 bytes")
        return real(base, bank, plans, *rest, **options)

    monkeypatch.setattr(trial_runner, "train_bank", narrow)
    *sound, failed = run(trials())
    assert failed.failure is not None
    assert failed.failure[0] == "TRIAL_OUT_OF_MEMORY"
    assert "999 bytes" in failed.failure[1]
    for one, other in zip(sound, expected, strict=False):
        assert one.failure is None
        assert one.losses == pytest.approx(other.losses, abs=1e-4)
