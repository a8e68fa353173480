"""Answers all questions of all adapters together: greedy text and the gold answer's log-probability.

One forward pass over "prompt + gold answer" of every row gives both: the log-probability of the gold tokens, and the
greedy choice at each of their positions. As long as the greedy choice is the gold token, the next position's choice
is the true greedy continuation too, so a right answer is complete after this single pass. Only rows that leave the
gold answer, or go on after it, are decoded further, one token a step from the pass's key-value cache. The text is
exactly what token-by-token greedy decoding gives; the gold answer saves time and decides nothing. (It is speculative
decoding with the gold answer as the draft: Leviathan et al. 2023, arXiv 2211.17192.)

Rows are padded on the right. Causal attention keeps pads and refused drafts out of the first pass; a mask keeps them
out of the steps after it. Students outside the families that ``student.packed_decoder`` knows are asked without a
cache: every step reads its rows anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from preceptor.errors import PreceptorError
from preceptor.tasks import Question
from student.base import LoadedBase
from student.lora_bank import LoraBank
from student.packed_decoder import supports
from student.trial import Answer, AnsweringSettings

# Tokens of one first pass. Enough to fill the matrix units, small enough that a tiny model's activations stay in the
# cache of a CPU core and a large one's in memory.
_CHUNK_TOKENS = {"cpu": 2_048, "cuda": 65_536}
# Logits are made in slices of at most this many floats (64 MiB).
_LOGITS = 1 << 24


@dataclass(slots=True)
class Prompt:
    """A question as tokens, and what has been answered so far."""

    question: int
    prompt: tuple[int, ...]
    gold: tuple[int, ...]
    generated: list[int] = field(default_factory=list)
    finished: bool = False
    gold_logprob: float = 0.0

    @property
    def length(self) -> int:
        """Tokens of prompt and gold answer."""
        return len(self.prompt) + len(self.gold)


def encode_questions(base: LoadedBase, questions: Sequence[Question], settings: AnsweringSettings) -> list[Prompt]:
    """Questions as tokens.

    Gold tokens are those that follow the prompt's when both are tokenised as one text, which is how a student met them
    in training; where the tokenizer merges across the seam, the gold answer is tokenised alone.
    Raises PreceptorError(SEQUENCE_TOO_LONG) if a prompt leaves no room for its answer.
    """
    prompts = [settings.prompt_template.replace("{question}", question.text) for question in questions]
    golds = [settings.answer_prefix + question.answer for question in questions]
    alone = base.encode(prompts)
    joined = base.encode([prompt + gold for prompt, gold in zip(prompts, golds, strict=True)])
    rows = []
    for index, (prompt, whole) in enumerate(zip(alone, joined, strict=True)):
        cut = len(prompt.ids)
        gold = whole.ids[cut:] if whole.ids[:cut] == prompt.ids else base.encode([golds[index]], opening=False)[0].ids
        needed = cut + max(len(gold), settings.max_new_tokens)
        if needed > base.context:
            raise PreceptorError(
                "SEQUENCE_TOO_LONG",
                f"a question needs {needed} tokens with its answer, the student's context is {base.context}: "
                f"{questions[index].text[:60]!r}",
            )
        rows.append(Prompt(index, prompt.ids, gold))
    return rows


@torch.inference_mode()
def answer(
    base: LoadedBase,
    bank: LoraBank,
    adapters: Sequence[int],
    prompts_of: Sequence[Sequence[Prompt]],
    settings: AnsweringSettings,
    on_chunk: Callable[[], None] | None = None,
) -> list[list[Answer]]:
    """Answers ``prompts_of[s]`` with ``adapters[s]``, in the order given; ``bank`` must be attached.

    ``on_chunk`` is called after every chunk of rows; an exception from it ends the answering.
    """
    values = bank.values_KP[list(adapters)]
    # Longest first within each adapter, so that a column of the grid [adapters, rows] holds rows of like length.
    grid = [sorted(prompts, key=lambda p: -p.length) for prompts in prompts_of]
    rows = max((len(prompts) for prompts in grid), default=0)
    start = 0
    while start < rows:
        longest = max(prompts[start].length for prompts in grid if len(prompts) > start)
        width = max(1, _CHUNK_TOKENS.get(base.device.type, 4_096) // (len(grid) * longest))
        chunk = [prompts[start : start + width] for prompts in grid]
        _answer_chunk(base, bank, adapters, values, chunk, settings)
        start += width
        if on_chunk is not None:
            on_chunk()
    return [[_to_answer(base, prompt, settings) for prompt in prompts] for prompts in prompts_of]


def _to_answer(base: LoadedBase, prompt: Prompt, settings: AnsweringSettings) -> Answer:
    text = str(base.tokenizer.decode(prompt.generated, skip_special_tokens=True)) if prompt.generated else ""
    if settings.stop_at_newline:
        text = text.split("\n", 1)[0]
    return Answer(prompt.question, text.strip(), prompt.gold_logprob, len(prompt.gold))


def _answer_chunk(
    base: LoadedBase,
    bank: LoraBank,
    adapters: Sequence[int],
    values: Tensor,
    grid: Sequence[Sequence[Prompt]],
    settings: AnsweringSettings,
) -> None:
    length = max(prompt.length for prompts in grid for prompt in prompts)
    bank.seat(adapters, [len(prompts) * length for prompts in grid], values)
    ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for prompts in grid:
        for prompt in prompts:
            first = len(ids) + len(prompt.prompt) - 1
            positions += range(first, first + len(prompt.gold) + 1)
            targets += (*prompt.gold, base.eos_id)  # what the place behind the answer predicts is not scored
            ids += (*prompt.prompt, *prompt.gold, *(base.eos_id,) * (length - prompt.length))
    # Of a student that we do not know, a cache may be more than a row of past tokens: windows, states.
    plain = supports(base.model, length + settings.max_new_tokens)
    cache = DynamicCache() if settings.generate and plain else None
    hidden = base.decoder(
        torch.tensor(ids, device=base.device).view(-1, length), past_key_values=cache, use_cache=cache is not None
    )[0]
    chosen, logprobs = _score(base, hidden.reshape(-1, hidden.shape[-1])[positions], targets)
    at = 0
    for prompts in grid:
        for prompt in prompts:
            end = at + len(prompt.gold)
            prompt.gold_logprob = float(sum(logprobs[at:end]))
            if settings.generate:
                for token, expected in zip(chosen[at : end + 1], (*prompt.gold, -1), strict=True):
                    _take(base, prompt, token, settings)
                    if prompt.finished or token != expected:
                        break
            at = end + 1
    if cache is not None:
        _decode(base, bank, adapters, values, grid, length, cache, settings)
    elif settings.generate:
        _decode_afresh(base, bank, adapters, values, grid, settings)


def _decode(
    base: LoadedBase,
    bank: LoraBank,
    adapters: Sequence[int],
    values: Tensor,
    grid: Sequence[Sequence[Prompt]],
    length: int,
    cache: DynamicCache,
    settings: AnsweringSettings,
) -> None:
    """Goes on with the rows that the first pass has not finished. ``length`` tokens of each are in the cache."""
    all_rows = [(seat, prompt) for seat, prompts in enumerate(grid) for prompt in prompts]
    places = [place for place, (_, prompt) in enumerate(all_rows) if not prompt.finished]
    if not places:
        return
    rows = [all_rows[place][1] for place in places]
    count = Counter(all_rows[place][0] for place in places)
    cache.batch_select_indices(torch.tensor(places, device=base.device))
    bank.seat([adapters[seat] for seat in count], list(count.values()), values[list(count)])
    # The cache holds prompt + gold + pads; valid are the prompt and the part of gold that was accepted.
    known = torch.tensor([len(p.prompt) + len(p.generated) - 1 for p in rows], device=base.device)
    seen = torch.arange(length, device=base.device)[None] < known[:, None]
    step = 0
    while not all(prompt.finished for prompt in rows):
        seen = functional.pad(seen, (0, 1), value=True)
        tokens = torch.tensor([prompt.generated[-1] for prompt in rows], device=base.device)
        hidden = base.decoder(
            tokens[:, None],
            attention_mask=seen[:, None, None],  # boolean, [rows, 1, 1, keys]; transformers takes 4-D masks as they are
            position_ids=(known + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        )[0]
        chosen, _ = _score(base, hidden[:, 0], None)
        for prompt, token in zip(rows, chosen, strict=True):
            if not prompt.finished:
                _take(base, prompt, token, settings)
        step += 1


def _decode_afresh(
    base: LoadedBase,
    bank: LoraBank,
    adapters: Sequence[int],
    values: Tensor,
    grid: Sequence[Sequence[Prompt]],
    settings: AnsweringSettings,
) -> None:
    """Goes on with the rows that the first pass has not finished, reading each anew for every token."""
    while rows := [(seat, p) for seat, prompts in enumerate(grid) for p in prompts if not p.finished]:
        count = Counter(seat for seat, _ in rows)
        whole = [(*prompt.prompt, *prompt.generated) for _, prompt in rows]
        length = max(map(len, whole))
        bank.seat([adapters[seat] for seat in count], [n * length for n in count.values()], values[list(count)])
        ids = torch.tensor([[*row, *(base.eos_id,) * (length - len(row))] for row in whole], device=base.device)
        hidden = base.decoder(ids, use_cache=False)[0]
        ends = torch.tensor([len(row) - 1 for row in whole], device=base.device)
        chosen, _ = _score(base, hidden[torch.arange(len(rows), device=base.device), ends], None)
        for (_, prompt), token in zip(rows, chosen, strict=True):
            _take(base, prompt, token, settings)


def _take(base: LoadedBase, prompt: Prompt, token: int, settings: AnsweringSettings) -> None:
    """Appends the greedy choice, or ends the answer."""
    if token in base.end_ids:
        prompt.finished = True
        return
    prompt.generated.append(token)
    newline = settings.stop_at_newline and token in base.newline_ids
    prompt.finished = newline or len(prompt.generated) >= settings.max_new_tokens


def _score(base: LoadedBase, hidden_NH: Tensor, targets: Sequence[int] | None) -> tuple[list[int], list[float]]:
    """The greedy token of each position and, with ``targets``, their log-probabilities."""
    chosen: list[int] = []
    logprobs: list[float] = []
    at_once = max(1, _LOGITS // base.model.config.vocab_size)
    for start in range(0, len(hidden_NH), at_once):
        logits = base.logits(hidden_NH[start : start + at_once])
        chosen += logits.argmax(-1).tolist()
        if targets is not None:
            nll = functional.cross_entropy(
                logits, torch.tensor(targets[start : start + at_once], device=logits.device), reduction="none"
            )
            logprobs += (-nll).tolist()
    return chosen, logprobs
