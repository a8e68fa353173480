"""How much of a reward is signal, and how little work finds the best self-edit.

    python -m bench.reward_reliability --json reliability.json
    python -m bench.reward_reliability --measured trials.json          # measures once, reads the file the next time

The shipped teacher writes K self-edits for each of P training passages; the shipped student is fine-tuned on each with
S seeds, and on each for a first look of a few steps. Everything is then worked out from these trials, with the code
that runs use (``evaluator.reward``, ``preceptor.groups``, ``preceptor.racing``). Two sets of candidates:

* ``varied``: the open format, as in ``make run``: styles, rates and epochs differ, so most differences are large.
* ``alike``: question-answer material under one directive, as from a teacher that has learnt: near-ties.

What is printed:

* **reliability**: share of the variance between the self-edits of a passage that another set of seeds would show again
  (intraclass correlation, pooled over passages): for the plain reward (gain - 0.3 x retention loss, as
  ``configs/almanac.toml`` had it) averaged over independent seeds, and over shared ones for the reward that it has now
  and for the dense terms alone.
* **validity**: the squared correlation, within passages, with what is wanted in the end: the plain reward's mean over
  seeds that were not used.
* **racing**: how often the race finds the self-edit that is best after 8 seeds each, and for what share of that work
  (trained tokens; measured seconds beside it). Its seeds are among those 8. With 8 other seeds as the judge, even
  those who measured everything would agree only so often: the ceiling.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import torch

from evaluator.graders.exact import ExactMatch
from evaluator.graders.grader import Given
from evaluator.reward import Marks, Weights, measure
from preceptor.completions import Limits, parse
from preceptor.groups import Spread, pooled
from preceptor.racing import Candidate, RaceSettings, best, next_step, spent
from preceptor.tasks import Bank, Directive, Question, SelfEdit
from preceptor.v1 import evaluator_pb2 as pb
from student.base import LoadedBase, load_base
from student.trial import AnsweringSettings, TrainingSettings, Trial, TrialOutcome
from student.trial_runner import run_trials
from teacher.backend import SamplingSettings
from teacher.in_process import in_process
from teacher.model import load_teacher
from teacher.service import Teacher
from teacher.settings import TeacherSettings
from teacher.writing import TaskText, WritingRequest
from worlds.almanac import MODELS
from worlds.almanac.memory import replay_documents, retention_probes
from worlds.almanac.passages import passages

PLAIN = Weights(1.0, 0.3)
OURS = Weights(0.5, 0.3, gold_probability_gain=0.5)
PROBABILITY = Weights(0.0, 0.3, gold_probability_gain=1.0)
LOG_PROBABILITY = LOOK = Weights(0.0, gold_logprob_gain=1.0)
SETTINGS = TrainingSettings(max_train_tokens=1_500)  # as in configs/almanac.toml
ANSWERING = AnsweringSettings(max_new_tokens=6)
# The directive of the best fixed strategy.
GOOD = Directive(learning_rate=1e-2, epochs=16, replay_share=0.5)
SETS: dict[str, tuple[str, Directive | None]] = {"varied": ("open", None), "alike": ("self_qa", GOOD)}
SEEDS = 16
REFERENCE = 8  # seeds of everybody that a race is compared with
PROBES = 32


@dataclass(frozen=True, slots=True)
class Measured:
    """A candidate: its trials by seed, and its look."""

    trials: tuple[Marks, ...]
    look: Marks


@dataclass(frozen=True, slots=True)
class Group:
    """The candidates of one passage and the untouched student. A candidate one of whose trials failed is left out."""

    baseline: Marks
    candidates: tuple[Measured, ...]

    def evaluation(self, candidate: int, seeds: Sequence[int], weights: Weights) -> pb.Evaluation:
        """The evaluation that these seeds would have given."""
        trials = [self.candidates[candidate].trials[seed] for seed in seeds]
        return _evaluation(trials, self.baseline, seeds, weights)

    def look(self, candidate: int) -> pb.Evaluation:
        """The evaluation that is the candidate's look."""
        untouched = Marks(gold_logprobs=self.baseline.gold_logprobs)
        return _evaluation([self.candidates[candidate].look], untouched, [0], LOOK)

    def values(self, weights: Weights) -> list[list[float]]:
        """The value of each trial [K][S]."""
        return [list(measure(one.trials, self.baseline, weights).values_S) for one in self.candidates]


