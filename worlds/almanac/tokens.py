"""The world's tokenizer: byte-level BPE trained on the world's own text, so that any other text goes through too."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from worlds.almanac import lessons
from worlds.almanac.facts import ATTRIBUTES, FIRST_NAMES, LAST_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 1_280  # 256 bytes, 3 special tokens, every word of the world, and room for pieces of others
CORPUS_LINES = 30_000
CONTEXT = 2_048  # tokens; a few SQuAD passages in bytes still fit
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer that puts ``<bos>`` before a text and nothing after it.

    Raises RuntimeError if a name or a value of the world is not one token: the world would then not be learnable.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_corpus(seed), trainer)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, raw.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        padding_side="right",
    )
    for word in world_words():
        if len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) != 1:
            raise RuntimeError(f"the word {word!r} is not one token; raise VOCABULARY or CORPUS_LINES")
    return tokenizer


def world_words() -> list[str]:
    """Every name and every value."""
    return [*FIRST_NAMES, *LAST_NAMES, *(value for attribute in ATTRIBUTES for value in attribute.values)]


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``."""
    tokenizer.save_pretrained(str(folder))


def _corpus(seed: int) -> Iterator[str]:
    rng = random.Random(f"almanac/{seed}/tokens")
    for _ in range(CORPUS_LINES // 10):
        prompt, completion = lessons.teaching(rng, lessons.ALL_SIZES)
        yield prompt
        yield completion
        for _ in range(8):
            yield lessons.stranger(rng)
