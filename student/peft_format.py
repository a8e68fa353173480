"""One adapter of a bank as a folder in PEFT's format, and back: adapter_config.json + adapter_model.safetensors.

Promises
- What is written loads in PEFT (``PeftModel.from_pretrained``) and gives the logits that the bank gives; keys, file
  names and configuration are those that PEFT itself writes, so whatever reads PEFT's folders reads these.
- Export and import are exact: the same float32 values come back, bit for bit.
- An adapter for another base, or of another kind than plain LoRA, is refused before the bank is touched, and the
  message names the module. Pickle files are never opened.
- ``adapter_config.json`` is written last and at once: a folder that has it is whole.

The format is that of PEFT 0.18 and later (https://huggingface.co/docs/peft/developer_guides/checkpoint).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from preceptor.errors import PreceptorError
from student.base import LoadedBase
from student.lora_bank import BankedLinear, LoraBank

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# Settings of PEFT under which the factors would mean something else than A, B and alpha / r.
_NOT_PLAIN = (
    "use_dora",
    "use_rslora",
    "fan_in_fan_out",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "use_qalora",
    "alora_invocation_tokens",
)
# Initialisations that change the base's weights too: their factors mean nothing on the base as it was.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")

Factors = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter as it lies in a folder."""

    folder: Path
    rank: int
    alpha: float
    base_source: str  # base_model_name_or_path, as written by whoever made it; "" if it says nothing
    factors: Factors  # per dotted module name (A [rank, in], B [out, rank]), float32


def export_adapter(base: LoadedBase, bank: LoraBank, adapter: int, folder: Path) -> None:
    """Writes adapter number ``adapter`` of ``bank``, a bank over ``base``, to ``folder``; made if it is not there.

    The folder names ``base.source`` and ``base.commit`` as the model it belongs to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)  # what lies here now is no adapter until it is whole again
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in bank.factors(adapter).items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.cpu()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.cpu()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    alpha = bank.alphas[adapter]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.source,
        "revision": base.commit or None,
        "r": bank.ranks[adapter],
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _targets(base.model, bank.modules),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    written = folder / f".{CONFIG_FILE}"
    written.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    written.replace(folder / CONFIG_FILE)


def _targets(model: nn.Module, modules: Sequence[str]) -> list[str]:
    """The modules' last names where these mean the same set of layers, as people write them; else the full names."""
    short = {module.rpartition(".")[2] for module in modules}
    meant = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | BankedLinear) and name.rpartition(".")[2] in short
    }
    return sorted(short) if meant == set(modules) else list(modules)


def read_adapter(folder: Path) -> PeftAdapter:
    """The adapter in ``folder``, on the CPU.

    Raises PreceptorError: FILE_NOT_FOUND, UNSAFE_CHECKPOINT (weights in pickle only), ARTIFACT_CORRUPT (a file that
    cannot be read), ADAPTER_MISMATCH (not plain LoRA).
    """
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not weights_file.is_file() and (folder / PICKLE_FILE).exists():
        raise PreceptorError(
            "UNSAFE_CHECKPOINT", f"the adapter's weights are in {PICKLE_FILE}, a pickle file", file=str(folder)
        )
    for file in (config_file, weights_file):
        if not file.is_file():
            raise PreceptorError("FILE_NOT_FOUND", f"no adapter: it has no {file.name}", file=str(folder))
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PreceptorError("ARTIFACT_CORRUPT", f"no JSON: {error}", file=str(config_file)) from error
    rank, alpha = _plain_lora(config, config_file)
    try:
        tensors = load_file(weights_file)
    except SafetensorError as error:
        raise PreceptorError("ARTIFACT_CORRUPT", f"no safetensors: {error}", file=str(weights_file)) from error
    return PeftAdapter(
        folder, rank, alpha, str(config.get("base_model_name_or_path") or ""), _pairs(tensors, rank, weights_file)
    )


def _plain_lora(config: Any, file: Path) -> tuple[int, float]:
    """Rank and alpha of a configuration that is plain LoRA."""

    def refuse(message: str, field: str) -> PreceptorError:
        return PreceptorError("ADAPTER_MISMATCH", message, file=str(file), field=field)

    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise refuse("the adapter is no LoRA", "peft_type")
    for name in _NOT_PLAIN:
        if config.get(name):
            raise refuse(f"the adapter is no plain LoRA: {name} is {config[name]!r}", name)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise refuse(f"the adapter was made on a changed base: init_lora_weights is {start!r}", "init_lora_weights")
    if config.get("bias", "none") != "none":
        raise refuse(f"the adapter trains biases: bias is {config['bias']!r}", "bias")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise refuse(f"the rank is {rank!r}, not a whole number above zero", "r")
    if not isinstance(alpha, int | float):
        raise refuse(f"alpha is {alpha!r}, not a number", "lora_alpha")
    return rank, float(alpha)


