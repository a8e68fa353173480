"""Arms over seeds: what the tables of ``preceptor reproduce`` are made of."""

from __future__ import annotations

import json
from typing import Any

import pytest

from preceptor import arms
from preceptor.reproduce import transfer
from preceptor.reproduce.experiment import Findings, PlainTable
from preceptor.reproduce.lab import Failed, evaluations_of
from preceptor.reproduce.report import files_of, results_of
from preceptor.reproduce.runs import in_order, notes_of, section
from preceptor.reproduce.table import Arm, Outcome, arm_values, arms_of, difference_values, pairs_with, section_values


def summary(seed: int, shares: dict[str, float], fails: str = "", tasks: int = 8) -> dict[str, Any]:
    """A run's summary in which an arm answers the same share of 10 questions about every passage, +- 1 in turn."""
    held: dict[str, Any] = {}
    for name, share in shares.items():
        outcomes: list[dict[str, Any] | None] = [
            {"right": min(max(share * 10 + (-1) ** at, 0), 10), "questions": 10, "retention": 0.5}
            for at in range(tasks)
        ]
        if name == fails:
            outcomes[0] = None
        held[name] = {
            "outcomes": outcomes,
            "malformed": 1 if name == arms.UNTRAINED else 0,
            "too_costly": 2 if name == arms.UNTRAINED else 0,
            "trained_tokens": None if name == arms.NO_EDIT else 1500.0,
            "worker_seconds": None if name == arms.NO_EDIT else 0.5,
        }
    return {
        "run": f"r{seed}",
        "policies": ["base", f"p{seed}"],
        "rounds": [{"worker_seconds": 60.0, "reward": {"mean": 0.1}}] * 2,
        "update_seconds": 24.0,
        "heldout": {
            "tasks": [f"task-{at}" for at in range(tasks)],
            "arms": {**held, arms.SHUFFLED: None},
            "left_out": {arms.EXTERNAL: {"reason": "SERVER_UNREACHABLE", "message": "nobody is there"}},
            "selection_worker_seconds": 7.5,
        },
    }


SHARES = {arms.NO_EDIT: 0.0, arms.UNTRAINED: 0.3, arms.FIXED: 0.6, arms.TRAINED: 0.7}


def by_name(found: list[Arm]) -> dict[str, Arm]:
    return {arm.name: arm for arm in found}


def test_seeds_are_pooled_and_told_one_by_one() -> None:
    other = {**SHARES, arms.TRAINED: 0.9}
    found = by_name(arms_of({0: summary(0, SHARES), 1: summary(1, other)}))
    values = arm_values(found[arms.TRAINED], price=3600.0)
    assert values["accuracy"] == pytest.approx(0.8)
    assert values["by_seed"] == {"0": pytest.approx(0.7), "1": pytest.approx(0.9)}
    low, high = values["ci95"]
    assert low < 0.8 < high
    assert (values["passages"], values["questions"], values["seeds"]) == (16, 160, 2)
    assert (values["trained_tokens"], values["worker_seconds"], values["retention"]) == (1500, 0.5, 0.5)
    assert values["preparation_seconds"] == 2 * 60 + 24
    assert (values["cost"], values["preparation_cost"]) == (0.5, 144.0)
    assert arm_values(found[arms.FIXED])["preparation_seconds"] == 7.5
    assert arm_values(found[arms.FIXED])["cost"] is None


def test_the_same_passage_of_another_seed_is_another_passage() -> None:
    found = by_name(arms_of({0: summary(0, SHARES), 1: summary(1, SHARES)}))
    assert len(found[arms.TRAINED].outcomes) == 16


def test_a_passage_that_all_seeds_share_is_drawn_with_all_its_seeds() -> None:
    def arm(name: str, seeds: int, shift: int = 0) -> Arm:
        rights = (1, 9, 4, 6)
        return Arm(
            name,
            outcomes={(s, str(at)): Outcome(rights[(at + shift) % 4], 10) for s in range(seeds) for at in range(8)},
        )

    one, three = arm_values(arm("x", 1)), arm_values(arm("x", 3))
    assert three["ci95"] == [pytest.approx(edge) for edge in one["ci95"]]  # eight passages, not twenty-four
    alone, together = (difference_values(arm("x", seeds), arm("y", seeds, 1)) for seeds in (1, 3))
    assert together["ci95"] == [pytest.approx(edge) for edge in alone["ci95"]]
    assert together["needed_questions"] == alone["needed_questions"]


