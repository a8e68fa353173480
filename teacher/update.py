"""Fine-tunes the teacher on the self-edits that were kept: LoRA, loss on the completion alone.

Promises: the same examples, settings and seed give the same adapter on the same machine; pads and prompts carry no
loss; only the adapter's weights change.

Dimension letters: B sequences of a batch, L its longest sequence, C its longest completion, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from preceptor.errors import PreceptorError
from teacher.recipe import FineTuning

# Short: an update has a dozen steps.
_WARMUP_SHARE = 0.1
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt and of the completion behind it, its end token included."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trained:
    """Mean loss per completion token over all examples, before and after, in nats."""

    first_loss: float
    final_loss: float
    steps: int


def fine_tune(
    model: nn.Module,
    examples: Sequence[Example],
    settings: FineTuning,
    seed: int,
    *,
    on_step: Callable[[int], None] = lambda step: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Trained:
    """Trains the trainable weights of ``model`` (a causal language model of transformers, perhaps in PEFT's coat).

    ``on_step`` hears of every step done. Raises PreceptorError: UPDATE_DIVERGED, and SHUTTING_DOWN when ``stopped``
    says so.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    total = settings.steps(len(examples))
    warmup = max(1, round(_WARMUP_SHARE * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warmup, (total - step) / max(1, total - warmup + 1))
    )
    model.eval()  # throughout: dropout of the base would be noise
    first = _mean_loss(model, examples, settings.batch_size, stopped)
    step = 0
    for epoch in range(settings.epochs):
        for batch in _batches(examples, settings.batch_size, random.Random(f"{seed}/{epoch}")):
            _check(stopped)
            loss_sum, tokens = _loss(model, batch)
            loss = loss_sum / tokens
            if not math.isfinite(loss.item()):
                raise PreceptorError("UPDATE_DIVERGED", f"the loss is {loss.item()} at step {step + 1} of {total}")
            loss.backward()
            nn.utils.clip_grad_norm_(weights, _MAX_GRAD_NORM)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            step += 1
            on_step(step)
    final = _mean_loss(model, examples, settings.batch_size, stopped)
    if not math.isfinite(final):
        raise PreceptorError("UPDATE_DIVERGED", f"the loss is {final} after {total} steps")
    return Trained(first, final, step)


def _check(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise PreceptorError("SHUTTING_DOWN", "the update was interrupted; it begins again when the service is back")


def _batches(examples: Sequence[Example], size: int, rng: random.Random | None) -> Iterator[list[Example]]:
    """Batches of about equal length, so that little is padded; with ``rng``, shuffled among equals and as a whole."""
    order = list(range(len(examples)))
    if rng:
        rng.shuffle(order)
    order.sort(key=lambda i: len(examples[i].prompt) + len(examples[i].completion))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    if rng:
        rng.shuffle(batches)
    for batch in batches:
        yield [examples[i] for i in batch]


def _loss(model: nn.Module, batch: Sequence[Example]) -> tuple[Tensor, int]:
    """Summed loss over the completions' tokens, and how many there are.

    Sequences end in the same column (padded on the left), so the logits of the last C + 1 columns are all that is
    needed: on a model with a large vocabulary, logits of the prompts would be most of the memory.
    """
    longest = max(len(e.prompt) + len(e.completion) for e in batch)
    answer = max(len(e.completion) for e in batch)
    ids = torch.zeros((len(batch), longest), dtype=torch.long)
    mask = torch.zeros((len(batch), longest), dtype=torch.long)
    labels = torch.full((len(batch), answer), -100)
    for row, example in enumerate(batch):
        tokens = [*example.prompt, *example.completion]
        ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask[row, longest - len(tokens) :] = 1
        labels[row, answer - len(example.completion) :] = torch.tensor(example.completion)
    device = next(model.parameters()).device
    out: Any = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
        logits_to_keep=answer + 1,
        use_cache=False,
    )
    logits = out.logits[:, -answer - 1 : -1].float()
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.to(device).flatten(), reduction="sum")
    return loss, sum(len(e.completion) for e in batch)


def _mean_loss(model: nn.Module, examples: Sequence[Example], size: int, stopped: Callable[[], bool]) -> float:
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in _batches(examples, size, None):
            _check(stopped)
            loss, count = _loss(model, batch)
            total += loss.item()
            tokens += count
    return total / tokens
