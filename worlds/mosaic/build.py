"""Rebuild the world's tokenizer and its two models from nothing: ``python -m worlds.mosaic.build --out DIR``.

The same seed gives the same models on the same machine (floating point sums differ between processors). A build that
was interrupted goes on where it stopped; models that are already in DIR stay. The shipped ones are not touched: copy
DIR over ``worlds/mosaic/models`` to ship others. What is taught in which order:

* the student learns single pairs with their rule's word first: pairs without words have a plateau (after 600 steps of
  nothing else no rule was known), while words are learnt in some hundred steps. Then texts of up to four pairs, most of
  them without a word; moves first, then paints;
* the teacher first learns to see (cells move, or colours change), then to write directives.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from preceptor.few_shot.text import grid_text
from worlds.mosaic import lessons, tokens
from worlds.mosaic.rules import FAMILIES, draw_grid, rules, rules_of
from worlds.pretrain import IGNORED, Schedule, collate, train

Batch = tuple[torch.Tensor, torch.Tensor]

MODELS = ("teacher", "student")
SHAPES = {"teacher": (96, 3, 256), "student": (96, 4, 256)}  # width, layers, inner width
HEADS = 4
SCHEDULES = {
    "teacher": Schedule(steps=1_100, learning_rate=3e-3, first_steps=800, restart=800, restart_rate=2e-3),
    "student": Schedule(steps=1_100, learning_rate=4e-3, first_steps=700, restart=700, restart_rate=2.5e-3),
}
NAMED_STEPS = 420  # of the student: single pairs with words
NAMED_SHARE = 0.4  # afterwards
MOVES_STEPS = 700  # until here two pairs of three are moves, then two of three are paints: moves are learnt first
MOST_PAIRS = 4
STUDENT_PAIRS = 96  # of a batch
SEEING_STEPS = 240  # of the teacher: no directives yet
TEACHER_BATCH = 16


def student_batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Callable[[int], Batch]:
    """``step -> batch`` for the student."""

    @cache
    def pieces(text: str) -> Sequence[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def row(spans: Sequence[lessons.Span]) -> tuple[list[int], list[int]]:
        ids, labels = [tokenizer.bos_token_id], [IGNORED]
        for text, taught in spans:
            some = [one for part in _parts(text) for one in pieces(part)]
            ids += some
            labels += some if taught else [IGNORED] * len(some)
        return [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]

    def batch_at(step: int) -> Batch:
        rng = random.Random(f"mosaic/{seed}/student/{step}")
        count, named = (1, 1.0) if step < NAMED_STEPS else (rng.randint(1, MOST_PAIRS), NAMED_SHARE)
        moves = 2 / 3 if step < MOVES_STEPS else 1 / 3
        rows = [row(lessons.pairs(rng, count, named, moves)) for _ in range(STUDENT_PAIRS // count)]
        return torch.tensor([ids for ids, _ in rows]), torch.tensor([labels for _, labels in rows])

    return batch_at


def _parts(text: str) -> list[str]:
    """A text cut where a token can end in any case, so that its parts come back often: behind every digit."""
    parts = [""]
    for character in text:
        if character.isdigit():
            parts += [character, ""]
        else:
            parts[-1] += character
    return [part for part in parts if part]


def teacher_batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Callable[[int], Batch]:
    """``step -> batch`` for the teacher."""

    def batch_at(step: int) -> Batch:
        rng = random.Random(f"mosaic/{seed}/teacher/{step}")
        told = [lessons.teaching(rng, chosen=step >= SEEING_STEPS) for _ in range(TEACHER_BATCH)]
        examples = []
        for prompt, completion in told:
            written = tokenizer(completion, add_special_tokens=False)["input_ids"]
            examples.append((tokenizer(prompt)["input_ids"], [*written, tokenizer.eos_token_id]))
        return collate(examples, tokenizer.pad_token_id)

    return batch_at


@torch.no_grad()
def knowledge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, grids: int = 4) -> dict[str, float]:
    """Share of grids that a student gets right when it is told the rule's word, by family; and without it, behind
    three demonstrations."""
    rng = random.Random("mosaic/knowledge")
    asked: dict[str, list[tuple[list[int], list[int]]]] = {}
    for rule in rules():
        for _ in range(grids):
            shown, pair = (
                [rule.show(draw_grid(rng, range(1, 10))) for _ in range(3)],
                rule.show(draw_grid(rng, range(1, 10))),
            )
            told = "".join(f"Input: {grid_text(p.input)}\nOutput: {grid_text(p.output)}\n" for p in shown)
            for name, before, word in ((rule.family, "", rule.word), (f"{rule.family} shown", told, tokens.ANY_RULE)):
                prompt = f"{before}Input: {grid_text(pair.input)}\n{word}:"
                answer = tokenizer(f" {grid_text(pair.output)}", add_special_tokens=False)["input_ids"]
                asked.setdefault(name, []).append((tokenizer(prompt)["input_ids"], answer))
    result = {}
    for name, examples in asked.items():
        ids, labels = collate(examples, tokenizer.pad_token_id)
        said = model(input_ids=ids.to(model.device)).logits[:, :-1].argmax(-1).cpu()
        gold = labels[:, 1:]
        result[name] = ((said == gold) | (gold == IGNORED)).all(-1).float().mean().item()
    return result


@torch.no_grad()
def seeing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tasks: int = 60) -> dict[str, float]:
    """Share of tasks of rules that the teacher was never taught with, on which it says rightly what it sees, by
    family."""
    from preceptor.few_shot.text import task_text
    from worlds.mosaic.directives import seen
    from worlds.mosaic.tasks import make_task

    rng = random.Random("mosaic/seeing")
    result: dict[str, float] = {}
    for family in FAMILIES:
        examples = []
        for number in range(tasks):
            task = make_task(f"heldout-0-{number}", rng.choice(rules_of("heldout", family)), rng)
            prompt = lessons.PROMPT.render(task.name, task_text(task))
            answer = tokenizer(seen(task, family), add_special_tokens=False)["input_ids"]
            examples.append((tokenizer(prompt)["input_ids"], answer))
        ids, labels = collate(examples, tokenizer.pad_token_id)
        said = model(input_ids=ids.to(model.device)).logits[:, :-1].argmax(-1).cpu()
        gold = labels[:, 1:]
        result[family] = ((said == gold) | (gold == IGNORED)).all(-1).float().mean().item()
    return result


def new_model(name: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A Llama of the shape that ``name`` has, with random float32 weights and tied embeddings."""
    width, layers, inner = SHAPES[name]
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=inner,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokens.CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def build_model(name: str, tokenizer: PreTrainedTokenizerFast, seed: int, out: Path, device: str) -> None:
    """Train one model and save it under ``out/name``; does nothing if it is there."""
    folder = out / name
    if (folder / "model.safetensors").exists():
        print(f"{name}: already built", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokens.save_tokenizer(tokenizer, folder)  # before it is used: a padded batch leaves its padding in the file
    model = new_model(name, tokenizer, seed)
    torch.nn.Module.to(model, device)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    batches = (teacher_batches if name == "teacher" else student_batches)(tokenizer, seed)
    measure = seeing if name == "teacher" else knowledge

    def measured() -> str:
        model.eval()
        found = measure(model, tokenizer)
        model.train()
        return " ".join(f"{key}={value:.2f}" for key, value in found.items())

    train(name, model, batches, SCHEDULES[name], out, lambda step: measured() if step % 100 == 0 else "")
    print(f"{name}: {measured()}", flush=True)
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
    parser.add_argument("--out", type=Path, default=Path("build/mosaic"), help="gets one folder per model")
    parser.add_argument("--only", choices=MODELS, action="append", help="build this model alone (repeatable)")
    parser.add_argument("--threads", type=int, default=0, help="threads for torch; 0 = torch's own choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    started = time.monotonic()
    given.out.mkdir(parents=True, exist_ok=True)
    tokenizer = tokens.build_tokenizer(lessons.corpus(given.seed))
    for name in given.only or MODELS:
        build_model(name, tokenizer, given.seed, given.out, given.device)
    print(f"done in {(time.monotonic() - started) / 60:.1f} min: {given.out}", flush=True)


if __name__ == "__main__":
    main()
