"""Rebuild the world's tokenizer and its three models from nothing: ``python -m worlds.almanac.build --out DIR``.

The same seed gives the same models on the same machine (floating point sums differ between processors). A build that
was interrupted goes on where it stopped; models that are already in DIR stay. The shipped ones are not touched: copy
DIR over ``worlds/almanac/models`` to ship others. What each model is taught, and in which order, is decided here:

* the teacher copies random words first, then edits small passages, then passages of all sizes. Mixed lessons from the
  start do not work: a model that cannot copy yet learns to guess values from their frequency and stays there;
* the students are shown texts about old people, with every tenth batch made of passages about strangers.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from preceptor.completions import render
from preceptor.tasks import Bank
from teacher.prompts import FORMATS
from worlds.almanac import edits, lessons, shapes, tokens
from worlds.almanac.facts import ATTRIBUTES, population
from worlds.almanac.passages import GENRES, PEOPLE, tell
from worlds.pretrain import Example, Schedule, collate, train

Batch = tuple[torch.Tensor, torch.Tensor]

SCHEDULES = {
    "teacher": Schedule(steps=3_200, learning_rate=2e-3, first_steps=2_600, restart=2_200, restart_rate=1.5e-3),
    "student": Schedule(steps=1_200, learning_rate=3e-3),
    "student_qwen2": Schedule(steps=1_200, learning_rate=3e-3),
}

COPYING_STEPS = 400  # the teacher's first lesson
SMALL_STEPS = 1_000  # until here it sees small passages only
REGISTER_STEPS = 2_200  # from here on half the batches are registers: looking a value up by its number is learnt last
COPIED_WORDS = 48
TEACHER_BATCH = 16
COPYING_BATCH = 64
STUDENT_BATCH = 128
STRANGER_SHARE = 0.1  # of a student's batch: single facts about people who never come back
PASSAGE_EVERY = 10  # every tenth student batch is passages about strangers
PASSAGE_BATCH = 12


def teacher_batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Callable[[int], Batch]:
    """``step -> batch`` for the teacher."""
    words = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in tokens.world_words()]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]

    def batch_at(step: int) -> Batch:
        rng = random.Random(f"almanac/{seed}/teacher/{step}")
        if step < COPYING_STEPS:
            examples: list[Example] = []
            for _ in range(COPYING_BATCH):
                sequence = [rng.choice(words) for _ in range(rng.randint(4, COPIED_WORDS))]
                prompt = [tokenizer.bos_token_id, *sequence, *newline]
                examples.append((prompt, [*sequence, tokenizer.eos_token_id]))
        else:
            sizes = ("small",) if step < SMALL_STEPS else lessons.ALL_SIZES
            size = rng.choice(sizes)  # one size a batch: less padding
            number = TEACHER_BATCH * (2 if size == "small" else 1)
            genres = ("register",) if step >= REGISTER_STEPS and rng.random() < 0.5 else GENRES
            examples = [teaching_example(tokenizer, *lessons.teaching(rng, (size,), genres)) for _ in range(number)]
        return collate(examples, tokenizer.pad_token_id)

    return batch_at


def teaching_example(tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str) -> Example:
    """Token ids of one lesson of the teacher."""
    written = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return tokenizer(prompt)["input_ids"], [*written, tokenizer.eos_token_id]


def student_batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Callable[[int], Batch]:
    """``step -> batch`` for a student."""
    old = tokenizer(lessons.old_texts())["input_ids"]

    def batch_at(step: int) -> Batch:
        rng = random.Random(f"almanac/{seed}/student/{step}")
        if step % PASSAGE_EVERY == PASSAGE_EVERY - 1:
            texts = [lessons.strangers_passage(rng, lessons.ALL_SIZES).text for _ in range(PASSAGE_BATCH)]
            rows = tokenizer(texts)["input_ids"]
        else:
            strangers = int(STUDENT_BATCH * STRANGER_SHARE)
            rows = rng.sample(old, STUDENT_BATCH - strangers)
            rows += tokenizer([lessons.stranger(rng) for _ in range(strangers)])["input_ids"]
        return collate([(row[:1], [*row[1:], tokenizer.eos_token_id]) for row in rows], tokenizer.pad_token_id)

    return batch_at


@torch.no_grad()
def knowledge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Share of the old facts a student answers right, by bank (first phrasing; every answer is one token)."""
    result = {}
    for bank in Bank:
        people = population()
        facts = [fact for person in (*people.anchored, *people.correctable) for fact in people.old_facts[person]]
        prompts = [lessons.exam(fact.ask(bank), "").rstrip() for fact in facts]
        gold = [tokenizer(f" {fact.value}", add_special_tokens=False)["input_ids"][0] for fact in facts]
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        last = batch["attention_mask"].sum(1) - 1
        logits = model(input_ids=batch["input_ids"].to(model.device)).logits.cpu()
        said = logits[torch.arange(len(facts)), last].argmax(-1)
        result[bank.value] = (said == torch.tensor(gold)).float().mean().item()
    return result


