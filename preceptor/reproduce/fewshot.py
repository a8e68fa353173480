"""Few-shot learning: tasks of a few demonstrations (ARC), for which the teacher writes augmentations and settings.

The world is the mosaic; with real models the same run on ARC's files (``--full --tasks FILE --solutions FILE``). For a
few-shot task the untouched student is the in-context baseline, as the demonstrations stand in its prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from preceptor import arms
from preceptor.config import RunConfig
from preceptor.reproduce.experiment import Findings, Options, Step
from preceptor.reproduce.knowledge import measure_runs
from preceptor.reproduce.lab import Lab
from preceptor.reproduce.runs import check_full, config_of, step_of

STUDENT = "mosaic"
WORDS = {
    arms.NO_EDIT: "in context (untouched student)",
    arms.SHUFFLED: "wrong directive",
    arms.ORACLE: "oracle (the right directive)",
}


def plan(options: Options) -> Iterator[tuple[str, int, RunConfig]]:
    """Student, seed and config of each run."""
    check_full(options)
    shipped = "reproduce/fewshot_full.toml" if options.full else "mosaic.toml"
    for student in options.students or (STUDENT,):
        for seed in range(options.seeds):
            yield student, seed, config_of(options, shipped, student, seed)


def steps(options: Options) -> Sequence[Step]:
    """One for each run."""
    return [step_of(f"student {student}, seed {seed}: a run", config) for student, seed, config in plan(options)]


def measure(lab: Lab, options: Options) -> Findings:
    """Raises PreceptorError(TOO_MANY_FAILURES) where no run succeeded."""
    return measure_runs(
        lab,
        plan(options),
        title="Few-shot learning",
        about="For each task the student is fine-tuned on training tasks that are made of the demonstrations, as a"
        " directive says (augmentations, loss, rate, epochs), and then asked for the outputs of the queries; right is"
        " what is right in every cell within two attempts. The arms differ in who chose the directive.",
        words=WORDS,
    )
