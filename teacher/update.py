"""Trains the teacher on the self-edits that it learns from: LoRA, loss on the completion alone.

Promises: the same examples, settings and seed give the same adapter on the same machine; pads and prompts carry no
loss; only the adapter's weights change. What the loss of a token is, the algorithm says (``teacher.algorithms``).

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
from teacher.algorithms.interface import Algorithm, LearningSettings
from teacher.algorithms.rest_em import ALGORITHM as REST_EM
from teacher.recipe import FineTuning

# Short: an update has a dozen steps.
_WARMUP_SHARE = 0.1
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt and of the completion behind it, its end token included; and how much it weighs.

    ``then`` and ``start``: log-probability of each token of the completion by the policy that wrote it and by the
    untouched teacher, in nats; empty where the algorithm does not need them.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    weight: float = 1.0
    then: tuple[float, ...] = ()
    start: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Trained:
    """Mean loss per completion token over all examples, before and after (ReST-EM: in nats)."""

    first_loss: float
    final_loss: float
    steps: int


def fine_tune(
    model: nn.Module,
    examples: Sequence[Example],
    settings: FineTuning,
    seed: int,
    *,
    algorithm: Algorithm = REST_EM,
    learning: LearningSettings | None = None,
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
    learning = learning or LearningSettings()
    first = _mean_loss(model, examples, settings.batch_size, algorithm, learning, stopped)
    step = 0
    for epoch in range(settings.epochs):
        for batch in _batches(examples, settings.batch_size, random.Random(f"{seed}/{epoch}")):
            _check(stopped)
            loss = _losses(_logprobs(model, batch), batch, algorithm, learning).sum() / _tokens(batch)
            if not math.isfinite(loss.item()):
                raise PreceptorError("UPDATE_DIVERGED", f"the loss is {loss.item()} at step {step + 1} of {total}")
            loss.backward()
            nn.utils.clip_grad_norm_(weights, _MAX_GRAD_NORM)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            step += 1
            on_step(step)
    final = _mean_loss(model, examples, settings.batch_size, algorithm, learning, stopped)
    if not math.isfinite(final):
        raise PreceptorError("UPDATE_DIVERGED", f"the loss is {final} after {total} steps")
    return Trained(first, final, step)


def token_logprobs(
    model: nn.Module, examples: Sequence[Example], size: int, stopped: Callable[[], bool] = lambda: False
) -> list[tuple[float, ...]]:
    """Log-probability of each token of each completion, in nats; ``size`` sequences at once. Raises SHUTTING_DOWN."""
    found: dict[int, tuple[float, ...]] = {}
    with torch.no_grad():
        for places in _places(examples, size, None):
            _check(stopped)
            rows = _logprobs(model, [examples[i] for i in places]).tolist()
            found |= {i: tuple(row[-len(examples[i].completion) :]) for i, row in zip(places, rows, strict=True)}
    return [found[i] for i in range(len(examples))]


def mean_divergence(
    model: nn.Module, start: nn.Module, examples: Sequence[Example], stopped: Callable[[], bool] = lambda: False
) -> float:
    """KL divergence of ``model`` from ``start``, mean over the completions' tokens, in nats: over the whole vocabulary,
    for an estimate from the tokens alone is nothing but noise where the model would no longer write them. One sequence
    at a time, for two models' predictions stand side by side. Raises SHUTTING_DOWN."""
    total = 0.0
    with torch.no_grad():
        for example in examples:
            _check(stopped)
            now, then = (_logits(of, [example]).log_softmax(-1) for of in (model, start))
            total += float((now.exp() * (now - then)).sum())
    return total / _tokens(examples)


def _check(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise PreceptorError("SHUTTING_DOWN", "the update was interrupted; it begins again when the service is back")


def _batches(examples: Sequence[Example], size: int, rng: random.Random | None) -> Iterator[list[Example]]:
    """Batches of about equal length, so that little is padded; with ``rng``, shuffled among equals and as a whole."""
    for places in _places(examples, size, rng):
        yield [examples[i] for i in places]


def _places(examples: Sequence[Example], size: int, rng: random.Random | None) -> list[list[int]]:
    order = list(range(len(examples)))
    if rng:
        rng.shuffle(order)
    order.sort(key=lambda i: len(examples[i].prompt) + len(examples[i].completion))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    if rng:
        rng.shuffle(batches)
    return batches


def _logprobs(model: nn.Module, batch: Sequence[Example]) -> Tensor:
    """(B, C): log-probability of each token of the completions, which end in the last column; 0 before they begin."""
    logits = _logits(model, batch)
    labels = torch.full(logits.shape[:2], -100)
    for row, example in enumerate(batch):
        labels[row, labels.shape[1] - len(example.completion) :] = torch.tensor(example.completion)
    labels = labels.to(logits.device)
    return -functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def _logits(model: nn.Module, batch: Sequence[Example]) -> Tensor:
    """(B, C, V): what is predicted of each token of the completions.

    Sequences end in the same column (padded on the left), so the logits of the last C + 1 columns are all that is
    needed: on a model with a large vocabulary, logits of the prompts would be most of the memory.
    """
    longest = max(len(e.prompt) + len(e.completion) for e in batch)
    answer = max(len(e.completion) for e in batch)
    ids = torch.zeros((len(batch), longest), dtype=torch.long)
    mask = torch.zeros((len(batch), longest), dtype=torch.long)
    for row, example in enumerate(batch):
        tokens = [*example.prompt, *example.completion]
        ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask[row, longest - len(tokens) :] = 1
    device = next(model.parameters()).device
    out: Any = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
        logits_to_keep=answer + 1,
        use_cache=False,
    )
    logits: Tensor = out.logits[:, -answer - 1 : -1].float()
    return logits


def _losses(now: Tensor, batch: Sequence[Example], algorithm: Algorithm, learning: LearningSettings) -> Tensor:
    """(B, C): what the algorithm says of each token; 0 before the completions begin."""
    history = _columns([e.then for e in batch], now), _columns([e.start for e in batch], now)
    weights = torch.tensor([[e.weight] for e in batch], device=now.device)
    losses = algorithm.token_losses(now, *history, weights, learning)
    return losses * _columns([(1.0,) * len(e.completion) for e in batch], now)


def _columns(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """The rows side by side with those of ``like``, zeros in front."""
    return torch.tensor([[0.0] * (like.shape[1] - len(row)) + list(row) for row in rows], device=like.device)


def _tokens(batch: Sequence[Example]) -> int:
    return sum(len(e.completion) for e in batch)


def _mean_loss(
    model: nn.Module,
    examples: Sequence[Example],
    size: int,
    algorithm: Algorithm,
    learning: LearningSettings,
    stopped: Callable[[], bool],
) -> float:
    total = 0.0
    with torch.no_grad():
        for batch in _batches(examples, size, None):
            _check(stopped)
            total += _losses(_logprobs(model, batch), batch, algorithm, learning).sum().item()
    return total / _tokens(examples)
