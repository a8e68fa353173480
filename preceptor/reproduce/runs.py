"""The same run for several seeds and students: what knowledge, fewshot and transfer are made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import preceptor
from preceptor import arms
from preceptor.config import RunConfig, load_config
from preceptor.errors import PreceptorError
from preceptor.reproduce.cost import run_step
from preceptor.reproduce.experiment import Options, Step
from preceptor.reproduce.table import Arm, Section, arm_values, arms_of, pairs_with
from preceptor.task_sources import gather_tasks

# Beside the package: where the repository has its configs.
_CONFIGS = Path(preceptor.__file__).parents[1] / "configs"


def config_of(
    options: Options,
    shipped: str,
    student: str,
    seed: int,
    overrides: Sequence[str] = (),
    decisive: Sequence[str] = (),
) -> RunConfig:
    """The config of one run. ``shipped``: the file in configs/ unless the options name another. The options' overrides
    come after ``overrides`` and before ``decisive``, without which the run would be another experiment.

    Raises PreceptorError(FILE_NOT_FOUND, BAD_CONFIG).
    """
    own = [f"seed={seed}", *([f"student.name={json.dumps(student)}"] if student else [])]
    if options.tasks is not None:
        own += ["tasks.world=", f"tasks.path={json.dumps(str(options.tasks))}"]
    if options.solutions is not None:
        own.append(f"tasks.solutions_path={json.dumps(str(options.solutions))}")
    if options.external_teacher:
        own.append("heldout.external_teacher=true")
    return load_config(options.config or _CONFIGS / shipped, [*own, *overrides, *options.overrides, *decisive])


def check_full(options: Options) -> None:
    """With real models there are files to learn from, and names of students. Raises PreceptorError(INVALID_REQUEST)."""
    if options.full and (options.tasks is None or not options.students):
        missing = "--tasks FILE" if options.tasks is None else "--students NAME"
        raise PreceptorError("INVALID_REQUEST", f"--full needs {missing}", field=missing.split()[0].strip("-"))
    if not options.full and (options.tasks is not None or options.solutions is not None):
        raise PreceptorError("INVALID_REQUEST", "--tasks and --solutions go with --full", field="tasks")


def step_of(words: str, config: RunConfig) -> Step:
    """A run as a step. Raises PreceptorError for tasks that are wrong."""
    tasks = gather_tasks(config)
    return run_step(words, config, tasks.train, tasks.heldout)


def section(name: str, title: str, summaries: Mapping[int, Mapping[str, Any]]) -> Section:
    """All arms of these runs (summaries by seed), the trained teacher against each of them, and the control."""
    found = in_order(arms_of(summaries))
    pairs = pairs_with(arms.TRAINED, found)
    if {arms.SHUFFLED, arms.NO_EDIT} <= {arm.name for arm in found}:
        pairs.append((arms.SHUFFLED, arms.NO_EDIT))
    return Section(name, title, found, pairs)


def in_order(found: Sequence[Arm]) -> list[Arm]:
    """From no edit to the controls, as every table has them; formats stand after the passage alone."""
    order = (
        arms.NO_EDIT,
        arms.PASSAGE,
        arms.FORMAT,
        arms.UNTRAINED,
        arms.FIXED,
        arms.EXTERNAL,
        arms.TRAINED,
        arms.IN_CONTEXT,
        arms.ORACLE,
        arms.SHUFFLED,
    )

    def place(arm: Arm) -> int:
        name = arms.FORMAT if arm.name.startswith(arms.FORMAT) else arm.name
        return order.index(name) if name in order else len(order)

    return sorted(found, key=place)


# Arms whose fine-tunes train this much more or less than the trained teacher's are not compared at equal tokens.
_UNEQUAL = 0.1


def notes_of(of: Section) -> list[str]:
    """What is to be known of a section before its differences are believed."""
    found = {arm.name: arm for arm in of.arms}
    if arms.TRAINED not in found:
        return [f"{of.title}: the trained teacher was not measured."]
    notes = []
    trained = found[arms.TRAINED]
    if trained.tokens:
        ours = fmean(trained.tokens)
        other = [
            f"{arm.words} {fmean(arm.tokens):,.0f}"
            for arm in of.arms
            if arm.name != arms.IN_CONTEXT and arm.tokens and abs(fmean(arm.tokens) / ours - 1) > _UNEQUAL
        ]
        if other:
            notes.append(
                f"{of.title}: not at equal tokens: the trained teacher's fine-tunes train {ours:,.0f} tokens,"
                f" {', '.join(other)}."
            )
    if arms.IN_CONTEXT in found:
        there, here = (arm_values(found[name])["accuracy"] for name in (arms.IN_CONTEXT, arms.TRAINED))
        if there is not None and here is not None and there < here:
            notes.append(
                f"{of.title}: with the text in the prompt it answers {there:.1%} right: it cannot read it, so this is"
                " no ceiling here."
            )
    notes += [f"{of.title}: {arm.words} was left out: {arm.left_out}" for arm in of.arms if arm.left_out]
    return notes
