"""Success by directive on the world mosaic: which augmentation suits which family of rules, and at which settings.

    python -m bench.directives --tasks 8 --json directives.json --picture docs/pictures/directives.svg

Makes the documents that each directive asks for from a task's demonstrations, fine-tunes the shipped student on them
with the run's settings, and asks for the outputs of the task's queries (exact match of the whole grid). The first line
is the untouched student with the demonstrations in its prompt: in-context. Tasks are of the training split. No teacher
is involved. A trial takes about half a second on one free core.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from preceptor.config import load_config
from preceptor.few_shot.text import MARKER
from preceptor.few_shot.training import training_documents
from preceptor.few_shot.views import views
from preceptor.tasks import Augmentations, Directive, FewShotTask, LossMask, Question
from student.base import LoadedBase, load_base
from student.trial import AnsweringSettings, TrainingSettings, Trial
from student.trial_runner import run_trials
from worlds.mosaic import MODELS
from worlds.mosaic.directives import EPOCHS, LEARNING_RATES
from worlds.mosaic.rules import FAMILIES
from worlds.mosaic.tasks import few_shot_tasks

TOGETHER = 8  # adapters trained side by side
IN_CONTEXT = "untouched student (in-context)"
AUGMENTATIONS = {
    "nothing": Augmentations(colours=False),
    "colours": Augmentations(),
    "basic": Augmentations(basic=True, colours=False),
    "basic, colours": Augmentations(basic=True),
    "size": Augmentations(size=True, colours=False),
    "chain": Augmentations(chain=True, colours=False),
    "repeat": Augmentations(repeat=True, colours=False),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One trial: shares in 0..1; ``probability`` is that of the right output, mean over queries."""

    task: str
    family: str
    augmentations: str
    learning_rate: float
    epochs: int
    strategy: str
    accuracy: float
    probability: float


def run_settings() -> tuple[TrainingSettings, int]:
    """How the shipped run fine-tunes, and its ``few_shot.max_documents``."""
    config = load_config(Path(__file__).parents[1] / "configs" / "mosaic.toml")
    given = config.training
    settings = TrainingSettings(
        rank=given.rank,
        alpha=given.alpha,
        learning_rate=given.learning_rate,
        epochs=given.epochs,
        batch_size=given.batch_size,
        schedule=given.schedule,
        warmup_share=given.warmup_share,
        loss_mask=LossMask(given.loss_mask),
        loss_marker=MARKER,
        max_train_tokens=given.max_train_tokens,
    )
    return settings, config.few_shot.max_documents


def measure(
    base: LoadedBase,
    settings: TrainingSettings,
    max_documents: int,
    tasks: Sequence[FewShotTask],
    directives: Sequence[tuple[str, Directive]],
) -> Iterator[list[Outcome]]:
    """The outcomes of every directive, task by task; the untouched student's first."""
    for task in tasks:
        asked = [Question(query[0].prompt, query[0].gold) for query in views(task, votes=1)]
        plans = [(IN_CONTEXT, Directive(learning_rate=0.0, epochs=0)), *directives]
        outcomes = []
        for start in range(0, len(plans), TOGETHER):
            some = plans[start : start + TOGETHER]
            trials = [
                Trial(
                    str(i), documents_of(task, one, max_documents), 0, settings.under(one) if one.epochs else settings
                )
                for i, (_, one) in enumerate(some)
            ]
            answering = AnsweringSettings(prompt_template="{question}", max_new_tokens=answer_tokens(asked))
            results = run_trials(base, trials, [asked] * len(some), answering=answering)
            for (name, one), result in zip(some, results, strict=True):
                if result.failure:  # a divergence is a fact about the directive; it is left out, and said
                    print(f"{task.name} {name} {one}: {result.failure}", flush=True)
                    continue
                right = sum(a.text.strip() == q.answer for a, q in zip(result.answers, asked, strict=True))
                outcomes.append(
                    Outcome(
                        task.name,
                        task.labels["family"],
                        name,
                        one.learning_rate or 0.0,
                        one.epochs or 0,
                        one.loss_mask.value if one.loss_mask else "",
                        right / len(asked),
                        sum(math.exp(a.gold_logprob) for a in result.answers) / len(asked),
                    )
                )
        yield outcomes


def documents_of(task: FewShotTask, directive: Directive, max_documents: int) -> tuple[str, ...]:
    """What a directive trains on; none where it has no augmentations (the untouched student)."""
    if directive.augmentations is None:
        return ()
    return training_documents(task, directive.augmentations, max_documents=max_documents)


