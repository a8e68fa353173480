"""The arms of the inner-loop benchmark: the same trials, trained by us and in the ways that are usual.

Every arm takes the same documents, rates, clipping and rank; they differ in how the work reaches the machine. What a
trial needs before its first step (making the bank, putting LoRA layers into the model) counts as training. Each arm
trains two steps before its clock starts.
"""

from __future__ import annotations

import importlib.util
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.inner_loop_workload import RECIPE, Work
from student.answering import Prompt, answer
from student.base import LoadedBase
from student.lora_bank import LoraBank
from student.peft_format import export_adapter
from student.plan import Lesson, TrainingPlan
from student.trainer import StepLimits, train_bank
from student.trial import AnsweringSettings

PADDED = 2_048
# Five questions of a passage, as in the published runs; of random weights none is answered early.
_QUESTIONS, _PROMPT_TOKENS, _GOLD_TOKENS = 5, 15, 4
_ANSWERING = AnsweringSettings(max_new_tokens=16, stop_at_newline=False)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one arm did. Seconds are those of all its trials together; None: the arm does not do that."""

    trials: int
    steps: int
    tokens: int  # real ones: pads do not count
    train_seconds: float
    peak_memory_bytes: int
    answer_seconds: float | None = None
    export_seconds: float | None = None
    scaled_from_steps: int | None = None  # only so many steps were measured; seconds are scaled by steps

    @property
    def trials_per_second(self) -> float:
        """Trials trained in a second."""
        return self.trials / self.train_seconds

    @property
    def tokens_per_second(self) -> float:
        """Real tokens trained in a second."""
        return self.tokens / self.train_seconds


@dataclass(slots=True)
class _Clock:
    """Seconds by what they were spent on, and the peak of memory since it was made."""

    device: str
    at: float = 0.0

    def __post_init__(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        self.at = self._now()

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        begun, self.at = self.at, self._now()
        return self.at - begun

    def peak(self) -> int:
        """Bytes: of the allocator on a GPU, of the whole process on the CPU."""
        if self.device == "cuda":
            return int(torch.cuda.max_memory_allocated())
        if sys.platform == "linux":
            status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
            return int(status.split()[0]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes, and of the whole run


def _begun(work: Work, steps: int = 2) -> Work:
    """The first steps of a trial, to warm up."""
    plan = TrainingPlan(
        work.plan.steps[:steps], work.plan.learning_rates[:steps], work.plan.weight_decay, work.plan.max_grad_norm
    )
    return replace(work, plan=plan)


def _sums(work: Sequence[Work]) -> dict[str, int]:
    steps = sum(len(item.plan.steps) for item in work)
    return {"trials": len(work), "steps": steps, "tokens": sum(item.plan.tokens for item in work)}


def ours(base: LoadedBase, work: Sequence[Work], targets: Sequence[str], together: int) -> Measurement:
    """One bank, ``together`` adapters in a step; the others wait for a seat. Then their answers, then their folders."""

    def bank_for(group: Sequence[Work]) -> LoraBank:
        each = len(group)
        return LoraBank(base.model, targets, [RECIPE.rank] * each, [RECIPE.alpha] * each, [item.seed for item in group])

    limits = StepLimits(seats=together)
    warm = [_begun(item) for item in work[:together]]
    bank = bank_for(warm)
    with bank.attached():
        train_bank(base, bank, [item.plan for item in warm], limits)
    clock = _Clock(base.device.type)
    bank = bank_for(work)
    with bank.attached(), tempfile.TemporaryDirectory() as scratch:
        train_bank(base, bank, [item.plan for item in work], limits)
        train = clock.lap()
        for start in range(0, len(work), together):
            group = range(start, min(start + together, len(work)))
            answer(base, bank, group, [_prompts() for _ in group], _ANSWERING)
        answers = clock.lap()
        for slot in range(len(work)):
            export_adapter(base, bank, slot, Path(scratch) / str(slot))
        export = clock.lap()
    return Measurement(
        **_sums(work),
        train_seconds=train,
        answer_seconds=answers,
        export_seconds=export,
        peak_memory_bytes=clock.peak(),
    )


def _prompts() -> list[Prompt]:
    prompt = tuple(range(40, 40 + _PROMPT_TOKENS))
    return [Prompt(number, prompt, tuple(range(90, 90 + _GOLD_TOKENS))) for number in range(_QUESTIONS)]


def _with_peft(base: LoadedBase, targets: Sequence[str], seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=RECIPE.rank,
        lora_alpha=int(RECIPE.alpha),
        lora_dropout=0.0,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base.model, config)


def _rows(lessons: Sequence[Lesson], device: torch.device, length: int = 0) -> dict[str, Tensor]:
    """A padded batch. With ``length`` it is padded to that, and the pads are in the loss, as published."""
    longest = length or max(len(item.ids) for item in lessons)
    ids = torch.tensor([[*item.ids, *(0,) * (longest - len(item.ids))] for item in lessons])
    real = torch.tensor([[1] * len(item.ids) + [0] * (longest - len(item.ids)) for item in lessons])
    labels = ids.clone() if length else ids.masked_fill(real == 0, -100)
    batch = {"input_ids": ids, "labels": labels}
    if not bool(real.all()):  # without pads no mask, which is the faster way for attention
        batch["attention_mask"] = real
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _train_peft(model: Any, plan: TrainingPlan, device: torch.device, length: int = 0) -> None:
    """A plain loop: forward, backward, clip, AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, weight_decay=plan.weight_decay)
    for step, rate in zip(plan.steps, plan.learning_rates, strict=True):
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad()
        model(**_rows(step, device, length), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, plan.max_grad_norm)
        optimiser.step()


