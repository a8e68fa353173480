"""What the tiny teacher may choose: every mix of augmentations, learning rate, epochs and strategy of a small grid.

It was warm-started on all of them in equal shares, whatever the task, so that it has no opinion. What it brings is its
eyes: before the directive it says which colours the demonstrations have, and whether cells move or colours change.
"""

from __future__ import annotations

import random
from itertools import product

from preceptor.few_shot.directives import render_json_directive
from preceptor.tasks import Augmentations, Directive, FewShotTask, LossMask
from worlds.mosaic.rules import Family
from worlds.mosaic.tasks import shown_colours

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
EPOCHS = (4, 8, 16, 32)
STRATEGIES = (LossMask.ALL, LossMask.AFTER_MARKER)
AUGMENTATIONS = tuple(Augmentations(*flags) for flags in product((False, True), repeat=5))
SEEN: dict[Family, str] = {"move": "The cells move.", "paint": "The colours change."}


def draw(rng: random.Random) -> Directive:
    """One of all, each as likely as the others."""
    return Directive(
        learning_rate=rng.choice(LEARNING_RATES),
        epochs=rng.choice(EPOCHS),
        loss_mask=rng.choice(STRATEGIES),
        augmentations=rng.choice(AUGMENTATIONS),
    )


def seen(task: FewShotTask, family: Family) -> str:
    """What the teacher says that it sees."""
    inputs, outputs = ("".join(map(str, sorted(colours))) for colours in shown_colours(task))
    return f"Inputs {inputs}, outputs {outputs}. {SEEN[family]}"


def completion(task: FewShotTask, family: Family, directive: Directive) -> str:
    """What the teacher writes about a task: what it sees, then the directive."""
    return f"{seen(task, family)}\n{render_json_directive(directive)}"
