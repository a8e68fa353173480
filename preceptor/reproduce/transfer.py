"""Transfer: a teacher that was trained against one student writes for another, of other size and other shape.

Two students, A and B. For each seed a run on each trains a teacher against it and measures all arms on it (A→A and B→B,
and the baselines); then each teacher writes for the other student (A→B, B→A): a run without rounds that starts from the
trained policy, on the same held-out passages with the same questions, sampling seed and trial seeds. So A→B, B→B and
every baseline of B are paired by passage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from preceptor import arms
from preceptor.config import RunConfig
from preceptor.errors import PreceptorError
from preceptor.reproduce import knowledge
from preceptor.reproduce.experiment import Findings, Options, PlainTable, Step
from preceptor.reproduce.lab import Lab
from preceptor.reproduce.runs import check_full, config_of, in_order, notes_of, step_of
from preceptor.reproduce.table import Arm, Section, arm_values, arms_of, difference_values

STUDENTS = ("almanac", "almanac-qwen2")
# What a teacher's writing for another student is held against; the rest of the other's arms is measured already.
_CROSS = ("rounds.count=0", "heldout.formats=[]", "heldout.fixed_strategies=[]", "heldout.in_context=false")
FOREIGN = "trained_elsewhere"
LETTERS = ("A", "B")


def steps(options: Options) -> Sequence[Step]:
    """For each seed a run on each student, then each teacher with the other student."""
    found = []
    for seed in range(options.seeds):
        for letter, student in _students(options):
            config = knowledge.config_for(options, student, seed)
            found.append(step_of(f"seed {seed}: a teacher trained against {letter} ({student})", config))
        for teacher, other in (("A", "B"), ("B", "A")):
            student = dict(_students(options))[other]
            config = cross_config(options, student, seed, "policy")
            found.append(step_of(f"seed {seed}: {teacher}'s teacher writes for {other} ({student})", config))
    return found


def cross_config(options: Options, student: str, seed: int, policy: str) -> RunConfig:
    """Of a run in which ``policy`` writes for a student it was not trained against."""
    # A name of its own, as its results go to a folder of this name; the seed says what it measures, and with what.
    decisive = (*_CROSS, f"teacher.policy={policy!r}", "name=transfer")
    shipped = "reproduce/knowledge_full.toml" if options.full else "almanac.toml"
    return config_of(options, shipped, student, seed, decisive=decisive)


def _students(options: Options) -> list[tuple[str, str]]:
    check_full(options)
    students = options.students or STUDENTS
    if len(students) != 2 or students[0] == students[1]:
        raise PreceptorError("INVALID_REQUEST", f"transfer needs two students, not {len(students)}", field="students")
    return list(zip(LETTERS, students, strict=True))


def measure(lab: Lab, options: Options) -> Findings:
    """Raises PreceptorError(TOO_MANY_FAILURES) where nothing was transferred at all."""
    students = dict(_students(options))
    own: dict[str, dict[int, dict[str, Any]]] = {letter: {} for letter in LETTERS}
    foreign: dict[str, dict[int, dict[str, Any]]] = {letter: {} for letter in LETTERS}  # by who is taught
    for seed in range(options.seeds):
        for letter in LETTERS:
            lab.step()
            config = knowledge.config_for(options, students[letter], seed)
            _keep(own[letter], seed, lab.attempt(f"seed {seed}, {letter}→{letter}", _run(lab, config)))
        for teacher, other in (("A", "B"), ("B", "A")):
            lab.step()
            if seed not in own[teacher]:
                continue  # said already
            config = cross_config(options, students[other], seed, own[teacher][seed]["policies"][-1])
            _keep(foreign[other], seed, lab.attempt(f"seed {seed}, {teacher}→{other}", _run(lab, config)))
    if not any(foreign.values()):
        raise PreceptorError("TOO_MANY_FAILURES", f"nothing was transferred; the first: {lab.failures[0].message}")
    sections = [
        section(letter, students[letter], own[letter], foreign[letter], elsewhere)
        for letter, elsewhere in (("A", "B"), ("B", "A"))
    ]
    return Findings(
        title="Transfer between students",
        about=f"Student A is {students['A']}, student B is {students['B']}. A teacher is trained against one of them"
        " and writes for either; nothing of a student but its rewards ever reaches a teacher. X→Y: trained against X,"
        " used for Y. All arms of a student share passages, sealed questions, token budget and trial seeds.",
        sections=sections,
        tables=[square(sections), transferred(sections)],
        pictures=_pictures(sections),
        notes=[note for of in sections for note in notes_of(of)],
        data={
            "students": students,
            "runs": {
                kind: {
                    letter: {str(seed): {"run": of["run"], "policies": of["policies"]} for seed, of in by_seed.items()}
                    for letter, by_seed in found.items()
                }
                for kind, found in (("own", own), ("foreign", foreign))
            },
        },
    )


def _run(lab: Lab, config: RunConfig) -> Callable[[], dict[str, Any]]:
    return lambda: lab.run(config)


def _keep(found: dict[int, dict[str, Any]], seed: int, summary: dict[str, Any] | None) -> None:
    if summary is not None:
        found[seed] = summary


def section(
    letter: str,
    student: str,
    own: Mapping[int, Mapping[str, Any]],
    foreign: Mapping[int, Mapping[str, Any]],
    elsewhere: str,
) -> Section:
    """All arms of one student, the other's teacher among them."""
    found = in_order(arms_of(own))
    at = next((place for place, arm in enumerate(found) if arm.name == arms.TRAINED), len(found))
    if at < len(found):
        found[at].label = f"{letter}→{letter}: teacher trained on {letter}"
    for arm in arms_of(foreign):
        if arm.name == arms.TRAINED:
            arm.name, arm.label = FOREIGN, f"{elsewhere}→{letter}: teacher trained on {elsewhere}"
            arm.preparation = []  # it is the other's
            found.insert(at + 1, arm)
    names = {arm.name for arm in found}
    formats = sorted(name for name in names if name.startswith(arms.FORMAT))
    against = (arms.TRAINED, arms.FIXED, arms.UNTRAINED, *formats, arms.PASSAGE, arms.NO_EDIT)
    pairs = [(FOREIGN, other) for other in against if other in names]
    pairs += [(arms.TRAINED, other) for other in (arms.FIXED, arms.UNTRAINED) if other in names]
    return Section(f"student-{letter}", f"Student {letter}: {student}", found, pairs)


