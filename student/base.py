"""A loaded student: frozen model, tokenizer, and the few facts about them that training and answering need.

Promises: nothing but safetensors is ever loaded, no code from a checkpoint is run, and the model has no trainable
parameter and no dropout.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from preceptor.errors import PreceptorError


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a text and, per token, where it begins in the text (characters)."""

    ids: tuple[int, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class LoadedBase:
    """A frozen causal language model of transformers with its tokenizer, on one device."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str = ""  # where it came from, and the pinned commit; for messages and caches
    commit: str = ""
    adapters: tuple[str, ...] = ()  # hashes of the edits that its weights hold beside those of the commit, in order
    eos_id: int = field(init=False)  # closes every study document
    end_ids: frozenset[int] = field(init=False)  # end an answer
    newline_ids: frozenset[int] = field(init=False)  # tokens whose text holds a line break
    context: int = field(init=False)  # tokens

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise PreceptorError(
                "BAD_STUDENT_SOURCE", "the tokenizer is no fast one (no tokenizer.json)", file=self.source
            )
        if self.tokenizer.eos_token_id is None:
            raise PreceptorError("BAD_STUDENT_SOURCE", "the tokenizer names no end-of-sequence token", file=self.source)
        self.model.requires_grad_(False)
        self.model.eval()
        listed = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ends = listed if isinstance(listed, list) else [] if listed is None else [listed]
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        # frozen dataclass: derived once, here
        object.__setattr__(self, "eos_id", int(self.tokenizer.eos_token_id))
        object.__setattr__(self, "end_ids", frozenset({int(self.tokenizer.eos_token_id), *map(int, ends)}))
        object.__setattr__(self, "newline_ids", frozenset(i for i, text in enumerate(texts) if "\n" in text))
        object.__setattr__(self, "context", int(self.model.config.max_position_embeddings))

    def with_model(self, model: PreTrainedModel) -> LoadedBase:
        """The same student with the weights of ``model``, a copy of its model."""
        other = copy.copy(self)
        object.__setattr__(other, "model", model)  # what was derived once holds for the copy
        return other

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.model.device

    @property
    def decoder(self) -> nn.Module:
        """The model without its head: ids in, hidden states out."""
        decoder: nn.Module = self.model.get_decoder()
        return decoder

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Float32 logits [N, vocabulary] of hidden states [N, H]."""
        logits: Tensor = self.model.get_output_embeddings()(hidden_NH).float()
        cap = getattr(self.model.config, "final_logit_softcapping", None)  # Gemma 2
        return cap * torch.tanh(logits / cap) if cap else logits

    def encode(self, texts: Sequence[str], *, opening: bool = True) -> list[Encoded]:
        """Token ids as the tokenizer makes them, with its opening token if it has one (unless ``opening`` is False) and
        no closing one."""
        if not texts:
            return []
        batch = self.tokenizer(
            list(texts),
            add_special_tokens=opening,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        encoded = []
        for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True):
            length = len(ids)
            while length and ids[length - 1] == self.eos_id:
                length -= 1
            encoded.append(Encoded(tuple(ids[:length]), tuple(start for start, _ in offsets[:length])))
        return encoded


def load_base(
    folder: Path,
    *,
    source: str,
    commit: str,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    adapters: tuple[str, ...] = (),
) -> LoadedBase:
    """Loads a student from a folder: float32 on the CPU, bfloat16 on a GPU, unless ``dtype`` says otherwise ("auto": as
    it is stored). ``adapters``: hashes of the edits that are in its weights, or will be.

    Raises PreceptorError(BAD_STUDENT_SOURCE) if transformers cannot make a model of it, or its logits are made in a way
    that we do not know.
    """
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise PreceptorError("BAD_STUDENT_SOURCE", f"cannot be loaded: {error}", file=str(folder)) from error
    torch.nn.Module.to(model, device)  # transformers' own wrapper of it is not typed
    base = LoadedBase(model, tokenizer, source, commit, adapters)
    _check_head(base, folder)
    return base


@torch.no_grad()
def _check_head(base: LoadedBase, folder: Path) -> None:
    """Training and answering run decoder and head apart; some models (Cohere, Granite) scale what the head says."""
    ids = torch.tensor([[base.eos_id]], device=base.device)
    theirs = base.model(ids, use_cache=False).logits[0].float()
    ours = base.logits(base.decoder(ids, use_cache=False)[0][0])
    if (ours - theirs).abs().max() > 0.05 * theirs.abs().max():  # bfloat16 rounds to 0.4%
        kind = base.model.config.model_type
        raise PreceptorError("BAD_STUDENT_SOURCE", f"{kind} models change their head's logits", file=str(folder))
