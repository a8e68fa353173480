"""What a trial costs: K adapters in one step, against the usual ways of training them.

    python -m bench.inner_loop --shape tiny --device cpu --json inner_loop.json --plot inner_loop.png

One run measures all arms on one workload, on one machine, after another; only ratios within a run mean something.

How to read it
- The workload: documents as long as those of 400 published self-edits; 5 candidates x 3 seeds per passage, 10 epochs
  at batch 1, rank 32. ``arms`` adapts q_proj and v_proj, as published; ``all_linear`` every linear layer. ``short`` is
  the same recipe on the shipped world's question-answer lines of about 15 tokens (q_proj and v_proj).
- ``ours_kN``: N adapters in a step, and four times as many trials (the other arms' trials, with more seeds), which take
  the seats that become free.
  ``bare_peft``: one adapter after the other, each sequence as long as it is, a plain AdamW loop. ``peft_trainer``: the
  same with a transformers Trainer per trial. ``trl_sft``: the same with TRL's SFTTrainer, without its activation
  checkpointing; measured where ``trl`` is installed, see below. ``padded_2048``: as published, every sequence padded to
  2,048 tokens with the pads in the loss; few steps are measured and scaled (``scaled_from_steps``).
- ``trials_per_second`` and ``tokens_per_second`` count training alone, with what it needs before its first step; tokens
  are real ones, pads do not count. What a trial's answers (5 questions, 16 tokens) and its adapter folder cost is under
  ``details``, in seconds per trial.
- ``limit_share``: tokens/s x 4N over ``matmul_flops``, the rate of a large matrix product measured in the same run, in
  the base's dtype and with the same threads. 4N: two FLOPs a weight forward and two for the activations' gradients;
  N counts the linear layers and the head. The adapters' own work is not in it, so 1.0 cannot be reached.
- ``peak_memory_bytes``: the process's on a CPU, the allocator's on a GPU.
- Weights are random; speed does not depend on their values.
- On a GPU, in under ten minutes (neither the network nor a tokenizer is needed; draw the picture anywhere, with
  ``--measured FILE --plot FILE``):

      python -m bench.inner_loop --shape 7b --device cuda --trials 5 --padded-steps 2 --targets qv \\
          --arms ours_k1 ours_k15 ours_k30 bare_peft peft_trainer padded_2048 --json inner_loop_7b.json

- Fewer ``--trials`` make the one-after-the-other arms shorter; each candidate is then trained with one seed.

TRL is no dependency of the project. To measure ``trl_sft`` too, give it an environment of its own:

    python -m venv .venv-trl
    .venv-trl/bin/pip install -c constraints.txt -e '.[embedded]' trl==1.16.0
    .venv-trl/bin/python -m bench.inner_loop ...
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import inner_loop_arms as arms
from bench.inner_loop_arms import Measurement
from bench.inner_loop_workload import (
    SHAPES,
    TARGETS,
    Work,
    base_parameters,
    more_of,
    random_base,
    self_edit_workload,
    share_of,
    short_workload,
    whole_passages,
)
from student.base import LoadedBase

TOGETHER = (1, 2, 4, 8, 15, 30)
ARMS = (*(f"ours_k{together}" for together in TOGETHER), "bare_peft", "peft_trainer", "trl_sft", "padded_2048")
# Trials of an arm of ours, for each of its seats: as in a worker, the steps stay full until the last trials end.
QUEUE = 4
SHORT_ARMS = ("ours_k15", "bare_peft")


def matmul_flops(device: str) -> float:
    """FLOP/s of a large matrix product in the dtype of the base: the best of several tries."""
    size, dtype = (1_024, torch.float32) if device == "cpu" else (8_192, torch.bfloat16)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(12):
        begun = time.perf_counter()
        for _ in range(4):
            left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - begun))
    return best


def measure(
    name: str, base: LoadedBase, work: Sequence[Work], targets: Sequence[str], trials: int, padded_steps: int
) -> Measurement:
    """One arm."""
    some = share_of(work, trials)
    if name.startswith("ours_k"):
        together = int(name.removeprefix("ours_k"))
        return arms.ours(base, more_of(some, QUEUE * together), targets, together)
    if name == "padded_2048":
        return arms.padded(base, some, targets, padded_steps)
    one_by_one: dict[str, Callable[..., Measurement]] = {
        "bare_peft": arms.bare_peft,
        "peft_trainer": arms.peft_trainer,
        "trl_sft": arms.trl_sft,
    }
    return one_by_one[name](base, some, targets)


def section(
    title: str, names: Sequence[str], run: Callable[[str], Measurement], flops_per_token: int, peak: float
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Measures the named arms; name, result and details of each. Prints a line for each."""
    print(f"\n{title}\n{'arm':<14}{'trials/s':>10}{'tokens/s':>11}{'4N limit':>10}{'peak MiB':>10}", end="")
    print("   seconds per trial: train, answer, export")
    for name in names:
        if name == "trl_sft" and (reason := arms.why_no_trl()):
            print(f"{name:<14}not measured: {reason}", flush=True)
            nothing = dict.fromkeys(("trials_per_second", "tokens_per_second", "peak_memory_bytes", "limit_share"))
            yield name, {**nothing, "not_measured": reason}, {}
            continue
        done = run(name)
        share = done.tokens_per_second * flops_per_token / peak
        result: dict[str, Any] = {
            "trials_per_second": done.trials_per_second,
            "tokens_per_second": done.tokens_per_second,
            "peak_memory_bytes": done.peak_memory_bytes,
            "limit_share": share,
        }
        if done.scaled_from_steps is not None:
            result["scaled_from_steps"] = done.scaled_from_steps
        split = {
            f"{what}_seconds": None if seconds is None else seconds / done.trials
            for what, seconds in (
                ("train", done.train_seconds),
                ("answer", done.answer_seconds),
                ("export", done.export_seconds),
            )
        }
        parts = ", ".join("-" if seconds is None else f"{seconds:.4f}" for seconds in split.values())
        print(
            f"{name:<14}{done.trials_per_second:>10.3f}{done.tokens_per_second:>11.0f}{share:>10.1%}"
            f"{done.peak_memory_bytes / 2**20:>10.0f}   {parts}"
            f"{f'  (scaled from {done.scaled_from_steps} steps)' if done.scaled_from_steps is not None else ''}",
            flush=True,
        )
        yield name, result, {"trials": done.trials, "steps": done.steps, "tokens": done.tokens, **split}


