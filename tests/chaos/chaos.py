"""A run that nobody disturbs, and the same run broken at its joints, with the proof that they agree."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.arena import Arena
from tests.chaos.breaker import Breaker
from tests.chaos.proof import Proof, differences, prove, work
from tests.chaos.schedule import Blow, Kind

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
    folder: Path, config: Path, overrides: Sequence[str], *, workers: int, scripted: bool, limit: float
) -> dict[str, Any]:
    """The summary of a run that nobody disturbs."""
    with Arena(folder / "undisturbed", workers=workers, scripted=scripted) as arena:
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
    workers: int,
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
    with Arena(folder / "disturbed", workers=workers, scripted=scripted, small_disk=disk) as arena:
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
