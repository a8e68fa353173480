"""Sampled answers, certainty and looks at log-probabilities alone are what a plain forward pass says they should be."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from peft import PeftModel

from preceptor.tasks import Question
from student import answering
from student.answering import answer, encode_questions
from student.base import LoadedBase
from student.lora_bank import LoraBank
from student.peft_format import export_adapter
from student.readings import draw, self_certainty, uniforms
from student.trial import ALL_LINEAR, Answer, AnsweringSettings, TrainingSettings, Trial
from student.trial_runner import run_trials
from tests.unit.test_answering import FACTS, QUESTIONS, SETTINGS, trained_bank
from tests.unit.tiny_students import tiny_base, tiny_model

ALL = replace(SETTINGS, samples=5, certainty=True)
# Decoded from a cache and, as its windows and caps are not known to us, by reading anew.
SHAPES = ("llama", "gemma2")


def ask(
    base: LoadedBase,
    bank: LoraBank,
    adapters: Sequence[int],
    settings: AnsweringSettings,
    questions: Sequence[Question] = QUESTIONS,
    seed: int = 0,
) -> list[list[Answer]]:
    rows = [encode_questions(base, questions, settings, seed) for _ in adapters]
    with bank.attached():
        return answer(base, bank, adapters, rows, settings)


@contextmanager
def calls_of(base: LoadedBase) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of every forward pass meanwhile."""
    calls: list[dict[str, Any]] = []
    hook = base.decoder.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
@pytest.mark.parametrize("shape", SHAPES)
def test_certainty_is_the_divergence_from_uniform_that_peft_gives_over_the_greedy_answer(
    shape: str, tmp_path: Path
) -> None:
    base = tiny_base(shape)
    bank = trained_bank(base)
    ours = ask(base, bank, [0, 1, 2], ALL)
    ends: set[str] = set()
    for adapter in range(3):
        export_adapter(base, bank, adapter, tmp_path / str(adapter))
        model = PeftModel.from_pretrained(tiny_model(shape), str(tmp_path / str(adapter))).eval()
        for question, got in zip(QUESTIONS, ours[adapter], strict=True):
            ids = list(base.encode([SETTINGS.prompt_template.format(question=question.text)])[0].ids)
            divergences: list[float] = []
            end = "the limit"
            while len(divergences) < SETTINGS.max_new_tokens:
                with torch.no_grad():
                    p = model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)
                divergences.append(float((torch.log(1 / len(p) / p) / len(p)).sum()))  # KL(U || p), as it is written
                ids.append(int(p.argmax()))
                if ids[-1] in base.end_ids | base.newline_ids:
                    end = "its end"
                    break
            ends.add(end)
            assert got.certainty == pytest.approx(sum(divergences) / len(divergences), abs=1e-3), (adapter, question)
    assert ends == {"the limit", "its end"}
    assert ours[1][0].certainty > ours[0][0].certainty, "who has learnt it is surer"


def expected_texts(base: LoadedBase, prompt: Sequence[int], settings: AnsweringSettings) -> dict[str, float]:
    """The probability of every text of at most two tokens, by plain forward passes."""

    def distribution(rows: list[list[int]]) -> torch.Tensor:
        with torch.no_grad():
            logits = torch.cat(
                [base.model(torch.tensor(rows[i : i + 64])).logits[:, -1] for i in range(0, len(rows), 64)]
            )
        return (logits.double() / settings.temperature).softmax(-1)

    first = distribution([list(prompt)])[0]
    second = distribution([[*prompt, token] for token in range(len(first))])
    tokens: list[list[int]] = []
    shares: list[float] = []
    for one, share in enumerate(first.tolist()):
        if one in base.end_ids or one in base.newline_ids:
            tokens.append([] if one in base.end_ids else [one])
            shares.append(share)
            continue
        tokens += [[one] if two in base.end_ids else [one, two] for two in range(len(first))]
        shares += (share * second[one]).tolist()
    texts: defaultdict[str, float] = defaultdict(float)
    for text, share in zip(base.tokenizer.batch_decode(tokens), shares, strict=True):
        texts[text.split("\n")[0].strip()] += share
    return texts


