"""The few base models that a worker keeps in memory, by source, commit and the edits merged into them.

Promise: what is handed out has been verified against its commit when it was read, and so has every edit that was merged
into it; it is never changed by whoever uses it (adapters are attached for the length of a batch and taken off again).
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import OrderedDict
from pathlib import Path

from preceptor.artifact_cache import ArtifactCache
from preceptor.errors import PreceptorError
from preceptor.v1 import types_pb2 as types
from student.base import LoadedBase, load_base
from student.fitting import check_fits, fits_alone
from student.kept import fetch_edits
from student.merge import merge_adapters
from student.source import fetch

log = logging.getLogger(__name__)


class BaseCache:
    """Least recently used leaves first. Safe to use from several threads; a model is read once."""

    def __init__(self, capacity: int, device: str, copies: ArtifactCache | None = None) -> None:
        """``copies``: where students and edits that lie in buckets are copied to."""
        self._capacity = capacity
        self._device = device
        self._copies = copies
        self._lock = threading.Lock()
        self._bases: OrderedDict[tuple[str, ...], LoadedBase] = OrderedDict()

    def get(self, student: types.PinnedStudent) -> LoadedBase:
        """The student, read now if it is not held.

        Raises PreceptorError(BAD_STUDENT_SOURCE, STUDENT_CHANGED, STUDENT_TOO_LARGE, MODEL_UNREACHABLE, DISK_FULL), and
        for one with edits ARTIFACT_NOT_FOUND, ARTIFACT_CORRUPT, ADAPTER_MISMATCH, BASE_NOT_ADAPTABLE.
        """
        edits = tuple(adapter.sha256 for adapter in student.adapters)
        key = (student.source, student.commit, *edits)
        with self._lock:
            if key not in self._bases:
                self._bases[key] = self._load(student, edits)
            self._bases.move_to_end(key)
            return self._bases[key]

    def _load(self, student: types.PinnedStudent, edits: tuple[str, ...]) -> LoadedBase:
        started = time.monotonic()
        weights, adapters = fetch_edits(student, self._copies)
        folder = weights or fetch(student.source, student.commit, self._copies)
        self._make_room(folder, student.name)
        base = load_base(folder, source=student.source, commit=student.commit, device=self._device, adapters=edits)
        merge_adapters(base, adapters)
        more = f" with {len(edits)} edits" if edits else ""
        log.info("loaded %s (%s)%s in %.1f s", student.name, student.commit[:12], more, time.monotonic() - started)
        return base

    def _make_room(self, folder: Path, name: str) -> None:
        """Others leave where there are too many of them, or a student would not fit beside them; for one that would not
        fit alone nobody does."""
        if not fits_alone(folder, self._device):
            check_fits(folder, self._device, name)
        while len(self._bases) >= self._capacity:  # first, so that two never need room for three
            self._bases.popitem(last=False)
        while True:
            try:
                return check_fits(folder, self._device, name)
            except PreceptorError:
                if not self._bases:
                    raise
                self._bases.popitem(last=False)
                gc.collect()  # a model is full of references to itself

    def commits(self) -> tuple[str, ...]:
        """Commits of the models held as they were registered, without waiting for one that is being read."""
        return tuple(dict.fromkeys(base.commit for base in list(self._bases.values()) if not base.adapters))
