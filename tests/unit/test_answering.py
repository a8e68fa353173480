"""Batched answers are the answers of each adapter asked alone, one question at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from preceptor.errors import PreceptorError
from preceptor.tasks import Question
from student import answering
from student.answering import answer, encode_questions
from student.base import LoadedBase
from student.lora_bank import LoraBank
from student.peft_format import bank_of, export_adapter
from student.plan import lesson, make_plan
from student.trainer import train_bank
from student.trial import ALL_LINEAR, Answer, AnsweringSettings, TrainingSettings
from tests.unit.tiny_students import SHAPES, tiny_base, tiny_model

SETTINGS = AnsweringSettings(max_new_tokens=9)
FACTS = ("Question: Where is Ada?\nAnswer: Rome", "Question: Who is Tom Hill?\nAnswer: a smith", "Ada is in Rome.")
QUESTIONS = (
    Question("Where is Ada?", "Rome"),  # learnt: complete after the first pass
    Question("Who is Tom Hill?", "a baker"),  # leaves the gold answer after a shared beginning
    Question("Where is Ada?", "Rom"),  # goes on after the gold answer
    Question("What does the old harbour master of Lisbon sell on Sundays?", "x"),
    Question("Who?", "nobody at all, not even the cat"),  # longer than may be generated
)


def trained_bank(base: LoadedBase) -> LoraBank:
    """Three adapters: one untouched, one that learnt the facts well, one half-way."""
    bank = LoraBank(base.model, ALL_LINEAR, [4, 8, 2], [8.0, 16.0, 4.0], [0, 1, 2])
    plans = []
    for epochs in (0, 80, 12):
        settings = TrainingSettings(epochs=epochs, learning_rate=1e-2, batch_size=3)
        lessons = [
            lesson(t, e.ids, e.starts, settings, base.eos_id, base.context)
            for t, e in zip(FACTS, base.encode(FACTS), strict=True)
        ]
        plans.append(make_plan(lessons, [], settings, seed=epochs))
    with bank.attached():
        train_bank(base, bank, plans)
    return bank


@torch.inference_mode()
def ask_alone(base: LoadedBase, bank: LoraBank, adapter: int, question: Question) -> Answer:
    """The plain way: merge the adapter into the weights, re-read everything for each token."""
    merged = []
    for name, (a, b) in bank.factors(adapter).items():
        linear = base.model.get_submodule(name)
        merged.append((linear, linear.weight.clone()))
        linear.weight += (16.0 / 8.0) * (b @ a)
    prompt = base.encode([SETTINGS.prompt_template.format(question=question.text)])[0].ids
    gold = base.encode([" " + question.answer])[0].ids
    logprobs = base.model(torch.tensor([[*prompt, *gold]])).logits[0].log_softmax(-1)
    total = sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(gold))
    generated: list[int] = []
    while len(generated) < SETTINGS.max_new_tokens:
        token = int(base.model(torch.tensor([[*prompt, *generated]])).logits[0, -1].argmax())
        if token == base.eos_id:
            break
        generated.append(token)
        if token in base.newline_ids:
            break
    for linear, weight in merged:
        linear.weight.copy_(weight)
    return Answer(0, base.tokenizer.decode(generated).split("\n")[0].strip(), total, len(gold))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk_tokens", [2048, 100])
def test_batched_answers_equal_those_of_each_adapter_asked_alone(
    shape: str, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(answering._CHUNK_TOKENS, "cpu", chunk_tokens)
    base = tiny_base(shape)
    bank = trained_bank(base)
    # every adapter gets other questions, and another number of them
    asked = [list(QUESTIONS), list(QUESTIONS[::-1]), [QUESTIONS[2], QUESTIONS[0]]]
    rows = [encode_questions(base, questions, SETTINGS) for questions in asked]
    with bank.attached():
        given = answer(base, bank, [0, 1, 2], rows, SETTINGS)
    for adapter, questions in enumerate(asked):
        assert [one.question for one in given[adapter]] == list(range(len(questions)))
        for question, got in zip(questions, given[adapter], strict=True):
            expected = ask_alone(base, bank, adapter, question)
            assert got.text == expected.text, (adapter, question)
            assert got.gold_logprob == pytest.approx(expected.gold_logprob, abs=1e-3)
            assert got.gold_tokens == expected.gold_tokens
    assert given[1][4].text == "Rome", "the trained adapter was to know its fact"
    assert given[1][2].text == "Rome", "a gold answer that is only the beginning must not cut the answer short"
    assert given[0][0].text != "Rome"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
@pytest.mark.parametrize("shape", ["llama", "qwen2", "gemma", "gemma2", "mistral with a window"])
def test_an_exported_adapter_gives_in_peft_and_in_a_new_bank_the_answers_it_gave_here(
    shape: str, tmp_path: Path
) -> None:
    base = tiny_base(shape)
    bank = trained_bank(base)
    rows = [encode_questions(base, QUESTIONS, SETTINGS) for _ in range(3)]
    with bank.attached():
        here = answer(base, bank, [0, 1, 2], rows, SETTINGS)
    folders = [tmp_path / str(adapter) for adapter in range(3)]
    for adapter, folder in enumerate(folders):
        export_adapter(base, bank, adapter, folder)
        model = PeftModel.from_pretrained(tiny_model(shape), str(folder)).eval()
        for question, got in zip(QUESTIONS, here[adapter], strict=True):
            ids = torch.tensor([base.encode([SETTINGS.prompt_template.format(question=question.text)])[0].ids])
            whole = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=SETTINGS.max_new_tokens,
                do_sample=False,
                pad_token_id=base.eos_id,
            )
            text = base.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
            assert got.text == text.split("\n")[0].strip(), (adapter, question)
    assert len({tuple(one.text for one in answers) for answers in here}) == 3, "the adapters are to differ"
    rows = [encode_questions(base, QUESTIONS, SETTINGS) for _ in range(3)]
    other = tiny_base(shape)
    back = bank_of(other, folders)
    with back.attached():
        assert answer(other, back, [0, 1, 2], rows, SETTINGS) == here


def test_the_gold_answer_changes_no_text() -> None:
    base = tiny_base()
    bank = trained_bank(base)
    texts = []
    for gold in ("Rome", "Paris", "R", "a very long wrong answer", ""):
        rows = encode_questions(base, [Question(q.text, gold) for q in QUESTIONS], SETTINGS)
        with bank.attached():
            texts.append([a.text for a in answer(base, bank, [2], [rows], SETTINGS)[0]])
    assert texts[1:] == texts[:-1]


def test_a_subset_of_the_adapters_can_answer() -> None:
    base = tiny_base()
    bank = trained_bank(base)
    with bank.attached():

        def ask(adapters: list[int]) -> list[list[Answer]]:
            rows = [encode_questions(base, QUESTIONS, SETTINGS) for _ in adapters]
            return answer(base, bank, adapters, rows, SETTINGS)

        both, one = ask([1, 2]), ask([2])
    assert [a.text for a in one[0]] == [a.text for a in both[1]]
    assert [a.gold_logprob for a in one[0]] == pytest.approx([a.gold_logprob for a in both[1]], abs=1e-4)


@pytest.mark.parametrize("shape", ["llama", "gemma2"])
def test_an_adapter_that_has_answered_leaves_the_others_theirs(shape: str) -> None:
    base = tiny_base(shape)
    bank = trained_bank(base)

    def ask(adapters: list[int], asked: list[list[Question]]) -> list[list[str]]:
        rows = [encode_questions(base, questions, SETTINGS) for questions in asked]
        with bank.attached():
            return [[one.text for one in answers] for answers in answer(base, bank, adapters, rows, SETTINGS)]

    learnt, others = [QUESTIONS[0]], list(QUESTIONS[3:])
    expected = [ask([adapter], [asked])[0] for adapter, asked in ((1, learnt), (0, others), (2, others))]
    assert expected[0] == ["Rome"], "complete after the first pass"
    assert ask([1, 0, 2], [learnt, others, others]) == expected
    assert expected[1] != expected[2]


def test_without_generation_only_the_gold_answer_is_scored() -> None:
    base = tiny_base()
    bank = trained_bank(base)
    quiet = AnsweringSettings(max_new_tokens=9, generate=False)
    with bank.attached():
        spoken = answer(base, bank, [1], [encode_questions(base, QUESTIONS, SETTINGS)], SETTINGS)[0]
        silent = answer(base, bank, [1], [encode_questions(base, QUESTIONS, quiet)], quiet)[0]
    assert [a.gold_logprob for a in silent] == [a.gold_logprob for a in spoken]
    assert {a.text for a in silent} == {""}


def test_a_question_that_leaves_no_room_for_its_answer_is_refused() -> None:
    base = tiny_base(context=32)
    with pytest.raises(PreceptorError, match="context is 32") as caught:
        encode_questions(base, [Question("Where is Ada?", "Rome")], SETTINGS)
    assert caught.value.reason == "SEQUENCE_TOO_LONG"
