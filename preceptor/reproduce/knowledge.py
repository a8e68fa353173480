"""Knowledge incorporation: what the student knows of passages that the teacher never saw, for every arm.

Each seed is a run of its own: other passages, another teacher, other fine-tunes. The world is the almanac; with real
models the same run on a file in SQuAD's layout (``--full --tasks FILE --students NAME``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from preceptor.config import RunConfig
from preceptor.errors import PreceptorError
from preceptor.reproduce.experiment import Findings, Options, Step
from preceptor.reproduce.lab import Lab
from preceptor.reproduce.runs import check_full, config_of, notes_of, section, step_of

STUDENT = "almanac"
# The formats that the teacher which ships was shown; others it reads as the one that comes nearest.
FORMATS = ("self_qa", "implications", "rewrite", "copy")
# What of a run's summary is kept with the results.
_OF_A_RUN = ("run", "config_sha256", "student", "policies", "wall_seconds", "throughput", "notes")
_OVERRIDES = (f"heldout.formats=[{', '.join(map(repr, FORMATS))}]", "heldout.in_context=true")


def plan(options: Options) -> Iterator[tuple[str, int, RunConfig]]:
    """Student, seed and config of each run."""
    check_full(options)
    for student in options.students or (STUDENT,):
        for seed in range(options.seeds):
            yield student, seed, config_for(options, student, seed)


def config_for(options: Options, student: str, seed: int) -> RunConfig:
    """Of one run. The same for every experiment on this world, so that one uses what another has done."""
    if options.full:
        return config_of(options, "reproduce/knowledge_full.toml", student, seed)
    return config_of(options, "almanac.toml", student, seed, _OVERRIDES)


def steps(options: Options) -> Sequence[Step]:
    """One for each run."""
    return [step_of(f"student {student}, seed {seed}: a run", config) for student, seed, config in plan(options)]


def measure(lab: Lab, options: Options) -> Findings:
    """Raises PreceptorError(TOO_MANY_FAILURES) where no run succeeded."""
    return measure_runs(
        lab,
        plan(options),
        title="Knowledge incorporation",
        about="The student is fine-tuned on study material about a passage and then asked about it without the passage."
        " The arms differ in who wrote the material; student, settings, token budget, trial seeds and sealed questions"
        " are the same. The teacher was trained on other passages.",
    )


def measure_runs(
    lab: Lab,
    runs: Iterator[tuple[str, int, RunConfig]],
    title: str,
    about: str,
    words: Mapping[str, str] | None = None,
) -> Findings:
    """A section for each student; ``words``: what arms are called here.

    Raises PreceptorError(TOO_MANY_FAILURES) where no run succeeded.
    """
    summaries: dict[str, dict[int, dict[str, Any]]] = {}
    for student, seed, config in runs:
        lab.step()
        run = lab.attempt(f"student {student}, seed {seed}", lambda config=config: lab.run(config))  # type: ignore[misc]
        if run is not None:
            summaries.setdefault(student, {})[seed] = run
    if not summaries:
        raise PreceptorError("TOO_MANY_FAILURES", f"no run succeeded; the first: {lab.failures[0].message}")
    sections = [section(student, f"Student {student}", found) for student, found in summaries.items()]
    for arm in (arm for of in sections for arm in of.arms):
        arm.label = (words or {}).get(arm.name, "")
    return Findings(
        title=title,
        about=about,
        sections=sections,
        notes=[note for of in sections for note in notes_of(of)],
        data={
            "runs": [
                {
                    "student": student,
                    "seed": seed,
                    **{
                        key: summary.get(key)
                        for key in (
                            "run",
                            "config_sha256",
                            "student",
                            "policies",
                            "wall_seconds",
                            "throughput",
                            "notes",
                        )
                    },
                    "fixed_strategy": (summary.get("heldout") or {}).get("fixed_strategy"),
                    "rewards": [of["reward"]["mean"] for of in summary.get("rounds") or ()],
                }
                for student, found in summaries.items()
                for seed, summary in found.items()
            ]
        },
    )
