"""What a run learns from: tasks of a few demonstrations of one rule, and queries that nobody has shown the answer to.

``few_shot_tasks(seed, split, count)`` is a pure function. The families take turns, and so do the rules of a split.
Every colour of a query is shown by a demonstration, else nobody could know what becomes of it; and the demonstrations
together fit no other rule.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from preceptor.tasks import Augmentations, Directive, FewShotTask, Grid, GridPair, LossMask, SelfEdit
from worlds.mosaic.rules import FAMILIES, Family, Rule, draw_grid, rules, rules_of

DEMONSTRATIONS = 3
QUERIES = 4
COLOURS_OF_A_TASK = 5  # never 0, which colour permutations leave alone
# By family: what the student learns most from, and what breaks the rules (bench/directives.py; `rules` says why).
RIGHT: dict[Family, Augmentations] = {
    "move": Augmentations(colours=True),
    "paint": Augmentations(colours=False),
}
WRONG: dict[Family, Augmentations] = {
    "move": Augmentations(basic=True, colours=False),
    "paint": Augmentations(colours=True),
}
LEARNING_RATES: dict[Family, float] = {"move": 1e-2, "paint": 3e-3}
EPOCHS = 16
# A task's name is read by the teacher: of both splits it looks the same.
FIRST_NUMBER = {"train": 0, "heldout": 500}


def few_shot_tasks(seed: int, split: str, count: int) -> tuple[FewShotTask, ...]:
    """``count`` tasks of a split (``train`` or ``heldout``), which share no rule with the other's.

    Each knows two edits: ``oracle`` trains with what suits its family, ``shuffled_facts`` (the control) with what
    breaks its rules. Raises ValueError for another split.
    """
    rng = random.Random(f"mosaic/{seed}/{split}")
    decks: dict[Family, list[Rule]] = {family: [] for family in FAMILIES}
    tasks = []
    for number in range(count):
        family = FAMILIES[number % len(FAMILIES)]
        if not decks[family]:
            decks[family] = rng.sample(rules_of(split, family), len(rules_of(split, family)))
        tasks.append(make_task(f"task-{seed}-{FIRST_NUMBER[split] + number}", decks[family].pop(), rng))
    return tuple(tasks)


def make_task(name: str, rule: Rule, rng: random.Random) -> FewShotTask:
    """A task of one rule. Its name says nothing about the rule."""
    while True:
        colours = rng.sample(range(1, 10), COLOURS_OF_A_TASK)
        shown = [rule.show(draw_grid(rng, colours)) for _ in range(DEMONSTRATIONS)]
        asked = [rule.show(draw_grid(rng, colours)) for _ in range(QUERIES)]
        if _is_fair(rule, shown, asked):
            break
    return FewShotTask(
        name,
        tuple(shown),
        tuple(asked),
        labels={"family": rule.family},
        reference_edits={
            "oracle": SelfEdit((), directive(rule.family, RIGHT[rule.family])),
            "shuffled_facts": SelfEdit((), directive(rule.family, WRONG[rule.family])),
        },
    )


def directive(family: Family, augmentations: Augmentations) -> Directive:
    """With the settings that were found to be good for the family (bench/directives.py)."""
    return Directive(LEARNING_RATES[family], EPOCHS, loss_mask=LossMask.AFTER_MARKER, augmentations=augmentations)


def shown_colours(task: FewShotTask) -> tuple[set[int], set[int]]:
    """The colours of the demonstrations' inputs and of their outputs."""
    return _colours(pair.input for pair in task.demonstrations), _colours(pair.output for pair in task.demonstrations)


def _colours(grids: Iterable[Grid]) -> set[int]:
    return {cell for grid in grids for row in grid for cell in row}


def _is_fair(rule: Rule, shown: list[GridPair], asked: list[GridPair]) -> bool:
    """Whether the demonstrations are of this rule alone and show every colour (of a paint: a new one, too), and no
    query is one of them or stays as it is."""
    before, after = _colours(pair.input for pair in shown), _colours(pair.output for pair in shown)
    others = (other for other in rules() if other is not rule)
    return (
        _colours(pair.input for pair in asked) <= before
        and (rule.family == "move") == (before == after)
        and not {pair.input for pair in asked} & {pair.input for pair in shown}
        and all(pair.input != pair.output for pair in asked)
        and not any(all(other.apply(pair.input) == pair.output for pair in shown) for other in others)
    )
