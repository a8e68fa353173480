"""Random students of real shapes for tests: a byte-level tokenizer (any text goes through), few weights."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from student.base import LoadedBase
from student.trial import ALL_LINEAR

SHAPES = ("llama", "qwen2", "mistral")
PACKED = (*SHAPES, "qwen3", "gemma")  # what the packed decoder knows
# Some that it does not, with their linear layers: caps, windows and more norms; fused layers and other names.
OTHERS = {
    "gemma2": ALL_LINEAR,
    "mistral with a window": ALL_LINEAR,
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; ``<eos>`` is token 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)} | {"<eos>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def tiny_model(shape: str = "llama", *, seed: int = 0, context: int = 128, **changes: object) -> PreTrainedModel:
    """A random model of transformers' family ``shape``; ``changes`` go into its configuration. Grouped-query attention,
    so that k and v are narrower than q. No norm is all ones and no bias zero, as in a trained model."""
    if shape == "mistral with a window":
        shape, changes = "mistral", {"sliding_window": 16, **changes}
    config = CONFIG_MAPPING[shape](
        **{
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": context,
            # Ten times the usual: as in a trained model, every layer matters and no gradient is so small that Adam
            # would turn rounding errors into whole steps.
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": 256,
            **({"sliding_window": 16, "attn_logit_softcapping": 5.0} if shape == "gemma2" else {}),
            **changes,
        }
    )
    torch.manual_seed(seed)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 5
    return made.eval()


def tiny_base(shape: str = "llama", *, seed: int = 0, context: int = 128, **changes: object) -> LoadedBase:
    """A loaded tiny student."""
    return LoadedBase(tiny_model(shape, seed=seed, context=context, **changes), byte_tokenizer())


def save_student(folder: Path, shape: str = "llama", *, seed: int = 0) -> Path:
    """A registered student's folder: config, safetensors and tokenizer of a tiny random model."""
    tiny_model(shape, seed=seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


class PeakMemory(TorchDispatchMode):
    """While it lasts, counts the bytes of live tensors that torch's operations have made; ``peak`` is the most there
    were at once. What an operation takes and frees inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {}  # by address

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_leaves(out):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                address = storage.data_ptr()
                if storage.nbytes() and address not in given and address not in self._live:
                    self._live[address] = storage.nbytes()
                    weakref.finalize(storage, self._live.pop, address, None)
        self.peak = max(self.peak, sum(self._live.values()))
        return out
