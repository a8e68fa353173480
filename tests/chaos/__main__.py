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
from pathlib import Path
from typing import Any

from tests.chaos.arena import can_mount
from tests.chaos.chaos import disturbed, undisturbed
from tests.chaos.schedule import KILLING, make

SMALL = Path(__file__).parents[1] / "e2e" / "small.toml"
# Long enough for fifty kills: the small run is over in half a minute.
LONG = ("rounds.count=12", "rounds.tasks=6", "rounds.self_edits=6", "tasks.train=12", "tasks.heldout=6")
SCRIPTED = ("rounds.count=4", "rounds.tasks=6", "tasks.train=12", "tasks.heldout=6")
WORKERS = 2


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

    stack: dict[str, Any] = {"workers": WORKERS, "scripted": options.scripted, "limit": options.limit}
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
        expected = undisturbed(folder, options.config, overrides, **stack)
        say(f"undisturbed: {time.monotonic() - began:.0f} s")
        if options.undisturbed:
            options.undisturbed.write_text(json.dumps(expected, indent=1))
    shortest, longest = (1.5, 5.0) if options.scripted else (2.0, 15.0)
    outcome = disturbed(
        folder,
        options.config,
        overrides,
        blows,
        expected,
        say,
        **stack,
        shortest=shortest,
        longest=longest,
    )
    say("broken: " + ", ".join(outcome.broken))
    if outcome.line["not_dealt"]:
        say(f"not dealt: {outcome.line['not_dealt']} blows; the run was over, make it longer with --set rounds.count=N")
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
