"""What is left of an experiment: results.json for programs, table.md and report.html for people, pictures as files.

All three say the same, and all of it comes from ``results``: the pages can be made again from results.json alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from preceptor import __version__, arms
from preceptor.errors import PreceptorError
from preceptor.reproduce.experiment import Findings
from preceptor.reproduce.lab import Failed
from preceptor.reproduce.table import section_values

SCHEMA = "preceptor.reproduce/1"


def results_of(
    name: str,
    command: str,
    findings: Findings,
    failures: Sequence[Failed],
    price: float | None,
    seconds: float,
    machine: Mapping[str, Any],
    evaluations: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """Everything that was found as plain JSON values. ``command`` made it, ``machine`` says on what; ``evaluations``
    were asked for and of them known before."""
    return {
        "schema": SCHEMA,
        "version": __version__,
        "experiment": name,
        "command": command,
        "title": findings.title,
        "about": findings.about,
        "sections": [section_values(replace(section, price=price)) for section in findings.sections],
        "tables": [asdict(table) for table in findings.tables],
        "pictures": list(findings.pictures),
        "failures": [asdict(failure) for failure in failures],
        "notes": list(findings.notes),
        "price_per_worker_hour": price,
        "seconds": round(seconds, 1),
        "machine": dict(machine),
        "evaluations": {"asked": evaluations[0], "known": evaluations[1]},
        "data": dict(findings.data),
    }


def files_of(results: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, str]:
    """File name -> text of everything there is to write. ``own``: the experiment's own pictures (name -> SVG)."""
    from preceptor.drawing import standalone

    drawn = {**section_pictures(results), **own}
    return {
        "results.json": json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "table.md": markdown(results, drawn),
        "report.html": html(results, drawn),
        **{f"{name}.svg": standalone(svg) for name, svg in drawn.items()},
    }


def section_pictures(results: Mapping[str, Any]) -> dict[str, str]:
    """Accuracy by arm and the paired differences of each section. Raises PreceptorError(EXTRA_MISSING)."""
    try:
        from preceptor.drawing import accuracy_by_arm, differences
    except ImportError as error:
        raise PreceptorError("EXTRA_MISSING", f"pictures need the extra `report` ({error.name} is missing)") from None
    drawn = {}
    for section in results["sections"]:
        name = file_name(section["name"])
        rows = [
            (arm["words"], arm["accuracy"], tuple(arm["ci95"]), arm["arm"] == arms.TRAINED)
            for arm in section["arms"]
            if arm["ci95"]
        ]
        if rows:
            drawn[f"{name}-arms"] = accuracy_by_arm(rows, "right answers, %")
        pairs = [
            (f"− {_word_of(section, of['second'])}", of["mean"], tuple(of["ci95"]), True)
            for of in section["differences"]
            if of["ci95"] and of["first"] == arms.TRAINED
        ]
        if pairs:
            drawn[f"{name}-differences"] = differences(pairs)
    return drawn


def section_picture_names(results: Mapping[str, Any]) -> set[str]:
    """Names that ``section_pictures`` may give."""
    return {f"{file_name(of['name'])}-{kind}" for of in results["sections"] for kind in ("arms", "differences")}


def file_name(name: str) -> str:
    """A section's name as a part of a file's name."""
    return "".join(char if char.isalnum() or char in "._-" else "-" for char in name)


def _word_of(section: Mapping[str, Any], arm: str) -> str:
    return next(str(of["words"]) for of in section["arms"] if of["arm"] == arm)


# ---- as text

ARM_HEADERS = ("arm", "accuracy", "95% interval", "by seed", "retention", "tokens", "seconds", "before, s", "cost", "n")


def arm_cells(arm: Mapping[str, Any]) -> list[str]:
    """A row of the table under ARM_HEADERS."""
    if arm["left_out"]:
        return [arm["words"], f"left out: {arm['left_out']}", *[""] * (len(ARM_HEADERS) - 2)]
    cost = "–"
    if arm["cost"] is not None:
        cost = _money(arm["cost"])
        if arm["preparation_cost"]:
            cost += f" + {_money(arm['preparation_cost'])} once"
    kinds = ("failed", "malformed", "too_costly")
    missing = [f"{arm[kind]} {kind.replace('_', ' ')}" for kind in kinds if arm.get(kind)]
    return [
        arm["words"],
        percent(arm["accuracy"]),
        f"[{percent(arm['ci95'][0])}, {percent(arm['ci95'][1])}]" if arm["ci95"] else "–",
        " / ".join(percent(value, 0) for value in arm["by_seed"].values()),
        percent(arm["retention"]),
        "–" if arm["trained_tokens"] is None else f"{arm['trained_tokens']:,.0f}",
        "–" if arm["worker_seconds"] is None else f"{arm['worker_seconds']:.2f}",
        f"{arm['preparation_seconds']:,.0f}" if arm["preparation_seconds"] else "0",
        cost,
        f"{arm['passages']}" + (f" ({', '.join(missing)})" if missing else ""),
    ]


DIFFERENCE_HEADERS = ("difference", "points", "95% interval", "by seed", "interval over seeds", "verdict")


