"""What an experiment is. One module each, with two functions:

    steps(options) -> the steps that it will take, in order, without a stack (for ``--dry-run``, progress and cost)
    measure(lab, options) -> Findings, calling ``lab.step()`` before each of them

An arm that fails is counted and said, and the rest goes on: ``lab.attempt``. Nothing is kept here between two calls of
the command: runs have request ids made of what they ask for, and the services know what they have written and measured,
so whoever asks again goes on where it stopped.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from preceptor.reproduce.lab import Lab
    from preceptor.reproduce.table import Section

EXPERIMENTS = ("knowledge", "fewshot", "batch", "transfer", "continual")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command was asked for."""

    students: tuple[str, ...] = ()  # registered names; empty: the experiment's own
    seeds: int = 3
    full: bool = False  # real models and files instead of a shipped world
    tasks: Path | None = None
    solutions: Path | None = None
    config: Path | None = None  # instead of the experiment's own config
    overrides: tuple[str, ...] = ()  # KEY=VALUE, as `preceptor run --set`
    external_teacher: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """A part of the work that is shown as such."""

    words: str
    # For progress and cost: trials (of the student that is named, or of any), their tokens, and what the teacher writes
    # and learns from. Estimates; 0 where unknown.
    trials: int = 0
    trained_tokens: float = 0.0  # of all trials together
    answered_tokens: float = 0.0
    written_tokens: float = 0.0
    learnt_tokens: float = 0.0  # that updates of the teacher train, epochs counted
    student: str = ""


@dataclass(frozen=True, slots=True)
class PlainTable:
    """Numbers that are no arms, e.g. a forgetting matrix. Cells are shown as they are; None is a dash."""

    name: str
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Findings:
    """What an experiment found."""

    title: str
    about: str  # one paragraph: what was measured and how
    sections: Sequence[Section] = ()  # arms and their paired differences
    tables: Sequence[PlainTable] = ()
    # File name without ending -> SVG of ``preceptor.drawing.to_svg``; shown in this order.
    pictures: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()  # what people should know before they believe it
    data: Mapping[str, Any] = field(default_factory=dict)  # whatever else belongs into results.json


class Experiment(Protocol):
    """A module of this package."""

    def steps(self, options: Options) -> Sequence[Step]:
        """Raises PreceptorError for options that make no sense (BAD_CONFIG, FILE_NOT_FOUND, ...)."""

    def measure(self, lab: Lab, options: Options) -> Findings:
        """Raises PreceptorError where nothing at all could be measured."""


def experiment(name: str) -> Experiment:
    """The module of one of EXPERIMENTS."""
    return cast(Experiment, importlib.import_module(f"preceptor.reproduce.{name}"))