def _pairs(tensors: dict[str, Tensor], rank: int, file: Path) -> Factors:
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise PreceptorError("ADAPTER_MISMATCH", f"{key} is no factor of a linear layer's adapter", file=str(file))
        halves.setdefault(match["module"], {})[match["factor"]] = tensor.to(torch.float32)
    factors: Factors = {}
    for module, pair in halves.items():
        if set(pair) != {"A", "B"}:
            missing = "B" if "A" in pair else "A"
            raise PreceptorError("ADAPTER_MISMATCH", f"{module} has no lora_{missing}", file=str(file), field=module)
        a, b = pair["A"], pair["B"]
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            message = f"{module}: A {list(a.shape)} and B {list(b.shape)} are not of rank {rank}"
            raise PreceptorError("ADAPTER_MISMATCH", message, file=str(file), field=module)
        factors[module] = (a, b)
    return factors


def import_adapter(bank: LoraBank, slot: int, adapter: PeftAdapter) -> None:
    """Puts ``adapter`` into ``slot`` of a bank that was made with its rank, alpha and target modules.

    Raises PreceptorError(ADAPTER_MISMATCH); the bank is then as it was.
    """
    place = str(adapter.folder)
    there = {module: (a.shape[1], b.shape[0]) for module, (a, b) in bank.factors(slot).items()}
    if unknown := [module for module in adapter.factors if module not in there]:
        message = f"the base or the bank has no module {unknown[0]} {_more(unknown)}"
        raise PreceptorError("ADAPTER_MISMATCH", message.strip(), file=place, field=unknown[0])
    if missing := [module for module in there if module not in adapter.factors]:
        message = f"the adapter has nothing for module {missing[0]} {_more(missing)}"
        raise PreceptorError("ADAPTER_MISMATCH", message.strip(), file=place, field=missing[0])
    for module, (a, b) in adapter.factors.items():
        width, height = there[module]
        if (a.shape[1], b.shape[0]) != (width, height):
            message = f"{module} takes {width} and gives {height} values, the adapter's {a.shape[1]} and {b.shape[0]}"
            raise PreceptorError("ADAPTER_MISMATCH", message, file=place, field=module)
    if (adapter.rank, adapter.alpha) != (bank.ranks[slot], bank.alphas[slot]):
        message = (
            f"rank {adapter.rank} and alpha {adapter.alpha:g}; the slot was made for rank {bank.ranks[slot]} "
            f"and alpha {bank.alphas[slot]:g}"
        )
        raise PreceptorError("ADAPTER_MISMATCH", message, file=place, field="r")
    bank.set_factors(slot, adapter.factors)


def bank_of(base: LoadedBase, folders: Iterable[Path]) -> LoraBank:
    """A bank over ``base`` with the adapters in ``folders``, in their order; ranks and alphas may differ.

    Raises PreceptorError as ``read_adapter``, and ADAPTER_MISMATCH if an adapter is for another base or if two of them
    do not adapt the same modules.
    """
    adapters = [read_adapter(folder) for folder in folders]
    if not adapters:
        raise ValueError("no adapter is named")
    known = {name for name, module in base.model.named_modules() if isinstance(module, nn.Linear)}
    for adapter in adapters:
        if unknown := [module for module in adapter.factors if module not in known]:
            message = f"the base has no linear layer {unknown[0]} {_more(unknown)}".strip()
            raise PreceptorError("ADAPTER_MISMATCH", message, file=str(adapter.folder), field=unknown[0])
        if not adapter.factors:
            raise PreceptorError("ADAPTER_MISMATCH", "the adapter is empty", file=str(adapter.folder))
    bank = LoraBank(
        base.model,
        list(adapters[0].factors),
        [adapter.rank for adapter in adapters],
        [adapter.alpha for adapter in adapters],
        [0] * len(adapters),  # the values drawn from it are overwritten
    )
    for slot, adapter in enumerate(adapters):
        import_adapter(bank, slot, adapter)
    return bank


def _more(modules: Sequence[str]) -> str:
    return f"(and {len(modules) - 1} more)" if len(modules) > 1 else ""
