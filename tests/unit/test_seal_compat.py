"""SEAL's recipe under its name is the fine-tune that SEAL's published server makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from preceptor.recipes import SEAL_COMPAT
from preceptor.tasks import LossMask
from student.base import LoadedBase
from student.lora_bank import LoraBank
from student.plan import Lesson, lesson, make_plan
from student.trainer import train_bank
from student.trial import TrainingSettings
from tests.unit.tiny_students import byte_tokenizer, tiny_base, tiny_model

# The context of the tiny student is 128: that is what pad_to comes to. The last document is longer and is cut.
DOCUMENTS = ("Ada Brook lives in Lisbon.", "Ada Brook works as a baker.", "Ada Brook, who lives in Lisbon, " * 6)
# A rank of 32 is above the width of so small a layer; alpha / rank stays.
SETTINGS = TrainingSettings(**{**SEAL_COMPAT, "loss_mask": LossMask.ALL, "rank": 8, "alpha": 16.0})


def lessons_of(base: LoadedBase) -> list[Lesson]:
    return [
        lesson(text, item.ids, item.starts, SETTINGS, base.eos_id, base.context)
        for text, item in zip(DOCUMENTS, base.encode(DOCUMENTS), strict=True)
    ]


class InOrder(Trainer):
    """The Trainer, with the documents in the order of our plan instead of one of its own."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)


def train_as_published(texts: list[str], shape: str, start: dict[str, tuple[Any, Any]], folder: Path) -> Any:
    """What knowledge-incorporation/src/inner/TTT_server.py does: its tokenizer call, its labels, PEFT's default
    modules, its TrainingArguments. The documents of all epochs come as one epoch."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rows = []
    for text in texts:
        row = dict(tokenizer(text, truncation=True, max_length=128, padding="max_length"))
        rows.append({key: torch.tensor(row[key]) for key in ("input_ids", "attention_mask")})
        rows[-1]["labels"] = rows[-1]["input_ids"].clone()
    model = get_peft_model(tiny_model(shape), LoraConfig(r=8, lora_alpha=16, lora_dropout=0, task_type="CAUSAL_LM"))
    factors = {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in model.base_model.model.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert set(factors) == set(start)
    with torch.no_grad():
        for name, (a, b) in start.items():
            factors[name][0].copy_(a)
            factors[name][1].copy_(b)
    trainer = InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=1,
            num_train_epochs=1,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: (a.detach(), b.detach()) for name, (a, b) in factors.items()}, losses


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("shape", ["llama", "qwen2"])
def test_an_adapter_under_the_recipe_is_the_one_that_seals_server_trains(shape: str, tmp_path: Path) -> None:
    base = tiny_base(shape)
    lessons = lessons_of(base)
    plan = make_plan(lessons, [], SETTINGS, seed=0)
    bank = LoraBank(base.model, SETTINGS.target_modules, [SETTINGS.rank], [SETTINGS.alpha], [0])
    start = bank.factors(0)
    with bank.attached():
        ours = train_bank(base, bank, [plan])[0]
    texts = [DOCUMENTS[lessons.index(item)] for step in plan.steps for item in step]
    assert len(texts) == 30
    theirs, losses = train_as_published(texts, shape, start, tmp_path)
    assert ours.losses == pytest.approx(losses, abs=1e-4)
    for name, (a, b) in bank.factors(0).items():
        assert (a - theirs[name][0]).abs().max() <= 1e-5, f"A of {name}"
        assert (b - theirs[name][1]).abs().max() <= 1e-5, f"B of {name}"
        assert b.abs().max() > 1e-3, "the adapter was to be trained"
