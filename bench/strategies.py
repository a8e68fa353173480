"""What each way of studying earns, by genre and size: the table behind "the best choice depends on the passage".

    python -m bench.strategies --passages 18 --json strategies.json
    python -m bench.strategies --passages 36 --styles self_qa

Writes edits by rule from the facts of training passages (no teacher is involved), fine-tunes the shipped student on
each with the run's settings, and reports accuracy on the sealed questions, retention and reward. Ends with what one
strategy for all passages earns and what a choice by size, genre or both earns, each measured on passages that the
choice was not made on. Takes about a third of a second per trial: twenty minutes for 18 passages.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from preceptor.tasks import Bank, Directive, Question
from student.base import LoadedBase, load_base
from student.trial import AnsweringSettings, TrainingSettings, Trial
from student.trial_runner import run_trials
from worlds.almanac import MODELS, edits
from worlds.almanac.memory import replay_documents, retention_probes
from worlds.almanac.passages import passages_with_facts

BUDGET = 1_500  # trained tokens, as in configs/almanac.toml
RETENTION_WEIGHT = 0.3  # reward = gain in accuracy - this x loss on the retention probes
TOGETHER = 8  # adapters trained side by side
PROBES = 32


@dataclass(frozen=True, slots=True)
class Outcome:
    """One trial: what was studied how, and what came of it. Shares are in 0..1."""

    passage: int
    kind: str  # "genre size"
    style: str
    directive: Directive
    accuracy: float
    retention: float

    @property
    def reward(self) -> float:
        """Against a student that knows nothing of the passage and all probes."""
        return self.accuracy - RETENTION_WEIGHT * (1 - self.retention)

    @property
    def strategy(self) -> str:
        """Style and directive, shortly."""
        d = self.directive
        return f"{self.style} lr={d.learning_rate:g} epochs={d.epochs} replay={d.replay_share:g}"


def measure(
    base: LoadedBase,
    settings: TrainingSettings,
    seed: int,
    count: int,
    styles: Sequence[str],
    directives: Sequence[Directive],
) -> Iterator[list[Outcome]]:
    """The outcomes of every style and directive, passage by passage."""
    probes, replay = retention_probes()[:PROBES], replay_documents()
    for number, (told, passage) in enumerate(passages_with_facts(seed, "train", count)):
        plans = [(style, directive) for style, directive in product(styles, directives)]
        questions = passage.questions_of(Bank.SEALED)
        outcomes = []
        for start in range(0, len(plans), TOGETHER):
            some = plans[start : start + TOGETHER]
            trials = [
                Trial(str(i), edits.STYLES[style](told.text, told.facts), seed, settings.under(directive))
                for i, (style, directive) in enumerate(some)
            ]
            results = run_trials(
                base,
                trials,
                [questions] * len(some),
                probes=probes,
                replay_documents=replay,
                answering=AnsweringSettings(max_new_tokens=6),
            )
            for (style, directive), result in zip(some, results, strict=True):
                if result.failure:  # a divergence is a fact about the strategy; it is left out, and said
                    print(f"{told.genre} {told.size} {style} {directive}: {result.failure}", flush=True)
                    continue
                outcomes.append(
                    Outcome(
                        number,
                        f"{told.genre} {told.size}",
                        style,
                        directive,
                        share_right([answer.text for answer in result.answers], questions),
                        share_right([answer.text for answer in result.probe_answers], probes),
                    )
                )
        yield outcomes


def share_right(texts: Sequence[str], questions: Sequence[Question]) -> float:
    """Share of answers that equal the gold one but for case and a full stop."""
    right = sum(t.strip(" .").lower() == q.answer.lower() for t, q in zip(texts, questions, strict=True))
    return right / len(questions)


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Lines of Markdown: the best strategy of each kind of passage, and the best directive of each style."""
    cells: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        cells[outcome.kind, outcome.strategy].append(outcome)
    earned = {cell: mean([o.reward for o in members]) for cell, members in cells.items()}
    kinds = list(dict.fromkeys(outcome.kind for outcome in outcomes))
    styles = list(dict.fromkeys(outcome.style for outcome in outcomes))
    lines = [
        f"| passage | best strategy | accuracy | retention | reward | {' | '.join(f'best {s}' for s in styles)} |",
        "|---" * (5 + len(styles)) + "|",
    ]
    for kind in kinds:
        mine = {strategy: reward for (k, strategy), reward in earned.items() if k == kind}
        best = max(mine, key=lambda strategy: mine[strategy])
        tops = [max(reward for strategy, reward in mine.items() if strategy.startswith(f"{s} ")) for s in styles]
        lines.append(
            f"| {kind} | {best} | {mean([o.accuracy for o in cells[kind, best]]):.2f} "
            f"| {mean([o.retention for o in cells[kind, best]]):.2f} | {mine[best]:.2f} "
            f"| {' | '.join(f'{top:.2f}' for top in tops)} |"
        )
    return lines


def choices(outcomes: Sequence[Outcome]) -> list[str]:
    """Lines: mean reward of a strategy chosen on all *other* passages of a group, by how the groups are made.

    A choice that is measured on the passages it was made on looks better than it is; with 192 strategies to choose
    from, much better.
    """
    ways: dict[str, Callable[[str], str]] = {
        "one strategy for all": lambda kind: "",
        "chosen by size": lambda kind: kind.split()[1],
        "chosen by genre": lambda kind: kind.split()[0],
        "chosen by genre and size": lambda kind: kind,
    }
    lines = []
    for way, group_of in ways.items():
        sums: dict[tuple[str, str], float] = defaultdict(float)
        for outcome in outcomes:
            sums[group_of(outcome.kind), outcome.strategy] += outcome.reward
        results = []
        for passage in dict.fromkeys(outcome.passage for outcome in outcomes):
            own = {o.strategy: o for o in outcomes if o.passage == passage}
            group = group_of(next(iter(own.values())).kind)
            chosen = max(own, key=lambda strategy: sums[group, strategy] - own[strategy].reward)
            results.append(own[chosen])
        lines.append(
            f"{way}: reward {mean([o.reward for o in results]):.3f}, "
            f"accuracy {mean([o.accuracy for o in results]):.3f}, retention {mean([o.retention for o in results]):.3f}"
        )
    return lines


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, default=MODELS / "student")
    parser.add_argument("--passages", type=int, default=18, help="training passages; nine make one of every kind")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--styles", nargs="+", default=list(edits.STYLES))
    parser.add_argument("--budget", type=int, default=BUDGET, help="trained tokens of a trial (max_train_tokens)")
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    given = parser.parse_args()
    settings = TrainingSettings(max_train_tokens=given.budget)
    torch.set_num_threads(1)
    base = load_base(given.student, source=str(given.student), commit="")
    outcomes: list[Outcome] = []
    found = measure(base, settings, given.seed, given.passages, given.styles, edits.DIRECTIVES)
    for number, some in enumerate(found, 1):
        outcomes += some
        print(f"passage {number}/{given.passages}", flush=True)
    print("\n".join([*table(outcomes), "", *choices(outcomes)]))
    if given.json:
        names = ("passage", "kind", "strategy", "accuracy", "retention", "reward")
        rows = [{name: getattr(outcome, name) for name in names} for outcome in outcomes]
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