def square(sections: Sequence[Section]) -> PlainTable:
    """Teacher by student, with the baselines: accuracy and its 95% interval."""
    by_student = [{arm.name: arm for arm in of.arms} for of in sections]
    rows = []
    for words, names in (
        ("trained on A", (arms.TRAINED, FOREIGN)),
        ("trained on B", (FOREIGN, arms.TRAINED)),
        ("untrained", (arms.UNTRAINED, arms.UNTRAINED)),
        ("best fixed strategy", (arms.FIXED, arms.FIXED)),
        ("oracle", (arms.ORACLE, arms.ORACLE)),
        ("no edit", (arms.NO_EDIT, arms.NO_EDIT)),
    ):
        rows.append([words, *(_with_interval(found.get(name)) for found, name in zip(by_student, names, strict=True))])
    return PlainTable("square", "Who was taught by whom", ["teacher", "student A", "student B"], rows)


def transferred(sections: Sequence[Section]) -> PlainTable:
    """What of the own teacher's gain over the untrained one the other's teacher brings."""
    rows: list[list[str | float | int | None]] = []
    for of, words in zip(sections, ("B→A", "A→B"), strict=True):
        by_name = {arm.name: arm for arm in of.arms}
        if not {arms.TRAINED, FOREIGN, arms.UNTRAINED} <= set(by_name):
            continue
        own = difference_values(by_name[arms.TRAINED], by_name[arms.UNTRAINED])
        other = difference_values(by_name[FOREIGN], by_name[arms.UNTRAINED])
        between = difference_values(by_name[FOREIGN], by_name[arms.TRAINED])
        share = other["mean"] / own["mean"] if own["mean"] and other["mean"] is not None else None
        rows.append(
            [
                words,
                _points(other),
                _points(own),
                _points(between),
                None if share is None or own["verdict"] != "better" else f"{share:.0%}",
            ]
        )
    return PlainTable(
        "transferred",
        "How much of the gain is carried over",
        ["", "gain of the other's teacher", "gain of the own teacher", "other's − own", "carried over"],
        rows,
        caption="Gains over the untrained teacher in percentage points, paired by passage; carried over: their ratio,"
        " where the own teacher's gain is clear.",
    )


def _with_interval(arm: Arm | None) -> str | None:
    values = arm and arm_values(arm)
    if not values or values["accuracy"] is None:
        return None
    low, high = values["ci95"]
    return f"{values['accuracy']:.1%} [{low:.1%}, {high:.1%}]"


def _points(of: Mapping[str, Any]) -> str | None:
    if of["mean"] is None:
        return None
    low, high = of["ci95"]
    return f"{of['mean'] * 100:+.1f} [{low * 100:+.1f}, {high * 100:+.1f}]".replace("-", "−")


def _pictures(sections: Sequence[Section]) -> dict[str, str]:
    from preceptor.reproduce.pictures import grouped

    shown = (arms.NO_EDIT, arms.PASSAGE, arms.UNTRAINED, arms.FIXED, FOREIGN, arms.TRAINED, arms.ORACLE)
    groups = []
    for of in sections:
        by_name = {arm.name: arm for arm in of.arms}
        rows = []
        for name in shown:
            values = arm_values(by_name[name]) if name in by_name else None
            if values and values["ci95"]:
                stress = 2 if name == FOREIGN else 1 if name == arms.TRAINED else 0
                rows.append((values["words"], values["accuracy"], tuple(values["ci95"]), stress))
        groups.append((of.title, rows))
    return (
        {"transfer": grouped(groups, "right answers on held-out passages, %")}
        if any(rows for _, rows in groups)
        else {}
    )
