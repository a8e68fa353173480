"""Few-shot tasks: what is done to a grid can be undone, training sets and votes are right against hand-made cases."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.few_shot.arc_files import read_arc
from preceptor.few_shot.grids import (
    IDENTITY,
    Transformation,
    chain,
    fits,
    flip,
    grid_fault,
    recolouring,
    reflection,
    repetition,
    rotation,
    scaling,
    transformed,
    translation,
    transposition,
)
from preceptor.few_shot.text import document, grid_text, prompt, read_grid, task_text
from preceptor.few_shot.training import permuted_colours, training_documents, training_set, transformations
from preceptor.few_shot.views import views, vote
from preceptor.tasks import Augmentations, FewShotTask, Grid, GridPair

GRID: Grid = ((0, 1, 2), (3, 4, 5))
GRIDS = st.integers(1, 30).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(0, 9), min_size=width, max_size=width).map(tuple), min_size=1, max_size=30
    ).map(tuple)
)
EVERYTHING = Augmentations(basic=True, size=True, chain=True, repeat=True)
WAYS = [
    IDENTITY,
    *transformations(EVERYTHING, random.Random(0)),
    translation(-2, 31),
    recolouring([9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
    repetition(3, 1),
    chain(flip(0), repetition(1, 2), scaling(3, 2), recolouring([0, 2, 1, 3, 4, 5, 6, 7, 9, 8])),
]
ARC = Path(os.environ.get("PRECEPTOR_TEST_DATA", "")) / "arc"
needs_arc = pytest.mark.skipif(not (ARC / "solutions.json").is_file(), reason="PRECEPTOR_TEST_DATA has no arc")


def task(pairs: int, queries: int = 1, size: int = 2) -> FewShotTask:
    """The i-th pair's input is all of colour i + 1; an output is its input in reverse order, one cell changed."""

    def pair(colour: int) -> GridPair:
        grid = ((colour,) * size,) * (size - 1) + ((0,) + (colour,) * (size - 1),)
        return GridPair(grid, grid[::-1])

    made = [pair(1 + at % 9) for at in range(pairs + queries)]
    return FewShotTask("turn", tuple(made[:pairs]), tuple(made[pairs:]))


def held_out(text: str) -> tuple[Grid, Grid]:
    """The last pair of a document."""
    given, output = text.split("\n")[-2:]
    found = read_grid(given), read_grid(output)
    assert found[0] is not None
    assert found[1] is not None
    return found[0], found[1]


@pytest.mark.parametrize("way", WAYS, ids=str)
@given(GRIDS)
def test_whatever_is_done_to_a_grid_is_undone_exactly(way: Transformation, grid: Grid) -> None:
    assert way.undo(way.apply(grid)) == grid


@pytest.mark.parametrize(
    ("way", "grid"),
    [
        (rotation(1), ((2, 5), (1, 4), (0, 3))),
        (rotation(2), ((5, 4, 3), (2, 1, 0))),
        (rotation(3), ((3, 0), (4, 1), (5, 2))),
        (flip(0), ((3, 4, 5), (0, 1, 2))),
        (flip(1), ((2, 1, 0), (5, 4, 3))),
        (transposition(), ((0, 3), (1, 4), (2, 5))),
        (translation(1, 1), ((5, 3, 4), (2, 0, 1))),
        (reflection(0, False), ((0, 1, 2), (3, 4, 5), (3, 4, 5), (0, 1, 2))),
        (reflection(1, True), ((2, 1, 0, 0, 1, 2), (5, 4, 3, 3, 4, 5))),
        (scaling(2, 1), ((0, 1, 2), (0, 1, 2), (3, 4, 5), (3, 4, 5))),
        (scaling(1, 2), ((0, 0, 1, 1, 2, 2), (3, 3, 4, 4, 5, 5))),
        (repetition(1, 2), ((0, 1, 2, 0, 1, 2), (3, 4, 5, 3, 4, 5))),
        (repetition(2, 1), GRID + GRID),
        (recolouring([1, 0, 2, 3, 4, 9, 6, 7, 8, 5]), ((1, 0, 2), (3, 4, 9))),
        (chain(transposition(), flip(0)), ((2, 5), (1, 4), (0, 3))),
    ],
    ids=str,
)
def test_each_transformation_does_what_its_name_says(way: Transformation, grid: Grid) -> None:
    assert way.apply(GRID) == grid


