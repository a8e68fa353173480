"""How the shipped models are trained: one loop for all of them, resumable, a log line every fifty steps.

A lesson is a list of (prompt ids, completion ids); only the completion carries loss. The loop asks its ``Curriculum``
for the next batch, so what is taught when is decided in one place per model (``build``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import PreTrainedModel

Example = tuple[Sequence[int], Sequence[int]]  # token ids without loss, token ids with loss
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Schedule:
    """Length and step size of a training: linear warm-up, then a cosine down to a tenth.

    With ``restart`` the cosine begins again, at ``restart_rate``, from that step on; the first one is laid out for
    ``first_steps``.
    """

    steps: int
    learning_rate: float
    warm_up: int = 50
    weight_decay: float = 0.05
    report_every: int = 50
    save_every: int = 200
    restart: int = 0
    restart_rate: float = 0.0
    first_steps: int = 0

    def rate(self, step: int) -> float:
        """The learning rate at ``step`` (0-based)."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / self.warm_up
        start, end, peak = self.warm_up, self.first_steps or self.steps, self.learning_rate
        if self.restart and step >= self.restart:
            start, end, peak = self.restart, self.steps, self.restart_rate
        progress = (step - start) / max(1, end - start)
        return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def collate(examples: Sequence[Example], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both [examples, longest], padded on the right; labels are -100 where nothing is taught."""
    longest = max(len(prompt) + len(completion) for prompt, completion in examples)
    ids = torch.full((len(examples), longest), pad_id)
    labels = torch.full((len(examples), longest), IGNORED)
    for row, (prompt, completion) in enumerate(examples):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor([*prompt, *completion])
        labels[row, len(prompt) : end] = torch.tensor(list(completion))
    return ids, labels


def loss_of(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean cross-entropy of the taught tokens, and the share of them that the model would have chosen.

    Logits are computed for the taught places alone: with a prompt of two hundred tokens that halves the work.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    taught = labels[:, 1:] != IGNORED
    logits = model.lm_head(hidden[:, :-1][taught])
    gold = labels[:, 1:][taught]
    accuracy = (logits.argmax(-1) == gold).float().mean().item()
    return functional.cross_entropy(logits, gold), accuracy


def train(
    name: str,
    model: PreTrainedModel,
    batch_at: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    schedule: Schedule,
    folder: Path,
    on_report: Callable[[int], str] | None = None,
) -> None:
    """Train ``model`` in place; ``batch_at(step)`` must be a pure function so that a resumed training is the same one.

    A state is kept in ``folder`` every ``schedule.save_every`` steps and removed by whoever saves the final model.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=schedule.weight_decay
    )
    state = folder / f"{name}.state.pt"
    first = 0
    if state.exists():
        kept = torch.load(state, weights_only=True, map_location=model.device)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        first = kept["step"]
        print(f"{name}: going on at step {first}", flush=True)
    started, losses, hits = time.monotonic(), [], []
    model.train()
    for step in range(first, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        ids, labels = batch_at(step)
        loss, accuracy = loss_of(model, ids.to(model.device), labels.to(model.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        hits.append(accuracy)
        done = step + 1
        if done % schedule.report_every == 0 or done == schedule.steps:
            pace = (time.monotonic() - started) / (done - first)
            left = pace * (schedule.steps - done) / 60
            extra = on_report(done) if on_report else ""
            print(
                f"{name}: step {done}/{schedule.steps} loss {sum(losses) / len(losses):.3f} "
                f"tokens right {sum(hits) / len(hits):.3f} {pace:.2f} s/step, {left:.1f} min left {extra}",
                flush=True,
            )
            losses, hits = [], []
        if done % schedule.save_every == 0 and done < schedule.steps:
            temporary = state.with_suffix(".tmp")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}, temporary)
            temporary.replace(state)
    model.eval()
