"""Answers all questions of all adapters together: greedy text, the gold answer's log-probability and, where they are
asked for, sampled answers and the student's certainty.

One forward pass over "prompt + gold answer" of every row gives the log-probability of the gold tokens, and the choice
at each of their positions. As long as the choice is the gold token, the next position's choice is the true
continuation too, so a right answer is complete after this single pass. Only rows that leave the gold answer, or go on
after it, are decoded further, one token a step from the pass's key-value cache. The text is exactly what
token-by-token decoding gives; the gold answer saves time and decides nothing. (It is speculative decoding with the
gold answer as the draft: Leviathan et al. 2023, arXiv 2211.17192.)

A sampled answer is a choice too: the token at which the cumulative distribution passes a number that depends on the
trial's seed, the question, the sample and the token's place. So all of it holds for samples, a prompt is read once
for all its answers, and candidates with the same seed are sampled with the same numbers.

Rows are padded on the right. Causal attention keeps pads and refused drafts out of the first pass; a mask keeps them
out of the steps after it. Students outside the families that ``student.packed_decoder`` knows are asked without a
cache: every step reads its rows anew.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from preceptor.errors import PreceptorError
from preceptor.tasks import Question
from student.base import LoadedBase
from student.lora_bank import LoraBank
from student.packed_decoder import supports
from student.readings import Reading, Wanted, read, uniforms
from student.trial import Answer, AnsweringSettings

# Tokens of one first pass. Enough to fill the matrix units, small enough that a tiny model's activations stay in the
# cache of a CPU core and a large one's in memory.
_CHUNK_TOKENS = {"cpu": 2_048, "cuda": 65_536}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as tokens, and what is to be measured beside its greedy answer."""

    question: int
    prompt: tuple[int, ...]
    gold: tuple[int, ...]
    uniforms: tuple[tuple[float, ...], ...] = ()  # a sampled answer for each, drawn with these numbers
    certainty: bool = False

    @property
    def length(self) -> int:
        """Tokens of prompt and gold answer."""
        return len(self.prompt) + len(self.gold)


def encode_questions(
    base: LoadedBase, questions: Sequence[Question], settings: AnsweringSettings, seed: int = 0
) -> list[Prompt]:
    """Questions as tokens; sampled answers are drawn with ``seed``.

    Gold tokens are those that follow the prompt's when both are tokenised as one text, which is how a student met them
    in training; where the tokenizer merges across the seam, the gold answer is tokenised alone. An empty gold answer
    has no tokens.
    Raises PreceptorError(SEQUENCE_TOO_LONG) if a prompt leaves no room for its answer.
    """
    prompts = [settings.prompt_template.replace("{question}", question.text) for question in questions]
    golds = [settings.answer_prefix + question.answer if question.answer else "" for question in questions]
    alone = base.encode(prompts)
    joined = base.encode([prompt + gold for prompt, gold in zip(prompts, golds, strict=True)])
    samples = range(settings.samples if settings.generate else 0)
    rows = []
    for index, (question, prompt, whole) in enumerate(zip(questions, alone, joined, strict=True)):
        cut = len(prompt.ids)
        gold = whole.ids[cut:] if whole.ids[:cut] == prompt.ids else base.encode([golds[index]], opening=False)[0].ids
        needed = cut + max(len(gold), settings.max_new_tokens)
        if needed > base.context:
            raise PreceptorError(
                "SEQUENCE_TOO_LONG",
                f"a question needs {needed} tokens with its answer, the student's context is {base.context}: "
                f"{question.text[:60]!r}",
            )
        numbers = tuple(uniforms(seed, question.text, sample, settings.max_new_tokens) for sample in samples)
        rows.append(Prompt(index, prompt.ids, gold, numbers, settings.certainty and settings.generate))
    return rows


@dataclass(slots=True)
class _Draft:
    """An answer under way: the greedy one, or one that is drawn with numbers, one per token."""

    uniforms: tuple[float, ...] | None = None
    certainties: list[float] | None = (
        None  # of each choice so far, the one that ends the answer included; None: unasked
    )
    generated: list[int] = field(default_factory=list)
    finished: bool = False

    def take(self, token: int, base: LoadedBase, settings: AnsweringSettings) -> None:
        """Appends a token, or ends the answer."""
        if token in base.end_ids:
            self.finished = True
            return
        self.generated.append(token)
        newline = settings.stop_at_newline and token in base.newline_ids
        self.finished = newline or len(self.generated) >= settings.max_new_tokens


@dataclass(slots=True)
class _Row:
    """A question that is being answered by one adapter."""

    prompt: Prompt
    drafts: list[_Draft]  # the greedy answer, then the sampled ones; none if nothing is decoded
    gold_logprob: float = 0.0


class _Open(NamedTuple):
    """A draft that the first pass has not finished."""

    place: int  # its row's in the first pass
    seat: int
    prompt: Prompt
    draft: _Draft


