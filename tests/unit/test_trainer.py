"""A trial depends on nothing but itself: its plan, its training, its failure."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from preceptor.tasks import Directive, LossMask, Question
from student import trial_runner
from student.base import LoadedBase
from student.buckets import like_lengths
from student.lora_bank import LoraBank
from student.plan import Lesson, TrainingPlan, lesson, make_plan, replayed_per_epoch
from student.trial import TrainingSettings, Trial, TrialOutcome
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