@pytest.mark.parametrize("way", [reflection(0, False), reflection(1, True), scaling(2, 2), repetition(2, 2)], ids=str)
def test_a_grid_that_no_grid_becomes_has_no_way_back(way: Transformation) -> None:
    assert way.undo(((1, 2), (3, 4))) is None
    assert way.undo(((1, 2, 3),)) is None
    assert chain(way, flip(0)).undo(((1,),)) is None


def test_a_recolouring_is_a_permutation() -> None:
    with pytest.raises(ValueError, match="no permutation"):
        recolouring([0] * 10)


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([], "is empty"),
        ([[]], "is empty"),
        ([[1, 2], [3]], "rows of 1 to 2 cells"),
        ([[0] * 31], "is 1 x 31"),
        ([[0]] * 31, "is 31 x 1"),
        ([[0, 10]], "the colour 10"),
        ([[-1]], "the colour -1"),
        ([[0] * 30] * 30, ""),
    ],
)
def test_what_is_no_grid_says_why(rows: list[list[int]], fault: str) -> None:
    assert fault in grid_fault(rows)
    assert bool(fault) == bool(grid_fault(rows))


@given(GRIDS, st.sampled_from(["", " "]))
def test_a_grid_is_one_line_of_text_and_is_read_back(grid: Grid, separator: str) -> None:
    text = grid_text(grid, separator)
    assert "\n" not in text
    assert read_grid(text) == grid


def test_texts_are_what_the_page_says() -> None:
    pairs = (GridPair(((0, 1, 2), (3, 4, 5)), ((5, 4, 3), (2, 1, 0))),)
    asked = FewShotTask("one", pairs, (GridPair(((7,),), ((8,),)),))
    shown = "Input: 012/345\nOutput: 543/210"
    assert prompt(pairs, ((7,),)) == f"{shown}\nInput: 7\nOutput:"
    assert document(pairs, asked.queries[0]) == f"{shown}\nInput: 7\nOutput: 8"
    assert document((), pairs[0], " ") == "Input: 0 1 2/3 4 5\nOutput: 5 4 3/2 1 0"
    assert task_text(asked) == f"{shown}\nQuery: 7"
    assert "8" not in task_text(asked)


def test_three_demonstrations_make_three_leave_one_out_tasks_and_six_leave_two_out() -> None:
    a, b, c = task(3).demonstrations
    plain = Augmentations(colours=False)
    documents = training_documents(task(3), plain, max_documents=1000)
    for shown, last in [((b, c), a), ((a, c), b), ((a, b), c)]:
        assert document(shown, last) in documents
        assert document(shown[:1], last) in documents
        assert document(shown[1:], last) in documents
    # Beyond these only the other order of two: one demonstration has no other order.
    others = {document(tuple(reversed(shown)), last) for shown, last in [((b, c), a), ((a, c), b), ((a, b), c)]}
    assert set(documents) - others == {
        document(shown, last)
        for last, rest in [(a, (b, c)), (b, (a, c)), (c, (a, b))]
        for shown in (rest, rest[:1], rest[1:])
    }


def test_few_demonstrations_are_never_left_out_to_the_last() -> None:
    (only,) = task(1).demonstrations
    plain = Augmentations(colours=False)
    assert training_documents(task(1), plain, max_documents=9) == (document((), only),)
    a, b = task(2).demonstrations
    assert set(training_documents(task(2), plain, max_documents=9)) == {document((a,), b), document((b,), a)}


