"""The base model of the teacher, and the models that its policies are.

Promises: nothing but safetensors is ever loaded and no code from a checkpoint is run; the base's weights are never
changed. A policy's model is a *shell* of the base: its modules are copies, its weights are shared, so that LoRA can
be put around them and trained, or merged into new weights, while the base and all other policies stay as they are.
"""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from preceptor.artifacts import folder_sha256
from teacher.decoding import Decoder, GeneralDecoder
from teacher.language import Words, ends_and_context, source_error, source_options
from teacher.shared_prefix import SharedPrefixDecoder, is_supported

if TYPE_CHECKING:
    from peft import PeftModel  # imported where it is used: it takes two seconds, and an untrained teacher needs none


@dataclass(frozen=True)
class TeacherBase(Words):
    """A frozen causal language model with its tokenizer. Raises PreceptorError(BAD_TEACHER_SOURCE)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str  # folder or hub id
    commit: str  # content hash of the folder, or the hub's commit
    end_id: int = field(init=False)  # closes a completion in training
    end_ids: frozenset[int] = field(init=False)  # end a completion in sampling
    context: int = field(init=False)  # tokens

    def __post_init__(self) -> None:
        read = ends_and_context(self.source, self.tokenizer, self.model.config, self.model.generation_config)
        self.model.requires_grad_(False)
        self.model.eval()
        for name, value in zip(("end_id", "end_ids", "context"), read, strict=True):
            object.__setattr__(self, name, value)  # frozen dataclass: derived once, here

    def decoder(self, model: PreTrainedModel) -> Decoder:
        """The fastest decoder that is right for a model of this kind."""
        pad = self.tokenizer.pad_token_id
        pad = self.end_id if pad is None else int(pad)
        return SharedPrefixDecoder(model, pad) if is_supported(model) else GeneralDecoder(model, pad)

    def shell(self) -> PreTrainedModel:
        """A model with the base's weights in modules of its own: what is put around or in place of a weight there
        does not reach the base."""
        shared: dict[int, Any] = {
            id(weight): nn.Parameter(weight.data, requires_grad=False) for weight in self.model.parameters()
        }
        shared |= {id(buffer): buffer for buffer in self.model.buffers()}
        made: PreTrainedModel = copy.deepcopy(self.model, shared)
        return made

    def new_adapter(self, rank: int, alpha: float, seed: int) -> PeftModel:
        """A shell with a fresh trainable LoRA adapter on every linear layer but the head. It changes nothing yet."""
        from peft import LoraConfig, get_peft_model

        head = self.model.get_output_embeddings()
        # by their last names, as people write them and as vLLM expects them in the adapter's config
        targets = sorted(
            {
                name.rpartition(".")[2]
                for name, module in self.model.named_modules()
                if isinstance(module, nn.Linear) and module is not head
            }
        )
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # a float works, and is what the contract says
            target_modules=targets,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            made: PeftModel = get_peft_model(self.shell(), config)
        return made

    def load_adapter(self, folder: Path, *, trainable: bool) -> PeftModel:
        """A shell with the adapter in ``folder`` (PEFT's format, safetensors)."""
        from peft import PeftModel

        return PeftModel.from_pretrained(self.shell(), str(folder), is_trainable=trainable, use_safetensors=True)


def adapter_files(model: PeftModel, base_source: str) -> dict[str, bytes]:
    """The files of the adapter in PEFT's format, as ``save_pretrained`` writes them, but in memory: an adapter that was
    trained waits there for a disk that has room. Equal adapters give equal bytes: PEFT writes a set in the order of
    its hashes and a model card with versions, so the one is sorted here and the other left out."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    # "auto" would ask the hub whether the vocabulary has changed
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    config: dict[str, Any] = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base_source, "inference_mode": True}
    for key, value in config.items():
        if isinstance(value, (set, list)) and all(isinstance(item, str) for item in value):
            config[key] = sorted(value)
    return {
        "adapter_model.safetensors": save(
            {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, metadata={"format": "pt"}
        ),
        "adapter_config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }


class PolicyModels:
    """Policies ready for writing, the least recently used dropped first. Safe to use from several threads."""

    def __init__(self, base: TeacherBase, capacity: int) -> None:
        self._base = base
        self._capacity = capacity
        self._lock = threading.Lock()
        self._ready: OrderedDict[str, PreTrainedModel] = OrderedDict()

    def get(self, key: str, adapter: Callable[[], Path | None]) -> PreTrainedModel:
        """The model called ``key``: made of the adapter in the folder that ``adapter`` gives, or of the base alone
        where it gives None.

        The adapter is merged into new weights: on a small model, running it beside them costs a third more time.
        """
        with self._lock:
            if key not in self._ready:
                folder = adapter()
                if folder is None:
                    self._ready[key] = self._base.shell()
                else:
                    peft = self._base.load_adapter(folder, trainable=False)
                    # safe: the product is made beside the shared weight and put in its place
                    merged: PreTrainedModel = peft.merge_and_unload(safe_merge=True)
                    self._ready[key] = merged.eval()
            self._ready.move_to_end(key)
            while len(self._ready) > self._capacity:
                self._ready.popitem(last=False)
            return self._ready[key]


def load_teacher(source: str, *, revision: str = "", device: str = "auto") -> TeacherBase:
    """Loads the base from a folder or the hub: float32 on the CPU, bfloat16 on a GPU.

    Raises PreceptorError: BAD_TEACHER_SOURCE if transformers can make no model of it, UNSAFE_CHECKPOINT if it has
    weights, but not as safetensors, MODEL_UNREACHABLE if it is no folder and the hub does not give it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    folder = Path(source)
    options = source_options(source, revision)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise source_error(source, error) from error
    commit = folder_sha256(folder) if folder.is_dir() else str(model.config._commit_hash)
    nn.Module.to(model, device)  # transformers' own wrapper of it is not typed
    return TeacherBase(model, tokenizer, source, commit)