@pytest.mark.parametrize(("shape", "temperature"), [("llama", 1.0), ("llama", 0.6), ("gemma2", 1.0)])
def test_samples_come_from_the_students_own_distribution(shape: str, temperature: float) -> None:
    base = tiny_base(shape)
    bank = LoraBank(base.model, ALL_LINEAR, [4], [8.0], [0])  # as B is zero, it is the base
    settings = AnsweringSettings(max_new_tokens=2, samples=3_000, temperature=temperature)
    greedy = ask(base, bank, [0], replace(settings, samples=0), QUESTIONS[:1])[0][0].text
    # A gold answer that is often said: many samples go through the first pass, and many leave it.
    question = Question(QUESTIONS[0].text, greedy)
    exact = expected_texts(base, encode_questions(base, [question], settings)[0].prompt, settings)
    drawn = Counter(ask(base, bank, [0], settings, [question])[0][0].samples)
    assert drawn.total() == settings.samples
    assert set(drawn) <= set(exact)
    cells = {text: share * settings.samples for text, share in exact.items() if share * settings.samples >= 8}
    assert len(cells) >= 10, "the distribution is to be wide"
    cells_drawn = [drawn[text] for text in cells] + [settings.samples - sum(drawn[text] for text in cells)]
    cells_exact = [*cells.values(), settings.samples - sum(cells.values())]
    chi_square = sum((n - m) ** 2 / m for n, m in zip(cells_drawn, cells_exact, strict=True))
    freedom = len(cells)
    # Mean and standard deviation of chi-square: freedom and sqrt(2 freedom). The seed is fixed: it cannot flake.
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_asked_beside_it_changes_no_greedy_answer(shape: str) -> None:
    base = tiny_base(shape)
    bank = trained_bank(base)
    plain, full = ask(base, bank, [0, 1, 2], SETTINGS), ask(base, bank, [0, 1, 2], ALL)
    for few, many in zip(plain, full, strict=True):
        assert [one.text for one in many] == [one.text for one in few]
        assert [one.gold_logprob for one in many] == pytest.approx([one.gold_logprob for one in few], abs=1e-4)
        assert all((one.samples, one.certainty) == ((), 0.0) for one in few)
        assert all(len(one.samples) == 5 and one.certainty > 0 for one in many)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk_tokens", [2048, 100])
