"""What the teacher must not forget: policies, which one is active, requests seen, and what was written.

Promises: every method is one transaction, one at a time; a ``request_id`` means one body for ever; an update that was
accepted is stored whole, so that it can be trained again after any crash; groups of self-edits that were streamed
once are streamed again as they were. SQLite and PostgreSQL through SQLAlchemy.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from preceptor.database import INT64, open_database
from preceptor.errors import PreceptorError

METADATA = sa.MetaData()
_POLICIES = sa.Table(
    "policies",
    METADATA,
    sa.Column("number", INT64, primary_key=True, autoincrement=True),  # order of creation
    sa.Column("id", sa.String(80), unique=True, nullable=False),
    sa.Column("parent_id", sa.String(80), nullable=False),
    sa.Column("base_source", sa.Text, nullable=False),
    sa.Column("base_commit", sa.String(80), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("adapter_uri", sa.Text, nullable=False, default=""),
    sa.Column("adapter_sha256", sa.String(64), nullable=False, default=""),
    sa.Column("kept", sa.Integer, nullable=False, default=0),
    sa.Column("offered", sa.Integer, nullable=False, default=0),
    sa.Column("first_loss", sa.Float, nullable=False, default=0.0),
    sa.Column("final_loss", sa.Float, nullable=False, default=0.0),
    sa.Column("steps", sa.Integer, nullable=False, default=0),
    sa.Column("steps_planned", sa.Integer, nullable=False, default=0),
    sa.Column("seconds", sa.Float, nullable=False, default=0.0),
    sa.Column("failure_reason", sa.String(64), nullable=False, default=""),
    sa.Column("failure_message", sa.Text, nullable=False, default=""),
    sa.Column("created", sa.Float, nullable=False),  # seconds since the epoch
    sa.Column("request", sa.LargeBinary, nullable=False, default=b""),  # the update; empty for the base
    sa.Column("diversity", sa.Float, nullable=True),
    sa.Column("kl", sa.Float, nullable=True),
)
# A table of its own, for databases that have the one above get no new columns.
_SELECTIONS = sa.Table(
    "policy_groups",
    METADATA,
    sa.Column("policy_id", sa.String(80), primary_key=True),
    sa.Column("groups", sa.Integer, nullable=False),
    sa.Column("groups_dropped", sa.Integer, nullable=False),
)
_WHOLE = sa.select(_POLICIES, _SELECTIONS.c.groups, _SELECTIONS.c.groups_dropped).select_from(
    _POLICIES.outerjoin(_SELECTIONS, _SELECTIONS.c.policy_id == _POLICIES.c.id)
)
_ACTIVE = sa.Table(
    "active_policy",
    METADATA,
    sa.Column("only", sa.Integer, primary_key=True),  # always 1
    sa.Column("policy_id", sa.String(80), nullable=False),
)
_REQUESTS = sa.Table(
    "requests",
    METADATA,
    sa.Column("request_id", sa.String(256), primary_key=True),
    sa.Column("body_sha256", sa.String(64), nullable=False),
    sa.Column("policy_id", sa.String(80), nullable=False),  # or how many updates were cancelled, in digits
)
_OWNERS = sa.Table(  # who waits for an update; an empty owner waits for ever
    "update_owners",
    METADATA,
    sa.Column("policy_id", sa.String(80), primary_key=True),
    sa.Column("owner", sa.String(256), primary_key=True),
)
_GROUPS = sa.Table(
    "written_groups",
    METADATA,
    sa.Column("key", sa.String(80), primary_key=True),
    sa.Column("group", sa.LargeBinary, nullable=False),
    sa.Column("created", sa.Float, nullable=False, index=True),  # seconds since the epoch
)
# Rows deleted in one transaction, so that it takes milliseconds.
_FORGOTTEN_AT_ONCE = 500


class PolicyState(StrEnum):
    """Where a policy stands."""

    TRAINING = "training"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Policy:
    """A version of the teacher. ``adapter_uri`` is empty where its weights are the base's."""

    id: str
    parent_id: str  # empty for the base
    base_source: str
    base_commit: str
    state: PolicyState
    created: datetime
    adapter_uri: str = ""
    adapter_sha256: str = ""
    kept: int = 0
    offered: int = 0
    groups: int = 0  # 0 also where the policy was made before groups were counted
    groups_dropped: int = 0
    first_loss: float = 0.0
    final_loss: float = 0.0
    steps: int = 0
    steps_planned: int = 0
    seconds: float = 0.0
    failure_reason: str = ""
    failure_message: str = ""
    active: bool = False
    diversity: float | None = None  # of what was offered; None where no group had two, and for the base
    kl: float | None = None  # from the base, in nats a token; None where the algorithm does not measure it

    @property
    def is_restored(self) -> bool:
        """Whether it was READY and is trained again, since its files were damaged."""
        return self.state is PolicyState.TRAINING and bool(self.adapter_sha256)


