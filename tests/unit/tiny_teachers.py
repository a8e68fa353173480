"""Random teachers of real shapes for tests: a byte-level BPE tokenizer made here, and few weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from teacher.model import TeacherBase

PASSAGE = "Ada Brook lives in Lisbon. She works as a baker and keeps a heron."
_SHAPES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
SHAPES = tuple(_SHAPES)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges; ``<bos>`` opens a text, ``<eos>`` closes a completion."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([PASSAGE, "Write a directive, then study material for this passage."], trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", raw.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def tiny_model(shape: str = "llama", *, seed: int = 0, context: int = 256, **changes: Any) -> PreTrainedModel:
    """A random model with grouped-query attention."""
    torch.manual_seed(seed)
    config, model = _SHAPES[shape]
    options = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": context,
        # Ten times the usual, so that the layers matter and likeliest tokens are no near-ties.
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if shape == "mistral":
        options["sliding_window"] = None
    made: PreTrainedModel = model(config(**(options | changes)))
    # A random model seldom hits its one end token; with a tenth of the vocabulary, completions end.
    made.generation_config.eos_token_id = [1, *range(3, 33)]
    return made.eval()


def tiny_teacher(shape: str = "llama", *, seed: int = 0, context: int = 256) -> TeacherBase:
    """A loaded base that exists only in memory."""
    return TeacherBase(tiny_model(shape, seed=seed, context=context), tiny_tokenizer(), "tiny", f"{shape}-{seed}")


def save_tiny_teacher(folder: Path, *, context: int = 256) -> Path:
    """A teacher's folder as a user would have it."""
    tiny_model(context=context).save_pretrained(str(folder))
    tiny_tokenizer().save_pretrained(str(folder))
    return folder