def test_an_adapter_draws_the_same_samples_alone_and_among_eight(
    shape: str, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(shape)
    bank = LoraBank(base.model, ALL_LINEAR, [4] * 8, [8.0] * 8, range(8))
    generator = torch.Generator().manual_seed(0)
    bank.values_KP += torch.randn(bank.values_KP.shape, generator=generator) / 20
    alone = [ask(base, bank, [adapter], ALL)[0] for adapter in range(8)]
    monkeypatch.setitem(answering._CHUNK_TOKENS, "cpu", chunk_tokens)
    for one, other in zip(alone, ask(base, bank, range(8), ALL), strict=True):
        assert [item.samples for item in one] == [item.samples for item in other]
        assert [item.certainty for item in one] == pytest.approx([item.certainty for item in other], abs=1e-4)
    assert len({item.samples for one in alone for item in one}) > 30, "neither adapters nor questions draw alike"


def test_the_gold_answer_changes_no_sample() -> None:
    base = tiny_base()
    bank = trained_bank(base)
    drawn = [
        [one.samples for one in ask(base, bank, [2], ALL, [Question(q.text, gold) for q in QUESTIONS])[0]]
        for gold in ("Rome", "a very long wrong answer", "")
    ]
    assert drawn[1:] == drawn[:-1]


def test_a_question_without_a_gold_answer_is_answered_and_scores_no_tokens() -> None:
    base = tiny_base()
    bank = trained_bank(base)
    known = ask(base, bank, [0, 1, 2], ALL)
    for settings in (ALL, replace(ALL, generate=False)):
        unknown = ask(base, bank, [0, 1, 2], settings, [Question(q.text, "") for q in QUESTIONS])
        for ours, theirs in zip(unknown, known, strict=True):
            assert [(one.gold_logprob, one.gold_tokens) for one in ours] == [(0.0, 0)] * len(QUESTIONS)
            if settings.generate:
                assert [one.text for one in ours] == [one.text for one in theirs]
                assert [one.certainty for one in ours] == pytest.approx([one.certainty for one in theirs], abs=1e-4)


def test_samples_at_almost_no_temperature_are_the_greedy_answer_and_what_is_known_takes_one_pass() -> None:
    base = tiny_base()
    bank = trained_bank(base)
    cold = replace(ALL, temperature=1e-3)
    for one in ask(base, bank, [1], cold)[0]:
        assert set(one.samples) == {one.text}
    with calls_of(base) as calls:
        (known,) = ask(base, bank, [1], cold, QUESTIONS[:1])
    assert known[0].samples == ("Rome",) * 5
    assert len(calls) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_look_is_one_pass_without_a_cache(shape: str) -> None:
    base = tiny_base(shape)
    bank = trained_bank(base)
    with calls_of(base) as calls:
        looked = ask(base, bank, [0, 1, 2], replace(ALL, generate=False))
    assert [(one["use_cache"], one["past_key_values"]) for one in calls] == [(False, None)]
    full = ask(base, bank, [0, 1, 2], SETTINGS)
    for ours, theirs in zip(looked, full, strict=True):
        assert ours == [replace(one, text="") for one in theirs]


def test_a_trial_draws_by_its_seed_and_question_whatever_is_asked_beside_it() -> None:
    base = tiny_base()
    settings = TrainingSettings(epochs=6, learning_rate=1e-2, batch_size=3)
    some_trials = [Trial(str(seed), FACTS, seed, settings) for seed in (3, 4)]
    probes = (Question("Who is Ada?", "a smith"),)
    both = run_trials(base, some_trials, [QUESTIONS, QUESTIONS], probes=probes, answering=ALL)
    (alone,) = run_trials(base, some_trials[:1], [QUESTIONS[::-1]], answering=ALL)
    assert [one.samples for one in alone.answers[::-1]] == [one.samples for one in both[0].answers]
    assert len({one.samples for outcome in both for one in outcome.answers}) > len(QUESTIONS)
    for outcome in both:
        assert [(one.samples, one.certainty) for one in outcome.probe_answers] == [((), 0.0)]
        assert outcome.answer_seconds > 0


def test_a_trial_that_breaks_in_its_last_step_has_diverged_without_gold_answers_too() -> None:
    wild = TrainingSettings(learning_rate=1e30, max_steps=1)
    asked = [Question(question.text, "") for question in QUESTIONS]
    for settings in (replace(SETTINGS, samples=3), replace(SETTINGS, generate=False)):
        (broken,) = run_trials(tiny_base(), [Trial("wild", FACTS, 0, wild)], [asked], answering=settings)
        assert broken.failure is not None
        assert broken.failure[0] == "TRIAL_DIVERGED"


def test_a_number_draws_the_token_at_which_the_cumulative_distribution_passes_it() -> None:
    p = torch.tensor([[0.0, 0.1, 0.0, 0.4, 0.5, 0.0]])
    at = torch.tensor([[0.0, 0.0999, 0.1001, 0.4999, 0.5001, 1 - 2.0**-32]], dtype=torch.float64)
    assert draw(p.log(), at, 1.0).tolist() == [[1, 1, 3, 3, 4, 4]]
    assert draw(torch.full((1, 6), math.nan), at, 1.0).max() < 6, "a broken adapter must not point outside"


def test_certainty_is_nothing_of_a_uniform_distribution_and_grows_with_its_peak() -> None:
    peaks = torch.tensor([[0.0] * 9, [1.0] + [0.0] * 8, [9.0] + [0.0] * 8])
    flat, hill, tower = self_certainty(peaks).tolist()
    assert flat == pytest.approx(0.0, abs=1e-6)
    assert 0.01 < hill < tower


@given(some.integers(0, 2**64 - 1), some.text(max_size=20), some.integers(0, 100), some.integers(1, 60))
def test_the_numbers_of_a_sample_depend_on_their_address_alone(seed: int, text: str, sample: int, length: int) -> None:
    long = uniforms(seed, text, sample, 64)
    assert uniforms(seed, text, sample, length) == long[:length]
    assert all(0 <= number < 1 for number in long)
    for other in ((seed ^ 1, text, sample), (seed, text + "x", sample), (seed, text, sample + 1)):
        assert uniforms(*other, 64) != long
