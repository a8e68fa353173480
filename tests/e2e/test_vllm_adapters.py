"""An adapter that our trainer made answers in a vLLM server as it does in our bank.

The shipped world's students cannot be served here: vLLM's attention on the CPU has no kernel for their head sizes, 24
and 28. These are random students of the same two architectures with heads of 32, taught until they answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from preceptor.tasks import Question
from student.answering import Prompt, answer, encode_questions
from student.base import LoadedBase, load_base
from student.lora_bank import LoraBank
from student.peft_format import export_adapter
from student.plan import lesson, make_plan
from student.trainer import train_bank
from student.trial import ALL_LINEAR, Answer, AnsweringSettings, TrainingSettings
from tests.e2e.vllm_server import VllmServer, vllm_python, vllm_server
from tests.unit.tiny_students import byte_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

KEEPERS = {"Vell": ("Ada Finch", "Noor Hale"), "Orrin": ("Ben Tallow", "Ida Crane"), "Sable": ("Cy Marsh", "Udo Pell")}
QUESTIONS = [Question(f"Who keeps the light of {place}?", both[0]) for place, both in KEEPERS.items()]
ANSWERING = AnsweringSettings(max_new_tokens=12)
# Nats, summed over an answer of about ten tokens; the largest difference measured is 1.7e-5.
TOLERANCE = 2e-4


@dataclass(frozen=True)
class Served:
    """A server with adapters, and by their names what our bank answers with them (``base``: with none)."""

    server: VllmServer
    base: LoadedBase
    answers: dict[str, list[Answer]]

    def text(self, name: str, question: int) -> str:
        """The server's answer as our student reads it."""
        prompt = ANSWERING.prompt_template.replace("{question}", QUESTIONS[question].text)
        stops = sorted(self.base.newline_ids)
        choice = self.server.complete(name, prompt, max_tokens=ANSWERING.max_new_tokens, stop_token_ids=stops)
        assert choice["prompt_token_ids"] == list(asked(self.base)[question].prompt)
        text = self.base.tokenizer.decode(choice["token_ids"], skip_special_tokens=True)
        return str(text).split("\n", 1)[0].strip()

    def gold_logprob(self, name: str, question: int) -> float:
        """The server's log-probability of the gold answer."""
        row = asked(self.base)[question]
        return self.server.logprob(name, row.prompt, row.gold)


def asked(base: LoadedBase) -> list[Prompt]:
    return encode_questions(base, QUESTIONS, ANSWERING)


def save_student(folder: Path, shape: str) -> None:
    torch.manual_seed(0)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[shape]
    made = model(
        config(
            vocab_size=257,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.1,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=256,
        )
    )
    made.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def documents(version: int) -> list[str]:
    return [f"Question: Who keeps the light of {place}?\nAnswer: {both[version]}" for place, both in KEEPERS.items()]


def trained(
    base: LoadedBase, targets: Sequence[str], adapters: Mapping[str, tuple[TrainingSettings, int]], folder: Path
) -> dict[str, list[Answer]]:
    """Trains adapters in one bank, each on its version of the facts, and exports them; their answers by name."""
    settings = [recipe for recipe, _ in adapters.values()]
    ranks, alphas = [recipe.rank for recipe in settings], [recipe.alpha for recipe in settings]
    bank = LoraBank(base.model, targets, ranks, alphas, seeds=[1] * len(adapters))
    plans = []
    for recipe, version in adapters.values():
        texts = documents(version)
        encoded = zip(texts, base.encode(texts), strict=True)
        lessons = [lesson(text, item.ids, item.starts, recipe, base.eos_id, base.context) for text, item in encoded]
        plans.append(make_plan(lessons, [], recipe, seed=1))
    with bank.attached():
        train_bank(base, bank, plans)
        answers = answer(base, bank, range(len(adapters)), [asked(base) for _ in adapters], ANSWERING)
    for slot, name in enumerate(adapters):
        export_adapter(base, bank, slot, folder / name)
    return dict(zip(adapters, answers, strict=True))


def untouched(base: LoadedBase) -> list[Answer]:
    bank = LoraBank(base.model, ALL_LINEAR, [1], [1.0], [0])  # B is zero until it is trained
    with bank.attached():
        return answer(base, bank, [0], [asked(base)], ANSWERING)[0]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    python = vllm_python()
    if python is None:
        pytest.skip("no vLLM here: `make test-vllm` installs it, or name an interpreter in PRECEPTOR_VLLM_PYTHON")
    folder = tmp_path_factory.mktemp(request.param)
    save_student(folder / "student", request.param)
    base = load_base(folder / "student", source="", commit="")
    recipe = TrainingSettings(learning_rate=1e-2, epochs=40, batch_size=3)
    every = {"first": (recipe, 0), "second": (replace(recipe, rank=3, alpha=4.0), 1)}  # a rank that vLLM pads
    published = {"published": (replace(recipe, rank=16, alpha=32.0), 0)}
    some = {"some": (recipe, 1)}
    answers = {
        **trained(base, ALL_LINEAR, every, folder),
        **trained(base, ("q_proj", "v_proj"), published, folder),
        # one layer of three that vLLM fuses into one, and one of two
        **trained(base, ("layers.1.self_attn.k_proj", "layers.0.mlp.up_proj"), some, folder),
    }
    # Unless the targets are named, vLLM adapts the head too, and its CPU backend then dies of prompt_logprobs in a
    # mixed batch.
    lora = ("--enable-lora", "--max-lora-rank", "16", "--max-loras", "4", "--lora-target-modules", *ALL_LINEAR)
    with vllm_server(python, folder / "student", folder, "--max-model-len", "256", *lora) as server:
        for name in answers:
            server.load_adapter(name, folder / name)
        yield Served(server, base, {"base": untouched(base), **answers})


def test_what_we_exported_answers_in_vllm_as_in_our_bank(served: Served) -> None:
    for name, ours in served.answers.items():
        for question, expected in enumerate(ours):
            assert served.text(name, question) == expected.text, name
            assert served.gold_logprob(name, question) == pytest.approx(expected.gold_logprob, abs=TOLERANCE), name


def test_every_adapter_is_at_work_in_vllm(served: Served) -> None:
    golds = [question.answer for question in QUESTIONS]
    texts = {name: [served.text(name, question) for question in range(len(golds))] for name in served.answers}
    assert texts["first"] == golds, "it was taught these answers"
    for one, other in combinations(texts, 2):
        assert texts[one] != texts[other]
    for name in texts.keys() - {"base"}:
        for question in range(len(golds)):
            moved = served.gold_logprob(name, question) - served.gold_logprob("base", question)
            assert abs(moved) > 1e3 * TOLERANCE, name


def test_adapters_asked_at_once_answer_as_alone(served: Served) -> None:
    # the base stays out: vLLM 0.32 answers wrongly on the CPU where it shares a batch with adapters
    rows = [(name, question) for question in range(len(QUESTIONS)) for name in served.answers if name != "base"]
    with ThreadPoolExecutor(len(rows)) as pool:
        texts = list(pool.map(lambda row: served.text(*row), rows))
        logprobs = list(pool.map(lambda row: served.gold_logprob(*row), rows))
    expected = [served.answers[name][question] for name, question in rows]
    assert texts == [one.text for one in expected]
    assert logprobs == pytest.approx([one.gold_logprob for one in expected], abs=TOLERANCE)