def bare_peft(base: LoadedBase, work: Sequence[Work], targets: Sequence[str]) -> Measurement:
    """PEFT, one adapter after the other, each with its own loop, generate() and save_pretrained()."""
    model = _with_peft(base, targets, 0)
    _train_peft(model, _begun(work[0]).plan, base.device)
    model.unload()
    train = answers = export = 0.0
    clock = _Clock(base.device.type)
    for item in work:
        model = _with_peft(base, targets, item.seed)
        _train_peft(model, item.plan, base.device)
        train += clock.lap()
        _answer_with_peft(model, base.device)
        answers += clock.lap()
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch, save_embedding_layers=False)
        export += clock.lap()
        model.unload()
        train += clock.lap()
    return Measurement(
        **_sums(work),
        train_seconds=train,
        answer_seconds=answers,
        export_seconds=export,
        peak_memory_bytes=clock.peak(),
    )


@torch.inference_mode()
def _answer_with_peft(model: Any, device: torch.device) -> None:
    rows = _prompts()
    prompts = torch.tensor([row.prompt for row in rows], device=device)
    model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=_ANSWERING.max_new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    gold = torch.tensor([[*row.prompt, *row.gold] for row in rows], device=device)
    model(gold).logits[:, _PROMPT_TOKENS - 1 : -1].float().log_softmax(-1).gather(2, gold[:, _PROMPT_TOKENS:, None])


def padded(base: LoadedBase, work: Sequence[Work], targets: Sequence[str], steps: int) -> Measurement:
    """As published: batch 1, every sequence padded to 2,048 tokens, the pads in the loss. The seconds of ``steps``
    steps are scaled to all of them; every step costs the same."""
    model = _with_peft(base, targets, 0)
    _train_peft(model, _begun(work[0], 1).plan, base.device, PADDED)
    clock = _Clock(base.device.type)
    some = _begun(work[0], steps).plan
    _train_peft(model, some, base.device, PADDED)
    seconds, peak = clock.lap(), clock.peak()
    model.unload()
    sums = _sums(work)
    return Measurement(
        **sums,
        train_seconds=seconds / len(some.steps) * sums["steps"],
        peak_memory_bytes=peak,
        scaled_from_steps=len(some.steps),
    )


def peft_trainer(base: LoadedBase, work: Sequence[Work], targets: Sequence[str]) -> Measurement:
    """PEFT and a transformers Trainer of its own for every trial."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    def train(item: Work) -> None:
        model = _with_peft(base, targets, item.seed)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = Trainer(
                model=model,
                args=TrainingArguments(**_arguments(scratch, item, base.device.type)),
                train_dataset=_dataset(item),
                data_collator=lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in rows[0]},
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        model.unload()

    return _trained_by(train, base, work)


def trl_sft(base: LoadedBase, work: Sequence[Work], targets: Sequence[str]) -> Measurement:
    """PEFT and a TRL SFTTrainer of its own for every trial. Needs ``trl``; see ``why_no_trl``."""

    def train(item: Work) -> None:
        with tempfile.TemporaryDirectory() as scratch, sft_trainer(base, item, targets, scratch) as trainer:
            trainer.train()

    return _trained_by(train, base, work)


@contextmanager
def sft_trainer(base: LoadedBase, item: Work, targets: Sequence[str], folder: str) -> Iterator[Any]:
    """TRL's SFTTrainer, ready to train one trial; afterwards the model is as it was."""
    from datasets import Dataset  # type: ignore[import-not-found]  # comes with trl
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    model = _with_peft(base, targets, item.seed)
    try:
        trainer = SFTTrainer(
            model=model,
            # TRL's own defaults would cut long documents and compute every layer twice; no other arm does.
            args=SFTConfig(
                **_arguments(folder, item, base.device.type), max_length=None, activation_checkpointing=False
            ),
            train_dataset=Dataset.from_list(_dataset(item)),
            processing_class=base.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        yield trainer
    finally:
        model.unload()
        vars(base.model).pop("forward", None)  # TRL wraps it, once more with every trainer


def why_no_trl() -> str | None:
    """Why the arm ``trl_sft`` cannot be measured here; None if it can."""
    return None if importlib.util.find_spec("trl") else "trl is not installed"


def _trained_by(train: Callable[[Work], None], base: LoadedBase, work: Sequence[Work]) -> Measurement:
    train(_begun(work[0], work[0].epochs))
    clock = _Clock(base.device.type)
    for item in work:
        train(item)
    return Measurement(**_sums(work), train_seconds=clock.lap(), peak_memory_bytes=clock.peak())


def _dataset(item: Work) -> list[dict[str, list[int]]]:
    return [{"input_ids": list(lesson.ids), "labels": list(lesson.ids)} for lesson in item.documents]


def _arguments(folder: str, item: Work, device: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": 1,
        "num_train_epochs": item.epochs,
        "learning_rate": RECIPE.learning_rate,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "sequential",  # the first epoch is the other arms' first epoch
        "max_grad_norm": RECIPE.max_grad_norm,
        "weight_decay": RECIPE.weight_decay,
        "seed": item.seed,
        "use_cpu": device == "cpu",
        "bf16": False,  # on a GPU the base itself is bfloat16
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": device == "cuda",
        "remove_unused_columns": False,
    }
