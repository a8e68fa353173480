"""The world of grids: rules that are kept and broken by what the documentation says, tasks that can be solved."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from preceptor.completions import Limits
from preceptor.few_shot.directives import parse_json_directive
from preceptor.few_shot.grids import flip, recolouring, rotation, transposition
from preceptor.few_shot.text import task_text
from preceptor.tasks import FewShotTask, GridPair
from worlds.mosaic import directives
from worlds.mosaic.rules import FAMILIES, Rule, draw_grid, rules, rules_of
from worlds.mosaic.tasks import RIGHT, WRONG, few_shot_tasks, shown_colours


def rule_of(task: FewShotTask) -> Rule:
    """The only rule that fits all pairs of a task."""
    [found] = [r for r in rules() if all(r.apply(p.input) == p.output for p in (*task.demonstrations, *task.queries))]
    return found


def test_equal_arguments_give_equal_tasks_and_another_seed_others() -> None:
    assert few_shot_tasks(3, "train", 6) == few_shot_tasks(3, "train", 6)
    assert few_shot_tasks(3, "train", 6) == few_shot_tasks(3, "train", 9)[:6]
    assert few_shot_tasks(4, "train", 6) != few_shot_tasks(3, "train", 6)


def test_training_and_heldout_tasks_share_no_rule_and_no_grid() -> None:
    train, heldout = few_shot_tasks(0, "train", 64), few_shot_tasks(0, "heldout", 32)
    assert not {rule_of(t).word for t in train} & {rule_of(t).word for t in heldout}
    assert {rule_of(t).word for t in heldout} == {r.word for f in FAMILIES for r in rules_of("heldout", f)}
    pairs = [{(p.input, p.output) for t in some for p in (*t.demonstrations, *t.queries)} for some in (train, heldout)]
    assert not pairs[0] & pairs[1]
    with pytest.raises(ValueError, match="neither train nor heldout"):
        few_shot_tasks(0, "test", 1)


def test_every_task_can_be_solved_from_its_demonstrations() -> None:
    for task in few_shot_tasks(1, "train", 48):
        fitting = [r for r in rules() if all(r.apply(pair.input) == pair.output for pair in task.demonstrations)]
        assert fitting == [rule_of(task)]
        before, after = shown_colours(task)
        assert {cell for query in task.queries for row in query.input for cell in row} <= before
        assert (before == after) == (task.labels["family"] == "move")  # a careful reader can tell the families apart
        assert not {query.input for query in task.queries} & {pair.input for pair in task.demonstrations}


def test_families_take_turns_and_nothing_a_teacher_reads_names_the_rule() -> None:
    tasks = few_shot_tasks(0, "heldout", 8)
    assert [task.labels["family"] for task in tasks] == [*FAMILIES] * 4
    for task in tasks:
        shown = f"{task.name} {task_text(task)}"
        assert not [rule.word for rule in rules() if rule.word in shown]
        for query in task.queries:
            assert query.output not in [pair.output for pair in task.demonstrations]


def test_words_are_different_and_no_rule_does_nothing() -> None:
    assert len({rule.word for rule in rules()}) == len(rules())
    assert len({(rule.places, rule.colours) for rule in rules()}) == len(rules())
    numbered = ((0, 1, 2), (3, 4, 5), (6, 7, 8))
    assert all(rule.apply(numbered) != numbered for rule in rules())


def test_permuted_colours_keep_every_move_and_break_every_paint() -> None:
    rng = random.Random(0)
    for rule in rules():
        colours = recolouring([0, *rng.sample(range(1, 10), 9)])
        pairs = [colours.pair(rule.show(draw_grid(rng))) for _ in range(9)]
        assert holds(rule, pairs) == (rule.family == "move")


def test_turned_and_mirrored_grids_keep_every_paint_and_break_every_move() -> None:
    rng = random.Random(0)
    ways = [*(rotation(quarters) for quarters in (1, 2, 3)), flip(0), flip(1), transposition()]
    for rule in rules():
        kept = [holds(rule, [way.pair(rule.show(draw_grid(rng))) for _ in range(9)]) for way in ways]
        assert all(kept) if rule.family == "paint" else not all(kept)


def holds(rule: Rule, pairs: list[GridPair]) -> bool:
    return all(rule.apply(pair.input) == pair.output for pair in pairs)


def test_a_task_knows_an_edit_that_suits_its_family_and_one_that_does_not() -> None:
    for task in few_shot_tasks(0, "train", 4):
        oracle, control = (task.reference_edits[name] for name in ("oracle", "shuffled_facts"))
        assert oracle.directive.augmentations == RIGHT[rule_of(task).family]
        assert control.directive.augmentations == WRONG[rule_of(task).family]
        assert not oracle.documents
        assert not control.documents


def test_what_the_teacher_was_taught_to_write_is_read_as_the_directive_it_means() -> None:
    [task] = few_shot_tasks(0, "train", 1)
    rng = random.Random(0)
    drawn = [directives.draw(rng) for _ in range(200)]
    for directive in drawn:
        assert parse_json_directive(directives.completion(task, "move", directive), Limits()) == directive
    assert {d.augmentations for d in drawn} == set(directives.AUGMENTATIONS)
    assert {d.learning_rate for d in drawn} == set(directives.LEARNING_RATES)


def test_importing_the_world_does_not_import_torch() -> None:
    code = "import sys, worlds.mosaic.tasks, worlds.mosaic.directives; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