class PolicyStore:
    """The teacher's durable state. Raises PreceptorError as named at each method."""

    def __init__(self, url: str) -> None:
        self._engine = open_database(url, "teacher.migrations")
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()

    def add_base(self, base: Policy) -> None:
        """Makes the untouched teacher known. It becomes active where nothing is, and where the active policy stands
        on another base (the service was started with another model)."""
        with self._begin() as db:
            if self._find(db, base.id) is None:
                db.execute(_POLICIES.insert().values(**_new_row(base, b"")))
            active = self._find(db, self._active_id(db) or "")
            if active is None or active["base_commit"] != base.base_commit:
                self._set_active(db, base.id)

    def get(self, policy_id: str = "") -> Policy:
        """A policy, the active one if no id is given. Raises POLICY_NOT_FOUND."""
        with self._begin() as db:
            return self._policy(db, policy_id)

    def page(self, size: int, before: int = 0) -> tuple[list[Policy], int]:
        """Up to ``size`` policies, newest first, and where the next page begins (0: there is none)."""
        query = _WHOLE.order_by(_POLICIES.c.number.desc()).limit(size + 1)
        if before:
            query = query.where(_POLICIES.c.number < before)
        with self._begin() as db:
            rows = db.execute(query).mappings().all()
            active = self._active_id(db)
        more = len(rows) > size
        rows = rows[:size]
        return [_read(row, active) for row in rows], rows[-1]["number"] if more else 0

    def answered(self, request_id: str, body: bytes) -> Policy | None:
        """What this request was answered with before, as it is now; None if it is new.

        Raises REQUEST_ID_REUSED if it came with another body.
        """
        with self._begin() as db:
            return self._answered(db, request_id, body)

    def start_update(
        self, policy: Policy, update: bytes, request_id: str, body: bytes, *, owner: str, activate: bool
    ) -> tuple[Policy, bool]:
        """Stores an update that ``owner`` waits for and says whether it is to be trained now.

        The same update under another request_id is the same policy; one that FAILED starts again. ``activate`` is
        obeyed at once where the policy is READY, and is part of ``update`` for later. Raises REQUEST_ID_REUSED.
        """
        with self._begin() as db:
            if (known := self._answered(db, request_id, body)) is not None:
                return known, False
            found = self._find(db, policy.id)
            if found is None:
                db.execute(_POLICIES.insert().values(**_new_row(policy, update)))
                counts = {"groups": policy.groups, "groups_dropped": policy.groups_dropped}
                db.execute(_SELECTIONS.insert().values(policy_id=policy.id, **counts))
            elif found["state"] == PolicyState.FAILED:
                db.execute(_OWNERS.delete().where(_OWNERS.c.policy_id == policy.id))
                self._change(db, policy.id, state="training", failure_reason="", failure_message="", request=update)
            elif activate and found["state"] == PolicyState.TRAINING:
                self._change(db, policy.id, request=update)
            elif activate:
                self._set_active(db, policy.id)
            self._remember(db, request_id, body, policy.id)
            same = (_OWNERS.c.policy_id == policy.id) & (_OWNERS.c.owner == owner)
            db.execute(_OWNERS.delete().where(same))
            db.execute(_OWNERS.insert().values(policy_id=policy.id, owner=owner))
            return self._policy(db, policy.id), found is None or found["state"] == PolicyState.FAILED

    def cancel(self, owner: str, request_id: str, body: bytes) -> tuple[int, list[str]]:
        """The owner waits for nothing any more; how many updates nobody else waits for, and which are FAILED now.

        A repeated request answers with the first number and ends nothing. Raises REQUEST_ID_REUSED.
        """
        with self._begin() as db:
            if (reply := self._reply(db, request_id, body)) is not None:
                return int(reply), []
            mine = sa.select(_OWNERS.c.policy_id).where(_OWNERS.c.owner == owner)
            waited = list(db.execute(mine).scalars())
            db.execute(_OWNERS.delete().where(_OWNERS.c.owner == owner))
            ended = []
            for policy_id in waited:
                policy = self._policy(db, policy_id)
                others = sa.select(sa.func.count()).select_from(_OWNERS).where(_OWNERS.c.policy_id == policy_id)
                if policy.state is PolicyState.TRAINING and not policy.is_restored and not db.execute(others).scalar():
                    failure = {"failure_reason": "CANCELLED", "failure_message": "nobody waits for it any more"}
                    self._change(db, policy_id, state="failed", **failure)
                    ended.append(policy_id)
            self._remember(db, request_id, body, str(len(ended)))
            return len(ended), ended

    def activate(self, policy_id: str, request_id: str, body: bytes) -> Policy:
        """Makes a READY policy active. Raises POLICY_NOT_FOUND, POLICY_NOT_READY, REQUEST_ID_REUSED."""
        with self._begin() as db:
            if (known := self._answered(db, request_id, body)) is not None:
                return known
            policy = self._policy(db, policy_id)
            if policy.state is not PolicyState.READY:
                raise PreceptorError("POLICY_NOT_READY", f"policy {policy_id} is {policy.state}", field="policy_id")
            self._set_active(db, policy.id)
            self._remember(db, request_id, body, policy.id)
            return replace(policy, active=True)

    def start_again(self, policy_id: str, update: bytes) -> bool:
        """A READY policy is to be trained again, since its files are damaged; whether it is this call that says so.

        Raises POLICY_NOT_FOUND.
        """
        with self._begin() as db:
            if self._policy(db, policy_id).state is not PolicyState.READY:
                return False
            self._change(db, policy_id, state="training", request=update)
            return True

    def unfinished(self) -> list[str]:
        """Ids of the policies left in TRAINING, oldest first."""
        query = sa.select(_POLICIES.c.id).where(_POLICIES.c.state == "training").order_by(_POLICIES.c.number)
        with self._begin() as db:
            return list(db.execute(query).scalars())

    def update_of(self, policy_id: str) -> bytes:
        """The stored update that makes this policy. Raises POLICY_NOT_FOUND."""
        with self._begin() as db:
            self._policy(db, policy_id)
            return bytes(db.execute(sa.select(_POLICIES.c.request).where(_POLICIES.c.id == policy_id)).scalar_one())

    def finish(self, policy: Policy, *, activate: bool) -> Policy:
        """Writes how a training ended, and in the same transaction makes the policy active where that was asked."""
        names = ("adapter_uri", "adapter_sha256", "first_loss", "final_loss", "steps", "seconds", "kl")
        failure = ("failure_reason", "failure_message")
        values: dict[str, Any] = {name: getattr(policy, name) for name in (*names, *failure)}
        with self._begin() as db:
            self._change(db, policy.id, state=policy.state.value, **values)
            if activate and policy.state is PolicyState.READY:
                self._set_active(db, policy.id)
            return self._policy(db, policy.id)

    def written(self, keys: Sequence[str]) -> dict[str, bytes]:
        """The stored groups among ``keys``."""
        with self._begin() as db:
            rows = db.execute(_GROUPS.select().where(_GROUPS.c.key.in_(keys))).mappings()
            return {row["key"]: row["group"] for row in rows}

    def keep_written(self, groups: Mapping[str, bytes]) -> None:
        """Stores groups; what is there already stays."""
        with self._begin() as db:
            there = set(db.execute(sa.select(_GROUPS.c.key).where(_GROUPS.c.key.in_(list(groups)))).scalars())
            now = time.time()
            new = [{"key": key, "group": group, "created": now} for key, group in groups.items() if key not in there]
            if new:
                db.execute(_GROUPS.insert(), new)

    def old_written(self, before: float) -> tuple[int, int, float]:
        """Groups stored before a time (seconds since the epoch): how many, their bytes, when the first was stored."""
        old = sa.select(
            sa.func.count(),
            sa.func.coalesce(sa.func.sum(sa.func.length(_GROUPS.c.group)), 0),
            sa.func.coalesce(sa.func.min(_GROUPS.c.created), before),
        ).where(_GROUPS.c.created < before)
        with self._begin() as db:
            count, size, first = db.execute(old).one()
        return int(count), int(size), float(first)

    def forget_written(self, before: float) -> None:
        """Forgets them, a bounded number in each transaction. The same request writes them again."""
        some = sa.select(_GROUPS.c.key).where(_GROUPS.c.created < before).limit(_FORGOTTEN_AT_ONCE)
        while True:
            with self._begin() as db:
                keys = list(db.execute(some).scalars())
                if not keys:
                    return
                db.execute(_GROUPS.delete().where(_GROUPS.c.key.in_(keys)))

    def updated_for(self, owners: Collection[str]) -> set[str]:
        """Ids of the policies that these owners have asked for."""
        found: set[str] = set()
        wanted = list(owners)
        with self._begin() as db:
            for start in range(0, len(wanted), 500):  # SQLite's old limit of parameters is 999
                mine = _OWNERS.c.owner.in_(wanted[start : start + 500])
                found |= set(db.execute(sa.select(_OWNERS.c.policy_id).where(mine)).scalars())
        return found

    @contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        # A teacher is one process, so a lock in it is enough to make what is read in a transaction stay true.
        with self._lock, self._engine.begin() as connection:
            yield connection

    @staticmethod
    def _find(db: sa.Connection, policy_id: str) -> sa.RowMapping | None:
        return db.execute(_WHOLE.where(_POLICIES.c.id == policy_id)).mappings().one_or_none()

    def _policy(self, db: sa.Connection, policy_id: str) -> Policy:
        active = self._active_id(db)
        row = self._find(db, policy_id or active or "")
        if row is None:
            raise PreceptorError("POLICY_NOT_FOUND", f"no policy {policy_id!r}", field="policy_id")
        return _read(row, active)

    @staticmethod
    def _change(db: sa.Connection, policy_id: str, **values: Any) -> None:
        db.execute(_POLICIES.update().where(_POLICIES.c.id == policy_id).values(**values))

    @staticmethod
    def _active_id(db: sa.Connection) -> str | None:
        found: str | None = db.execute(sa.select(_ACTIVE.c.policy_id)).scalar()
        return found

    @staticmethod
    def _set_active(db: sa.Connection, policy_id: str) -> None:
        db.execute(_ACTIVE.delete())
        db.execute(_ACTIVE.insert().values(only=1, policy_id=policy_id))

    def _answered(self, db: sa.Connection, request_id: str, body: bytes) -> Policy | None:
        reply = self._reply(db, request_id, body)
        return None if reply is None else self._policy(db, reply)

    @staticmethod
    def _reply(db: sa.Connection, request_id: str, body: bytes) -> str | None:
        row = db.execute(_REQUESTS.select().where(_REQUESTS.c.request_id == request_id)).mappings().one_or_none()
        if row is None:
            return None
        if row["body_sha256"] != hashlib.sha256(body).hexdigest():
            raise PreceptorError(
                "REQUEST_ID_REUSED", f"request_id {request_id!r} came before with another body", field="request_id"
            )
        return str(row["policy_id"])

    @staticmethod
    def _remember(db: sa.Connection, request_id: str, body: bytes, reply: str) -> None:
        values = {"request_id": request_id, "body_sha256": hashlib.sha256(body).hexdigest(), "policy_id": reply}
        db.execute(_REQUESTS.insert().values(**values))


def _new_row(policy: Policy, update: bytes) -> dict[str, Any]:
    names = ("id", "parent_id", "base_source", "base_commit", "kept", "offered", "steps_planned", "diversity")
    values: dict[str, Any] = {name: getattr(policy, name) for name in names}
    return values | {"state": policy.state.value, "created": policy.created.timestamp(), "request": update}


def _read(row: sa.RowMapping, active: str | None) -> Policy:
    values = {name: row[name] for name in Policy.__dataclass_fields__ if name in row}
    values |= {
        "groups": row["groups"] or 0,
        "groups_dropped": row["groups_dropped"] or 0,
        "state": PolicyState(row["state"]),
        "created": datetime.fromtimestamp(row["created"], UTC),
        "active": row["id"] == active,
    }
    return Policy(**values)
