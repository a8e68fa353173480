"""What a live view shows of a run that is executed here, kept in memory.

Promise: a watcher reads the latest state whenever it is ready for one; a slow watcher skips states and holds nobody up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from orchestrator.entries import EditKey, Entry
from preceptor.statistics import clustered_mean
from preceptor.v1 import orchestrator_pb2 as pb

# Before this share of the work an estimate of the time left would mislead.
MIN_SHARE_FOR_ESTIMATE = 0.03


@dataclass(frozen=True, slots=True)
class _Mark:
    """What counts of a ledger line."""

    malformed: bool
    too_costly: bool
    created: bool
    failed: bool
    cached: bool
    stopped: bool
    settled: bool
    reward: float | None


class Progress:
    """The state of one run's progress. Safe to use from several threads."""

    def __init__(self, rounds: int, planned: int, elapsed: Callable[[], float]) -> None:
        """``planned``: self-edits the run will write in all; ``elapsed``: seconds spent on the run."""
        self._rounds = rounds
        self._planned = planned
        self._elapsed = elapsed
        self._changed = threading.Condition()
        self._version = 0
        self._marks: dict[EditKey, _Mark] = {}
        self._stale: set[str] = set()  # stages of which lines have changed since their reward was computed
        self._rewards: dict[str, pb.RoundReward] = {}  # by stage
        self._phase = ""
        self._hindrances: dict[str, str] = {}  # by service
        self._round = 0
        self._workers = 0
        self.first_reward_seconds: float | None = None

    def enter(self, phase: str, number: int | None = None) -> None:
        """The run does this now, in this round if one is given."""
        with self._change():
            self._phase = phase
            self._round = self._round if number is None else number

    def hindered(self, by: str, words: str) -> None:
        """What the run waits for because of this service; without words: not any more."""
        if self._hindrances.get(by, "") != words:
            with self._change():
                self._hindrances[by] = words

    def show(self, entries: Iterable[Entry]) -> None:
        """These ledger lines are new or have changed."""
        with self._change():
            for entry in entries:
                reward = entry.earned
                self._stale.add(entry.key.stage)
                self._marks[entry.key] = _Mark(
                    malformed=bool(entry.malformed),
                    too_costly=bool(entry.too_costly),
                    created=entry.evaluation is not None or entry.look is not None,
                    failed=entry.failed,
                    cached=entry.cached,
                    stopped=entry.stopped,
                    settled=entry.settled,
                    reward=None if reward is None else reward.value,
                )

    def first_reward(self, seconds: float) -> None:
        """The first reward came after so many seconds of the run."""
        with self._change():
            self.first_reward_seconds = seconds

    def workers(self, alive: int) -> None:
        """So many workers are alive."""
        with self._change():
            self._workers = alive

    def wake(self) -> None:
        """Watchers are to look at the run's state again."""
        with self._change():
            pass

    def wait(self, version: int, seconds: float) -> int:
        """Waits at most so long for a version after ``version``; returns the current one."""
        end = time.monotonic() + seconds
        with self._changed:
            while self._version == version and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            return self._version

    def snapshot(self, state: pb.RunState.ValueType) -> pb.RunProgress:
        """The progress as a message."""
        elapsed = self._elapsed()
        with self._changed:
            marks = dict(self._marks)
            settled = sum(mark.settled for mark in marks.values())
            share = min(1.0, settled / self._planned) if self._planned else 0.0
            first = self.first_reward_seconds
            self._compute_rewards()
            rewards = [self._rewards[stage] for stage in sorted(self._rewards)]
            message = pb.RunProgress(
                state=state,
                phase="; ".join(words for words in (self._phase, *self._hindrances.values()) if words),
                round=self._round,
                rounds=self._rounds,
                workers=self._workers,
                done_share=1.0 if state == pb.RUN_STATE_SUCCEEDED else share,
                seconds_elapsed=elapsed,
                first_reward_seconds=-1.0 if first is None else first,
            )
        values = marks.values()
        message.evaluations_done = sum(mark.reward is not None for mark in values)
        message.evaluations_failed = sum(mark.failed for mark in values)
        message.evaluations_running = sum(mark.created and not mark.settled for mark in values)
        message.evaluations_cached = sum(mark.cached for mark in values)
        message.self_edits_malformed = sum(mark.malformed for mark in values)
        message.self_edits_too_costly = sum(mark.too_costly for mark in values)
        message.self_edits_stopped = sum(mark.stopped for mark in values)
        message.rewards.extend(rewards)
        running = state == pb.RUN_STATE_RUNNING and share >= MIN_SHARE_FOR_ESTIMATE
        message.seconds_left = elapsed * (1 - share) / share if running else -1.0
        return message

    def _compute_rewards(self) -> None:
        """Of the rounds that have changed: watchers look several times a second. The caller holds the lock."""
        for stage in self._stale:
            if stage.startswith("round-"):
                reward = _round_reward(stage, self._marks)
                if reward is None:
                    self._rewards.pop(stage, None)
                else:
                    self._rewards[stage] = reward
        self._stale.clear()

    @contextmanager
    def _change(self) -> Iterator[None]:
        with self._changed:
            yield
            self._version += 1
            self._changed.notify_all()


def _round_reward(stage: str, marks: dict[EditKey, _Mark]) -> pb.RoundReward | None:
    """The mean of what is measured of a round, if anything is; after looks that is the better part of each group."""
    pairs = sorted((key, mark.reward) for key, mark in marks.items() if key.stage == stage and mark.reward is not None)
    if not pairs:
        return None
    mean, stderr = clustered_mean([value for _, value in pairs], [key.task for key, _ in pairs])
    return pb.RoundReward(round=int(stage.rpartition("-")[2]), mean=mean, stderr=stderr or 0.0, count=len(pairs))
