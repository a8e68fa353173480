"""What a teacher may let go: adapters of policies that nobody has used for long, what killed writers left, and groups
of self-edits that were written long ago.

Promises: nothing goes that is active, that is being trained or stands in the line of what is being trained, or that a
run under way has made; what goes is made again when it is asked for (an adapter is trained again from its stored
update, a group is written again). Killed in the middle, the next time goes on.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator

from preceptor.artifacts import Stored, UsedStore
from preceptor.v1 import types_pb2 as types
from teacher.policy_store import Policy, PolicyState, PolicyStore

log = logging.getLogger(__name__)

# Whoever wrote it would have finished by now.
LEFTOVER_SECONDS = 3600.0
# Whoever was given a folder to read has read it by now.
IN_USE_SECONDS = 600.0


class TeacherGarbage:
    """``clock`` gives seconds since the epoch."""

    def __init__(self, store: PolicyStore, artifacts: UsedStore, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._artifacts = artifacts
        self._clock = clock

    def collect(self, keep_seconds: float, keep_owners: Collection[str], *, dry_run: bool) -> list[types.Garbage]:
        """Removes what may go and was not used for ``keep_seconds``, or only says what that would be.

        Raises what the store of artifacts and the database say that cannot be read or written now.
        """
        found = []
        for stored, kind, reason in self._artifacts_to_go(keep_seconds, keep_owners):
            if dry_run:
                goes = not self._artifacts.is_used(stored.name, IN_USE_SECONDS)
            else:
                goes = self._artifacts.remove_unless_used(stored.name, IN_USE_SECONDS)
            if goes:
                found.append(
                    types.Garbage(
                        kind=kind,
                        name=stored.name,
                        count=1,
                        bytes=stored.bytes,
                        age_seconds=stored.age_seconds,
                        reason=reason,
                    )
                )
        now = self._clock()
        count, size, first = self._store.old_written(now - keep_seconds)
        if count:
            if not dry_run:
                self._store.forget_written(now - keep_seconds)
            found.append(
                types.Garbage(
                    kind="written groups",
                    count=count,
                    bytes=size,
                    age_seconds=now - first,
                    reason="written long ago; the same request writes them again",
                )
            )
        if not dry_run:
            log.info("garbage: %d things, %d bytes", len(found), sum(item.bytes for item in found))
        return found

    def _artifacts_to_go(self, keep_seconds: float, keep_owners: Collection[str]) -> Iterator[tuple[Stored, str, str]]:
        policies = self._policies()
        needed = self._needed(policies, keep_owners)
        users: defaultdict[str, list[Policy]] = defaultdict(list)  # one that learnt nothing has its parent's adapter
        for policy in policies.values():
            if policy.adapter_uri:
                users[policy.adapter_uri.rpartition("/")[2]].append(policy)
        for stored in self._artifacts.list():
            if not stored.whole:
                if stored.age_seconds > LEFTOVER_SECONDS:
                    yield stored, "leftover", "left by a writer that was killed"
            elif not (mine := users[stored.name]):
                if stored.name in policies and policies[stored.name].state is PolicyState.FAILED:
                    yield stored, "adapter", "its policy FAILED"
                # what no policy here has ever heard of may be another house's
            elif needed.isdisjoint(policy.id for policy in mine):
                if all(policy.state is PolicyState.FAILED for policy in mine):
                    yield stored, "adapter", "its policy FAILED"
                elif stored.age_seconds > keep_seconds:
                    yield stored, "adapter", "old and not active; trained again when it is asked for"

    def _needed(self, policies: dict[str, Policy], keep_owners: Collection[str]) -> set[str]:
        """Ids of policies whose adapters stay."""
        training = {policy.id for policy in policies.values() if policy.state is PolicyState.TRAINING}
        needed = {policy.id for policy in policies.values() if policy.active}
        line = training | self._store.updated_for(keep_owners)
        while line:  # up to the base
            needed |= line
            line = {policies[one].parent_id for one in line if one in policies} & policies.keys() - needed
        return needed

    def _policies(self) -> dict[str, Policy]:
        found: dict[str, Policy] = {}
        before = 0
        while True:
            page, before = self._store.page(1000, before)
            found |= {policy.id: policy for policy in page}
            if not before:
                return found