def _evaluation(trials: Sequence[Marks], baseline: Marks, seeds: Sequence[int], weights: Weights) -> pb.Evaluation:
    found = measure(trials, baseline, weights)
    evaluation = pb.Evaluation(state=pb.EVALUATION_STATE_SUCCEEDED, reward=found.reward)
    for seed, marks, value, values in zip(seeds, trials, found.values_S, found.values_S_Q, strict=True):
        evaluation.trials.add(seed=seed, value=value, values=values, trained_tokens=marks.tokens, seconds=marks.seconds)
    return evaluation


# -- measuring ---------------------------------------------------------------------------------------------------------


def write(name: str, seed: int, count: int, candidates: int) -> list[list[SelfEdit]]:
    """What the shipped teacher writes for each passage; what it wrote badly is left out."""
    prompt_format, directive = SETS[name]
    tasks = tuple(
        TaskText(str(i), passage.title, passage.text) for i, passage in enumerate(passages(seed, "train", count))
    )
    with tempfile.TemporaryDirectory() as home:
        teacher = Teacher(
            in_process(load_teacher(str(MODELS / "teacher"), device="cpu")), TeacherSettings(home=Path(home))
        )
        request = WritingRequest(
            "", tasks, candidates, prompt_format, SamplingSettings(0.8, 1.0, 460), seed, Limits(), max_resamples=3
        )
        try:
            groups = [
                [parse(one.completion, Limits(), finished=True) for one in group.written if not one.malformed_reason]
                for group in teacher.writer.write(request, lambda: False)
            ]
        finally:
            teacher.stop()
            teacher.store.close()
    return [[replace(edit, directive=directive) if directive else edit for edit in edits] for edits in groups]


def run(
    base: LoadedBase,
    edits: Sequence[SelfEdit],
    seed: int,
    questions: Sequence[Question],
    probes: Sequence[Question],
    *,
    look_steps: int = 0,
) -> list[Marks | None]:
    """One trial of each self-edit, or a look at each; None where it failed."""
    settings = replace(SETTINGS, max_steps=look_steps)
    trials = [Trial(str(i), e.documents, seed, settings.under(e.directive)) for i, e in enumerate(edits)]
    began = time.process_time()
    outcomes = run_trials(
        base,
        trials,
        [questions] * len(trials),
        probes=() if look_steps else probes,
        replay_documents=replay_documents(),
        answering=replace(ANSWERING, generate=not look_steps),
    )
    seconds = (time.process_time() - began) / len(trials)
    return [None if one.failure else _marks(one, questions, probes, seconds, bool(look_steps)) for one in outcomes]


def _marks(
    outcome: TrialOutcome, questions: Sequence[Question], probes: Sequence[Question], seconds: float, look: bool
) -> Marks:
    exact = ExactMatch()
    given = [Given(q, answer.text) for q, answer in zip(questions, outcome.answers, strict=True)]
    asked = [] if look else [Given(q, answer.text) for q, answer in zip(probes, outcome.probe_answers, strict=True)]
    return Marks(
        correct=() if look else tuple(verdict.right for verdict in exact.grade(given)),
        gold_logprobs=tuple(answer.gold_logprob for answer in outcome.answers),
        probes_correct=tuple(verdict.right for verdict in exact.grade(asked)),
        tokens=outcome.trained_tokens,
        seconds=seconds,
    )


def measure_set(name: str, seed: int, count: int, candidates: int, look_steps: int) -> list[Group]:
    """All trials of a set of candidates."""
    base = load_base(MODELS / "student", source="", commit="")
    every = retention_probes()
    probes = [every[i] for i in sorted(random.Random(seed).sample(range(len(every)), PROBES))]
    groups = []
    for number, (passage, edits) in enumerate(
        zip(passages(seed, "train", count), write(name, seed, count, candidates), strict=True), 1
    ):
        questions = passage.questions_of(Bank.REWARD)
        (baseline,) = run(base, [SelfEdit(())], 0, questions, probes)
        assert baseline is not None
        by_seed = [run(base, edits, seed, questions, probes) for seed in range(SEEDS)]
        looks = run(base, edits, 0, questions, probes, look_steps=look_steps)
        found = []
        for k, look in enumerate(looks):
            trials = [marks for of_seed in by_seed if (marks := of_seed[k]) is not None]
            if look is not None and len(trials) == SEEDS:
                found.append(Measured(tuple(trials), look))
        groups.append(Group(baseline, tuple(found)))
        print(f"{name}: passage {number}/{count}, {len(found)} self-edits", flush=True)
    return groups


