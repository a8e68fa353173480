"""The backend `transformers`: this process draws and trains, never both at once, for both want the device's memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from preceptor.errors import PreceptorError
from teacher.backend import Backend, Draw, Drawn, Row, SamplingSettings
from teacher.decoding import Decoder
from teacher.model import PolicyModels, TeacherBase
from teacher.policy_store import Policy
from teacher.sampling import sample, uniforms
from teacher.training import LoraTrainer


def in_process(base: TeacherBase, cached_policies: int = 2) -> Backend:
    """A base that is loaded draws and is trained here; so many policies are kept ready for drawing."""
    device = threading.Lock()

    @contextmanager
    def held() -> Iterator[TeacherBase]:
        with device:
            yield base

    author = _InProcessAuthor(base, PolicyModels(base, cached_policies), device)
    return Backend(base.source, base.commit, author, LoraTrainer(base, held))


class _InProcessAuthor:
    """See ``teacher.backend.Author``."""

    def __init__(self, base: TeacherBase, models: PolicyModels, device: threading.Lock) -> None:
        self._base = base
        self._models = models
        self._device = device

    def prompt_tokens(self, prompt: str) -> int:
        return len(self._base.prompt_ids(prompt))

    @property
    def context(self) -> int:
        return self._base.context

    @contextmanager
    def writing(
        self, policy: Policy, adapter: Callable[[], Path | None], stopped: Callable[[], bool]
    ) -> Iterator[Draw]:
        with _hold(self._device, stopped):
            decoder = self._base.decoder(self._models.get(policy.adapter_sha256, adapter))
            yield lambda *asked: self._draw(decoder, *asked)

    def _draw(
        self,
        decoder: Decoder,
        rows: Sequence[Row],
        seed: int,
        settings: SamplingSettings,
        stopped: Callable[[], bool],
    ) -> list[Drawn]:
        prompts = list(dict.fromkeys(row.prompt for row in rows))
        ids = [self._base.prompt_ids(prompt) for prompt in prompts]
        places = [prompts.index(row.prompt) for row in rows]
        length = settings.max_new_tokens
        numbers = np.stack([uniforms(seed, row.task_id, row.sample, row.draw, length) for row in rows])
        completions = sample(
            decoder,
            ids,
            places,
            torch.from_numpy(numbers),
            settings,
            self._base.end_ids,
            [min(length, self._base.context - len(ids[place])) for place in places],
            stopped,
        )
        return [Drawn(self._base.text(one.tokens), len(one.tokens), one.finished) for one in completions]


@contextmanager
def _hold(lock: threading.Lock, stopped: Callable[[], bool]) -> Iterator[None]:
    """The lock, waited for only as long as somebody wants the result."""
    while not lock.acquire(timeout=0.1):
        if stopped():
            raise PreceptorError("CANCELLED", "the client went away while it waited for the teacher")
    try:
        yield
    finally:
        lock.release()
