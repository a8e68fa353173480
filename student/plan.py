"""What one trial trains on, step by step: order, replay, loss masks, token budget. Pure; no torch.

A plan is a function of the trial's documents, settings and seed and of the replay corpus. It is made before training
starts, so the number of steps, and with it the learning-rate schedule, is known, and a trial never looks at its
neighbours.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from preceptor.errors import PreceptorError
from preceptor.tasks import LossMask
from student.trial import TrainingSettings


@dataclass(frozen=True, slots=True)
class Lesson:
    """One tokenised document. Token i > 0 carries loss iff i >= ``loss_from``.

    Without pads the last of ``ids`` is the end-of-sequence token. With pads it is the document's last own token, and
    ``pads`` end-of-sequence tokens stand behind it: each carries loss (the last own token is asked for the first of
    them), and no token sees any, not even itself, because the attention mask hides them. Their positions count on.
    """

    ids: tuple[int, ...]
    loss_from: int = 1
    pads: int = 0

    @property
    def labels(self) -> int:
        """Number of tokens that carry loss, pads included."""
        return len(self.ids) - self.loss_from + self.pads


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """The lessons of every optimiser step of one trial, and the learning rate of each step."""

    steps: tuple[tuple[Lesson, ...], ...]
    learning_rates: tuple[float, ...]
    weight_decay: float
    max_grad_norm: float

    @property
    def tokens(self) -> int:
        """Real tokens that are put through the student when the plan is carried out."""
        return sum(len(lesson.ids) for step in self.steps for lesson in step)


def lesson(
    text: str, ids: Sequence[int], starts: Sequence[int], settings: TrainingSettings, eos_id: int, context: int
) -> Lesson:
    """A document as a lesson, closed by the end-of-sequence token. ``starts`` holds the character at which each token
    begins.

    With AFTER_MARKER and OUTPUTS_ONLY the loss begins behind the last marker. Where there is none, AFTER_MARKER puts it
    on all tokens and OUTPUTS_ONLY on none. With ``pad_to`` a longer document is cut, and pads close a shorter one.
    Raises PreceptorError(SEQUENCE_TOO_LONG).
    """
    pad_to = min(settings.pad_to, context)
    limit = min(settings.max_document_tokens or math.inf, math.inf if pad_to else context)
    if len(ids) + 1 > limit:
        message = f"a document has {len(ids) + 1} tokens, the limit is {limit}: {text[:60]!r}"
        raise PreceptorError("SEQUENCE_TOO_LONG", message)
    kept = tuple(ids[:pad_to]) if pad_to else (*ids, eos_id)
    loss_from = _loss_from(text, starts, settings)
    if loss_from is None or not ids:  # a lone closing token is no material
        return Lesson(kept, len(kept))
    return Lesson(kept, min(loss_from, len(kept)), max(0, pad_to - len(kept)))


def _loss_from(text: str, starts: Sequence[int], settings: TrainingSettings) -> int | None:
    """The first token that carries loss, ``len(starts)`` being the one that closes the document; None: no token."""
    if settings.loss_mask is LossMask.ALL:
        return 1
    at = text.rfind(settings.loss_marker)
    if at < 0:
        return 1 if settings.loss_mask is LossMask.AFTER_MARKER else None
    behind = at + len(settings.loss_marker)
    return max(1, next((i for i, start in enumerate(starts) if start >= behind), len(starts)))


def replayed_per_epoch(documents: int, replay_share: float) -> int:
    """How many replay documents join ``documents`` own ones so that they are ``replay_share`` of all."""
    return round(documents * replay_share / (1 - replay_share))


def make_plan(
    lessons: Sequence[Lesson], replay: Sequence[Lesson], settings: TrainingSettings, seed: int
) -> TrainingPlan:
    """What is trained on in which step, and how fast.

    A step holds ``batch_size`` x ``gradient_accumulation`` lessons, and its loss is the mean over all their labels, as
    transformers' Trainer counts; how many passes it takes is the trainer's affair. No step begins once the token budget
    or ``max_steps`` is used up. Lessons without a single label are left out.
    Raises PreceptorError(NOTHING_TO_TRAIN) if that leaves none of ``lessons``; without any lesson the plan is empty.
    """
    own = [item for item in lessons if item.labels > 0]
    if lessons and not own:
        asked = f"loss mask {settings.loss_mask}, marker {settings.loss_marker!r}"
        raise PreceptorError("NOTHING_TO_TRAIN", f"none of {len(lessons)} documents has a token with loss ({asked})")
    steps: list[tuple[Lesson, ...]] = []
    tokens = 0
    for step in _steps(own, [item for item in replay if item.labels > 0], settings, seed):
        if settings.max_train_tokens and tokens >= settings.max_train_tokens:
            break
        if settings.max_steps and len(steps) >= settings.max_steps:
            break
        steps.append(step)
        tokens += sum(len(item.ids) for item in step)
    return TrainingPlan(
        tuple(steps),
        tuple(learning_rate(step, len(steps), settings) for step in range(len(steps))),
        settings.weight_decay,
        settings.max_grad_norm,
    )


def _steps(
    own: Sequence[Lesson], corpus: Sequence[Lesson], settings: TrainingSettings, seed: int
) -> Iterator[tuple[Lesson, ...]]:
    """The steps of all epochs: each epoch shuffled, with replay mixed in. Its last step may be smaller than the others.

    Replay is drawn afresh for each epoch, without repetition as far as the corpus reaches.
    """
    # Two streams, so that a change of the replay share leaves the order of the own documents alone.
    order, draws = random.Random(f"order:{seed}"), random.Random(f"replay:{seed}")
    size = settings.batch_size * settings.gradient_accumulation
    for _ in range(settings.epochs if own else 0):
        epoch = order.sample(own, len(own))
        wanted = replayed_per_epoch(len(own), settings.replay_share) if corpus else 0
        for start in range(0, wanted, len(corpus) or 1):
            for item in draws.sample(corpus, min(len(corpus), wanted - start)):
                epoch.insert(draws.randint(0, len(epoch)), item)
        for start in range(0, len(epoch), size):
            yield tuple(epoch[start : start + size])


def learning_rate(step: int, steps: int, settings: TrainingSettings) -> float:
    """The rate of step 0..steps-1: linear rise over the warm-up, then constant, linear fall or half a cosine.

    The first and the last step already have a rate above zero: with the ten or twenty steps of a trial, a step at
    rate zero would be a tenth of the work thrown away. From the warm-up's end on the rates are those of transformers'
    ``get_{linear,constant,cosine}_schedule_with_warmup``; the warm-up is theirs one step earlier, which leaves out
    their first step at rate zero.
    """
    warmup = warmup_steps(steps, settings)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    if settings.schedule == "cosine":
        return settings.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
    return settings.learning_rate * (steps - step) / (steps - warmup)


def warmup_steps(steps: int, settings: TrainingSettings) -> int:
    """In how many of ``steps`` the rate rises: the share of the settings, at least one if that is above 0."""
    return min(steps, max(1, round(settings.warmup_share * steps))) if settings.warmup_share > 0 else 0