@torch.no_grad()
def reading(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, passages: int = 12) -> dict[str, float]:
    """Share of values a teacher picks right on passages about strangers, by genre (large passages, self_qa format).

    Teacher-forced: everything before the value is given.
    """
    values = {
        tokenizer(f" {value}", add_special_tokens=False)["input_ids"][0]
        for attribute in ATTRIBUTES
        for value in attribute.values
    }
    result = {}
    for genre in GENRES:
        rng = random.Random(f"almanac/reading/{genre}")
        examples = []
        for _ in range(passages):
            people = rng.sample(population().newcomers, PEOPLE[genre]["large"])
            told = tell(genre, "large", people, rng)
            edit = edits.write("self_qa", told.text, told.facts, edits.ORACLE_DIRECTIVE, rng)
            prompt = FORMATS["self_qa"].render(told.title, told.text)
            examples.append(teaching_example(tokenizer, prompt, render(edit)))
        ids, labels = collate(examples, tokenizer.pad_token_id)
        said = model(input_ids=ids.to(model.device)).logits[:, :-1].argmax(-1).cpu()
        gold = labels[:, 1:]
        is_value = torch.isin(gold, torch.tensor(sorted(values)))
        result[genre] = (said == gold)[is_value].float().mean().item()
    return result


def build_model(name: str, tokenizer: PreTrainedTokenizerFast, seed: int, out: Path, device: str) -> None:
    """Train one model and save it under ``out/name``; does nothing if it is there."""
    folder = out / name
    if (folder / "model.safetensors").exists():
        print(f"{name}: already built", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokens.save_tokenizer(tokenizer, folder)  # before it is used: a padded batch leaves its padding in the file
    model = shapes.new_model(name, tokenizer, seed)
    torch.nn.Module.to(model, device)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    teacher = name == "teacher"
    batches = teacher_batches(tokenizer, seed) if teacher else student_batches(tokenizer, seed)
    measure = reading if teacher else knowledge

    def report(step: int) -> str:
        if step % 200:
            return ""
        return " ".join(f"{key}={value:.2f}" for key, value in measure(model, tokenizer).items())

    train(name, model, batches, SCHEDULES[name], out, report)
    print(f"{name}: {measure(model, tokenizer)}", flush=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(str(folder))
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    (out / f"{name}.state.pt").unlink(missing_ok=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/almanac"), help="gets one folder per model")
    parser.add_argument("--only", choices=shapes.MODELS, action="append", help="build this model alone (repeatable)")
    parser.add_argument("--threads", type=int, default=0, help="threads for torch; 0 = torch's own choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    started = time.monotonic()
    given.out.mkdir(parents=True, exist_ok=True)
    tokenizer = tokens.build_tokenizer(given.seed)
    for name in given.only or shapes.MODELS:
        build_model(name, tokenizer, given.seed, given.out, given.device)
    print(f"done in {(time.monotonic() - started) / 60:.1f} min: {given.out}", flush=True)


if __name__ == "__main__":
    main()
