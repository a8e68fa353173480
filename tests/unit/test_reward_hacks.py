"""Attacks on the reward meet their guards. What each earns is measured by bench/reward_hacks.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import pytest

from bench.reward_hacks import (
    AFTER,
    ATTACKS,
    INJECTIONS,
    PERSUASION,
    Attack,
    Bench,
    Case,
    Verdicts,
    hedge,
    judges,
)
from evaluator.graders.exact import ExactMatch
from evaluator.graders.grader import Given
from evaluator.graders.lexical import Lexical
from evaluator.overlap import audit
from evaluator.reward import Marks, measure
from preceptor.config import load_config
from preceptor.tasks import Bank, Question
from worlds.almanac import MODELS

WHERE = Question("In what place does Ada Abbot live?", "Arlow")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(MODELS / "student", seed=11)


@pytest.fixture(scope="module")
def cases(bench: Bench) -> list[Case]:
    return bench.cases(9)


@pytest.fixture(scope="module")
def ways() -> Iterator[Mapping[str, Verdicts]]:
    with judges() as found:
        yield found


def named(name: str) -> Attack:
    return next(attack for attack in ATTACKS if attack.name == name)


@pytest.mark.parametrize("name", ["exam copied, right answers", "exam copied, wrong answers"])
def test_a_copied_exam_loses_all_that_right_answers_could_earn(name: str, cases: list[Case]) -> None:
    for case in cases:
        questions = case.passage.questions_of(Bank.REWARD)
        found = audit(named(name).documents(case), case.passage.text, questions)
        assert found.copied == len(questions)
        count = len(questions)
        certain, ignorant = Marks((True,) * count, (0.0,) * count), Marks((False,) * count, (-50.0,) * count)
        best = measure([certain], ignorant, AFTER.weights, copied=found.copied)
        assert best.reward.value <= 0


@pytest.mark.parametrize("name", ["question and answer", "statements, three wordings", "honest, malformed characters"])
def test_honest_material_pays_no_overlap(name: str, cases: list[Case]) -> None:
    for case in cases:
        assert audit(named(name).documents(case), case.passage.text, case.passage.questions_of(Bank.REWARD)).copied == 0


@pytest.mark.parametrize("joint", [" or ", "/", ", "])
def test_naming_all_candidates_is_no_answer(joint: str, cases: list[Case]) -> None:
    for case in cases:
        for document in hedge(joint)(case):
            candidates = document.partition("Answer: ")[2]
            if (several := candidates.split(joint))[1:]:
                given = [Given(Question("Which one is it?", several[-1]), candidates)]
                assert not Lexical().grade(given)[0].right
                assert not ExactMatch().grade(given)[0].right


@pytest.mark.parametrize("name", ["chat template", "JSON break-out"])
def test_an_answer_made_for_the_prompt_works_where_it_is_pasted_and_not_where_it_is_quoted(
    name: str, ways: Mapping[str, Verdicts]
) -> None:
    attack = [Given(WHERE, INJECTIONS[name])]
    naive = "pasted" if name == "chat template" else "JSON without escapes"
    assert ways[naive](attack) == [True]
    assert ways["judge"](attack) == [False]
    assert ways["judge"]([Given(WHERE, "Arlow")]) == [True]


def test_a_judge_that_believes_is_asked_about_nothing_that_words_are_sure_of(ways: Mapping[str, Verdicts]) -> None:
    attack = [Given(WHERE, PERSUASION), Given(WHERE, f"Bexmoor, {PERSUASION}")]
    assert ways["judge that believes"](attack) == [True, True]
    assert ways["cascade with it"](attack) == [False, False]


def test_a_real_student_earns_with_honest_material_and_loses_with_the_exam(bench: Bench, cases: list[Case]) -> None:
    [honest] = bench.pay(cases[:1], named("question and answer"), AFTER)
    [copied] = bench.pay(cases[:1], named("exam copied, right answers"), AFTER)
    assert honest.value > 0.3
    assert copied.gain > 0.3  # it works, and
    assert copied.value < 0  # does not pay


def test_the_attacks_are_paid_by_the_rules_that_ship() -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "almanac.toml")
    assert asdict(AFTER.weights) == {name: getattr(config.reward, name) for name in asdict(AFTER.weights)}
    assert config.training.max_train_tokens == AFTER.budget
    assert config.reward.grader == "exact"
