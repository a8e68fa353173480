"""What the inner-loop benchmark trains: lengths of real self-edits, models of real shapes with random weights.

Lengths come from ``self_edit_lengths.json``, a histogram of 400 published self-edits (none of their text is shipped).
It is made again from the published file by

    python -m bench.inner_loop_workload SELF_EDITS.jsonl

A document's length in tokens is its words times TOKENS_PER_WORD; token ids are random, for speed does not depend on
their values.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from student.base import LoadedBase
from student.plan import Lesson, TrainingPlan, make_plan
from student.trial import ALL_LINEAR, TrainingSettings

HISTOGRAM = Path(__file__).with_name("self_edit_lengths.json")
CANDIDATES, SEEDS = 5, 3  # self-edits of one passage, fine-tunes of each
# The published edits are English with 6.3 characters a word, spaces included, and Qwen's tokenizer takes about 4.7
# characters a token on such text. An estimate: no tokenizer is asked.
TOKENS_PER_WORD = 1.35
RECIPE = TrainingSettings(
    rank=32, alpha=64, learning_rate=1e-3, epochs=10, batch_size=1, schedule="linear", warmup_share=0.0
)
TARGETS = {"qv": ("q_proj", "v_proj"), "all": ALL_LINEAR}
_CONTEXT = 4_096
_EOS = 256

SHAPES: dict[str, dict[str, Any]] = {
    # for the test of this benchmark; no layer narrower than the recipe's rank
    "minute": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 300,
        "tie_word_embeddings": True,
    },
    # the shipped world's student
    "tiny": {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 1_280,
        "tie_word_embeddings": True,
    },
    # Qwen2.5-0.5B and Qwen2.5-7B
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4_864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3_584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True, slots=True)
class Work:
    """One trial: its documents' lengths are in the plan, its seed gives the adapter's start."""

    plan: TrainingPlan
    seed: int
    epochs: int

    @property
    def documents(self) -> list[Lesson]:
        """The lessons of one epoch."""
        return [step[0] for step in self.plan.steps[: len(self.plan.steps) // self.epochs]]


def share_of(work: Sequence[Work], trials: int) -> list[Work]:
    """At least ``trials`` trials in which every candidate is trained equally often: five, or whole passages."""
    if trials <= CANDIDATES:
        return [item for item in work[: CANDIDATES * SEEDS] if item.seed == 0]
    return list(work[: whole_passages(trials)])


def more_of(work: Sequence[Work], trials: int) -> list[Work]:
    """At least ``trials`` trials: the same ones again and again, each time with other seeds and orders."""
    rounds = -(-trials // len(work))
    return [
        Work(make_plan(item.documents, [], replace(RECIPE, epochs=item.epochs), seed), seed, item.epochs)
        for again in range(rounds)
        for item in work
        for seed in (item.seed + SEEDS * again,)
    ]


def whole_passages(trials: int) -> int:
    """``trials``, rounded up to whole passages."""
    return -(-trials // (CANDIDATES * SEEDS)) * CANDIDATES * SEEDS


def random_base(shape: str, device: str) -> LoadedBase:
    """A model of the shape with random weights: float32 on the CPU, bfloat16 on a GPU."""
    made = SHAPES[shape]
    kind = LlamaConfig if shape in ("minute", "tiny") else Qwen2Config
    config = kind(**made, max_position_embeddings=_CONTEXT, bos_token_id=None, eos_token_id=_EOS)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {symbol: index for index, symbol in enumerate(alphabet)} | {"<eos>": _EOS}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return LoadedBase(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))


def base_parameters(base: LoadedBase) -> int:
    """N of the 4N count: weights that a token is multiplied with, the head among them. Call it before LoRA is on."""
    return sum(module.weight.numel() for module in base.model.modules() if isinstance(module, torch.nn.Linear))


def self_edit_workload(trials: int, *, epochs: int = RECIPE.epochs) -> list[Work]:
    """``trials`` trials: passage after passage, five candidates each, three seeds of every candidate."""
    histogram = json.loads(HISTOGRAM.read_text(encoding="utf-8"))["formats"]
    return _work(_drawn_lengths(histogram), trials, epochs)


def _drawn_lengths(histogram: Mapping[str, Any]) -> Iterator[list[int]]:
    """Lengths of one candidate after the other. The five of a passage are the middles of the five fifths of all
    self-edits, ordered by their number of documents: five free draws would be another workload with every seed."""
    rng = random.Random("inner-loop")
    pool = sorted(
        (int(documents), name)
        for name, drawn in histogram.items()
        for documents, count in drawn["documents_per_self_edit"].items()
        for _ in range(count)
    )
    middles = [pool[len(pool) * (2 * fifth + 1) // (2 * CANDIDATES)] for fifth in range(CANDIDATES)]
    while True:
        for documents, name in middles:
            words = histogram[name]["words_per_document"]
            drawn = rng.choices([int(n) for n in words], weights=list(words.values()), k=documents)
            yield [max(2, round(TOKENS_PER_WORD * n)) for n in drawn]


def short_workload(trials: int, *, epochs: int = RECIPE.epochs) -> list[Work]:
    """The same recipe on question-answer documents of the shipped world: about fifteen tokens each."""
    # imported here: GPU machines run the benchmark without the world
    from transformers import AutoTokenizer

    from worlds.almanac import MODELS, edits
    from worlds.almanac.passages import passages_with_facts

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "student", local_files_only=True)
    passages = passages_with_facts(11, "train", -(-trials // SEEDS))
    lengths = (
        [len(ids) for ids in tokenizer(list(edits.STYLES["self_qa"](told.text, told.facts)))["input_ids"]]
        for told, _ in passages
    )
    return _work(lengths, trials, epochs)


def _work(lengths: Iterator[list[int]], trials: int, epochs: int) -> list[Work]:
    rng = random.Random("tokens")
    work: list[Work] = []
    for candidate in lengths:
        # ids below 256: in every shape's vocabulary, and none of them ends a text
        lessons = [Lesson((*(rng.randrange(256) for _ in range(n)), _EOS)) for n in candidate]
        settings = replace(RECIPE, epochs=epochs)
        for seed in range(SEEDS):
            work.append(Work(make_plan(lessons, [], settings, seed), seed, epochs))
            if len(work) == trials:
                return work
    raise ValueError(f"{trials} trials are more than there are documents for")


def make_histogram(lines: Sequence[str]) -> dict[str, Any]:
    """The histogram of published self-edits, one JSON object a line with ``format`` and ``completion``."""
    documents: dict[str, Counter[int]] = {}
    words: dict[str, Counter[int]] = {}
    for line in lines:
        edit = json.loads(line)
        texts = [text.split() for text in edit["completion"].splitlines() if text.strip()]
        documents.setdefault(edit["format"], Counter())[len(texts)] += 1
        words.setdefault(edit["format"], Counter()).update(len(text) for text in texts)
    return {
        "what": "lengths of 400 self-edits that Qwen2.5-7B wrote for SQuAD passages, by prompt format; a document is "
        "a non-empty line, words are separated by white space; value -> how often",
        "source": "SEAL's published results (Zweiger et al. 2025, arXiv 2506.10943)",
        "licence": "MIT (c) 2025 Adam Zweiger",
        "formats": {
            name: {
                "documents_per_self_edit": {str(n): c for n, c in sorted(documents[name].items())},
                "words_per_document": {str(n): c for n, c in sorted(words[name].items())},
            }
            for name in sorted(documents)
        },
    }


if __name__ == "__main__":
    published = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    HISTOGRAM.write_text(json.dumps(make_histogram(published), indent=1) + "\n", encoding="utf-8")
