"""The forgetting matrix, what was kept, and what is replayed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from preceptor.adapt.subject import Subject
from preceptor.config import RunConfig
from preceptor.convert import task_to_proto
from preceptor.errors import PreceptorError
from preceptor.reproduce.continual import EARLIER, NO_REPLAY, REPLAY, _check, findings, protocol_of, replay_of
from preceptor.reproduce.forgetting import Chain, Material, kept_of, matrix
from preceptor.tasks import Bank, Passage, Question
from preceptor.union import union_task
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import types_pb2 as types

PASSAGES = tuple(
    Passage(
        name,
        f"All about {name}.",
        tuple(Question(f"What is {number} of {name}?", "this", Bank.SEALED) for number in range(2)),
    )
    for name in "ab"
)
OLD = tuple(f"old {number}" for number in range(12))


def material(seed: int = 0, edits: tuple[types.SelfEdit | None, ...] | None = None) -> Material:
    config = RunConfig.model_validate({"tasks": {"world": "almanac"}, "seed": seed, "training": {"replay_share": 0.8}})
    tasks = [task_to_proto(passage) for passage in PASSAGES]
    return Material(
        seed=seed,
        config=config,
        subject=Subject(PASSAGES, (Question("Who?", "he"), Question("What?", "it")), OLD),
        union=union_task(tasks, types.QUESTION_BANK_SEALED),
        student=types.PinnedStudent(name="s", source="/s", commit="c"),
        edits=edits or (types.SelfEdit(documents=["a1", "a2"]), types.SelfEdit(documents=["b1"])),
    )


def evaluation(correct: str, probes: str = "11", before: str = "0000", adapter: str = "x") -> evaluator.Evaluation:
    def bits(text: str) -> list[bool]:
        return [letter == "1" for letter in text]

    made = evaluator.Evaluation(state=evaluator.EVALUATION_STATE_SUCCEEDED)
    made.baseline.correct.extend(bits(before))
    made.baseline.probes_correct.extend([True, True])
    trial = made.trials.add(correct=bits(correct), probes_correct=bits(probes), trained_tokens=100, seconds=1.0)
    trial.adapter.sha256 = adapter
    return made


def chain(way: str, *evaluations: evaluator.Evaluation, seed: int = 0) -> Chain:
    made = Chain(material(seed), way, types.PinnedStudent(name="s", source="/s", commit="c"))
    for one in evaluations:
        made.take(one)
    return made


def test_the_matrix_has_a_row_before_anything_and_one_after_each_edit() -> None:
    one = chain(NO_REPLAY, evaluation("1100"), evaluation("0111", probes="10"))
    assert matrix([one]) == [[0.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.5, 1.0, 0.5]]
    other = chain(NO_REPLAY, evaluation("1100"), evaluation("1111"), seed=1)
    assert matrix([one, other])[2] == [0.75, 1.0, 0.75]


def test_what_is_kept_is_a_share_of_what_was_right_after_its_own_edit() -> None:
    found = kept_of([chain(NO_REPLAY, evaluation("1000"), evaluation("0111", probes="10"))], 200)
    assert found.learnt is not None
    assert found.kept is not None
    assert found.final is not None
    assert found.old is not None
    assert found.learnt.mean == pytest.approx(3 / 4)
    assert found.kept.mean == pytest.approx(2 / 3)  # one answer about a is gone; the new one is no kept one
    assert found.final.mean == pytest.approx(3 / 4)
    assert found.old.mean == pytest.approx(1 / 2)
    assert (found.tokens, found.seconds) == (200, 2.0)


def test_every_edit_stands_on_those_before() -> None:
    one = chain(REPLAY, evaluation("1100", adapter="e1"), evaluation("1111", adapter="e2"))
    assert [adapter.sha256 for adapter in one.student.adapters] == ["e1", "e2"]


def test_an_edit_that_was_not_kept_is_no_link_of_a_chain() -> None:
    found = evaluation("1100")
    _check(found)
    found.trials[0].ClearField("adapter")
    with pytest.raises(PreceptorError, match="gave no adapter") as caught:
        _check(found)
    assert caught.value.reason == "VERSION_SKEW"


def test_a_passage_of_which_nothing_was_written_leaves_the_student_as_it_was() -> None:
    one = chain(REPLAY, evaluation("1100"))
    one.repeat()
    assert one.rows[0] == one.rows[1]
    assert len(one.student.adapters) == 1


def test_nothing_was_written_of_the_first_passage() -> None:
    one = Chain(material(), REPLAY, types.PinnedStudent(name="s", source="/s", commit="c"))
    one.repeat()
    one.take(evaluation("1011", before="1000"))
    assert matrix([one]) == [[0.5, 0.0, 1.0], [0.5, 0.0, 1.0], [0.5, 1.0, 1.0]]
    found = kept_of([one], 200)
    assert found.learnt is not None
    assert found.learnt.mean == pytest.approx(3 / 4)
    assert findings([one], []).data["chains"][0]["right"] == [[1, 0], [1, 2]]


def test_a_chain_without_any_edit_is_no_measurement() -> None:
    one = Chain(material(), REPLAY, types.PinnedStudent(name="s", source="/s", commit="c"))
    one.repeat()
    assert not one.whole
    one.take(evaluation("1011"))
    assert one.whole
    one.broken = True
    assert not one.whole


def test_a_passage_that_all_seeds_share_is_drawn_once() -> None:
    one = kept_of([chain(NO_REPLAY, evaluation("1100"), evaluation("1100"))], 500)
    three = kept_of([chain(NO_REPLAY, evaluation("1100"), evaluation("1100"), seed=seed) for seed in range(3)], 500)
    assert one.final == three.final  # the same two passages, whoever was trained how often


def test_so_much_of_the_replay_is_of_earlier_edits() -> None:
    found = replay_of(OLD, ["a1", "a2"])
    assert found[: len(OLD)] == list(OLD)
    assert sum(document.startswith("a") for document in found) / len(found) == pytest.approx(EARLIER, abs=0.03)
    assert replay_of(OLD, []) == list(OLD)
    assert replay_of([], ["a1"]) == ["a1"]
    assert replay_of(OLD, ["a"] * 100).count("a") == 100  # once at least


def test_only_replay_replays_and_both_keep_what_they_learn() -> None:
    with_replay, without = chain(REPLAY), chain(NO_REPLAY)
    first, second = protocol_of(with_replay, 0), protocol_of(with_replay, 1)
    assert list(first.replay_documents) == list(OLD)
    assert list(second.replay_documents).count("a1") == 4
    assert (first.training.replay_share, protocol_of(without, 1).training.replay_share) == (0.8, 0.0)
    assert not protocol_of(without, 1).replay_documents
    assert (first.training.epochs, protocol_of(without, 1).training.epochs) == (8, 40)  # as many documents in all
    assert first.training.keep
    assert first.seeds != second.seeds
    assert first.seeds == protocol_of(without, 0).seeds


def test_with_nothing_to_replay_yet_an_edit_trains_as_many_documents() -> None:
    made = material()
    bare = replace(made, subject=Subject(PASSAGES, (), ()))
    with_replay, without = (Chain(bare, way, bare.student) for way in (REPLAY, NO_REPLAY))
    first = protocol_of(with_replay, 0).training
    assert (first.replay_share, first.epochs) == (0.0, 40)
    assert protocol_of(without, 0).training == first
    assert (protocol_of(with_replay, 1).training.replay_share, protocol_of(with_replay, 1).training.epochs) == (0.8, 8)


def test_findings_have_matrices_numbers_and_a_picture() -> None:
    chains = [
        chain(NO_REPLAY, evaluation("1100"), evaluation("0111", probes="10")),
        chain(REPLAY, evaluation("1100"), evaluation("1111")),
    ]
    found = findings(chains, ["a note"])
    kept, without, with_replay = found.tables
    assert [row[0] for row in kept.rows] == [NO_REPLAY, REPLAY]
    assert without.rows[-1] == ["2", "50.0%", "100.0%", "50.0%"]
    assert with_replay.rows[-1] == ["2", "100.0%", "100.0%", "100.0%"]
    assert "no replay, after the last edit: 50%, 100%, 50%" in found.pictures["forgetting"]
    assert found.data["kept"][REPLAY]["kept"]["mean"] == 1.0
    assert found.data["chains"][0]["right"] == [[2, 0], [1, 2]]


def test_what_nobody_was_asked_is_no_number() -> None:
    knows_nothing = evaluation("1100", probes="00")
    del knows_nothing.baseline.probes_correct[:]
    knows_nothing.baseline.probes_correct.extend([False, False])
    found = findings([chain(NO_REPLAY, knows_nothing)], [])
    assert found.data["matrices"][NO_REPLAY] == [[0.0, 0.0, None], [1.0, 0.0, None]]
    assert found.tables[1].rows[-1] == ["1", "100.0%", "0.0%", None]
    assert "100%, 0%, not asked" in found.pictures["forgetting"]
    json.dumps(found.data, allow_nan=False)  # as results.json is written
