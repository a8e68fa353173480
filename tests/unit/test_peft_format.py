"""An adapter leaves the bank as PEFT's, and comes back as it was."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from preceptor.errors import PreceptorError
from student.base import LoadedBase
from student.lora_bank import LoraBank
from student.peft_format import CONFIG_FILE, WEIGHTS_FILE, bank_of, export_adapter, import_adapter, read_adapter
from student.trial import ALL_LINEAR
from tests.unit.tiny_students import byte_tokenizer, tiny_base, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT

IDS = torch.tensor([[72, 101, 108, 108, 111, 32, 65, 100, 97]])
RANKS, ALPHAS = (8, 4, 2), (16.0, 16.0, 3.0)


def moved_bank(base: LoadedBase, targets: tuple[str, ...] = ALL_LINEAR) -> LoraBank:
    """Three adapters of different ranks whose factors are no longer the initial ones."""
    bank = LoraBank(base.model, targets, RANKS, ALPHAS, seeds=(1, 2, 3))
    generator = torch.Generator().manual_seed(0)
    for slot in range(len(bank)):
        bank.set_factors(
            slot,
            {
                name: (torch.randn(a.shape, generator=generator) / 10, torch.randn(b.shape, generator=generator) / 10)
                for name, (a, b) in bank.factors(slot).items()
            },
        )
    return bank


def bank_logits(base: LoadedBase, bank: LoraBank, slot: int) -> torch.Tensor:
    with bank.attached(), torch.no_grad():
        bank.seat([slot], [IDS.numel()])
        logits: torch.Tensor = base.model(IDS).logits
    return logits


def changed_config(folder: Path, **changes: object) -> None:
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("shape", ["llama", "qwen2"])
@pytest.mark.parametrize("targets", [ALL_LINEAR, ("q_proj", "v_proj"), ("layers.1.self_attn.q_proj",)])
def test_peft_gives_the_logits_of_the_bank(shape: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    base = tiny_base(shape)
    bank = moved_bank(base, targets)
    with torch.no_grad():
        untouched = base.model(IDS).logits
    for slot in range(len(bank)):
        export_adapter(base, bank, slot, tmp_path / str(slot))
        alone = PeftModel.from_pretrained(tiny_model(shape), str(tmp_path / str(slot))).eval()
        adapted = {name for name, module in alone.base_model.model.named_modules() if hasattr(module, "lora_A")}
        assert adapted == set(bank.modules)
        with torch.no_grad():
            theirs = alone(IDS).logits
        ours = bank_logits(base, bank, slot)
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
        assert (ours - untouched).abs().max() > 1e-2, "the adapter does something"


def test_the_folder_is_as_peft_writes_it(tmp_path: Path) -> None:
    base = LoadedBase(tiny_model(), byte_tokenizer(), source="acme/tiny", commit="0" * 40)
    bank = moved_bank(base, ("q_proj", "v_proj"))
    export_adapter(base, bank, 2, tmp_path / "ours")
    settings = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), settings).save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    theirs, ours = (load_file(tmp_path / side / WEIGHTS_FILE) for side in ("theirs", "ours"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    config = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    expected = json.loads((tmp_path / "theirs" / CONFIG_FILE).read_text())
    for key in ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "fan_in_fan_out", "use_dora"):
        assert config[key] == expected[key], key
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "acme/tiny"
    assert config["revision"] == "0" * 40


@pytest.mark.parametrize("shape", ["llama", "qwen2"])
def test_what_was_exported_comes_back_bit_for_bit(shape: str, tmp_path: Path) -> None:
    base = tiny_base(shape)
    bank = moved_bank(base)
    folders = [tmp_path / str(slot) for slot in range(len(bank))]
    for slot, folder in enumerate(folders):
        export_adapter(base, bank, slot, folder)
    back = bank_of(base, folders)
    assert (back.ranks, back.alphas, back.modules) == (bank.ranks, bank.alphas, bank.modules)
    assert torch.equal(back.values_KP, bank.values_KP)
    assert torch.equal(bank_logits(base, back, 1), bank_logits(base, bank, 1))


def test_an_adapter_goes_into_a_slot_and_its_neighbours_stay(tmp_path: Path) -> None:
    base = tiny_base()
    bank = moved_bank(base)
    export_adapter(base, bank, 1, tmp_path / "one")
    other = LoraBank(base.model, ALL_LINEAR, RANKS, ALPHAS, seeds=(7, 8, 9))
    before = other.values_KP.clone()
    import_adapter(other, 1, read_adapter(tmp_path / "one"))
    assert torch.equal(other.values_KP[1], bank.values_KP[1])
    assert torch.equal(other.values_KP[[0, 2]], before[[0, 2]])
    with pytest.raises(PreceptorError) as refused:
        import_adapter(other, 0, read_adapter(tmp_path / "one"))
    assert refused.value.reason == "ADAPTER_MISMATCH"
    assert "rank 4" in refused.value.message
    assert torch.equal(other.values_KP[[0, 2]], before[[0, 2]])


def test_an_adapter_that_peft_made_comes_in(tmp_path: Path) -> None:
    settings = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    theirs = get_peft_model(tiny_model("qwen2"), settings).eval()
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    base = tiny_base("qwen2")
    with torch.no_grad():
        expected = theirs(IDS).logits
    torch.testing.assert_close(bank_logits(base, bank_of(base, [tmp_path]), 0), expected, atol=2e-5, rtol=1e-5)


def drop(key: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(key)


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return edit


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (rename("layers.1", "layers.7"), "model.layers.7.mlp.down_proj"),
        (rename("layers.0.self_attn.q_proj", "layers.0.self_attn.c_attn"), "model.layers.0.self_attn.c_attn"),
        (lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp.up_proj" in k], "model.layers.1.mlp.up_proj"),
        (drop(f"{Q}.lora_B.weight"), "model.layers.0.self_attn.q_proj has no lora_B"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(8, 64)}), "model.layers.0.self_attn.q_proj"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(5, 32)}), "model.layers.0.self_attn.q_proj"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}), "lm_head"),
    ],
)
def test_an_adapter_of_another_base_is_refused_and_the_module_named(
    edit: Callable[[dict[str, torch.Tensor]], object], named: str, tmp_path: Path
) -> None:
    base = tiny_base()
    bank = moved_bank(base)
    export_adapter(base, bank, 0, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    before = bank.values_KP.clone()
    with pytest.raises(PreceptorError) as refused:
        import_adapter(bank, 0, read_adapter(tmp_path))
    assert refused.value.reason == "ADAPTER_MISMATCH"
    assert named in refused.value.message
    assert torch.equal(bank.values_KP, before)


def test_a_bank_is_not_made_of_adapters_for_another_base(tmp_path: Path) -> None:
    base = tiny_base("llama")
    export_adapter(base, moved_bank(base), 0, tmp_path / "all")
    export_adapter(base, moved_bank(base, ("q_proj",)), 0, tmp_path / "q")
    with pytest.raises(PreceptorError, match=r"nothing for module model\.layers\.0\.self_attn\.k_proj") as refused:
        bank_of(base, [tmp_path / "all", tmp_path / "q"])
    assert refused.value.reason == "ADAPTER_MISMATCH"
    wider = tiny_model("llama").config
    wider.hidden_size, wider.num_hidden_layers = 40, 1
    torch.manual_seed(0)
    other = LoadedBase(type(tiny_model("llama"))(wider), byte_tokenizer())
    with pytest.raises(PreceptorError, match=r"model\.layers\.1\.") as refused:
        bank_of(other, [tmp_path / "all"])
    assert refused.value.reason == "ADAPTER_MISMATCH"
    assert "layers.1" in refused.value.metadata["field"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"r": "eight"}, "r"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_what_is_no_plain_lora_is_refused(changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    base = tiny_base()
    export_adapter(base, moved_bank(base), 0, tmp_path)
    changed_config(tmp_path, **changes)
    with pytest.raises(PreceptorError) as refused:
        read_adapter(tmp_path)
    assert (refused.value.reason, refused.value.metadata["field"]) == ("ADAPTER_MISMATCH", field)


class _Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self._mark,))


def test_pickle_is_never_read(tmp_path: Path) -> None:
    base = tiny_base()
    folder, mark = tmp_path / "adapter", tmp_path / "sprung"
    export_adapter(base, moved_bank(base), 0, folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Trap(mark)))
    read_adapter(folder)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(PreceptorError) as refused:
        read_adapter(folder)
    assert refused.value.reason == "UNSAFE_CHECKPOINT"
    (folder / "adapter_model.bin").rename(folder / WEIGHTS_FILE)
    with pytest.raises(PreceptorError) as refused:
        read_adapter(folder)
    assert refused.value.reason == "ARTIFACT_CORRUPT"
    assert not mark.exists()
    pickle.loads((folder / WEIGHTS_FILE).read_bytes())
    assert mark.exists(), "the trap works"


def test_a_half_written_folder_is_no_adapter(tmp_path: Path) -> None:
    base = tiny_base()
    bank = moved_bank(base)
    export_adapter(base, bank, 0, tmp_path)
    (tmp_path / CONFIG_FILE).unlink()
    with pytest.raises(PreceptorError) as refused:
        read_adapter(tmp_path)
    assert refused.value.reason == "FILE_NOT_FOUND"
    export_adapter(base, bank, 0, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    (tmp_path / CONFIG_FILE).write_text("{")
    with pytest.raises(PreceptorError) as refused:
        read_adapter(tmp_path)
    assert refused.value.reason == "ARTIFACT_CORRUPT"
