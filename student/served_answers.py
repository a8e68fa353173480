"""Answers large question sets through an inference server (vLLM), with the adapters that were trained here.

The bank's adapters are written in PEFT's format to a folder that the server sees, loaded into it under names that hold
their hashes, asked all together, and taken out again. The server batches across adapters and reads a prompt's beginning
once; from some hundred questions on that is worth the way there.

Promises
- The answers are those of ``student.answering.answer``, within the rounding of two ways to compute the same: the same
  tokens go in, choices are greedy, an answer ends where it ends here, and gold answers are scored by the same sum. An
  evaluation's identity therefore does not say who answered, as it does not say which GPU did.
- Before it is asked anything, each adapter must give a question's text the log-probability that it has here. So another
  base, an adapter that is not at work or only partly, or another precision is noticed, and nothing of it is used.
- What the server cannot do is done here: sampled answers (whose numbers are the trial's own), certainty, adapters it
  does not take, questions that do not fit into its context, everything while it is away. With ``only`` that the server
  is away or refuses is an error instead.
- A student with edits merged into it is asked here, whatever the settings say: the server has the student as it was.
- Adapters of a dead worker are taken out of the server by whoever asks it next.

``on_chunk`` is called as answers come, a few times a second at most; what it raises ends the asking.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from preceptor.errors import PreceptorError
from preceptor.inference import InferenceServer, Probe
from student.answering import Prompt, answer, read_answer
from student.base import LoadedBase
from student.lora_bank import LoraBank
from student.peft_format import export_adapter
from student.served_adapters import AdapterFolder
from student.trial import Answer, AnsweringSettings

log = logging.getLogger(__name__)

# Digits of the commit in the name under which a server serves a student: NAME@<commit>.
COMMIT_DIGITS = 12
# Nats per token of a text by which two sound computations may differ. float32: a hundred times what was measured on
# the CPU; bfloat16 is off by about 0.01.
_TOLERANCE = {torch.float32: 1e-4}
_COARSE_TOLERANCE = 0.05
# While the server is away the questions can be answered here, so it is not waited for as a teacher's would be.
PATIENCE_SECONDS = 10.0
# So many rounds of requests are one call: what is answered by then is kept if the server fails.
_ROUNDS = 4
_TICK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class _Row:
    """A question for the server: who asks it, and where its answer goes."""

    seat: int
    place: int
    prompt: Prompt


class ServedAnswers:
    """Answers as ``student.answering.answer`` does, through the server at ``url`` where that pays."""

    def __init__(
        self,
        url: str,
        folder: Path,
        *,
        api_key: str = "",
        min_questions: int = 1,
        only: bool = False,
        concurrency: int = 256,
        timeout_seconds: float = 120.0,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """``folder`` is where the adapters go; the server must see it under the same path."""
        self._server = InferenceServer(
            url,
            "",
            api_key,
            concurrency=concurrency,
            timeout_seconds=timeout_seconds,
            patience_seconds=patience_seconds,
        )
        self._folder = AdapterFolder(folder)
        self._min_questions = min_questions
        self._only = only
        self._at_once = _ROUNDS * concurrency
        self._owed: list[str] = []  # names that could not be taken out of the server

    def __call__(
        self,
        base: LoadedBase,
        bank: LoraBank,
        adapters: Sequence[int],
        prompts_of: Sequence[Sequence[Prompt]],
        settings: AnsweringSettings,
        on_chunk: Callable[[], None] | None = None,
    ) -> list[list[Answer]]:
        """Answers ``prompts_of[s]`` with ``adapters[s]``, in the order given; ``bank`` must be attached.

        Raises PreceptorError with ``only``: what ``preceptor.inference`` raises, NOT_SERVABLE where the server does not
        serve this student.
        """
        rows = [
            _Row(seat, place, prompt)
            for seat, prompts in enumerate(prompts_of)
            for place, prompt in enumerate(prompts)
            if not prompt.uniforms and not prompt.certainty
        ]
        found: dict[tuple[int, int], Answer] = {}
        if len(rows) >= self._min_questions and not base.adapters:
            try:
                self._ask(base, bank, adapters, rows, settings, _rarely(on_chunk), found)
            except (PreceptorError, OSError) as error:
                if self._only:
                    raise
                log.warning("%d of %d questions are answered here: %s", len(rows) - len(found), len(rows), error)
        left = [
            [prompt for place, prompt in enumerate(prompts) if (seat, place) not in found]
            for seat, prompts in enumerate(prompts_of)
        ]
        here = [iter(answers) for answers in _here(base, bank, adapters, left, settings, on_chunk)]
        return [
            [found.get((seat, place)) or next(here[seat]) for place in range(len(prompts))]
            for seat, prompts in enumerate(prompts_of)
        ]

    def clear_leftovers(self) -> None:
        """Takes out of the server what dead workers have left in it, and removes their files.

        Raises PreceptorError where the server does not answer; what it may still have stays then.
        """
        while self._owed:
            self._server.unload_adapter(self._owed[-1])
            self._owed.pop()
        with self._folder.leftovers() as names:
            for name in names:
                self._server.unload_adapter(name)
        if names:
            log.info("%d adapters of workers that are gone were taken out of %s", len(names), self._server.url)

    def close(self) -> None:
        """Closes all connections and removes this process's files."""
        self._server.close()
        self._folder.close()

    def _ask(
        self,
        base: LoadedBase,
        bank: LoraBank,
        adapters: Sequence[int],
        rows: Sequence[_Row],
        settings: AnsweringSettings,
        on_done: Callable[[], None],
        found: dict[tuple[int, int], Answer],
    ) -> None:
        """Puts the answers of the rows that the server can answer into ``found``, by seat and place."""
        context = self._context_for(base)
        on_done()
        self.clear_leftovers()
        # A prompt of which log-probabilities are asked needs room for a token more.
        room = [
            row for row in rows if max(row.prompt.length, len(row.prompt.prompt) + settings.max_new_tokens) < context
        ]
        with self._loaded(base, bank, adapters, room, on_done) as names:
            asked = [row for row in room if row.seat in names]
            for start in range(0, len(asked), self._at_once):
                some = asked[start : start + self._at_once]
                texts = self._texts(base, [names[row.seat] for row in some], some, settings, on_done)
                golds = self._golds([names[row.seat] for row in some], some, on_done)
                for row, text, gold in zip(some, texts, golds, strict=True):
                    if text is not None:
                        prompt = row.prompt
                        found[row.seat, row.place] = Answer(prompt.question, text, gold, len(prompt.gold))

    def _context_for(self, base: LoadedBase) -> int:
        """The context in which the server serves this student."""
        facts = self._server.check()
        at = f"@{base.commit[:COMMIT_DIGITS]}"
        served = [model for model in facts.models if not model.parent]
        for model in served:
            if base.commit and model.id.endswith(at):
                return model.max_model_len or base.context
        names = ", ".join(model.id for model in served) or "nothing"
        message = f"{self._server.url} serves {names}, not the student {base.source}{at}"
        raise PreceptorError("NOT_SERVABLE", message)

    @contextmanager
    def _loaded(
        self,
        base: LoadedBase,
        bank: LoraBank,
        adapters: Sequence[int],
        rows: Sequence[_Row],
        on_done: Callable[[], None],
    ) -> Iterator[dict[int, str]]:
        """The names of the adapters, by seat, while they are loaded. One that the server does not take is left out."""
        first = {row.seat: row.prompt for row in reversed(rows)}
        probes = self._probes(base, bank, adapters, first)
        names: dict[int, str] = {}
        put: list[str] = []
        clean = False
        try:
            for seat, probe in probes.items():
                name, folder = self._folder.put(partial(export_adapter, base, bank, adapters[seat]))
                put.append(name)
                try:
                    self._server.load_adapter(name, folder, probe)
                except PreceptorError as error:
                    if self._only or error.reason != "ADAPTER_MISMATCH":
                        raise
                    log.warning("an adapter of rank %d is asked here: %s", bank.ranks[adapters[seat]], error)
                else:
                    names[seat] = name
                on_done()
            yield names
            clean = True
        finally:
            self._take_out(put, clean)

    def _take_out(self, names: Sequence[str], clean: bool) -> None:
        self._owed += dict.fromkeys(names)
        try:
            self.clear_leftovers()
        except PreceptorError as error:
            log.warning("adapters are left in %s until it answers again: %s", self._server.url, error)
            clean = False
        if clean:
            self._folder.remove(names)
        else:  # the server may still be at a request that was given up
            self._folder.abandon(names)

    def _probes(
        self, base: LoadedBase, bank: LoraBank, adapters: Sequence[int], first: dict[int, Prompt]
    ) -> dict[int, Probe]:
        """By seat a question of the adapter's, prompt and gold answer, scored as one text; none for one that has no
        numbers."""
        texts = {seat: (*prompt.prompt, *prompt.gold) for seat, prompt in first.items()}
        seats = [seat for seat, text in texts.items() if len(text) > 1]
        prompts = [[Prompt(0, texts[seat][:1], texts[seat][1:])] for seat in seats]
        scoring = AnsweringSettings(generate=False)
        scored = answer(base, bank, [adapters[seat] for seat in seats], prompts, scoring) if seats else []
        tolerance = _TOLERANCE.get(base.model.dtype, _COARSE_TOLERANCE)
        return {
            seat: Probe(texts[seat][:1], texts[seat][1:], one.gold_logprob, tolerance=tolerance)
            for seat, (one,) in zip(seats, scored, strict=True)
            if math.isfinite(one.gold_logprob)
        }

    def _texts(
        self,
        base: LoadedBase,
        names: Sequence[str],
        rows: Sequence[_Row],
        settings: AnsweringSettings,
        on_done: Callable[[], None],
    ) -> list[str | None]:
        """The answers; None where one does not end, as when the server is shut down in the middle of it."""
        if not settings.generate:
            return [""] * len(rows)
        completed = self._server.complete(
            [row.prompt.prompt for row in rows],
            model=names,
            max_tokens=settings.max_new_tokens,
            temperature=0.0,
            stop_token_ids=sorted(base.end_ids),
            stop=["\n"] if settings.stop_at_newline else [],
            on_done=on_done,
        )
        return [read_answer(base, one.token_ids, settings, ended=one.finished) for one in completed]

    def _golds(self, names: Sequence[str], rows: Sequence[_Row], on_done: Callable[[], None]) -> list[float]:
        known = [number for number, row in enumerate(rows) if row.prompt.gold]
        scores = self._server.score(
            [(rows[number].prompt.prompt, rows[number].prompt.gold) for number in known],
            model=[names[number] for number in known],
            on_done=on_done,
        )
        golds = [0.0] * len(rows)
        for number, score in zip(known, scores, strict=True):
            golds[number] = score
        return golds


def _here(
    base: LoadedBase,
    bank: LoraBank,
    adapters: Sequence[int],
    left: Sequence[Sequence[Prompt]],
    settings: AnsweringSettings,
    on_chunk: Callable[[], None] | None,
) -> list[list[Answer]]:
    """Answers what is left by ourselves; seats of which nothing is left take no part."""
    seats = [seat for seat, prompts in enumerate(left) if prompts]
    answers: list[list[Answer]] = [[] for _ in left]
    if seats:
        asked = answer(
            base, bank, [adapters[seat] for seat in seats], [left[seat] for seat in seats], settings, on_chunk
        )
        for seat, one in zip(seats, asked, strict=True):
            answers[seat] = one
    return answers


def _rarely(on_chunk: Callable[[], None] | None) -> Callable[[], None]:
    """``on_chunk``, for calls that come by the thousand."""
    if on_chunk is None:
        return lambda: None
    last = -math.inf

    def tick() -> None:
        nonlocal last
        if (now := time.monotonic()) > last + _TICK_SECONDS:
            last = now
            on_chunk()

    return tick