def difference_cells(of: Mapping[str, Any]) -> list[str]:
    """A row of the table under DIFFERENCE_HEADERS."""
    if of["mean"] is None:
        return [of["words"], "–", "–", "–", "–", "not measured"]
    verdict = of["verdict"]
    if of["needed_questions"]:
        verdict += f" (about {of['needed_questions']:,} questions would show it)"
    return [
        of["words"],
        points(of["mean"]),
        f"[{points(of['ci95'][0])}, {points(of['ci95'][1])}]",
        " / ".join(points(value) for value in of["by_seed"].values()),
        f"[{points(of['seeds_ci95'][0])}, {points(of['seeds_ci95'][1])}]" if of["seeds_ci95"] else "–",
        verdict,
    ]


def markdown(results: Mapping[str, Any], pictures: Mapping[str, str], folder: str = "") -> str:
    """The tables and pictures as a page. ``folder``: where the pictures lie, seen from the page."""
    lines = [f"# {results['title']}", "", results["about"], "", *made_by(results), ""]
    lines += body(results, pictures, folder)
    return "\n".join(lines) + "\n"


def made_by(results: Mapping[str, Any]) -> list[str]:
    """Who made the numbers, when asked how, on what."""
    machine = results["machine"]
    on = f" on {machine['cores']} cores, {machine['workers']} workers" if machine.get("cores") else ""
    parts = [f"Made by `{results['command']}`{on} in {_duration(results['seconds'])}"]
    if (cpu := machine.get("cpu_seconds")) is not None:
        parts.append(f", {_duration(cpu)} of processors' time in all")
    if (load := machine.get("load")) is not None and machine.get("cores") and load > machine["cores"] * 1.5:
        parts.append(f", beside other work (the load was {load:.0f})")
    said = "".join(parts) + "."
    asked, known = results["evaluations"]["asked"], results["evaluations"]["known"]
    if known:
        which = "All" if known == asked else f"{known:,}"
        said += f" {which} of {asked:,} evaluations were known from earlier: anew it takes longer."
    elif asked:
        said += f" None of {asked:,} evaluations was known before."
    return [said]


def body(results: Mapping[str, Any], pictures: Mapping[str, str], folder: str = "", level: int = 2) -> list[str]:
    """The experiment's own pictures and tables, its sections, failures and notes as lines of Markdown. ``level``: of
    the headings."""
    lines: list[str] = []
    in_sections = section_picture_names(results)
    for name in pictures:
        if name not in in_sections:
            lines += [f"![{name}]({folder}{name}.svg)", ""]
    for table in results["tables"]:
        lines += [f"{'#' * level} {table['title']}", ""]
        if table["caption"]:
            lines += [table["caption"], ""]
        lines += [*_table(table["headers"], [[cell(value) for value in row] for row in table["rows"]]), ""]
    for section in results["sections"]:
        lines += [f"{'#' * level} {section['title']}", ""]
        if section["caption"]:
            lines += [section["caption"], ""]
        lines += _table(ARM_HEADERS, [arm_cells(arm) for arm in section["arms"]])
        if section["differences"]:
            lines += ["", *_table(DIFFERENCE_HEADERS, [difference_cells(of) for of in section["differences"]])]
        lines.append("")
        for kind in ("arms", "differences"):
            name = f"{file_name(section['name'])}-{kind}"
            if name in pictures:
                lines += [f"![{section['title']}: {kind}]({folder}{name}.svg)", ""]
    if results["failures"]:
        lines += [f"{'#' * level} What failed", ""]
        lines += [f"- {of['what']}: {of['message']} ({of['reason']})" for of in results["failures"]] + [""]
    if results["notes"]:
        lines += [f"{'#' * level} Notes", "", *(f"- {note}" for note in results["notes"]), ""]
    if results["sections"]:
        lines += [*_legend(), ""]
    return lines


def _legend() -> list[str]:
    return [
        "accuracy: share of right answers over all seeds; 95% interval: passages drawn again, these teachers given;"
        " tokens: trained in a fine-tune; seconds: of a worker, a fine-tune with its answers; before: worker seconds"
        " spent once, before the arm could be used (choosing the strategy; rounds of training and updates), mean of the"
        " seeds; cost: at --price a worker's hour; n: passages. Interval over seeds: Student's t, other teachers."
    ]


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(headers), "|" + "---|" * len(headers), *(line(row) for row in rows)]


def cell(value: str | float | int | None) -> str:
    """As a table shows it."""
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{value * 100:.{digits}f}%"


def points(value: float) -> str:
    """A difference of shares in percentage points."""
    return f"{value * 100:+.1f}".replace("-", "−")


def _money(value: float) -> str:
    return f"${value:,.2f}" if value >= 1 else f"${value:.2g}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


# ---- as a page


def html(results: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """One self-contained page: no script, no request to anywhere. Raises PreceptorError(EXTRA_MISSING)."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise PreceptorError("EXTRA_MISSING", f"the page needs the extra `report` ({error.name} is missing)") from None
    environment = Environment(
        loader=PackageLoader("preceptor.reproduce"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        results=results,
        pictures={name: Markup(svg) for name, svg in pictures.items()},
        own=[name for name in pictures if name not in section_picture_names(results)],
        file_name=file_name,
        arm_headers=ARM_HEADERS,
        arm_cells=arm_cells,
        difference_headers=DIFFERENCE_HEADERS,
        difference_cells=difference_cells,
        cell=cell,
        made_by=made_by(results)[0].replace("`", ""),
        legend=_legend()[0],
        trained=arms.TRAINED,
    )
