"""The world's tokenizer: a digit a token, the world's own words whole, and any other text as bytes and pieces."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from worlds.mosaic.rules import rules

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTEXT = 2_048  # tokens
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
SPECIAL = (BOS, EOS, PAD)
ANY_RULE = "Output"  # where a rule's word stands, and any rule may follow
VOCABULARY = 640  # 256 bytes, the special ones, and what the world's own texts have often


def build_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on ``corpus`` that never joins two digits.

    A grid's cell is one token wherever it stands, so that a student can learn where a cell goes. It puts ``<bos>``
    before a text and nothing after it. Raises RuntimeError if a rule's word is not one token: the student learns what a
    word means as what follows from one token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(corpus, trainer)
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
    for word in (ANY_RULE, *(rule.word for rule in rules())):
        if len(tokenizer(f"\n{word}:", add_special_tokens=False)["input_ids"]) != 3:
            raise RuntimeError(f"the word {word!r} is not one token; raise VOCABULARY")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``."""
    tokenizer.save_pretrained(str(folder))
