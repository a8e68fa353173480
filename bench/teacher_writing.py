"""How many tokens a second the teacher writes: through vLLM, batched and one by one, and in its own process.

    make vllm
    python -m bench.teacher_writing --shape minute --device cpu --json writing.json
    python -m bench.teacher_writing --shape 7b --device cuda --prompts 32 --samples 16 --tokens 512 --json 7b.json
    python -m bench.teacher_writing --model FOLDER --device cuda       # real weights, real lengths

How to read it
- Each arm is the teacher's own code from prompts to texts (``teacher.backend.Author``), on the same prompts:
  ``--samples`` self-edits of each of ``--prompts`` passages. ``batched``: all together; ``one_by_one``: the next
  begins when the last has ended, on ``--alone`` of them. Tokens are those that were written; prompts are not counted.
- ``batched_over_one_by_one`` and ``vllm_over_in_process`` are ratios of tokens a second.
- The arms run one after the other. On a GPU both models are in its memory: ``--gpu-memory`` is the server's share.
- Weights are random unless ``--model`` names some, so completions run into the limit: all are equally long, which is
  the best case for the decoder in the process, whose batch takes as long as its longest row.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.inner_loop_workload import SHAPES, random_base
from bench.served_answers import serving
from teacher.backend import Backend, Row, SamplingSettings
from teacher.in_process import in_process
from teacher.model import load_teacher
from teacher.policy_store import Policy, PolicyState
from teacher.prompts import FORMATS
from teacher.served import served
from teacher.settings import TeacherSettings

WORDS = ("the", "a", "of", "heron", "lake", "baker", "keeps", "lives", "in", "Lisbon", "when", "near", "old", "year")


def rows(prompts: int, samples: int, words: int) -> list[Row]:
    """Self-edits to write about passages of so many words."""
    drawn = random.Random(0)
    passages = [" ".join(drawn.choices(WORDS, k=words)) for _ in range(prompts)]
    made = [FORMATS["open"].render(f"Passage {number}", text) for number, text in enumerate(passages)]
    return [Row(f"task-{i}", prompt, sample, 1) for i, prompt in enumerate(made) for sample in range(samples)]


def speed(backend: Backend, asked: list[list[Row]], tokens: int, seed: int) -> dict[str, Any]:
    """Writes the batches one after the other, after a short warm-up."""
    base = Policy("base", "", backend.source, backend.commit, PolicyState.READY, datetime.now(UTC))
    with backend.author.writing(base, lambda: None, lambda: False) as draw:
        draw(asked[0], seed + 1, SamplingSettings(1.0, 1.0, 4), lambda: False)
        began = time.perf_counter()
        drawn = [one for batch in asked for one in draw(batch, seed, SamplingSettings(1.0, 1.0, tokens), lambda: False)]
        seconds = time.perf_counter() - began
    written = sum(one.tokens for one in drawn)
    return {"self_edits": len(drawn), "tokens": written, "seconds": seconds, "tokens_per_second": written / seconds}


def measure(backend: Backend, prompts: int, samples: int, words: int, tokens: int, alone: int) -> dict[str, Any]:
    """Batched, one by one, and how much the one is faster than the other."""
    together = rows(prompts, samples, words)
    batched = speed(backend, [together], tokens, seed=0)
    one_by_one = speed(backend, [[row] for row in together[:: max(1, len(together) // alone)][:alone]], tokens, seed=0)
    ratio = batched["tokens_per_second"] / one_by_one["tokens_per_second"]
    return {"batched": batched, "one_by_one": one_by_one, "batched_over_one_by_one": ratio}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="minute", help="random weights of this shape")
    parser.add_argument("--model", default="", help="a folder with weights, instead of random ones")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--words", type=int, default=60, help="of a passage")
    parser.add_argument("--tokens", type=int, default=64, help="of a self-edit, at most")
    parser.add_argument("--alone", type=int, default=4, help="self-edits that are written one by one")
    parser.add_argument("--gpu-memory", type=float, default=0.5, help="the server's share of the GPU's")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    workload = (given.prompts, given.samples, given.words, given.tokens, given.alone)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(given.model or Path(scratch) / "teacher")
        if not given.model:
            made = random_base(given.shape, "cpu")
            if given.device != "cpu":
                torch.nn.Module.to(made.model, torch.bfloat16)
            made.model.save_pretrained(folder)
            made.tokenizer.save_pretrained(folder)
            del made
        # vLLM 0.32 dies on the CPU of a request with a seed whose prompt it reads in parts
        cpu = ["--no-enable-chunked-prefill", "--max-model-len", "2048", "--max-num-batched-tokens", "2048"]
        more = cpu if given.device == "cpu" else ["--gpu-memory-utilization", str(given.gpu_memory)]
        with serving(folder, 1, more) as url:
            settings = TeacherSettings(
                home=Path(scratch) / "home",
                teacher_backend="vllm",
                teacher_source=str(folder),
                teacher_server_url=url,
                teacher_server_concurrency=given.prompts * given.samples,
            )
            through = served(settings)
            result: dict[str, Any] = {"vllm": measure(through, *workload)}
            through.close()
        result["in_process"] = measure(in_process(load_teacher(str(folder), device=given.device)), *workload)
    for arm in ("batched", "one_by_one"):
        pair = (result[name][arm]["tokens_per_second"] for name in ("vllm", "in_process"))
        result[f"vllm_over_in_process_{arm}"] = next(pair) / next(pair)
    result |= {
        "shape": given.model or given.shape,
        "device": torch.cuda.get_device_name() if given.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "self_edits": given.prompts * given.samples,
        "tokens_at_most": given.tokens,
    }
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