def answer_tokens(asked: Sequence[Question]) -> int:
    """A blank and the cells and row ends of the largest output."""
    return 1 + max(len(question.answer) for question in asked)


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def table(outcomes: Sequence[Outcome], row: str, head: str) -> list[str]:
    """Lines of Markdown: accuracy and probability of each value of a field, by family."""
    cells: dict[tuple[object, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        cells[getattr(outcome, row), outcome.family].append(outcome)
    lines = [
        f"| {head} | {' | '.join(f'{family}: right | probability' for family in FAMILIES)} |",
        "|---" * (1 + 2 * len(FAMILIES)) + "|",
    ]
    for value in dict.fromkeys(getattr(outcome, row) for outcome in outcomes):
        shown = [cells[value, family] for family in FAMILIES]
        words = " | ".join(
            f"{mean([o.accuracy for o in some]):.2f} | {mean([o.probability for o in some]):.2f}" for some in shown
        )
        lines.append(f"| {value} | {words} |")
    return lines


def tables(outcomes: Sequence[Outcome]) -> list[str]:
    """By augmentation at each one's best settings (chosen over all tasks of the family), then by every setting under
    the augmentation that suits the family best."""
    untouched = [o for o in outcomes if o.augmentations == IN_CONTEXT]
    best: list[Outcome] = []
    suits: list[Outcome] = []
    chosen: list[str] = []
    for family in FAMILIES:
        tops: dict[str, list[Outcome]] = {}
        for name in AUGMENTATIONS:
            groups: dict[tuple[float, int, str], list[Outcome]] = defaultdict(list)
            for o in outcomes:
                if (o.family, o.augmentations) == (family, name):
                    groups[o.learning_rate, o.epochs, o.strategy].append(o)
            if groups:
                tops[name] = max(groups.values(), key=lambda some: mean([o.accuracy + o.probability for o in some]))
        best += [o for some in tops.values() for o in some]
        right = max(tops, key=lambda name: mean([o.accuracy + o.probability for o in tops[name]]))
        one = tops[right][0]
        chosen.append(f"{family}: {right}, lr {one.learning_rate:g}, {one.epochs} epochs, loss on {one.strategy}")
        suits += [o for o in outcomes if (o.family, o.augmentations) == (family, right)]
    lines = [*table([*untouched, *best], "augmentations", "directive"), "", f"Best: {'; '.join(chosen)}."]
    for row, head in (("learning_rate", "learning rate"), ("epochs", "epochs"), ("strategy", "loss on")):
        lines += ["", *table(suits, row, head)]
    return lines


def picture(outcomes: Sequence[Outcome]) -> str:
    """Mean share of right outputs by augmentation and family, over all settings, as SVG."""
    import matplotlib

    from preceptor import drawing

    names = [IN_CONTEXT, *AUGMENTATIONS]
    with matplotlib.rc_context(drawing.STYLE):
        figure, axes = drawing.new_axes(0.9 + 0.42 * len(names))
        handles = []
        for number, (family, colour) in enumerate(zip(FAMILIES, (drawing.ACCENT, drawing.PLAIN), strict=True)):
            some = [[o.accuracy for o in outcomes if (o.family, o.augmentations) == (family, name)] for name in names]
            places = [place + 0.36 * (number - 0.5) for place in range(len(names))]
            handles.append(axes.barh(places, [100 * mean(one) if one else 0 for one in some], 0.32, color=colour))
        drawing.name_rows(axes, names)
        axes.set_xlim(0, 100)
        axes.set_xlabel("right outputs, %, mean over learning rates, epochs and strategies")
        axes.grid(axis="x")
        drawing.legend(figure, handles, [f"{family}s" for family in FAMILIES])
        return drawing.standalone(drawing.to_svg(figure, "Success by directive", "bars by augmentation and family"))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, default=MODELS / "student")
    parser.add_argument("--tasks", type=int, default=8, help="half of them of each family")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--augmentations", nargs="+", choices=list(AUGMENTATIONS), default=list(AUGMENTATIONS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(LEARNING_RATES))
    parser.add_argument("--epochs", nargs="+", type=int, default=list(EPOCHS))
    parser.add_argument("--strategies", nargs="+", choices=["all", "after_marker"], default=["all", "after_marker"])
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    parser.add_argument("--picture", type=Path, help="write the picture to this file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings, max_documents = run_settings()
    base = load_base(given.student, source=str(given.student), commit="")
    directives = [
        (name, Directive(rate, epochs, loss_mask=LossMask(strategy), augmentations=AUGMENTATIONS[name]))
        for name in given.augmentations
        for rate in given.rates
        for epochs in given.epochs
        for strategy in given.strategies
    ]
    outcomes: list[Outcome] = []
    tasks = few_shot_tasks(given.seed, "train", given.tasks)
    for number, some in enumerate(measure(base, settings, max_documents, tasks, directives), 1):
        outcomes += some
        print(f"task {number}/{given.tasks}", flush=True)
    print("\n".join(tables(outcomes)))
    if given.json:
        given.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n", encoding="utf-8")
    if given.picture:
        given.picture.parent.mkdir(parents=True, exist_ok=True)
        given.picture.write_text(picture(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
