"""The graders' benchmark: kappa is Cohen's, the report keeps its keys, and the promised numbers hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench.graders import Agreement, Record, agreement, main
from evaluator.graders.grader import Given, Verdict
from preceptor.tasks import Question


def records(correct: list[bool]) -> list[Record]:
    return [Record(Given(Question("?", "gold"), "answer"), one) for one in correct]


def test_kappa_is_cohens() -> None:
    # The textbook example: 20 both yes, 15 both no, 5 and 10 apart; agreement 0.7, by chance 0.5.
    found = Agreement(right_right=20, right_wrong=5, wrong_right=10, wrong_wrong=15)
    assert found.agreement == pytest.approx(0.7)
    assert found.kappa == pytest.approx(0.4)
    assert Agreement(3, 0, 0, 0).kappa == 1.0


def test_in_a_cascade_the_record_stands_in_for_what_is_unsure() -> None:
    verdicts = [Verdict(True), Verdict(True, sure=False), Verdict(False, sure=False)]
    found = agreement(records([True, False, True]), verdicts, cascade=True)
    assert (found.agreement, found.sent) == (1.0, 2)
    assert agreement(records([True, False, True]), verdicts).agreement == pytest.approx(1 / 3)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_the_report_keeps_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"question": "Where does she live?", "gold": "Lisbon", "answer": "In Lisbon.", "correct": True}
    file = write(tmp_path / "records.jsonl", row, {**row, "answer": "Porto", "correct": False})
    main(["--records", str(file), "--json", str(tmp_path / "report.json"), "--show", "1", "--fit"])
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept == {"lexical": {"kappa": 1.0}, "cascade": {"kappa": 1.0, "sent": 0.0}}
    assert "lexical/2 alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row", [{"question": "?"}, [], "text", {"question": "?", "gold": "a", "answer": "b", "correct": "no"}]
)
def test_a_bad_record_is_named_with_its_line(tmp_path: Path, row: object) -> None:
    good = {"question": "?", "gold": "a", "answer": "b", "correct": False}
    with pytest.raises(SystemExit, match=r"records\.jsonl:2: "):
        main(["--records", str(write(tmp_path / "records.jsonl", good, row))])


def test_what_is_promised_holds_on_the_published_answers(tmp_path: Path) -> None:
    folder = os.environ.get("PRECEPTOR_TEST_DATA", "")
    file = Path(folder) / "graded" / "answers.jsonl"
    if not folder or not file.is_file():
        pytest.skip("PRECEPTOR_TEST_DATA names no folder with graded/answers.jsonl")
    main(["--records", str(file), "--json", str(tmp_path / "report.json")])
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["lexical"]["kappa"] >= 0.74
    assert kept["cascade"]["kappa"] >= 0.88
    assert kept["cascade"]["sent"] <= 0.25