def test_permuted_colours_are_the_same_in_the_whole_document_and_black_stays() -> None:
    documents = training_documents(task(3), Augmentations(), max_documents=1000)
    assert len(documents) > len(training_documents(task(3), Augmentations(colours=False), max_documents=1000))
    for text in documents:
        pairs = [read_grid(line) for line in text.split("\n")]
        for grid, output in zip(pairs[::2], pairs[1::2], strict=True):
            assert grid is not None
            assert output == grid[::-1]  # the rule holds in every document
            assert grid[-1][0] == 0


@given(st.integers(0, 2**31), st.sets(st.integers(1, 9), min_size=1))
def test_colours_go_to_unused_ones_first_and_no_two_become_one(seed: int, colours: set[int]) -> None:
    grid = (tuple(sorted(colours)),)
    found = recolouring(permuted_colours([GridPair(grid, grid)], random.Random(seed))).apply(grid)[0]
    assert len(set(found)) == len(colours)
    assert 0 not in found
    assert len(set(found) - colours) == min(len(colours), 9 - len(colours))


@pytest.mark.parametrize("family", ["basic", "size", "chain", "repeat"])
def test_each_family_adds_documents_whose_last_pair_is_a_transformed_demonstration(family: str) -> None:
    asked = Augmentations(colours=False, **{family: True})
    plain = training_documents(task(3, size=3), Augmentations(colours=False), max_documents=1000)
    made = training_documents(task(3, size=3), asked, max_documents=1000, seed=5)
    assert len(made) > len(plain)
    assert {held_out(text) for text in plain} < {held_out(text) for text in made}
    known = {(pair.input, pair.output) for pair in task(3, size=3).demonstrations}
    possible = [way for seed in range(40) for way in transformations(asked, random.Random(seed))]
    for text in set(made) - set(plain):
        last = held_out(text)
        assert any((way.undo(last[0]), way.undo(last[1])) in known for way in possible), text


def test_what_leaves_thirty_by_thirty_is_left_out_and_counted() -> None:
    large = task(2, size=16)
    asked = Augmentations(size=True, chain=True, repeat=True, basic=True, colours=False)
    made = training_set(large, asked, max_documents=1000)
    # Four reflections, four sizes, six chains and three repeats do not fit.
    assert made.too_large == 17
    assert all(fits(grid) for text in made.documents for grid in held_out(text))
    assert training_set(task(2, size=2), asked, max_documents=1000).too_large == 0


@pytest.mark.parametrize("most", [1, 5, 8, 20, 64])
def test_the_cap_keeps_the_tasks_own_grids_and_leave_one_out_first(most: int) -> None:
    made = training_set(task(3), EVERYTHING, max_documents=most)
    everything = training_set(task(3), EVERYTHING, max_documents=10**6)
    assert len(made.documents) == most
    assert set(made.documents) <= set(everything.documents)
    assert len(set(made.documents)) == most
    own = set(everything.documents[:6])  # three as they are, three permuted
    assert len(own & set(made.documents)) == min(most, 6)


def test_the_same_seed_makes_the_same_documents_and_another_seed_others() -> None:
    def made(seed: int, name: str = "turn", queries: int = 1) -> tuple[str, ...]:
        return training_documents(
            replace(task(4, queries), name=name), EVERYTHING, max_documents=30, separator=" ", seed=seed
        )

    assert made(1) == made(1)
    assert made(1) != made(2)
    assert made(1) == made(1, name="renamed")


def test_the_queries_are_no_part_of_the_training_documents() -> None:
    own = task(3, queries=1)
    other = replace(own, queries=(GridPair(((9, 9),), ((8, 8),)),))
    assert training_documents(own, EVERYTHING, max_documents=99) == training_documents(
        other, EVERYTHING, max_documents=99
    )


