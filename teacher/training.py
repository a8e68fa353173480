"""Trains policies in this process: LoRA on self-edits, on a base that may be loaded only for that.

Promises: what the training needed of the device is free again when the base is given back, also after a failure; every
adapter carries a probe (``probe.json``), by which a server that loads it can be seen to use it.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from preceptor.errors import PreceptorError
from preceptor.inference import Probe
from teacher.backend import TrainedPolicy
from teacher.language import Language
from teacher.model import TeacherBase, adapter_files
from teacher.prompts import prompt_format
from teacher.recipe import Lesson, UpdateSettings
from teacher.update import Example, fine_tune, mean_divergence, token_logprobs

if TYPE_CHECKING:
    from peft import PeftModel

PROBE_FILE = "probe.json"
# Enough for a sum that rounding does not reach; one short sequence for the server.
_PROBE_TOKENS = 64


class LoraTrainer:
    """See ``teacher.backend.Trainer``. ``base`` gives the base for one training, with the device to itself."""

    def __init__(self, words: TeacherBase | Language, base: Callable[[], AbstractContextManager[TeacherBase]]) -> None:
        self._words = words
        self._base = base

    def train(
        self,
        parent: Path | None,
        lessons: Sequence[Lesson],
        writers: Mapping[str, Path | None],
        settings: UpdateSettings,
        seed: int,
        on_step: Callable[[int], None],
        stopped: Callable[[], bool],
    ) -> TrainedPolicy:
        """See Trainer."""
        examples = [self._example(lesson) for lesson in lessons]
        written_by = [lesson.example.policy_id for lesson in lessons]
        with self._base() as base:
            try:
                return _train(base, parent, examples, written_by, writers, settings, seed, on_step, stopped)
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # they hold the model
                raise
            finally:
                del base

    def _example(self, lesson: Lesson) -> Example:
        words, example = self._words, lesson.example
        prompt = example.prompt or prompt_format(example.prompt_format).render(example.title, example.text)
        ids = tuple(words.prompt_ids(prompt)), tuple(words.completion_ids(example.completion))
        made = Example(*ids, weight=lesson.weight)
        tokens = len(made.prompt) + len(made.completion)
        if tokens > words.context:
            raise PreceptorError(
                "SEQUENCE_TOO_LONG",
                f"a self-edit of group {example.group} has {tokens} tokens with its prompt, the teacher's context is "
                f"{words.context}",
            )
        return made


def _with_history(
    base: TeacherBase,
    model: PeftModel,
    examples: Sequence[Example],
    written_by: Sequence[str],
    writers: Mapping[str, Path | None],
    size: int,
    stopped: Callable[[], bool],
) -> list[Example]:
    """The examples with what their writers and the untouched teacher made of their tokens; ``model`` is the parent,
    before its first step."""
    starts = token_logprobs(base.model, examples, size, stopped)
    thens: dict[int, tuple[float, ...]] = {}
    for policy_id in sorted(set(written_by)):
        places = [i for i, writer in enumerate(written_by) if writer == policy_id]
        folder = writers[policy_id] if policy_id else None
        writer = base.load_adapter(folder, trainable=False) if folder else base.model if policy_id else model
        found = token_logprobs(writer.eval(), [examples[i] for i in places], size, stopped)
        thens |= dict(zip(places, found, strict=True))
    return [replace(one, then=thens[i], start=starts[i]) for i, one in enumerate(examples)]


def _train(
    base: TeacherBase,
    parent: Path | None,
    examples: Sequence[Example],
    written_by: Sequence[str],
    writers: Mapping[str, Path | None],
    settings: UpdateSettings,
    seed: int,
    on_step: Callable[[int], None],
    stopped: Callable[[], bool],
) -> TrainedPolicy:
    # The model is of this frame alone: it is gone when the base is given back.
    if parent is None:
        model = base.new_adapter(settings.rank, settings.alpha, seed)
    else:
        model = base.load_adapter(parent, trainable=True)
    if settings.learns_by.needs_history:
        examples = _with_history(base, model, examples, written_by, writers, settings.tuning.batch_size, stopped)
    trained = fine_tune(
        model,
        examples,
        settings.tuning,
        seed,
        algorithm=settings.learns_by,
        learning=settings.selection,
        on_step=on_step,
        stopped=stopped,
    )
    files = adapter_files(model, base.source)
    files[PROBE_FILE] = _probe(model, examples[0])
    kl = mean_divergence(model, base.model, examples, stopped) if settings.learns_by.needs_history else None
    return TrainedPolicy(files, trained.first_loss, trained.final_loss, trained.steps, kl)


def _probe(model: PeftModel, example: Example) -> bytes:
    continuation = example.completion[:_PROBE_TOKENS]
    with_adapter = _logprob(model, example.prompt, continuation)
    with model.disable_adapter():
        without = _logprob(model, example.prompt, continuation)
    values = {
        "prompt": list(example.prompt),
        "continuation": list(continuation),
        "logprob": round(with_adapter, 4),
        "base_logprob": round(without, 4),
    }
    return (json.dumps(values) + "\n").encode()


def _logprob(model: Any, prompt: Sequence[int], continuation: Sequence[int]) -> float:
    """Of the continuation behind the prompt, in nats, summed over its tokens."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *continuation]], device=device)
    wanted = torch.tensor(continuation, device=device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(continuation) + 1).logits[0, :-1]
        return float(logits.float().log_softmax(-1).gather(1, wanted[:, None]).sum())


def read_probe(folder: Path) -> Probe | None:
    """The probe of an adapter; None where it was made before there were probes."""
    try:
        values = json.loads((folder / PROBE_FILE).read_text(encoding="utf-8"))
        numbers = float(values["logprob"]), float(values["base_logprob"])
        return Probe(tuple(values["prompt"]), tuple(values["continuation"]), *numbers)
    except FileNotFoundError:
        return None
