"""Writes docs/reproduce.md from the result files in docs/reproduce, so that every number on it was measured.

    python scripts/write_reproduce_page.py                       # from what is in docs/reproduce
    python scripts/write_reproduce_page.py reproduced/knowledge ...  # takes over these folders' results first

A result file is what `preceptor reproduce` wrote; no number on the page is typed by hand.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor import arms
from preceptor.reproduce.experiment import EXPERIMENTS
from preceptor.reproduce.report import body, made_by, points

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "reproduce"
PAGE = DOCS / "reproduce.md"
SEEDS = 3

INTRODUCTION = """# The paper's experiments, with one command each

```bash
preceptor reproduce knowledge     # what a student knows after reading, by who wrote what it read
preceptor reproduce fewshot       # rules from a few demonstrations (ARC's kind), by who chose the augmentations
preceptor reproduce batch         # many passages in one update
preceptor reproduce transfer      # a teacher trained against one student, used for another
preceptor reproduce continual     # passages one after the other: what is forgotten
```

Each runs all arms for three seeds (`--seeds`) on the worlds that ship and prints one table; `--out` gets
`results.json`, `table.md`, `report.html` and the pictures. Ctrl-C and the same command again goes on where it stopped:
what is known is not done again, and `batch` and `transfer` use the teachers that `knowledge` has trained. A part that
fails is counted and said, and the rest goes on. `--dry-run` prints the steps, `--price` a worker's hour fills in the
cost.

With real models it is the same command: `preceptor reproduce knowledge --full --tasks squad.json --students
NAME=Qwen/Qwen2.5-7B` (`fewshot --full --tasks challenges.json --solutions solutions.json`). The configs are in
`configs/reproduce/`. What it would cost is printed before it starts, as an **estimate**: operations counted at an
assumed share of the GPU's rate, and beside it what the same number of fine-tunes would take at the paper's own 30 to 45
seconds each. `--yes` starts without asking. No number on this page was made with real models.

**How sure the numbers are.** Each seed has other passages, another teacher and other fine-tunes. 95% intervals come
from drawing passages again, with the teachers as they are; the *interval over seeds* is Student's t over the seeds' own
differences, which is how far other teachers would move it, and with three seeds it is wide. *Better* and *worse* are
said only where the first interval excludes 0; where it does not, the number of questions is given that would show a
difference of the size that was seen.

This page was written by `python scripts/write_reproduce_page.py` from the result files in [reproduce/](reproduce); the
command that made each is named with its numbers.

"""


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """The page as Markdown."""
    lines = INTRODUCTION.split("\n")
    for of in results:
        lines += [f"## {of['title']}", "", of["about"], "", *made_by(of), ""]
        seeds = max((arm["seeds"] for section in of["sections"] for arm in section["arms"]), default=SEEDS)
        if seeds < SEEDS:
            lines += [f"**Only {seeds} of {SEEDS} seeds were measured**: the interval over seeds says nothing yet.", ""]
        lines += [f"**What did not work.** {line}" if number == 0 else line for number, line in enumerate(failed(of))]
        lines += ["", *body(of, dict.fromkeys(_pictures(of["experiment"]), ""), f"reproduce/{of['experiment']}-", 3)]
    missing = [name for name in EXPERIMENTS if name not in {of["experiment"] for of in results}]
    if missing:
        lines += ["## Not on this page yet", "", f"{', '.join(missing)}: no result file is there.", ""]
    return "\n".join(line.rstrip() for line in lines).rstrip() + "\n"


def failed(results: Mapping[str, Any]) -> list[str]:
    """Where the trained teacher was no better than something simpler, and what failed, in a sentence each."""
    said = []
    for section in results["sections"]:
        lost, unclear = [], []
        for of in section["differences"]:
            if of["first"] != arms.TRAINED or of["second"] in (arms.ORACLE, arms.IN_CONTEXT):
                continue
            name = f"{of['words'].partition(' − ')[2]} ({points(of['mean'])})" if of["mean"] is not None else ""
            if of["verdict"] == "worse":
                lost.append(name)
            elif of["verdict"] == "not told apart":
                unclear.append(name)
        for words, names in (("worse than", lost), ("not told apart from", unclear)):
            if names:
                said.append(f"{section['title']}: the trained teacher was {words} {', '.join(names)} (points).")
    if results["failures"]:
        said.append(f"{len(results['failures'])} parts failed; they are listed below.")
    if said or not results["sections"]:
        return said  # without arms nothing can be said of them
    return ["No simpler arm was as good as the trained teacher, and no part failed."]


def _pictures(experiment: str) -> list[str]:
    prefix = f"{experiment}-"
    return sorted(path.stem.removeprefix(prefix) for path in RESULTS.glob(f"{prefix}*.svg"))


def take(folder: Path) -> None:
    """Copies the results and pictures of one experiment's folder, instead of those that were there."""
    name = json.loads((folder / "results.json").read_text(encoding="utf-8"))["experiment"]
    RESULTS.mkdir(exist_ok=True)
    for old in RESULTS.glob(f"{name}-*.svg"):
        old.unlink()
    shutil.copyfile(folder / "results.json", RESULTS / f"{name}.json")
    for picture in folder.glob("*.svg"):
        shutil.copyfile(picture, RESULTS / f"{name}-{picture.name}")


def read() -> list[dict[str, Any]]:
    """The result files, in the order of the experiments."""
    found = [RESULTS / f"{name}.json" for name in EXPERIMENTS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in found if path.exists()]


def main() -> None:
    """Takes over the folders given, then writes the page."""
    for folder in sys.argv[1:]:
        take(Path(folder))
    PAGE.write_text(page(read()), encoding="utf-8")


if __name__ == "__main__":
    main()
