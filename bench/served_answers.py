"""What answering through vLLM gains over answering in the worker, by the number of questions.

    make vllm
    python -m bench.served_answers --shape minute --device cpu --adapters 4 --questions 16 64 --json served.json
    python -m bench.served_answers --shape 7b --device cuda --adapters 30 --questions 16 128 512 --json served_7b.json

Both arms run on one machine, one after the other, with the same adapters and questions; only their ratio means
something. On a GPU both share it: the worker's student stays in memory while the server has ``--gpu-memory`` of it.

How to read it
- ``here``: ``student.answering.answer``; ``served``: ``student.served_answers.ServedAnswers``, all of it: writing the
  adapters, loading and verifying them, asking, scoring gold answers, taking them out again. ``ratio``: here / served.
- ``unasked_seconds``: what ``served`` takes for one question of each adapter. From it and the largest number of
  questions follows ``pays_from``, the number of questions of a batch from which the server is faster: the value for
  PRECEPTOR_ANSWER_SERVER_MIN_QUESTIONS (null: it never is).
- Weights are random and no answer is right, so every answer is decoded to its last token. That is the worst case for
  ``here``, which gets right answers from its first pass: with a trained student the ratio is smaller.
- ``same``: share of texts that are equal. Of random bfloat16 weights the likeliest tokens are often ties, which the two
  break differently; in float32 it must be 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.inner_loop_workload import SHAPES, random_base
from preceptor.hashes import folder_sha256
from student.answering import Prompt, answer
from student.base import LoadedBase, load_base
from student.lora_bank import LoraBank
from student.served_answers import ServedAnswers
from student.trial import ALL_LINEAR, Answer, AnsweringSettings

NAME = "bench"
RANK = 32
PROMPT_TOKENS, GOLD_TOKENS = (16, 48), (2, 12)


def random_bank(base: LoadedBase, adapters: int) -> LoraBank:
    """Adapters that change what the student says."""
    rank = min(RANK, base.model.config.hidden_size // 2)
    bank = LoraBank(base.model, ALL_LINEAR, [rank] * adapters, [2.0 * rank] * adapters, list(range(adapters)))
    generator = torch.Generator().manual_seed(0)
    for adapter in range(adapters):
        factors = {
            name: (a, torch.randn(b.shape, generator=generator).to(b) * 0.01)
            for name, (a, b) in bank.factors(adapter).items()
        }
        bank.set_factors(adapter, factors)
    return bank


def random_prompts(count: int) -> list[Prompt]:
    """Questions and gold answers of random bytes."""
    drawn = random.Random(0)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(drawn.randrange(32, 250) for _ in range(drawn.randint(least, most)))

    return [Prompt(number, tokens(*PROMPT_TOKENS), tokens(*GOLD_TOKENS)) for number in range(count)]


@contextmanager
def serving(folder: Path, adapters: int, more: list[str]) -> Iterator[str]:
    """The address of a server of the student in ``folder``, started as ``preceptor students serve`` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "student.serve", "--name", NAME, "--source", str(folder)]
    command += ["--commit", folder_sha256(folder), "--port", str(port), "--for-workers"]
    command += ["--max-loras", str(min(adapters, 16)), "--max-rank", str(RANK), "--", *more]
    environment = {**os.environ, "PRECEPTOR_HOME": str(folder.parent / "home")}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        if not any("Ask it:" in line for line in server.stdout):
            raise SystemExit("the server did not come up")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(120)


def timed(ask: Callable[[], list[list[Answer]]]) -> tuple[float, list[list[Answer]]]:
    """Seconds and answers."""
    begun = time.perf_counter()
    answers = ask()
    return time.perf_counter() - begun, answers


def measure(base: LoadedBase, served: ServedAnswers, adapters: int, counts: list[int], tokens: int) -> dict[str, Any]:
    """Both arms for each number of questions of an adapter."""
    bank, settings = random_bank(base, adapters), AnsweringSettings(max_new_tokens=tokens, stop_at_newline=False)
    seats = range(adapters)
    rows = []
    with bank.attached():
        one = [random_prompts(1)] * adapters
        for ask in (answer, served):  # both warm
            ask(base, bank, seats, one, settings)
        unasked, _ = timed(lambda: served(base, bank, seats, one, settings))
        for count in counts:
            asked = [random_prompts(count)] * adapters
            here, ours = timed(lambda asked=asked: answer(base, bank, seats, asked, settings))  # type: ignore[misc]
            there, theirs = timed(lambda asked=asked: served(base, bank, seats, asked, settings))  # type: ignore[misc]
            pairs = [
                (a, b) for some, others in zip(ours, theirs, strict=True) for a, b in zip(some, others, strict=True)
            ]
            rows.append(
                {
                    "questions": count * adapters,
                    "here_seconds": here,
                    "served_seconds": there,
                    "ratio": here / there,
                    "same": sum(a.text == b.text for a, b in pairs) / len(pairs),
                    "largest_logprob_difference": max(abs(a.gold_logprob - b.gold_logprob) for a, b in pairs),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    last = rows[-1]
    gain = (last["here_seconds"] - (last["served_seconds"] - unasked)) / last["questions"]
    return {"unasked_seconds": unasked, "pays_from": round(unasked / gain) if gain > 0 else None, "rows": rows}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="minute")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--questions", type=int, nargs="+", default=[16, 64], help="of each adapter")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--gpu-memory", type=float, default=0.5, help="the server's share of the GPU's")
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "student"
        made = random_base(given.shape, "cpu")
        if given.device != "cpu":
            torch.nn.Module.to(made.model, torch.bfloat16)
        made.model.save_pretrained(folder)
        made.tokenizer.save_pretrained(folder)
        del made
        base = load_base(folder, source=str(folder), commit=folder_sha256(folder), device=given.device)
        more = ["--max-model-len", "512"]
        if given.device != "cpu":
            more += ["--gpu-memory-utilization", str(given.gpu_memory)]
        with serving(folder, given.adapters, more) as url:
            served = ServedAnswers(url, Path(scratch) / "answers", only=True, concurrency=given.concurrency)
            result = measure(base, served, given.adapters, given.questions, given.tokens)
            served.close()
    result |= {
        "shape": given.shape,
        "device": torch.cuda.get_device_name() if given.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "adapters": given.adapters,
        "answer_tokens": given.tokens,
    }
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
