"""What is broken, when and in which order: a list of blows that is a function of its seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

PROCESSES = ("redis", "student", "evaluator", "teacher", "orchestrator")
LINKS = ("redis", "student", "evaluator", "teacher")  # what other processes reach through a proxy
OWNER = "owner"


class Kind(StrEnum):
    """A way to break something."""

    KILL = "kill"  # SIGKILL
    STOP = "stop"  # SIGSTOP, and SIGCONT after some seconds; 0: never
    FLUSH = "flush"  # Redis forgets everything
    WIPE = "wipe"  # Redis is killed and its folder emptied
    TEAR = "tear"  # Redis is killed in the middle of a write: the last bytes of its file are missing
    GARBLE = "garble"  # Redis is killed, and what is in its file is not what it wrote
    DROP = "drop"  # all connections to a service are reset
    DELAY = "delay"  # each chunk to and from it comes late, for some seconds
    STALL = "stall"  # nothing passes, for some seconds
    REFUSE = "refuse"  # new connections are reset too, for some seconds
    DISK = "disk"  # no space left, for some seconds


KILLING = frozenset({Kind.KILL, Kind.WIPE, Kind.TEAR, Kind.GARBLE})


@dataclass(frozen=True, slots=True)
class Blow:
    """One blow. ``calm``: it hits a worker in the middle of a batch, and the next waits until that has recovered."""

    kind: Kind
    victim: str
    seconds: float = 0.0
    calm: bool = False

    def __str__(self) -> str:
        for_long = f" for {self.seconds:.1f} s" if self.seconds else " for ever" if self.kind is Kind.STOP else ""
        return f"{self.kind} {self.victim}{for_long}"


def make(seed: int, kills: int, workers: Sequence[str], *, disk: bool, calm: bool = True) -> list[Blow]:
    """``kills`` kills, spread evenly over all processes and their owner, and half as many blows of other kinds.

    ``calm``: begins with one worker killed and one stopped for ever, each left alone until it has recovered.
    """
    dice = random.Random(f"chaos/{seed}")
    everybody = [*PROCESSES, *workers]
    special = [Blow(Kind.WIPE, "redis"), Blow(Kind.TEAR, "redis"), Blow(Kind.GARBLE, "redis")]
    owners = [Blow(Kind.KILL, OWNER)] * (1 + kills // 40)
    special = special[: max(kills // 8, 1)]
    plain = max(kills - len(special) - len(owners) - calm, 0)
    shuffled: list[str] = []
    while len(shuffled) < plain:
        shuffled += dice.sample(everybody, len(everybody))
    blows = [*special, *owners, *(Blow(Kind.KILL, victim) for victim in shuffled[:plain])]
    others = [
        Blow(Kind.STOP, dice.choice(PROCESSES[1:])),
        Blow(Kind.STOP, "redis", dice.uniform(3, 12)),
        *([Blow(Kind.DISK, "home", dice.uniform(4, 8))] if disk else []),
        Blow(Kind.DROP, "redis"),
        Blow(Kind.STALL, "redis", dice.uniform(3, 12)),
        Blow(Kind.STOP, dice.choice(workers), dice.uniform(12, 20)),
        Blow(Kind.STOP, OWNER, dice.uniform(5, 10)),
    ]
    while len(others) < kills // 2:
        kind = dice.choice([Kind.STOP, Kind.DROP, Kind.DELAY, Kind.STALL, Kind.REFUSE])
        victim = dice.choice(everybody) if kind is Kind.STOP else dice.choice(LINKS)
        others.append(Blow(kind, victim, 0.0 if kind is Kind.DROP else dice.uniform(2, 12)))
    blows += others[: max(kills // 2, 2)]
    dice.shuffle(blows)
    blows.insert(len(blows) // 2, Blow(Kind.FLUSH, "redis"))
    if calm:
        first = [Blow(Kind.KILL, workers[0], calm=True), Blow(Kind.STOP, workers[-1], calm=True)]
        blows = [*first, *blows]
    return blows
