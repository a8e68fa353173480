"""How far the graders agree with verdicts that somebody recorded: ``python bench/graders.py --records FILE``.

FILE is JSONL of ``{question, gold, answer, correct}`` with an optional ``aliases``. In the cascade the recorded verdict
plays the judge, so what is left are the errors of which the lexical grader was sure. Agreement is given beside Cohen's
kappa, which is 0 for a grader that guesses with the right frequency.

The lexical grader's points were made from one half of SEAL's published answers, chosen by a hash of the question; the
halves are shown apart. ``--fit`` makes the points again from that half and prints them beside the ones in use.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluator.graders.exact import ExactMatch
from evaluator.graders.grader import Given, Verdict, grader_label
from evaluator.graders.lexical import POINTS, Lexical, evidence
from preceptor.tasks import Question


@dataclass(frozen=True, slots=True)
class Record:
    """An answer and what was said about it."""

    given: Given
    correct: bool

    @property
    def of_the_fit(self) -> bool:
        """Whether the points were made from this record's half."""
        return hashlib.sha256(self.given.question.text.encode()).digest()[0] % 2 == 0


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of a grader with the record: counts by (said right, was right), and how many were sent to the judge."""

    right_right: int
    right_wrong: int
    wrong_right: int
    wrong_wrong: int
    sent: int = 0

    @property
    def total(self) -> int:
        """All answers."""
        return self.right_right + self.right_wrong + self.wrong_right + self.wrong_wrong

    @property
    def agreement(self) -> float:
        """Share on which both say the same."""
        return (self.right_right + self.wrong_wrong) / self.total

    @property
    def kappa(self) -> float:
        """Cohen's kappa: agreement beyond that of guessing. 1 where both say the same one thing about everything."""
        said = (self.right_right + self.right_wrong) / self.total
        was = (self.right_right + self.wrong_right) / self.total
        chance = said * was + (1 - said) * (1 - was)
        return 1.0 if chance == 1 else (self.agreement - chance) / (1 - chance)


def agreement(records: Sequence[Record], verdicts: Sequence[Verdict], *, cascade: bool = False) -> Agreement:
    """What the verdicts are worth; in a ``cascade`` the record stands in for every unsure one."""
    said = [
        record.correct if cascade and not verdict.sure else verdict.right
        for record, verdict in zip(records, verdicts, strict=True)
    ]
    pairs = [(right, record.correct) for right, record in zip(said, records, strict=True)]
    return Agreement(
        pairs.count((True, True)),
        pairs.count((True, False)),
        pairs.count((False, True)),
        pairs.count((False, False)),
        sum(not verdict.sure for verdict in verdicts) if cascade else 0,
    )


def read_records(path: Path) -> list[Record]:
    """The records of a file. Raises SystemExit naming file and line."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            question = Question(str(row["question"]), str(row["gold"]), aliases=tuple(row.get("aliases", ())))
            if not isinstance(row["correct"], bool):
                raise ValueError("correct must be true or false")
            records.append(Record(Given(question, str(row["answer"])), row["correct"]))
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}:{number}: is not a record {{question, gold, answer, correct}}: {error}") from None
    if not records:
        raise SystemExit(f"{path} has no records")
    return records


def fit(records: Sequence[Record], penalty: float = 1.0) -> dict[str, float]:
    """Points by logistic regression with an L2 penalty (Newton's method)."""
    import numpy as np

    rows = [
        evidence(record.given.question.text, record.given.question.answer, record.given.answer) for record in records
    ]
    x = np.array([list(row.values()) for row in rows])
    y = np.array([record.correct for record in records], float)
    points = np.zeros(x.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ points))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + penalty * np.eye(len(points))
        points += np.linalg.solve(hessian, x.T @ (y - p) - penalty * points)
    return dict(zip(rows[0], points.tolist(), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; with --json keeps the two numbers that are promised."""
    parser = argparse.ArgumentParser(description="agreement of the graders with recorded verdicts")
    parser.add_argument("--records", type=Path, required=True, help="JSONL of {question, gold, answer, correct}")
    parser.add_argument("--json", type=Path, help="write the kappas here")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N sure disagreements of each kind")
    parser.add_argument("--fit", action="store_true", help="make the lexical grader's points again (needs numpy)")
    options = parser.parse_args(arguments)
    if not options.records.is_file():
        raise SystemExit(f"there is no file {options.records}")
    records = read_records(options.records)
    given = [record.given for record in records]
    lexical, exact = Lexical(), ExactMatch()
    started = time.perf_counter()
    verdicts = lexical.grade(given)
    seconds = time.perf_counter() - started

    print(f"{len(records)} answers, {sum(record.correct for record in records) / len(records):.1%} recorded as right\n")
    print(f"{'':34}{'kappa':>7}{'agree':>8}{'sent':>7}   said right: was right, wrong   said wrong: was right, wrong")
    alone = agreement(records, verdicts)
    cascade = agreement(records, verdicts, cascade=True)
    _print(f"{grader_label(exact)}", agreement(records, exact.grade(given)))
    _print(f"{grader_label(lexical)} alone", alone)
    _print(f"{grader_label(lexical)}, record as judge", cascade)
    for name, half in (("half of the fit", True), ("other half", False)):
        part = [place for place, record in enumerate(records) if record.of_the_fit is half]
        if part:
            some, their = [records[place] for place in part], [verdicts[place] for place in part]
            _print(f"  {name}, alone", agreement(some, their))
            _print(f"  {name}, record as judge", agreement(some, their, cascade=True))
    print(f"\n{1e6 * seconds / len(records):.0f} microseconds an answer")
    for kind, said in (("said right, was wrong", True), ("said wrong, was right", False)):
        shown = [
            record
            for record, verdict in zip(records, verdicts, strict=True)
            if verdict.sure and verdict.right is said and record.correct is not said
        ]
        for record in shown[:: max(1, len(shown) // options.show)][: options.show] if options.show else ():
            question, answer = record.given
            print(f"{kind}: {question.text} | {question.answer} | {answer[:200]!r}")
    if options.fit:
        print("\npoints, in use and made again:")
        for name, value in fit([record for record in records if record.of_the_fit]).items():
            print(f"  {name:32}{POINTS[name]:6.1f}{value:8.2f}")
    if options.json:
        kept = {
            "lexical": {"kappa": alone.kappa},
            "cascade": {"kappa": cascade.kappa, "sent": cascade.sent / cascade.total},
        }
        options.json.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return 0


def _print(name: str, found: Agreement) -> None:
    print(
        f"{name:34}{found.kappa:7.3f}{found.agreement:8.1%}{found.sent / found.total:7.1%}"
        f"   {found.right_right:21}, {found.right_wrong:5}   {found.wrong_right:21}, {found.wrong_wrong:5}"
    )


if __name__ == "__main__":
    sys.exit(main())
