"""The breaking test: one run that nobody disturbs, one that is broken at every joint, and the proof that they agree.

    make chaos [ARGS="--seed 7 --kills 50 --real"]

Each process of the embedded stack is killed, stopped and cut off while the run goes on; Redis forgets everything,
loses its folder, finds its file torn; the disk is full. Afterwards the databases must show that every evaluation has
one final state and every reward was counted once, and the summary must be that of the undisturbed run. What was broken
and what was proven is printed; the last line is JSON. The exit code is 1 if anything was lost, counted twice or came
out differently.

Workers may lose a batch up to twenty times here (PRECEPTOR_TRIAL_ATTEMPTS=20) before it is cut in halves: a trial in a
smaller batch is the same mathematics, but may differ in its last bits (docs/adr/0002).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.arena import Arena, can_mount
from tests.chaos.breaker import Breaker
from tests.chaos.proof import Proof, differences, prove, work
from tests.chaos.schedule import KILLING, Blow, Kind, make

SMALL = Path(__file__).parents[1] / "e2e" / "small.toml"
# Long enough for fifty kills: the small run is over in half a minute.
LONG = ("rounds.count=4", "rounds.tasks=6", "rounds.self_edits=6", "tasks.train=12", "tasks.heldout=6")
SCRIPTED = ("rounds.count=4", "rounds.tasks=6", "tasks.train=12", "tasks.heldout=6")
WORKERS = 2
# Of processes that went down with the stack.
GONE_SECONDS = 15.0


@dataclass
class Outcome:
    """What became of one disturbed run."""

    proof: Proof
    different: list[str]
    line: dict[str, Any]
    broken: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing was lost, counted twice or came out differently, and nothing was left."""
        return bool(self.proof) and not self.different


def undisturbed(
    folder: Path, config: Path, overrides: Sequence[str], *, scripted: bool, limit: float
) -> dict[str, Any]:
    """The summary of a run that nobody disturbs."""
    with Arena(folder / "undisturbed", workers=WORKERS, scripted=scripted) as arena:
        arena.start()
        return arena.follow(arena.create(config, overrides), limit)


def disturbed(
    folder: Path,
    config: Path,
    overrides: Sequence[str],
    blows: Sequence[Blow],
    expected: dict[str, Any],
    say: Callable[[str], None],
    *,
    scripted: bool,
    limit: float,
    shortest: float,
    longest: float,
) -> Outcome:
    """The run with the blows, and its proof."""
    disk = any(blow.kind is Kind.DISK for blow in blows)
    failure = ""
    summary: dict[str, Any] = {}
    run_id = ""
    with Arena(folder / "disturbed", workers=WORKERS, scripted=scripted, small_disk=disk) as arena:
        arena.start()
        began = time.monotonic()
        run_id = arena.create(config, overrides)
        breaker = Breaker(arena, blows, say, shortest=shortest, longest=longest)
        breaker.start()
        try:
            summary = arena.follow(run_id, limit, lambda share: setattr(breaker, "share", share))
        except AssertionError as error:
            failure = str(error)
        seconds = time.monotonic() - began
        breaker.finish()
        arena.stop()
        end = time.monotonic() + GONE_SECONDS
        while (left := arena.left()) and time.monotonic() < end:
            time.sleep(0.2)
        proof = prove(arena.home, run_id)
        cost = work(arena.home)
        shutil.copytree(arena.home / "logs", folder / "logs", dirs_exist_ok=True)
        (folder / "events.txt").write_text("\n".join(arena.events) + "\n")
    if failure:
        proof.lost.append(failure)
    proof.left += left
    if not left:
        proof.facts.append("no process left")
    different = differences(expected, summary)
    line = {
        "kills": breaker.kills,
        "lost": len(proof.lost),
        "twice": len(proof.twice),
        "same_result": not different,
        "left": len(proof.left),
        "blows": sum(breaker.dealt.values()),
        "by_kind": _count(breaker, 0),
        "by_victim": _count(breaker, 1),
        "flushes": breaker.dealt[f"{Kind.FLUSH} redis"] + breaker.dealt[f"{Kind.WIPE} redis"],
        "seconds": round(seconds, 1),
        "recovery_seconds": breaker.calm,
        "moved_seconds_in_the_storm": sorted(breaker.moved),
        "back_seconds_longest": {name: max(times) for name, times in sorted(breaker.back.items())},
        "work": {**cost, "trained_again": cost["trainings"] - cost["trials"]},
        "not_dealt": len(blows) - sum(breaker.dealt.values()),
        "problems": breaker.problems,
    }
    return Outcome(proof, different, line, [f"{number} x {blow}" for blow, number in sorted(breaker.dealt.items())])


def _count(breaker: Breaker, word: int) -> dict[str, int]:
    counts: dict[str, int] = {}
    for blow, number in sorted(breaker.dealt.items()):
        name = blow.split()[word]
        counts[name] = counts.get(name, 0) + number
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make chaos", description="Breaks a run at every joint and proves its result."
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--scripted", action="store_true", help="scripted teacher and worker: minutes instead of many")
    parser.add_argument("--real", action="store_false", dest="scripted", help="tiny real models (the default)")
    parser.add_argument("--config", type=Path, default=SMALL)
    parser.add_argument("--set", action="append", dest="overrides", help="as of preceptor run")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for each of the two runs")
    parser.add_argument("--undisturbed", type=Path, help="summary of such a run: read if it is there, else written")
    parser.add_argument("--keep", action="store_true", help="keep the folder with logs and databases")
    options = parser.parse_args()

    def say(message: str) -> None:
        print(message, flush=True)

    overrides = options.overrides or list(SCRIPTED if options.scripted else LONG)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    disk = can_mount(folder)
    if not disk:
        say("no small file system can be had here (root is needed): the disk is not filled")
    blows = make(options.seed, options.kills, [f"worker-{n}" for n in range(1, WORKERS + 1)], disk=disk)
    kills = sum(blow.kind in KILLING for blow in blows)
    say(f"seed {options.seed}: {len(blows)} blows, {kills} of them kills; in {folder}")
    if options.undisturbed and options.undisturbed.exists():
        expected = json.loads(options.undisturbed.read_text())
    else:
        began = time.monotonic()
        expected = undisturbed(folder, options.config, overrides, scripted=options.scripted, limit=options.limit)
        say(f"undisturbed: {time.monotonic() - began:.0f} s")
        if options.undisturbed:
            options.undisturbed.write_text(json.dumps(expected, indent=1))
    shortest, longest = (1.0, 4.0) if options.scripted else (3.0, 15.0)
    outcome = disturbed(
        folder,
        options.config,
        overrides,
        blows,
        expected,
        say,
        scripted=options.scripted,
        limit=options.limit,
        shortest=shortest,
        longest=longest,
    )
    say("broken: " + ", ".join(outcome.broken))
    for fact in outcome.proof.facts:
        say(f"looked at: {fact}")
    for word in ("lost", "twice", "left"):
        for line in getattr(outcome.proof, word):
            say(f"{word}: {line}")
    for line in outcome.different:
        say(f"different: {line}")
    if options.keep or not outcome.good:
        say(f"logs are in {folder}")
    else:
        shutil.rmtree(folder)
    say(json.dumps({**outcome.line, "seed": options.seed, "mode": "scripted" if options.scripted else "real"}))
    return 0 if outcome.good else 1


if __name__ == "__main__":
    sys.exit(main())