# -- working out -------------------------------------------------------------------------------------------------------


def reliability(groups: Sequence[Group], weights: Weights, seeds: int, *, shared: bool) -> float:
    """Of the mean over ``seeds`` seeds: ``shared`` by a group's candidates, or each with its own."""
    spreads = []
    for group in groups:
        values = group.values(weights)
        means = [fmean(row) for row in values]
        total = fmean(means)
        of_seed = [fmean(column) - total if shared else 0.0 for column in zip(*values, strict=True)]
        rest = sum(
            (value - mean - common) ** 2
            for row, mean in zip(values, means, strict=True)
            for value, common in zip(row, of_seed, strict=True)
        )
        noise = rest / ((len(values) - shared) * (SEEDS - 1))
        spreads.append(Spread(variance(means) - noise / SEEDS, noise / seeds))
    found = pooled(spreads)
    assert found is not None
    return found.reliability


def validity(groups: Sequence[Group], weights: Weights, seeds: int, draws: int) -> float:
    """Squared correlation, within passages, with the plain reward of the seeds that are not used."""
    dice = random.Random(0)
    product = mine = truth = 0.0
    for group in groups:
        values, wanted = group.values(weights), group.values(PLAIN)
        for _ in range(draws):
            used = set(dice.sample(range(SEEDS), seeds))
            x = [fmean(row[s] for s in used) for row in values]
            y = [fmean(row[s] for s in range(SEEDS) if s not in used) for row in wanted]
            x, y = [a - fmean(x) for a in x], [b - fmean(y) for b in y]
            product += sum(a * b for a, b in zip(x, y, strict=True))
            mine += sum(a * a for a in x)
            truth += sum(b * b for b in y)
    return product**2 / (mine * truth)


def race(group: Group, settings: RaceSettings, order: Sequence[int], weights: Weights) -> list[Candidate]:
    """The group after a race on the seeds of ``order``, driven as a run drives it."""
    candidates = [Candidate() for _ in group.candidates]
    while (step := next_step(candidates, settings)) is not None:
        for i in step.candidates:
            if step.look:
                candidates[i] = Candidate(look=group.look(i))
            else:
                evaluation = group.evaluation(i, order[: step.seeds], weights)
                candidates[i] = Candidate(candidates[i].look, evaluation)
    return candidates


def racing(groups: Sequence[Group], settings: RaceSettings, weights: Weights, rounds: int = 6) -> dict[str, float]:
    """Shares of races (each group, with the seeds dealt anew ``rounds`` times)."""
    dice = random.Random(1)
    same, other_same, ceiling, compute, seconds, regret = [], [], [], [], [], []
    for group in groups:
        values = group.values(weights)
        for _ in range(rounds):
            order = dice.sample(range(SEEDS), SEEDS)
            mine, others = order[:REFERENCE], order[REFERENCE:]
            full = [fmean(row[s] for s in mine) for row in values]
            judge = [fmean(row[s] for s in others) for row in values]
            candidates = race(group, settings, mine, weights)
            choice = best(candidates, settings)[0]
            same.append(full[choice] == max(full))
            other_same.append(judge[choice] == max(judge))
            ceiling.append(judge[full.index(max(full))] == max(judge))
            regret.append(max(judge) - judge[choice])
            compute.append(spent(candidates) / (len(values) * REFERENCE))
            reports = [
                report
                for one in candidates
                for evaluation in (one.look, one.evaluation)
                if evaluation is not None
                for report in evaluation.trials
            ]
            everything = sum(one.trials[s].seconds for one in group.candidates for s in mine)
            seconds.append(sum(report.seconds for report in reports) / everything)
    names = ("same_choice", "compute", "seconds", "same_choice_of_other_seeds", "ceiling", "regret")
    return dict(zip(names, map(fmean, (same, compute, seconds, other_same, ceiling, regret)), strict=True))


