"""What happens when a teacher is trained on rewards without labels: small real runs of the embedded stack.

    python -m bench.label_free_runs --seeds 0 1 --json label_free_runs.json
    python -m bench.label_free_runs --arms labelled certainty --out runs/label_free   # reads what is already there

Every arm is ``preceptor run configs/almanac.toml`` with fewer rounds and passages and another reward. Arms of one seed
share held-out passages and sampling seeds, and all but the unwatched their training passages. In every arm 8 labelled
canary tasks are looked at after each round, which is the true reward by round and may stop the run; the arms that are
``unwatched`` have none. What is printed: the reward that was trained on and the true one by round, and the accuracy of
the untrained and the trained teacher on the sealed questions of held-out passages, with the interval of their paired
difference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMALL = (
    "rounds.count=3",
    "rounds.tasks=12",
    "tasks.train=44",
    "tasks.canary=8",
    "tasks.heldout=32",
    "heldout.fixed_strategies=[]",
    # Plain rewards of one seed, whatever the config has meanwhile.
    "reward.seeds=1",
    "reward.gain=1.0",
    "reward.gold_probability_gain=0.0",
    "reward.gold_logprob_gain=0.0",
    "reward.fresh_seeds=0",
    "reward.race=",
    "update.min_reward_z=0.0",
    "update.min_advantage_z=0.0",
    "update.min_advantage=0.5",
)
# A certainty has no natural zero: whatever the group's best two are, they are learnt from.
_ALL_KEPT = ("reward.gain=0.0", "reward.certainty_gain=1.0", "update.min_reward=-100.0")
ARMS: dict[str, tuple[str, ...]] = {
    "labelled": (),
    "written": ("tasks.questions=written",),
    "certainty": ("reward.gain=0.0", "reward.certainty_gain=1.0"),
    "agreement": ("reward.gain=0.0", "reward.agreement_gain=1.0", "reward.samples=8"),
    "written + agreement": (
        "tasks.questions=written",
        "reward.gain=0.5",
        "reward.agreement_gain=0.5",
        "reward.samples=8",
    ),
    "certainty, all kept": _ALL_KEPT,
    "certainty, all kept, unwatched": (*_ALL_KEPT, "tasks.canary=0", "tasks.train=36"),
}
LIMIT_SECONDS = 3600.0


def run(arm: str, seed: int, out: Path) -> dict[str, Any]:
    """The summary of one run, which is made where it is not there."""
    folder = out / f"{arm.replace(' ', '-').replace(',', '').replace('+', 'and')}-{seed}"
    summary = folder / "summary.json"
    if not summary.exists():
        settings = [f"seed={seed}", "name=label-free", *SMALL, *ARMS[arm]]
        flags = [part for setting in settings for part in ("--set", setting)]
        command = [sys.executable, "-m", "preceptor", "run", "configs/almanac.toml", "--workers", "1"]
        subprocess.run([*command, "--out", str(folder), *flags], check=True, timeout=LIMIT_SECONDS)
    found: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    return found


def line(arm: str, seed: int, summary: dict[str, Any]) -> dict[str, Any]:
    """What is shown of a run."""
    arms, looks = summary["heldout"]["arms"], summary["canary"] or []
    difference = summary["heldout"]["differences"]["trained_minus_untrained"]
    return {
        "arm": arm,
        "seed": seed,
        "proxy": [of["reward"]["mean"] for of in summary["rounds"]],
        "true": [look["mean"] for look in looks],
        "true_stderr": [look["stderr"] for look in looks],
        "stopped_after": next((look["round"] for look in looks if look["stopped"]), None),
        "untrained": arms["untrained_teacher"]["accuracy"],
        "trained": arms["trained_teacher"]["accuracy"],
        "difference": difference,
    }


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The runs as Markdown."""

    def numbers(values: Sequence[float | None]) -> str:
        return " ".join("-" if value is None else f"{value:.2f}" for value in values) or "-"

    rows = [
        "| trained on | seed | that reward by round | true one, from round 0 | held-out accuracy | difference (95%) |",
        "|---|---|---|---|---|---|",
    ]
    for one in lines:
        low, high = one["difference"]["ci95"]
        gained = f"{one['difference']['mean']:+.2f} ({low:+.2f} .. {high:+.2f})"
        stopped = "" if one["stopped_after"] is None else f", stopped after {one['stopped_after']}"
        rows.append(
            f"| {one['arm']} | {one['seed']} | {numbers(one['proxy'])} | {numbers(one['true'])}{stopped} "
            f"| {one['untrained']:.2f} -> {one['trained']:.2f} | {gained} |"
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/label_free"), help="folder of the runs' results")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    given = parser.parse_args(arguments)
    lines = []
    for seed in given.seeds:
        for arm in given.arms:
            lines.append(line(arm, seed, run(arm, seed, given.out)))
            print("\n".join(table(lines)), flush=True)
    if given.json:
        given.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
