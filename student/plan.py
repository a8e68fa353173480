"""What one trial trains on, step by step: order, replay, loss masks, token budget. Pure; no torch.

A plan is a function of the trial's documents, settings and seed and of the replay corpus. It is made before training
starts, so the number of steps, and with it the learning-rate schedule, is known, and a trial never looks at its
neighbours.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
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
    """A document as a lesson. ``starts`` holds the character at which each token begins.

    With AFTER_MARKER the loss begins behind the last marker; a document without one carries loss on all its tokens.
    Raises PreceptorError(SEQUENCE_TOO_LONG).
    """
    closed = (*ids, eos_id)
    limit = min(settings.max_document_tokens or context, context)
    if len(closed) > limit:
        message = f"a document has {len(closed)} tokens, the limit is {limit}: {text[:60]!r}"
        raise PreceptorError("SEQUENCE_TOO_LONG", message)
    loss_from = 1
    if settings.loss_mask is LossMask.AFTER_MARKER and (at := text.rfind(settings.loss_marker)) >= 0:
        behind = at + len(settings.loss_marker)
        loss_from = max(1, next((i for i, start in enumerate(starts) if start >= behind), len(ids)))
    return Lesson(closed, loss_from)


def replayed_per_epoch(documents: int, replay_share: float) -> int:
    """How many replay documents join ``documents`` own ones so that they are ``replay_share`` of all."""
    return round(documents * replay_share / (1 - replay_share))


def make_plan(
    lessons: Sequence[Lesson], replay: Sequence[Lesson], settings: TrainingSettings, seed: int
) -> TrainingPlan:
    """Shuffles each epoch, mixes replay in, cuts it into steps and stops at the token budget.

    Replay is drawn afresh for each epoch, without repetition as far as the corpus reaches. An epoch's last step may be
    smaller than the batch size. Lessons without a single label are left out.
    """
    own = [item for item in lessons if item.labels > 0]
    corpus = [item for item in replay if item.labels > 0]
    # Two streams, so that a change of the replay share leaves the order of the own documents alone.
    order, draws = random.Random(f"order:{seed}"), random.Random(f"replay:{seed}")
    steps: list[tuple[Lesson, ...]] = []
    tokens = 0
    for _ in range(settings.epochs if own else 0):
        epoch = order.sample(own, len(own))
        wanted = replayed_per_epoch(len(own), settings.replay_share) if corpus else 0
        for start in range(0, wanted, len(corpus) or 1):
            for item in draws.sample(corpus, min(len(corpus), wanted - start)):
                epoch.insert(draws.randint(0, len(epoch)), item)
        for start in range(0, len(epoch), settings.batch_size):
            if settings.max_train_tokens and tokens >= settings.max_train_tokens:
                break
            step = tuple(epoch[start : start + settings.batch_size])
            steps.append(step)
            tokens += sum(len(item.ids) for item in step)
    return TrainingPlan(
        tuple(steps),
        tuple(learning_rate(step, len(steps), settings) for step in range(len(steps))),
        settings.weight_decay,
        settings.max_grad_norm,
    )


def learning_rate(step: int, steps: int, settings: TrainingSettings) -> float:
    """The rate of step 0..steps-1: linear rise over the warm-up, then constant or linear fall.

    The first and the last step already have a rate above zero: with the ten or twenty steps of a trial, a step at
    rate zero would be a tenth of the work thrown away.
    """
    warmup = min(steps, max(1, round(settings.warmup_share * steps))) if settings.warmup_share > 0 else 0
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate * (steps - step) / (steps - warmup)
