"""The shapes of the shipped models: a Llama-shaped student, a Qwen2-shaped one, and a Llama-shaped teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

from worlds.almanac.tokens import CONTEXT

STUDENTS = ("student", "student_qwen2")
MODELS = ("teacher", *STUDENTS)


def new_model(name: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A model of shape ``name`` with random float32 weights.

    Embeddings are tied: most of a tiny model would otherwise be two tables.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    if name == "teacher":
        return LlamaForCausalLM(LlamaConfig(**_values(tokenizer, width=128, layers=4, heads=4, inner=352)))
    if name == "student":
        return LlamaForCausalLM(LlamaConfig(**_values(tokenizer, width=96, layers=4, heads=4, inner=256)))
    if name == "student_qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**_values(tokenizer, width=112, layers=3, heads=4, inner=288)))
    raise ValueError(f"model {name!r} is not one of {', '.join(MODELS)}")


def _values(tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": inner,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "dtype": "float32",
    }