class Seating(Protocol):
    """What is told whose adapters the tokens of the next batches go through: a bank, or nothing at all."""

    def values_of(self, adapters: Sequence[int]) -> Tensor:
        """See LoraBank."""

    def seat(self, adapters: Sequence[int], tokens: Sequence[int], values_SP: Tensor | None = None) -> None:
        """See LoraBank."""


class Answering(Protocol):
    """Whatever answers as ``answer`` does."""

    def __call__(
        self,
        base: LoadedBase,
        bank: LoraBank,
        adapters: Sequence[int],
        prompts_of: Sequence[Sequence[Prompt]],
        settings: AnsweringSettings,
        on_chunk: Callable[[], None] | None = None,
    ) -> list[list[Answer]]:
        """Answers ``prompts_of[s]`` with ``adapters[s]``, in the order given."""


@torch.inference_mode()
def answer(
    base: LoadedBase,
    bank: Seating,
    adapters: Sequence[int],
    prompts_of: Sequence[Sequence[Prompt]],
    settings: AnsweringSettings,
    on_chunk: Callable[[], None] | None = None,
) -> list[list[Answer]]:
    """Answers ``prompts_of[s]`` with ``adapters[s]``, in the order given; ``bank`` must be attached.

    ``on_chunk`` is called after every chunk of rows; an exception from it ends the answering.
    """
    values = bank.values_of(adapters)
    asked = [[_row(prompt, settings) for prompt in prompts] for prompts in prompts_of]
    kinds = dict.fromkeys((len(p.uniforms), p.certainty) for prompts in prompts_of for p in prompts)
    for samples, certainty in kinds:  # apart, so that what is asked of some rows costs nothing on the others
        asking = _Asking(
            base, bank, adapters, values, settings, Wanted(settings.generate, certainty, settings.temperature)
        )
        alike = [[row for row in rows if _is(row.prompt, samples, certainty)] for rows in asked]
        # Longest first within each adapter, so that a column of the grid [adapters, rows] holds rows of like length.
        grid = [sorted(rows, key=lambda row: -row.prompt.length) for rows in alike]
        start = 0
        while any(len(rows) > start for rows in grid):
            longest = max(rows[start].prompt.length for rows in grid if len(rows) > start)
            # The cache holds a row once for each of its answers.
            tokens = len(grid) * longest * (1 + samples)
            width = max(1, _CHUNK_TOKENS.get(base.device.type, 4_096) // tokens)
            asking.answer([rows[start : start + width] for rows in grid])
            start += width
            if on_chunk is not None:
                on_chunk()
    return [[_to_answer(base, row, settings) for row in rows] for rows in asked]


def _row(prompt: Prompt, settings: AnsweringSettings) -> _Row:
    if not settings.generate:
        return _Row(prompt, [])
    greedy = _Draft(certainties=[] if prompt.certainty else None)
    return _Row(prompt, [greedy, *(_Draft(numbers) for numbers in prompt.uniforms)])


def _is(prompt: Prompt, samples: int, certainty: bool) -> bool:
    return len(prompt.uniforms) == samples and prompt.certainty == certainty


def _to_answer(base: LoadedBase, row: _Row, settings: AnsweringSettings) -> Answer:
    prompt = row.prompt
    texts = [_text(base, draft, settings) for draft in row.drafts] or [""]
    certainties = row.drafts[0].certainties if row.drafts else None
    certainty = sum(certainties) / len(certainties) if certainties else 0.0
    return Answer(prompt.question, texts[0], row.gold_logprob, len(prompt.gold), certainty, tuple(texts[1:]))


def read_answer(
    base: LoadedBase, tokens: Sequence[int], settings: AnsweringSettings, *, ended: bool = False
) -> str | None:
    """The answer that begins ``tokens``, as ``answer`` reads it. None if it does not end among them, nor behind them
    (``ended``)."""
    draft = _Draft()
    for token in tokens:
        if not draft.finished:
            draft.take(token, base, settings)
    return _text(base, draft, settings) if draft.finished or ended else None


def _text(base: LoadedBase, draft: _Draft, settings: AnsweringSettings) -> str:
    text = str(base.tokenizer.decode(draft.generated, skip_special_tokens=True)) if draft.generated else ""
    if settings.stop_at_newline:
        text = text.split("\n", 1)[0]
    return text.strip()


@dataclass(frozen=True, slots=True)
class _Asking:
    """Who is asked what, for rows of which the same is wanted."""

    base: LoadedBase
    bank: Seating
    adapters: Sequence[int]
    values: Tensor  # [adapters, P]
    settings: AnsweringSettings
    wanted: Wanted

    def answer(self, grid: Sequence[Sequence[_Row]]) -> None:
        """Answers a chunk, a list of rows for each adapter."""
        base, settings = self.base, self.settings
        length = max(row.prompt.length for rows in grid for row in rows)
        ids: list[int] = []
        positions: list[int] = []
        targets: list[int] = []
        numbers: list[list[float]] = []
        for rows in grid:
            for row in rows:
                prompt = row.prompt
                first = len(ids) + len(prompt.prompt) - 1
                positions += range(first, first + len(prompt.gold) + 1)
                targets += (*prompt.gold, base.eos_id)  # what the place behind the answer predicts is not scored
                ids += (*prompt.prompt, *prompt.gold, *(base.eos_id,) * (length - prompt.length))
                if prompt.uniforms:
                    numbers += ([_at(one, n) for one in prompt.uniforms] for n in range(len(prompt.gold) + 1))
        # Of a student that we do not know, a cache may be more than a row of past tokens: windows, states.
        plain = supports(base.model, length + settings.max_new_tokens)
        cache = DynamicCache() if settings.generate and plain else None
        self.bank.seat(self.adapters, [len(rows) * length for rows in grid], self.values)
        hidden = base.decoder(
            torch.tensor(ids, device=base.device).view(-1, length), past_key_values=cache, use_cache=cache is not None
        )[0]
        reading = read(base, hidden.reshape(-1, hidden.shape[-1])[positions], self.wanted, targets, numbers or None)
        going: list[_Open] = []
        at = 0
        for place, (seat, row) in enumerate((seat, row) for seat, rows in enumerate(grid) for row in rows):
            end = at + len(row.prompt.gold)
            row.gold_logprob = float(sum(reading.logprobs[at:end]))
            if math.isnan(reading.logprobs[end]):  # tells of a broken adapter where there is no gold answer, too
                row.gold_logprob = math.nan
            for column, draft in enumerate(row.drafts):
                for position, expected in enumerate((*row.prompt.gold, -1), start=at):
                    self._take(draft, reading, position, column)
                    if draft.finished or draft.generated[-1] != expected:
                        break
                if not draft.finished:
                    going.append(_Open(place, seat, row.prompt, draft))
            at = end + 1
        if going and cache is not None:
            self._decode(going, length, cache)
        elif going:
            self._decode_afresh(going)

    def _decode(self, going: Sequence[_Open], length: int, cache: DynamicCache) -> None:
        """Goes on with the drafts that the first pass has not finished. ``length`` tokens of each row are cached."""
        device = self.base.device
        cache.batch_select_indices(torch.tensor([one.place for one in going], device=device))
        self._seat(going, 1)
        # The cache holds prompt + gold + pads; valid are the prompt and the part of gold that was accepted.
        known = torch.tensor([len(one.prompt.prompt) + len(one.draft.generated) - 1 for one in going], device=device)
        seen = torch.arange(length, device=device)[None] < known[:, None]
        step = 0
        while not all(one.draft.finished for one in going):
            seen = functional.pad(seen, (0, 1), value=True)
            tokens = torch.tensor([one.draft.generated[-1] for one in going], device=device)
            hidden = self.base.decoder(
                tokens[:, None],
                attention_mask=seen[:, None, None],  # boolean, [rows, 1, 1, keys]; 4-D masks are taken as they are
                position_ids=(known + step)[:, None],
                past_key_values=cache,
                use_cache=True,
            )[0]
            self._advance(going, hidden[:, 0])
            step += 1

    def _decode_afresh(self, going: Sequence[_Open]) -> None:
        """Goes on with the drafts that the first pass has not finished, reading each row anew for every token."""
        eos, device = self.base.eos_id, self.base.device
        while going := [one for one in going if not one.draft.finished]:
            whole = [(*one.prompt.prompt, *one.draft.generated) for one in going]
            length = max(map(len, whole))
            self._seat(going, length)
            ids = torch.tensor([[*row, *(eos,) * (length - len(row))] for row in whole], device=device)
            hidden = self.base.decoder(ids, use_cache=False)[0]
            ends = torch.tensor([len(row) - 1 for row in whole], device=device)
            self._advance(going, hidden[torch.arange(len(going), device=device), ends])

    def _seat(self, going: Sequence[_Open], tokens: int) -> None:
        """Seats the adapters of the drafts; the next batches hold so many tokens of each draft."""
        count = Counter(one.seat for one in going)
        adapters = [self.adapters[seat] for seat in count]
        self.bank.seat(adapters, [drafts * tokens for drafts in count.values()], self.values[list(count)])

    def _advance(self, going: Sequence[_Open], hidden_RH: Tensor) -> None:
        """Gives each draft that is not finished its next token."""
        drafts = [one.draft for one in going]
        sampled = bool(going[0].prompt.uniforms)
        numbers = [[_at(draft.uniforms, len(draft.generated))] for draft in drafts] if sampled else None
        reading = read(self.base, hidden_RH, self.wanted, uniforms_NS=numbers)
        for position, draft in enumerate(drafts):
            if not draft.finished:
                self._take(draft, reading, position, 0 if draft.uniforms is None else 1)

    def _take(self, draft: _Draft, reading: Reading, position: int, column: int) -> None:
        """Gives a draft what was chosen at a position."""
        if draft.certainties is not None:
            draft.certainties.append(reading.certainties[position])
        draft.take(reading.tokens[position][column], self.base, self.settings)


def _at(uniforms: tuple[float, ...] | None, place: int) -> float:
    """The number for a token; any, where nothing is drawn or the answer has ended."""
    return uniforms[place] if uniforms is not None and place < len(uniforms) else 0.0
