"""Random students of real shapes for tests: a byte-level tokenizer (any text goes through), few weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from student.base import LoadedBase

SHAPES = ("llama", "qwen2", "mistral")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; ``<eos>`` is token 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)} | {"<eos>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def tiny_model(shape: str = "llama", *, seed: int = 0, context: int = 128) -> PreTrainedModel:
    """A random model; grouped-query attention, so that k and v are narrower than q."""
    torch.manual_seed(seed)
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[shape]
    made = model(
        config(
            vocab_size=257,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=context,
            # Ten times the usual: as in a trained model, every layer matters and no gradient is so small that Adam
            # would turn rounding errors into whole steps.
            initializer_range=0.2,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=256,
        )
    )
    return made.eval()


def tiny_base(shape: str = "llama", *, seed: int = 0, context: int = 128) -> LoadedBase:
    """A loaded tiny student."""
    return LoadedBase(tiny_model(shape, seed=seed, context=context), byte_tokenizer())


def save_student(folder: Path, shape: str = "llama", *, seed: int = 0) -> Path:
    """A registered student's folder: config, safetensors and tokenizer of a tiny random model."""
    tiny_model(shape, seed=seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