def report(groups: Sequence[Group], settings: RaceSettings, draws: int = 50) -> dict[str, Any]:
    """All figures of one set; ``draws`` of the seeds that a correlation is worked out from."""
    rows = [
        {
            "reward": name,
            "seeds": seeds,
            "compute": seeds / 3,
            "reliability": reliability(groups, weights, seeds, shared=shared),
            "validity": validity(groups, weights, seeds, draws),
        }
        for name, weights, shared in (
            *(("plain", PLAIN, False), ("ours", OURS, True)),
            *(("probability", PROBABILITY, True), ("log-probability", LOG_PROBABILITY, True)),
        )
        for seeds in (1, 2, 3)
    ]
    return {
        "passages": len(groups),
        "self_edits": sum(len(group.candidates) for group in groups),
        "rewards": rows,
        "racing": racing(groups, settings, OURS),
    }


def table(name: str, found: dict[str, Any]) -> list[str]:
    """The figures of one set as Markdown."""
    lines = [
        f"### {name}: {found['self_edits']} self-edits of {found['passages']} passages",
        "",
        "| reward | seeds | compute of plain 3 | reliability | validity |",
        "|---|---|---|---|---|",
    ]
    lines += [
        "| {reward} | {seeds} | {compute:.0%} | {reliability:.3f} | {validity:.3f} |".format(**row)
        for row in found["rewards"]
    ]
    race_ = found["racing"]
    return [
        *lines,
        "",
        f"Racing: the same choice as {REFERENCE} seeds each in {race_['same_choice']:.1%} of races, for "
        f"{race_['compute']:.1%} of the trained tokens ({race_['seconds']:.1%} of the seconds). Judged by 8 other "
        f"seeds, the best in {race_['same_choice_of_other_seeds']:.1%} (whoever measures all 8: "
        f"{race_['ceiling']:.1%}), "
        f"{race_['regret']:.4f} below it on average.",
        "",
    ]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=27, help="training passages; nine make one of every kind")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--look-steps", type=int, default=4)
    parser.add_argument("--look-keep", type=float, default=0.5)
    parser.add_argument("--budget", type=float, default=3.2, help="trials per self-edit on average; 8 are everything")
    parser.add_argument("-z", type=float, default=1.0)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--measured", type=Path, help="read the trials from this file, or write them there")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    measured: dict[str, list[Group]] = {}
    if given.measured and given.measured.exists():
        measured = _read(json.loads(given.measured.read_text(encoding="utf-8")))
    for name in given.sets:
        if name not in measured:
            measured[name] = measure_set(name, given.seed, given.passages, given.candidates, given.look_steps)
            if given.measured:
                text = json.dumps({key: [asdict(group) for group in groups] for key, groups in measured.items()})
                given.measured.write_text(text + "\n", encoding="utf-8")
    settings = RaceSettings(given.look_steps, given.look_keep, REFERENCE, given.budget, given.z, top=1)
    found = {name: report(measured[name], settings) for name in given.sets}
    for name, figures in found.items():
        print("\n".join(table(name, figures)))
    if given.json:
        given.json.write_text(json.dumps(_headline(found), indent=1) + "\n", encoding="utf-8")


def _headline(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures that are followed over time are those of the first set; all sets stand beside them."""
    first = next(iter(found.values()))
    by = {(row["reward"], row["seeds"]): row for row in first["rewards"]}
    return {
        "plain3": {"reliability": by["plain", 3]["reliability"]},
        "ours": {"reliability": by["ours", 3]["reliability"], "compute": by["ours", 3]["compute"]},
        "racing": {"same_choice": first["racing"]["same_choice"], "compute": first["racing"]["compute"]},
        "sets": found,
    }


def _read(stored: dict[str, Any]) -> dict[str, list[Group]]:
    def marks(values: dict[str, Any]) -> Marks:
        read: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return Marks(**read)

    make: Callable[[dict[str, Any]], Group] = lambda group: Group(  # noqa: E731
        marks(group["baseline"]),
        tuple(Measured(tuple(map(marks, one["trials"])), marks(one["look"])) for one in group["candidates"]),
    )
    return {name: [make(group) for group in groups] for name, groups in stored.items()}


if __name__ == "__main__":
    main()
