"""What a trial is made of and what comes out of it, as plain values (no torch, no proto).

A trial is one fine-tune of one pinned student on one self-edit with one seed, and its answers. Everything that
steers it is in ``Trial``: initialisation, data order and replay draws depend on its seed, its documents and its
settings alone, never on the trials it happens to share a batch with.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from preceptor.tasks import TARGETS, Directive, FineTuning, LossMask, Schedule

# Every linear layer of a Llama-, Qwen- or Mistral-shaped block. Named in full, because PEFT's own default for these
# models is q_proj and v_proj only, and a silent default is a silent change of the experiment.
ALL_LINEAR = TARGETS["all"]


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How one adapter is trained. Lengths are in tokens, shares in 0..1."""

    rank: int = 8
    alpha: float = 16.0  # the adapter's output is scaled by alpha / rank, as in PEFT
    target_modules: tuple[str, ...] = ALL_LINEAR  # matched by suffix of the module's dotted name
    learning_rate: float = 3e-3  # AdamW peak
    epochs: int = 8
    batch_size: int = 8  # documents in one optimiser step, replayed ones included ...
    gradient_accumulation: int = 1  # ... times this
    max_steps: int = 0  # no more optimiser steps than this, whatever the epochs; 0 = no limit
    schedule: Schedule = "linear"  # after the warm-up
    warmup_share: float = 0.1  # share of the steps in which the learning rate rises; at least one step if above 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # per adapter; 0 = no clipping
    replay_share: float = 0.0  # share of an epoch's documents drawn from the replay corpus
    loss_mask: LossMask = LossMask.ALL
    loss_marker: str = "Answer:"  # unless ALL: the loss begins behind its last occurrence in the document
    max_train_tokens: int = 0  # no step begins once this many tokens are trained; 0 = no limit
    max_document_tokens: int = 0  # 0 = the student's context
    full: bool = False  # all weights are trained, and no adapter; such a trial is trained alone
    keep: bool = False  # what was learnt is kept
    pad_to: int = 0  # cut or pad every document to so many tokens, at most the context, pads in the loss; 0 = neither

    def under(self, directive: Directive) -> TrainingSettings:
        """These settings with what ``directive`` says in place of the defaults."""
        named: dict[str, Any] = {
            name: value
            for name in ("learning_rate", "epochs", "replay_share", "rank", "loss_mask")
            if (value := getattr(directive, name)) is not None
        }
        if "rank" in named:  # keep alpha / rank, so that the rank alone does not change the size of a step
            named["alpha"] = self.alpha * named["rank"] / self.rank
        if directive.targets is not None:
            named["target_modules"] = TARGETS[directive.targets]
        if directive.fine_tuning is not None:
            named["full"] = directive.fine_tuning is FineTuning.FULL
        return replace(self, **named)


@dataclass(frozen=True, slots=True)
class AnsweringSettings:
    """How questions are put to the student and when an answer ends."""

    prompt_template: str = "Question: {question}\nAnswer:"
    answer_prefix: str = " "  # stands between the prompt and a gold answer
    max_new_tokens: int = 16  # an answer that has not ended by then is cut off
    stop_at_newline: bool = True  # besides the end-of-sequence token
    generate: bool = True  # False: only the gold answers' log-probability, and empty texts
    # Beside the greedy answer; they change nothing about it, and are nothing without ``generate``.
    samples: int = 0  # answers drawn for each question ...
    temperature: float = 1.0  # ... at this temperature, above 0
    certainty: bool = False  # the student's certainty of its greedy answer


DEFAULT_ANSWERING = AnsweringSettings()


@dataclass(frozen=True, slots=True)
class Trial:
    """One adapter to train. Without documents it is the untouched student (the baseline)."""

    trial_id: str
    documents: tuple[str, ...]
    seed: int
    settings: TrainingSettings = TrainingSettings()


@dataclass(frozen=True, slots=True)
class Answer:
    """What the student said to one question."""

    question: int  # index into the questions that were asked
    text: str
    gold_logprob: float  # sum of log p(token) over the gold answer's tokens, natural logarithm
    gold_tokens: int  # none if there is no gold answer; gold_logprob is 0 then
    certainty: float = 0.0  # nats, mean over the greedy answer's tokens and the one that ends it; 0 if not asked for
    samples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TrialOutcome:
    """The result of one trial: answers, or ``failure`` = (reason of the catalogue, message)."""

    trial_id: str
    answers: tuple[Answer, ...] = ()
    probe_answers: tuple[Answer, ...] = ()
    losses: tuple[float, ...] = field(default=(), repr=False)  # mean loss of each step
    trained_tokens: int = 0  # real tokens put through the student in training: no pads, epochs counted
    train_seconds: float = 0.0  # this trial's share of the bank's time
    answer_seconds: float = 0.0  # likewise
    failure: tuple[str, str] | None = None
    adapter: tuple[str, str] | None = None  # (uri, SHA-256) of what was learnt, where it was to be kept

    @property
    def steps(self) -> int:
        """Optimiser steps taken."""
        return len(self.losses)

    @property
    def first_loss(self) -> float | None:
        """Loss of the first step; None if nothing was trained."""
        return self.losses[0] if self.losses else None

    @property
    def final_loss(self) -> float | None:
        """Loss of the last step; None if nothing was trained."""
        return self.losses[-1] if self.losses else None