def ratios(title: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """Lines: how many times the trials per second of each other arm ours at K = 15 makes."""
    rates = {name: result["trials_per_second"] for name, result in results.items() if result["trials_per_second"]}
    if "ours_k15" not in rates:
        return []
    others = [name for name in rates if not name.startswith("ours")]
    return [f"{title}: ours_k15 = {rates['ours_k15'] / rates[name]:.1f} x {name}" for name in others]


def draw(file: Path, written: dict[str, Any]) -> None:
    """Trials per second of every arm, one panel a section of what a run has written."""
    from matplotlib.figure import Figure

    sections = {name: written[name] for name in ("arms", "all_linear", "short") if name in written}
    rates = {
        title: {name: result["trials_per_second"] for name, result in results.items() if result["trials_per_second"]}
        for title, results in sections.items()
    }
    every = [rate for some in rates.values() for rate in some.values()]
    titles = {
        "arms": "self-edits, q and v",
        "all_linear": "self-edits, all linear",
        "short": "short documents, q and v",
    }
    figure = Figure(figsize=(4 * len(sections), 4), layout="constrained")
    for place, (title, some) in enumerate(rates.items(), 1):
        panel = figure.add_subplot(1, len(sections), place)
        bars = panel.barh(list(some), list(some.values()), color=["C0" if n[:4] == "ours" else "C7" for n in some])
        panel.bar_label(bars, fmt="%.2g", padding=2)
        panel.invert_yaxis()
        panel.set(xscale="log", xlabel="trials per second", title=titles[title])
        panel.set_xlim(min(every) / 3, max(every) * 4)
    figure.suptitle(f"{written['shape']} shape, {written['device']}, one workload, one run")
    figure.savefig(file, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--trials", type=int, default=15, help="of an arm, if its K does not need more")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--padded-steps", type=int, default=4, help="steps of padded_2048 that are measured")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a picture; needs matplotlib")
    parser.add_argument("--measured", type=Path, help="measure nothing: plot what an earlier run wrote with --json")
    given = parser.parse_args(arguments)
    if given.measured:
        earlier = json.loads(given.measured.read_text(encoding="utf-8"))
        draw(given.plot or given.measured.with_suffix(".png"), earlier)
        return
    torch.set_num_threads(given.threads)
    # PEFT asks transformers for something under its old name, once per trial
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)

    base = random_base(given.shape, given.device)
    parameters = base_parameters(base)
    peak = matmul_flops(given.device)
    print(f"{given.shape} on {given.device}: N = {parameters:,}, matrix products {peak / 1e9:,.0f} GFLOP/s")
    trials = whole_passages(given.trials)
    long = self_edit_workload(trials, epochs=given.epochs)
    sections: dict[str, dict[str, dict[str, Any]]] = {}
    details: dict[str, dict[str, dict[str, Any]]] = {}

    def add(key: str, title: str, names: Sequence[str], work: Sequence[Work], targets: Sequence[str]) -> None:
        def run(name: str) -> Measurement:
            return measure(name, base, work, targets, given.trials, given.padded_steps)

        sections[key], details[key] = {}, {}
        for name, result, detail in section(title, names, run, 4 * parameters, peak):
            sections[key][name], details[key][name] = result, detail

    if "qv" in given.targets:
        add("arms", "self-edits, q_proj and v_proj", given.arms, long, TARGETS["qv"])
    if "all" in given.targets:
        names = [name for name in given.arms if name != "padded_2048"]  # the published way knows q and v only
        add("all_linear", "self-edits, all linear layers", names, long, TARGETS["all"])
    if "qv" in given.targets:
        short = short_workload(trials, epochs=given.epochs)
        names = [name for name in SHORT_ARMS if name in given.arms]
        add("short", "the shipped world's short documents, q_proj and v_proj", names, short, TARGETS["qv"])
    print()
    print("\n".join(line for title, results in sections.items() for line in ratios(title, results)))
    written = {**sections, "shape": given.shape, "device": given.device, "matmul_flops": peak, "details": details}
    if given.json:
        given.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        draw(given.plot, written)


if __name__ == "__main__":
    main()