def test_what_failed_is_left_out_of_the_arm_and_of_its_pairs_and_counted() -> None:
    found = by_name(arms_of({0: summary(0, SHARES, fails=arms.FIXED)}))
    assert arm_values(found[arms.FIXED])["failed"] == 1
    assert arm_values(found[arms.FIXED])["passages"] == 7
    assert difference_values(found[arms.TRAINED], found[arms.FIXED])["passages"] == 7
    assert difference_values(found[arms.TRAINED], found[arms.UNTRAINED])["passages"] == 8
    assert arm_values(found[arms.UNTRAINED])["malformed"] == 1
    assert arm_values(found[arms.UNTRAINED])["too_costly"] == 2


def test_an_arm_that_could_not_be_had_says_why_and_is_compared_with_nothing() -> None:
    found = arms_of({0: summary(0, SHARES)})
    values = arm_values(by_name(found)[arms.EXTERNAL])
    assert values["accuracy"] is None
    assert values["left_out"] == "SERVER_UNREACHABLE: nobody is there"
    assert arms.SHUFFLED not in by_name(found)
    assert (arms.TRAINED, arms.EXTERNAL) not in pairs_with(arms.TRAINED, found)


def test_differences_are_paired_and_say_what_may_be_claimed() -> None:
    found = by_name(arms_of({seed: summary(seed, {**SHARES, arms.FIXED: 0.69}) for seed in range(3)}))
    clear = difference_values(found[arms.TRAINED], found[arms.UNTRAINED])
    assert clear["mean"] == pytest.approx(0.4)
    # Every passage differs by the same, so nothing moves the difference when passages are drawn again.
    assert clear["ci95"] == [pytest.approx(0.4), pytest.approx(0.4)]
    assert clear["seeds_ci95"] == [pytest.approx(0.4), pytest.approx(0.4)]
    assert (clear["verdict"], clear["needed_questions"]) == ("better", None)
    assert difference_values(found[arms.UNTRAINED], found[arms.TRAINED])["verdict"] == "worse"
    two = Arm("x", outcomes={(0, str(at)): Outcome(5 + (-1) ** at, 10) for at in range(8)})
    same = Arm("y", outcomes={(0, str(at)): Outcome(5 + (-1) ** (at // 2), 10) for at in range(8)})
    unclear = difference_values(two, same)
    assert unclear["verdict"] == "not told apart"
    assert unclear["seeds_ci95"] is None
    nothing = difference_values(two, Arm("z"))
    assert (nothing["mean"], nothing["verdict"], nothing["passages"]) == (None, None, 0)


def test_seeds_that_disagree_make_the_interval_over_seeds_wide() -> None:
    runs = {seed: summary(seed, {**SHARES, arms.TRAINED: 0.5 + 0.1 * seed}) for seed in range(3)}
    found = by_name(arms_of(runs))
    of = difference_values(found[arms.TRAINED], found[arms.UNTRAINED])
    assert list(of["by_seed"].values()) == [pytest.approx(0.2), pytest.approx(0.3), pytest.approx(0.4)]
    low, high = of["seeds_ci95"]  # t of two degrees of freedom is 4.30, the error 0.1 / sqrt(3)
    assert (low, high) == (pytest.approx(0.3 - 0.2484, abs=1e-3), pytest.approx(0.3 + 0.2484, abs=1e-3))


def test_arms_stand_from_no_edit_to_the_controls() -> None:
    names = [arms.ORACLE, arms.TRAINED, "format:rewrite", arms.NO_EDIT, "format:copy", arms.PASSAGE]
    ordered = [arm.name for arm in in_order([Arm(name) for name in names])]
    assert ordered == [arms.NO_EDIT, arms.PASSAGE, "format:rewrite", "format:copy", arms.TRAINED, arms.ORACLE]


def test_unequal_tokens_and_a_ceiling_that_is_none_are_said() -> None:
    run = summary(0, {**SHARES, arms.IN_CONTEXT: 0.1})
    run["heldout"]["arms"][arms.FIXED]["trained_tokens"] = 1000.0
    said = " ".join(notes_of(section("s", "Student s", {0: run})))
    assert "best fixed strategy 1,000" in said
    assert "untrained teacher 1,500" not in said
    assert "no ceiling" in said
    assert "nobody is there" in said


def written(
    findings: Findings, failures: tuple[Failed, ...] = (), evaluations: tuple[int, int] = (100, 0)
) -> dict[str, str]:
    machine = {"cores": 2, "workers": 2}
    command = "preceptor reproduce knowledge"
    results = results_of("knowledge", command, findings, failures, None, 75.0, machine, evaluations)
    return files_of(results, findings.pictures)


def test_the_same_is_written_for_programs_and_for_people_and_nothing_in_it_is_markup() -> None:
    nasty = "a|b <script>alert(1)</script>"
    findings = Findings(
        title="Knowledge",
        about=nasty,
        sections=[section("s", "Student s", {0: summary(0, SHARES)})],
        tables=[PlainTable("t", "A table", ["x", nasty], [["y", None], ["z", 0.123456]])],
        notes=[nasty],
    )
    files = written(findings, (Failed("seed 1", "TOO_MANY_FAILURES", nasty),))
    results = json.loads(files["results.json"])
    assert results["schema"] == "preceptor.reproduce/1"
    assert results["sections"][0]["arms"][0]["arm"] == arms.NO_EDIT
    assert results["failures"] == [{"what": "seed 1", "reason": "TOO_MANY_FAILURES", "message": nasty}]
    table = files["table.md"]
    assert "| trained teacher | 70.0% |" in table
    assert "left out: SERVER_UNREACHABLE" in table
    assert "| z | 0.123 |" in table
    assert "| y | – |" in table
    assert "Made by `preceptor reproduce knowledge` on 2 cores, 2 workers in 1 min 15 s. None of 100 " in table
    assert "(s-arms.svg)" in table
    page = files["report.html"]
    assert "<script" not in page
    assert "alert(1)" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "NaN" not in files["results.json"]
    for name in ("s-arms.svg", "s-differences.svg"):
        assert files[name].startswith("<svg")
        assert "prefers-color-scheme" in files[name]
        assert "<script" not in files[name]


def test_what_was_not_measured_is_written_as_such() -> None:
    empty = section("s", "Student s", {0: {"rounds": [], "heldout": None}})
    files = written(Findings(title="t", about="", sections=[empty]))
    assert json.loads(files["results.json"])["sections"][0]["arms"] == []
    assert section_values(empty)["differences"] == []


def test_transfer_sets_the_others_teacher_beside_the_own_one() -> None:
    own = {seed: summary(seed, SHARES) for seed in range(2)}
    foreign = {seed: summary(seed, {**SHARES, arms.TRAINED: 0.5}) for seed in range(2)}
    of = transfer.section("B", "almanac-qwen2", own, foreign, "A")
    names = [arm.name for arm in of.arms]
    assert names.index(transfer.FOREIGN) == names.index(arms.TRAINED) + 1
    words = {arm.name: arm.words for arm in of.arms}
    assert words[arms.TRAINED] == "B→B: teacher trained on B"
    assert words[transfer.FOREIGN] == "A→B: teacher trained on A"
    differences = {(d["first"], d["second"]): d["mean"] for d in section_values(of)["differences"]}
    assert differences[transfer.FOREIGN, arms.TRAINED] == pytest.approx(-0.2)
    assert differences[transfer.FOREIGN, arms.FIXED] == pytest.approx(-0.1)
    other = transfer.section("A", "almanac", own, foreign, "B")
    table = transfer.square([other, of])
    assert table.rows[0][0] == "trained on A"
    assert str(table.rows[0][1]).startswith("70.0%")  # A→A
    assert str(table.rows[0][2]).startswith("50.0%")  # A→B
    assert str(table.rows[1][1]).startswith("50.0%")  # B→A
    carried = transfer.transferred([other, of])
    assert [row[0] for row in carried.rows] == ["B→A", "A→B"]
    assert carried.rows[1][-1] == "50%"  # 0.2 of 0.4
    assert "transfer" in transfer._pictures([other, of])


def test_the_page_says_what_was_known_before_since_its_time_means_little_then() -> None:
    findings = Findings(title="Knowledge", about="", sections=[])
    assert "All of 100 evaluations were known from earlier" in written(findings, evaluations=(100, 100))["table.md"]
    some = written(findings, evaluations=(100, 40))
    assert "40 of 100 evaluations were known from earlier" in some["report.html"]
    assert json.loads(some["results.json"])["evaluations"] == {"asked": 100, "known": 40}


def test_evaluations_of_a_run_are_those_of_its_rounds_and_of_its_measurement() -> None:
    counts = {"succeeded": 5, "failed": 1, "malformed": 2, "cached": 3}
    assert evaluations_of({"rounds": [{"evaluations": counts}] * 2, "heldout": {"evaluations": counts}}) == (18, 9)
    assert evaluations_of({"rounds": [], "heldout": None}) == (0, 0)
