"""The lessons of the two tiny models.

* **Student**: pairs of grids, input and output. Some are named: the rule's word stands where ``Output`` stands else,
  and what follows is what that rule makes of the input. The others say ``Output``, and follow any rule: each pair of a
  text one of its own, so that earlier pairs tell nothing about later ones. It learns every rule by its word, and that
  ``Output`` may mean any; that demonstrations show what it means here it is never taught.
* **Teacher**: tasks of the world under the prompt format ``augmentations``; what it writes says which family it sees,
  then a directive drawn evenly from all.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from preceptor.few_shot.text import grid_text, task_text
from teacher.prompts import FEW_SHOT_FORMATS
from worlds.mosaic import directives
from worlds.mosaic.rules import FAMILIES, draw_grid, rules, rules_of
from worlds.mosaic.tasks import make_task
from worlds.mosaic.tokens import ANY_RULE

PROMPT = FEW_SHOT_FORMATS["augmentations"]
FEWEST_COLOURS, MOST_COLOURS = 3, 10

Span = tuple[str, bool]  # a text, and whether it carries loss


def pairs(rng: random.Random, count: int, named_share: float, moves_share: float = 0.5) -> list[Span]:
    """A text of the student's: ``count`` pairs, each of a rule of its own. Outputs alone carry loss: inputs are
    random."""
    spans: list[Span] = []
    for number in range(count):
        family = "move" if rng.random() < moves_share else "paint"
        rule = rng.choice([one for one in rules() if one.family == family])
        pair = rule.show(draw_grid(rng, rng.sample(range(10), rng.randint(FEWEST_COLOURS, MOST_COLOURS))))
        word = rule.word if rng.random() < named_share else ANY_RULE
        if number:
            spans.append(("\n", True))  # where an answer ends
        spans += [(f"Input: {grid_text(pair.input)}\n{word}:", False), (f" {grid_text(pair.output)}", True)]
    return spans


def teaching(rng: random.Random, chosen: bool = True) -> tuple[str, str]:
    """A lesson of the teacher: prompt and completion; without ``chosen`` only what it sees, and no directive."""
    rule = rng.choice(rules_of("train", rng.choice(FAMILIES)))
    task = make_task(f"task-{rng.randrange(10 ** rng.randint(1, 4))}-{rng.randrange(1_000)}", rule, rng)
    prompt = PROMPT.render(task.name, task_text(task))
    if not chosen:
        return prompt, directives.seen(task, rule.family)
    return prompt, directives.completion(task, rule.family, directives.draw(rng))


def corpus(seed: int, lines: int = 3_000) -> Iterator[str]:
    """Texts of both models' lessons, for the tokenizer."""
    rng = random.Random(f"mosaic/{seed}/tokens")
    for _ in range(lines):
        yield "".join(text for text, _ in pairs(rng, 2, 1.0))
        yield "".join(text for text, _ in pairs(rng, 1, 0.0))
        yield "".join(teaching(rng))
