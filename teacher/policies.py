"""The teacher's policies: starts updates, trains them one after the other in the background, tells who watches.

Promises: an accepted update ends READY or FAILED, whatever dies meanwhile; without room on the disk, or with an
artifact store that is away, it waits; updates run one after the other; the parent is never changed; a policy whose
files are damaged or gone is trained again from what is stored.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from preceptor.artifacts import ArtifactStore
from preceptor.errors import PreceptorError
from preceptor.storage import when_there_is_room
from preceptor.v1 import types_pb2 as types
from teacher.backend import Trainer
from teacher.policy_store import Policy, PolicyState, PolicyStore
from teacher.prompts import prompt_format
from teacher.recipe import Update
from teacher.sight import TeacherSight

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# What ``adapter_folder`` says of files that are not what they were.
DAMAGED = frozenset({"ARTIFACT_CORRUPT", "ARTIFACT_NOT_FOUND"})
# How often a watch looks whether its client is still there.
_WATCH_POLL_SECONDS = 0.5


class Policies:
    """All policies of one base. Without a ``trainer`` there are no updates."""

    def __init__(
        self,
        base_source: str,
        base_commit: str,
        trainer: Trainer | None,
        store: PolicyStore,
        artifacts: ArtifactStore,
        sight: TeacherSight | None = None,
    ) -> None:
        self._base_source = base_source
        self._base_commit = base_commit
        self._trainer = trainer
        self._store = store
        self._artifacts = artifacts
        self._sight = sight or TeacherSight()
        self._waiting: queue.Queue[str] = queue.Queue()
        self._steps: dict[str, int] = {}  # of the policy in training
        self._hindrance: dict[str, PreceptorError] = {}  # what it waits for, where it waits
        self._changed = threading.Condition()
        self._in_hand: set[str] = set()  # policies that the thread is at: one, or a child and its parent
        self._abandoned: set[str] = set()  # those of them that nobody waits for any more
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._train_all, name="policy-training", daemon=True)
        base_id = f"base-{base_commit[:32]}"
        store.add_base(Policy(base_id, "", base_source, base_commit, PolicyState.READY, datetime.now(UTC)))

    def start(self) -> None:
        """Begins to train: first what a crash has left."""
        for policy_id in self._store.unfinished():
            log.info("training %s again: it was interrupted", policy_id)
            self._waiting.put(policy_id)
        self._thread.start()

    def stop(self) -> None:
        """Ends open watches and the training under way, which begins again at the next start."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    @property
    def fixed(self) -> bool:
        """Whether nobody trains here."""
        return self._trainer is None

    def _is_fixed(self) -> PreceptorError:
        return PreceptorError("TEACHER_IS_FIXED", f"{self._base_source} is a fixed teacher; it does not learn")

    @property
    def stopping(self) -> bool:
        """Whether the service is going down."""
        return self._stopping.is_set()

    def get(self, policy_id: str = "") -> Policy:
        """A policy as it is now, the active one if no id is given. Raises POLICY_NOT_FOUND."""
        policy = self._store.get(policy_id)
        if policy.state is PolicyState.TRAINING:
            policy = replace(policy, steps=self._steps.get(policy.id, 0))
            if (hindrance := self._hindrance.get(policy.id)) is not None:
                policy = replace(policy, failure_reason=hindrance.reason, failure_message=str(hindrance))
        return policy

    def ready(self, policy_id: str = "") -> Policy:
        """A policy that can write. Raises POLICY_NOT_FOUND, POLICY_NOT_READY."""
        policy = self.get(policy_id)
        if policy.state is not PolicyState.READY:
            raise PreceptorError("POLICY_NOT_READY", f"policy {policy.id} is {policy.state}", field="policy_id")
        if policy.base_commit != self._base_commit:
            raise PreceptorError(
                "POLICY_NOT_READY",
                f"policy {policy.id} stands on {policy.base_source}, this service serves {self._base_source}",
                field="policy_id",
            )
        return policy

    def page(self, size: int, before: int = 0) -> tuple[list[Policy], int]:
        """See PolicyStore.page."""
        return self._store.page(size, before)

    def update(self, update: Update, request_id: str, body: bytes, owner: str = "") -> Policy:
        """Starts an update (an empty parent_id: of the active policy) and returns the policy it makes.

        Raises TEACHER_IS_FIXED, POLICY_NOT_FOUND, POLICY_NOT_READY (the parent, or one that wrote an example whose
        probability by it is needed), UNKNOWN_PROMPT_FORMAT, REQUEST_ID_REUSED.
        """
        if self.fixed:
            raise self._is_fixed()
        if (known := self._store.answered(request_id, body)) is not None:
            return known
        for example in update.examples:
            if not example.prompt:
                prompt_format(example.prompt_format)
        parent = self._to_be_whole(update.parent_id)
        update = update.of_parent(parent.id)
        for writer in sorted(update.writers):
            self._to_be_whole(writer)
        lessons = update.lessons()
        policy = Policy(
            id=update.policy_id(self._base_commit),
            parent_id=parent.id,
            base_source=self._base_source,
            base_commit=self._base_commit,
            state=PolicyState.TRAINING,
            created=datetime.now(UTC),
            kept=len(lessons),
            offered=len(update.examples),
            groups=len(update.groups),
            groups_dropped=len(update.groups - {lesson.example.group for lesson in lessons}),
            steps_planned=update.settings.tuning.steps(len(lessons)),
            diversity=update.diversity,
        )
        policy, trains = self._store.start_update(
            policy, update.to_bytes(), request_id, body, owner=owner, activate=update.activate
        )
        if trains:
            self._sight.asked(policy.id)
            self._waiting.put(policy.id)
        self._tell()
        return policy

    def _to_be_whole(self, policy_id: str) -> Policy:
        """A policy that is READY, or will be before a later update is trained. Raises POLICY_NOT_FOUND,
        POLICY_NOT_READY."""
        policy = self.get(policy_id)
        return policy if policy.is_restored else self.ready(policy.id)

    def cancel(self, owner: str, request_id: str, body: bytes) -> int:
        """Ends the updates that this owner waits for and nobody else does, within a step; how many.

        Raises REQUEST_ID_REUSED.
        """
        with self._changed:
            number, ended = self._store.cancel(owner, request_id, body)
            self._abandoned |= self._in_hand & set(ended)
            self._changed.notify_all()
        return number

    def activate(self, policy_id: str, request_id: str, body: bytes) -> Policy:
        """Makes a policy the active one. Raises POLICY_NOT_FOUND, POLICY_NOT_READY, REQUEST_ID_REUSED."""
        if (known := self._store.answered(request_id, body)) is not None:
            return known
        policy = self._store.activate(self.ready(policy_id).id, request_id, body)
        self._tell()
        return policy

    def watch(self, policy_id: str, stopped: Callable[[], bool]) -> Iterator[Policy]:
        """The policy now and after every change, until it is READY or FAILED.

        Raises POLICY_NOT_FOUND, and SHUTTING_DOWN when the service goes down first.
        """
        seen: Policy | None = None
        while not stopped():
            policy = self.get(policy_id)
            if policy != seen:
                yield policy
                seen = policy
            if policy.state is not PolicyState.TRAINING:
                return
            if self.stopping:
                raise PreceptorError("SHUTTING_DOWN", "the teacher is going down; the update goes on when it is back")
            with self._changed:
                if self.get(policy_id) == seen and not self.stopping:
                    self._changed.wait(_WATCH_POLL_SECONDS)

    def adapter_folder(self, policy: Policy) -> Path | None:
        """Where a policy's adapter lies, verified; None where its weights are the base's.

        Raises ARTIFACT_NOT_FOUND, ARTIFACT_CORRUPT, and what a store says that cannot be read now.
        """
        if not policy.adapter_uri:
            return None
        return self._artifacts.local_path(types.Artifact(uri=policy.adapter_uri, sha256=policy.adapter_sha256))

    def restored(self, policy_id: str, stopped: Callable[[], bool]) -> Policy:
        """A policy that can write, the active one if no id is given; one that is being trained again is waited for.

        Raises POLICY_NOT_FOUND, POLICY_NOT_READY, CANCELLED when ``stopped`` says so, SHUTTING_DOWN.
        """
        policy = self.get(policy_id)
        if policy.is_restored:
            for _ in self.watch(policy.id, stopped):
                pass
            if stopped():
                raise PreceptorError("CANCELLED", "the client went away while a damaged policy was trained again")
        return self.ready(policy.id)

    def restore(self, policy_id: str) -> None:
        """Has a policy trained again whose files are damaged: its stored update gives the same weights."""
        if self._start_again(policy_id):
            self._waiting.put(policy_id)
            self._tell()

    def _start_again(self, policy_id: str) -> bool:
        _, update = self._read(policy_id)
        started = self._store.start_again(policy_id, replace(update, activate=False).to_bytes())
        if started:
            log.error("the files of policy %s are damaged or gone; it is trained again", policy_id)
        return started

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _train_all(self) -> None:
        while not self.stopping:
            try:
                policy_id = self._waiting.get(timeout=0.2)
            except queue.Empty:
                continue
            try:
                self._train_one(policy_id)
            except Exception:  # the thread must live on for the next update; this one begins again at the next start
                log.exception("the update to %s could not be brought to an end", policy_id)

    def _train_one(self, policy_id: str) -> None:
        """Trains, and writes how it ended. Every failure becomes a FAILED policy, which a new request can retry; where
        the service goes down meanwhile, it stays TRAINING in the store."""
        began = time.monotonic()
        with self._changed:
            self._in_hand.add(policy_id)
        try:
            policy, update = self._patiently(policy_id, lambda: self._read(policy_id))
            if policy.state is not PolicyState.TRAINING:
                return  # cancelled, or trained again already for the sake of a child
            ended = self._outcome(policy, update)
            ended = replace(ended, seconds=time.monotonic() - began)
            ended = self._patiently(policy_id, lambda: self._finish(ended))
        except PreceptorError as error:
            if error.reason == "SHUTTING_DOWN":
                return
            raise
        finally:
            with self._changed:
                self._in_hand.discard(policy_id)
                self._abandoned.discard(policy_id)
        self._steps.pop(policy_id, None)
        self._tell()
        self._sight.updated(ended)
        log.info(
            "policy %s is %s: %d of %d self-edits kept, %d of %d groups dropped, %d steps, loss %.3f -> %.3f, %.1f s",
            *(ended.id, ended.state, ended.kept, ended.offered, ended.groups_dropped, ended.groups, ended.steps),
            *(ended.first_loss, ended.final_loss, ended.seconds),
        )

    def _read(self, policy_id: str) -> tuple[Policy, Update]:
        return self._store.get(policy_id), Update.from_bytes(self._store.update_of(policy_id))

    def _finish(self, ended: Policy) -> Policy:
        # Asked again: an activation may have been wished for meanwhile.
        _, update = self._read(ended.id)
        return self._store.finish(ended, activate=update.activate)

    def _outcome(self, policy: Policy, update: Update) -> Policy:
        """The policy as its training leaves it, READY or FAILED. Raises SHUTTING_DOWN."""
        try:
            return self._train(policy, update)
        except PreceptorError as error:
            if error.reason == "SHUTTING_DOWN":
                raise
            if self.stopping:  # it may have failed of that, and what is wrong with it will be so after the next start
                raise PreceptorError("SHUTTING_DOWN", "the service is going down") from error
            return _failed(policy, error)
        except Exception as error:  # a bug: it must end in the policy's state, not only in this thread
            log.exception("the update to %s failed", policy.id)
            return _failed(policy, PreceptorError("UPDATE_FAILED", f"{type(error).__name__}: {error}"))

    def _train(self, policy: Policy, update: Update) -> Policy:
        parent, folder = self._whole(update.parent_id, policy.id)
        lessons = update.lessons()
        if not lessons:  # nothing to learn from: the new policy is the parent under another id
            return replace(
                policy,
                state=PolicyState.READY,
                adapter_uri=parent.adapter_uri,
                adapter_sha256=parent.adapter_sha256,
            )
        if self._trainer is None:  # it was asked for when the service had another backend
            raise self._is_fixed()

        def on_step(step: int) -> None:
            self._steps[policy.id] = step
            self._tell()

        def stopped() -> bool:
            return self.stopping or policy.id in self._abandoned

        writers = {writer: self._whole(writer, policy.id)[1] for writer in sorted(update.writers)}
        trained = self._trainer.train(folder, lessons, writers, update.settings, update.seed, on_step, stopped)

        def write(draft: Path) -> None:
            for name, content in trained.files.items():
                (draft / name).write_bytes(content)

        artifact = self._patiently(policy.id, lambda: self._artifacts.write_folder(policy.id, write))
        return replace(
            policy,
            state=PolicyState.READY,
            adapter_uri=artifact.uri,
            adapter_sha256=artifact.sha256,
            first_loss=trained.first_loss,
            final_loss=trained.final_loss,
            steps=trained.steps,
            kl=trained.kl,
        )

    def _whole(self, policy_id: str, child_id: str) -> tuple[Policy, Path | None]:
        """A policy that ``child_id`` is trained on, or that wrote its examples, and its adapter's folder; where that is
        damaged, it is trained again first."""
        policy = self.get(policy_id)
        if policy.state is PolicyState.READY:
            try:
                return self.ready(policy_id), self._patiently(child_id, lambda: self.adapter_folder(policy))
            except PreceptorError as error:
                if error.reason not in DAMAGED:
                    raise
            self._patiently(child_id, lambda: self._start_again(policy_id))
        if self.get(policy_id).is_restored:
            self._train_one(policy_id)
            if self.stopping:
                raise PreceptorError("SHUTTING_DOWN", "the service is going down")
        whole = self.ready(policy_id)
        return whole, self._patiently(child_id, lambda: self.adapter_folder(whole))

    def _patiently(self, policy_id: str, action: Callable[[], Result]) -> Result:
        """Does it, and again while a disk has no room or a bucket is away; watchers are told. Raises SHUTTING_DOWN."""

        def waits(hindrance: PreceptorError) -> None:
            self._hindrance[policy_id] = hindrance
            self._tell()

        def pause(seconds: float) -> None:
            if self._stopping.wait(seconds) or policy_id in self._abandoned:
                raise PreceptorError("SHUTTING_DOWN", "the update is not to go on")

        try:
            return when_there_is_room(action, pause, waits)
        finally:
            if self._hindrance.pop(policy_id, None) is not None:
                self._tell()


def _failed(policy: Policy, error: PreceptorError) -> Policy:
    return replace(policy, state=PolicyState.FAILED, failure_reason=error.reason, failure_message=error.message)