def test_a_task_without_demonstrations_has_no_documents() -> None:
    assert training_set(task(0), EVERYTHING, max_documents=9).documents == ()


@pytest.mark.parametrize("votes", [1, 8, 20])
def test_every_view_asks_the_same_question_and_knows_the_way_back(votes: int) -> None:
    asked = task(3, queries=2, size=3)
    seen = views(asked, votes)
    assert [len(of_query) for of_query in seen] == [votes, votes]
    assert len({view.prompt for view in seen[0]}) == votes
    for query, of_query in zip(asked.queries, seen, strict=True):
        assert of_query[0].prompt == prompt(asked.demonstrations, query.input)
        for view in of_query:
            assert view.way.read(f" {view.gold}") == query.output
            assert view.way.read("no grid") is None
    assert [view.prompt for view in seen[1]] == [view.prompt for view in views(asked, votes)[1]]


def test_a_query_whose_output_is_not_known_is_asked_all_the_same() -> None:
    asked = replace(task(2), queries=(GridPair(GRID, ()),))
    assert [view.gold for view in views(asked, 9)[0]] == [""] * 9


def test_the_most_frequent_two_win_the_vote_and_ties_go_to_the_first() -> None:
    a, b, c = ((1,),), ((2,),), ((3,),)
    assert vote([a, b, c, c, b]) == (b, c)
    assert vote([c, b, a]) == (c, b)
    assert vote([None, a, None]) == (a,)
    assert vote([]) == ()


@given(st.lists(st.sampled_from(["1", "[[1]]", "2", "12", "3/3", "no"]), max_size=12))
def test_a_vote_is_for_the_grid_and_not_for_its_spelling(answers: list[str]) -> None:
    read = [read_grid(answer) for answer in answers]
    winners = vote(read)
    assert len(winners) == min(2, len(set(read) - {None}))
    most = [read.count(winner) for winner in winners]
    assert most == sorted(most, reverse=True)
    assert all(read.count(grid) <= most[-1] for grid in read if grid not in (None, *winners))


@needs_arc
def test_all_real_tasks_round_trip_through_everything_and_back() -> None:
    found = read_arc(ARC / "challenges.json", ARC / "solutions.json")
    assert (len(found.tasks), found.left_out, found.problems) == (120, (), ())
    rng = random.Random(0)
    for read in found.tasks:
        one = read.task
        ways = [*WAYS, recolouring(permuted_colours(one.demonstrations, rng))]
        for pair in (*one.demonstrations, *one.queries):
            for way in ways:
                assert way.undo(way.apply(pair.input)) == pair.input, (one.name, way.name)
                assert way.undo(way.apply(pair.output)) == pair.output, (one.name, way.name)
                assert read_grid(grid_text(way.apply(pair.output))) == way.apply(pair.output)
        for query, of_query in zip(one.queries, views(one, 16, " "), strict=True):
            assert all(view.way.read(view.gold) == query.output for view in of_query)


@needs_arc
def test_all_real_tasks_have_training_documents_of_which_every_grid_fits() -> None:
    for read in read_arc(ARC / "challenges.json", ARC / "solutions.json").tasks:
        made = training_set(read.task, EVERYTHING, max_documents=64)
        assert 0 < len(made.documents) <= 64
        assert len(set(made.documents)) == len(made.documents)
        for text in made.documents:
            for line in text.split("\n"):
                grid = read_grid(line)
                assert grid is not None
                assert grid_fault(grid) == ""


@needs_arc
def test_the_real_files_hold_what_is_read_from_them() -> None:
    challenges = json.loads((ARC / "challenges.json").read_text())
    for read in read_arc(ARC / "challenges.json", ARC / "solutions.json").tasks:
        assert len(challenges[read.task.name]["train"]) == len(read.task.demonstrations)
        assert transformed(read.task, IDENTITY) == replace(read.task, labels={}, reference_edits={})
