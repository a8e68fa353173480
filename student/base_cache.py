"""The few base models that a worker keeps in memory, by source and commit.

Promise: what is handed out has been verified against its commit when it was read, and is never changed by whoever
uses it (adapters are attached for the length of a batch and taken off again).
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
from student.source import fetch

log = logging.getLogger(__name__)


class BaseCache:
    """Least recently used leaves first. Safe to use from several threads; a model is read once."""

    def __init__(self, capacity: int, device: str, copies: ArtifactCache | None = None) -> None:
        """``copies``: where students that lie in buckets are copied to."""
        self._capacity = capacity
        self._device = device
        self._copies = copies
        self._lock = threading.Lock()
        self._bases: OrderedDict[tuple[str, str], LoadedBase] = OrderedDict()

    def get(self, student: types.PinnedStudent) -> LoadedBase:
        """The student, read now if it is not held.

        Raises PreceptorError(BAD_STUDENT_SOURCE, STUDENT_CHANGED, STUDENT_TOO_LARGE, MODEL_UNREACHABLE, DISK_FULL).
        """
        key = (student.source, student.commit)
        with self._lock:
            if key not in self._bases:
                started = time.monotonic()
                folder = fetch(student.source, student.commit, self._copies)
                self._make_room(folder, student.name)
                self._bases[key] = load_base(folder, source=student.source, commit=student.commit, device=self._device)
                log.info("loaded %s (%s) in %.1f s", student.name, student.commit[:12], time.monotonic() - started)
            self._bases.move_to_end(key)
            return self._bases[key]

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
        """Commits of the models held, without waiting for one that is being read."""
        return tuple(dict.fromkeys(commit for _, commit in list(self._bases)))
