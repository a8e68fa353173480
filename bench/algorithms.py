"""ReST-EM, GRPO and RLOO from the same start on the same budget: small real runs of the embedded stack.

    python -m bench.algorithms --seeds 0 1 2 --json algorithms.json --picture docs/algorithms.png
    python -m bench.algorithms --out runs/algorithms   # reads what is already there

Every run is ``preceptor run configs/almanac.toml`` with fewer passages, every self-edit measured to the end (policy
gradients learn from the poor ones too) and another ``update.algorithm``. Runs of one seed share passages, sampling and
trial seeds, and the first round with its rewards; after it each goes its own way. Rewards are of fresh passages: those
of round n are about the policy after n - 1 updates. What is printed: reward by round, diversity of what was offered,
divergence from the untrained teacher, seconds of the updates, and the accuracy of the untrained and the trained teacher
on the sealed questions of held-out passages with the interval of their paired difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

SMALL = (
    "rounds.count=4",
    "rounds.tasks=6",
    "rounds.self_edits=8",
    "tasks.train=24",
    "tasks.heldout=12",
    "heldout.fixed_strategies=[]",
    "reward.fresh_seeds=0",
    "reward.race=",
)
# As many passes over about as many tokens: ReST-EM sees its best quarter six times, the others see all twice.
_GRADIENT = ("update.epochs=2", "update.min_reward_z=0.0")
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "rest_em": ("update.algorithm=rest_em",),
    "grpo": ("update.algorithm=grpo", *_GRADIENT),
    "rloo": ("update.algorithm=rloo", *_GRADIENT),
}
LIMIT_SECONDS = 3600.0
# Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS = {"rest_em": "#0072b2", "grpo": "#d55e00", "rloo": "#009e73"}


def run(algorithm: str, seed: int, out: Path, workers: int) -> dict[str, Any]:
    """The summary of one run, which is made where it is not there."""
    folder = out / f"{algorithm}-{seed}"
    summary = folder / "summary.json"
    if not summary.exists():
        settings = [f"seed={seed}", "name=algorithms", *SMALL, *ALGORITHMS[algorithm]]
        flags = [part for setting in settings for part in ("--set", setting)]
        command = [sys.executable, "-m", "preceptor", "run", "configs/almanac.toml", "--workers", str(workers)]
        # one home for all of a seed: what they have in common is written and measured once
        home = {"PRECEPTOR_HOME": str((out / f"home-{seed}").resolve())}
        made = [*command, "--out", str(folder), *flags]
        subprocess.run(made, check=True, timeout=LIMIT_SECONDS, env=os.environ | home)
    found: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    return found


def line(algorithm: str, seed: int, summary: dict[str, Any]) -> dict[str, Any]:
    """What is shown of a run."""
    rounds, heldout = summary["rounds"], summary["heldout"]
    return {
        "algorithm": algorithm,
        "seed": seed,
        "reward": [of["reward"]["mean"] for of in rounds],
        "reward_stderr": [of["reward"]["stderr"] for of in rounds],
        "groups_dropped": [of["groups"]["dropped"] for of in rounds],
        "malformed": [of["evaluations"]["malformed"] for of in rounds],
        "diversity": [of["diversity"] for of in rounds],
        "kl": [of["kl"] for of in rounds],
        "update_seconds": sum(of["seconds"]["update"] for of in rounds),
        "untrained": heldout["arms"]["untrained_teacher"]["accuracy"],
        "trained": heldout["arms"]["trained_teacher"]["accuracy"],
        "difference": heldout["differences"]["trained_minus_untrained"],
    }


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The runs as Markdown."""

    def numbers(values: Sequence[float | None]) -> str:
        return "-" if None in values else " ".join(f"{value:.2f}" for value in values)

    rows = [
        "| algorithm | seed | reward by round | diversity by round | divergence (nats a token) | updates "
        "| held-out accuracy | difference (95%) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in lines:
        low, high = one["difference"]["ci95"]
        rows.append(
            f"| {one['algorithm']} | {one['seed']} | {numbers(one['reward'])} | {numbers(one['diversity'])} "
            f"| {numbers(one['kl'])} | {one['update_seconds']:.0f} s | {one['untrained']:.2f} -> {one['trained']:.2f} "
            f"| {one['difference']['mean']:+.2f} ({low:+.2f} .. {high:+.2f}) |"
        )
    return rows


def means(lines: Sequence[dict[str, Any]]) -> list[str]:
    """By algorithm, over seeds, as Markdown: lowest, mean and highest."""

    def spread(values: Sequence[float]) -> str:
        return f"{fmean(values):.2f} ({min(values):.2f} .. {max(values):.2f})"

    rows = ["| algorithm | reward of the last round | held-out accuracy | seeds |", "|---|---|---|---|"]
    for algorithm, of in _by_algorithm(lines).items():
        last, trained = [one["reward"][-1] for one in of], [one["trained"] for one in of]
        rows.append(f"| {algorithm} | {spread(last)} | {spread(trained)} | {len(of)} |")
    return rows


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Reward by round and held-out accuracy after the last: means over seeds, with bands from lowest to highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=(3, 1.2))
    for place, (algorithm, of) in enumerate(_by_algorithm(lines).items()):
        colour, by_round = _COLOURS[algorithm], list(zip(*(one["reward"] for one in of), strict=True))
        rounds = range(1, len(by_round) + 1)
        curves.fill_between(rounds, list(map(min, by_round)), list(map(max, by_round)), color=colour, alpha=0.15)
        curves.plot(rounds, list(map(fmean, by_round)), marker="o", color=colour, label=algorithm)
        trained = [100 * one["trained"] for one in of]
        ends.plot([place, place], [min(trained), max(trained)], color=colour, linewidth=6, alpha=0.25)
        ends.plot([place] * len(of), trained, "o", color=colour, alpha=0.5)
        ends.plot([place - 0.25, place + 0.25], [fmean(trained)] * 2, color=colour, linewidth=2)
    untrained = fmean(100 * one["untrained"] for one in lines)
    ends.axhline(untrained, color="grey", linestyle=":", label="untrained")
    curves.set(xlabel="round (policy after one update less)", ylabel="mean reward on fresh passages", xticks=rounds)
    ends.set(ylabel="held-out accuracy, %", xticks=range(place + 1), xticklabels=_by_algorithm(lines))
    for axes in (curves, ends):
        axes.legend(frameon=False, loc="upper left" if axes is curves else "lower right")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(f"Mean of {len({one['seed'] for one in lines})} seeds; bands: lowest to highest", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _by_algorithm(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for one in lines:
        found.setdefault(one["algorithm"], []).append(one)
    return {name: found[name] for name in ALGORITHMS if name in found}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"), help="folder of the runs' results")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--picture", type=Path, help="draw the curves to this file (.png, .svg)")
    given = parser.parse_args(arguments)
    lines = []
    for seed in given.seeds:
        for algorithm in given.algorithms:
            lines.append(line(algorithm, seed, run(algorithm, seed, given.out, given.workers)))
            print("\n".join(table(lines)), flush=True)
    print("\n".join(["", *means(lines)]))
    if given.json:
        given.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    if given.picture:
        draw(lines, given.picture)


if __name__ == "__main__":
    main()
