"""How many documents real completions hold: a table by prompt format.

    python -m bench.splitting --data DIR [--json FILE] [--show N]

DIR/self_edits/*.jsonl: lines of {format, title, completion}, as SEAL published its self-edits. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, quantiles

from preceptor.splitting import split

# The published formats: how we split what they ask for, and what stood at the end of their prompt.
SPLITTINGS = {
    "implications": ("numbered", ""),
    "implications-long": ("numbered", ""),
    "rewrite": ("auto", ""),
    "self-qa": ("qa", "Question 1: "),
}
# What has no place in study material: numbers of a list, a chat, an announcement.
DEBRIS = re.compile(r"^\W*\d{1,3}[.)]\s|You are an AI|^(Sure|Certainly|Here (is|are))\b|<\|", re.MULTILINE)


def rows(folder: Path) -> list[dict[str, str]]:
    """The completions of a folder's files."""
    files = sorted((folder / "self_edits").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def documents_of(row: dict[str, str]) -> tuple[str, ...]:
    """The study documents of one completion."""
    how, opening = SPLITTINGS.get(row["format"], ("auto", ""))
    return split(opening + row["completion"], how, title=row["title"])


def table(found: Sequence[dict[str, str]]) -> list[dict[str, object]]:
    """One line for each format."""
    lines: list[dict[str, object]] = []
    for name in dict.fromkeys(row["format"] for row in found):
        rows_of = [row for row in found if row["format"] == name]
        split_up = [documents_of(row) for row in rows_of]
        counts = [len(documents) for documents in split_up]
        low, middle, high = quantiles(counts, n=4)
        every = [document for documents in split_up for document in documents]
        kept = sum(map(len, every)) / sum(len(row["completion"]) for row in rows_of)
        raw = [len([line for line in row["completion"].splitlines() if line.strip()]) for row in rows_of]
        lines.append(
            {
                "format": name,
                "splitting": SPLITTINGS.get(name, ("auto", ""))[0],
                "completions": len(rows_of),
                "without documents": counts.count(0),
                "documents": f"{min(counts)} / {low:g} / {middle:g} / {high:g} / {max(counts)}",
                "lines that are not blank": round(mean(raw), 1),
                "characters of a document": round(mean(map(len, every))),
                "share of the text that is kept": round(kept, 3),
                "of the rest, behind the last document": round(_behind(rows_of), 2),
                "documents with debris": sum(bool(DEBRIS.search(document)) for document in every),
            }
        )
    return lines


def _behind(rows_of: Sequence[dict[str, str]]) -> float:
    """Share of the dropped characters that stand behind the end of the last document, where that is found again."""
    behind = dropped = 0
    for row in rows_of:
        documents, text = documents_of(row), row["completion"]
        if documents and (at := text.rfind(end := documents[-1].splitlines()[-1].removeprefix("Answer: ")[-40:])) >= 0:
            behind += len(text) - at - len(end)
            dropped += max(0, len(text) - sum(map(len, documents)))
    return behind / max(1, dropped)


def markdown(lines: Sequence[dict[str, object]]) -> str:
    """The table for docs/formats.md."""
    heads = list(lines[0])
    out = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*out, *(f"| {' | '.join(str(line[head]) for head in heads)} |" for line in lines)])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="write the table there, too")
    parser.add_argument("--show", type=int, default=0, help="print every Nth completion split up, for people")
    arguments = parser.parse_args()
    found = rows(arguments.data)
    if not found:
        parser.error(f"there are no completions in {arguments.data / 'self_edits'}")
    lines = table(found)
    print(markdown(lines))
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
    for row in found[:: arguments.show] if arguments.show else ():
        print(f"\n# {row['format']}: {row['title']}")
        for document in documents_of(row):
            print("  -", document.replace("\n", "\n    "))


if __name__ == "__main__":
    main()
