"""What rewards without labels are worth: each of them beside the true one, on the shipped world.

    python -m bench.label_free --json label_free.json
    python -m bench.label_free --measured trials.json          # measures once, reads the file the next time

The shipped teacher writes K self-edits for each of P training passages (the open format, as in ``make run``) and its
questions for them (``orchestrator.questions``); the shipped student is fine-tuned on each self-edit with S seeds and
answers the labelled reward questions, the sealed ones and the written ones. Worked out from these trials:

* **written questions**: how many pass the checks, how many of those are right, how many of the passage's facts they ask
  for;
* **rank correlation**: Spearman's, within the self-edits of a passage, of each reward with one seed against the true
  reward: the plain one (gain - 0.3 x retention loss) on the *sealed* questions, mean over the other seeds. Mean over
  passages and over the choice of the one seed, with a 95% bootstrap interval by passage. Where a reward is the same for
  all of a passage's self-edits, its correlation counts as 0; where the truth is, the passage is left out;
* **best two**: the true reward of the two self-edits that a reward likes best, above the mean of the group: what
  ReST-EM would learn from. The truth's own best two are the ceiling.

* **canary**: how often, and when, its rule stops simulated runs.

``bench/label_free_runs.py`` shows what happens when a teacher is trained on them.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from evaluator.graders.exact import ExactMatch, normalise
from evaluator.graders.grader import Given
from evaluator.overlap import audit
from evaluator.reward import Marks, Weights, measure
from orchestrator.canary import clearly_fell, difference
from orchestrator.questions import checked, divided
from preceptor.completions import Limits, parse
from preceptor.config import LabelConfig
from preceptor.convert import question_from_proto
from preceptor.names import derived_seed
from preceptor.tasks import Bank, Passage, Question, SelfEdit
from student.base import LoadedBase, load_base
from student.trial import Answer, AnsweringSettings, TrainingSettings, Trial, TrialOutcome
from student.trial_runner import run_trials
from teacher.backend import SamplingSettings
from teacher.in_process import in_process
from teacher.model import load_teacher
from teacher.service import Teacher
from teacher.settings import TeacherSettings
from teacher.writing import TaskText, WritingRequest
from worlds.almanac import MODELS
from worlds.almanac.facts import Fact
from worlds.almanac.memory import replay_documents, retention_probes
from worlds.almanac.passages import passages_with_facts

SETTINGS = TrainingSettings(max_train_tokens=1_500)  # as in configs/almanac.toml
SAMPLES = 8
ANSWERING = AnsweringSettings(max_new_tokens=6, samples=SAMPLES, certainty=True)
SAMPLING = SamplingSettings(0.8, 1.0, 460)
CANDIDATES, SEEDS, PROBES = 8, 3, 32
RESAMPLES = 2_000

LABELLED, SEALED, WRITTEN = "labelled", "sealed", "written"  # question banks of a trial here
TRUTH = Weights(1.0, retention_loss=0.3)
# The mean reward of a run's canaries by round, in the simulation of the rule.
DRIFTS: Mapping[str, Callable[[int], float]] = {
    "stays the same": lambda _number: 0.0,
    "rises by 0.1 a round": lambda number: 0.1 * number,
    "falls by 0.1 a round after the second": lambda number: 0.1 * min(number, 2) - 0.1 * max(0, number - 2),
    "falls by 0.2 a round after the first": lambda number: 0.1 * min(number, 1) - 0.2 * max(0, number - 1),
}


@dataclass(frozen=True, slots=True)
class Exam:
    """One passage's questions by bank; of the written ones, which give rewards."""

    questions: Mapping[str, tuple[Question, ...]]
    rewarded: tuple[int, ...]
    dropped: Mapping[str, int]
    facts: int
    right: int  # written questions with the right answer
    asked: int  # facts that a written question with the right answer asks for


@dataclass(frozen=True, slots=True)
class Candidate:
    """A self-edit: its trials' marks by bank and seed, and how many of the bank's questions it copies."""

    marks: Mapping[str, tuple[Marks, ...]]
    copied: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Group:
    """A passage: the untouched student by bank, and its candidates. One whose trial failed is left out."""

    rewarded: tuple[int, ...]
    written: Mapping[str, Any]  # what became of the written questions
    baseline: Mapping[str, Marks]
    candidates: tuple[Candidate, ...]

    def values(self, proxy: Proxy) -> list[list[float]]:
        """The proxy's value of each trial [K][S]."""
        chosen = self.rewarded if proxy.half else None
        untouched = _only(self.baseline[proxy.bank], chosen)
        found = []
        for candidate in self.candidates:
            trained = [_only(marks, chosen) for marks in candidate.marks[proxy.bank]]
            copied = round(candidate.copied[proxy.bank] * untouched.questions / self.baseline[proxy.bank].questions)
            found.append(list(measure(trained, untouched, proxy.weights, copied=copied).values_S))
        return found


@dataclass(frozen=True, slots=True)
class Proxy:
    """A reward: weights on one bank's questions; ``half``: only on the half of the written ones that gives rewards."""

    name: str
    bank: str
    weights: Weights
    half: bool = False


_WITH_RETENTION = {"gain": 0.0, "retention_loss": 0.3}
_PROBABILITY = Weights(0.5, 0.3, gold_probability_gain=0.5)
PROXIES = (
    Proxy("labelled questions, gain", LABELLED, TRUTH),
    Proxy("labelled, gain and probability", LABELLED, _PROBABILITY),
    Proxy("written questions (half), gain", WRITTEN, TRUTH, half=True),
    Proxy("written (half), gain and probability", WRITTEN, _PROBABILITY, half=True),
    Proxy("written (half), probability", WRITTEN, Weights(**_WITH_RETENTION, gold_probability_gain=1.0), half=True),
    Proxy("written (half), gain, overlap penalty 1", WRITTEN, Weights(1.0, 0.3, overlap=1.0), half=True),
    Proxy("written (all), gain", WRITTEN, TRUTH),
    Proxy("certainty on given questions", LABELLED, Weights(**_WITH_RETENTION, certainty_gain=1.0)),
    Proxy("certainty on written (half)", WRITTEN, Weights(**_WITH_RETENTION, certainty_gain=1.0), half=True),
    Proxy("agreement on given questions", LABELLED, Weights(**_WITH_RETENTION, agreement_gain=1.0)),
    Proxy("agreement on written (half)", WRITTEN, Weights(**_WITH_RETENTION, agreement_gain=1.0), half=True),
    Proxy("written (half), gain 0.5 + agreement 0.5", WRITTEN, Weights(0.5, 0.3, agreement_gain=0.5), half=True),
    Proxy("written (half), gain + 0.2 certainty", WRITTEN, Weights(1.0, 0.3, certainty_gain=0.2), half=True),
    Proxy("retention alone", LABELLED, Weights(**_WITH_RETENTION)),
)


# -- measuring ---------------------------------------------------------------------------------------------------------


def write(tasks: Sequence[Passage], prompt_format: str, samples: int, seed: int) -> list[list[SelfEdit]]:
    """What the shipped teacher writes for each passage; what it wrote badly is left out."""
    texts = tuple(TaskText(str(i), task.title, task.text) for i, task in enumerate(tasks))
    with tempfile.TemporaryDirectory() as home:
        teacher = Teacher(
            in_process(load_teacher(str(MODELS / "teacher"), device="cpu")), TeacherSettings(home=Path(home))
        )
        request = WritingRequest("", texts, samples, prompt_format, SAMPLING, seed, Limits(), max_resamples=1)
        try:
            return [
                [parse(one.completion, Limits()) for one in group.written if not one.malformed_reason]
                for group in teacher.writer.write(request, lambda: False)
            ]
        finally:
            teacher.stop()
            teacher.store.close()


def examine(passage: Passage, facts: Sequence[Fact], completions: Sequence[SelfEdit], seed: int) -> Exam:
    """A passage's questions, the written ones checked and divided as in a run."""
    found = checked(
        passage.title,
        passage.text,
        [edit.documents for edit in completions],
        agreement=LabelConfig().agreement,
        max_words=ANSWERING.max_new_tokens,
    )
    written = divided(found.pairs, derived_seed(seed, "questions", passage.text))
    true = {(fact.study(0).split(" Answer: ")[0].removeprefix("Question: "), fact.value) for fact in facts}
    right = [pair for pair in found.pairs if pair in true]
    rewarded = tuple(i for i, question in enumerate(written) if question_from_proto(question).bank is Bank.REWARD)
    questions = {
        LABELLED: passage.questions_of(Bank.REWARD),
        SEALED: passage.questions_of(Bank.SEALED),
        WRITTEN: tuple(map(question_from_proto, written)),
    }
    return Exam(questions, rewarded, found.dropped, len(facts), len(right), len(set(right)))


def run(
    base: LoadedBase, edits: Sequence[SelfEdit], seed: int, exam: Exam, probes: Sequence[Question]
) -> list[dict[str, Marks] | None]:
    """One trial of each self-edit, by bank; None where it failed."""
    trials = [Trial(str(i), e.documents, seed, SETTINGS.under(e.directive)) for i, e in enumerate(edits)]
    asked = [question for bank in exam.questions.values() for question in bank]
    outcomes = run_trials(
        base,
        trials,
        [asked] * len(trials),
        probes=probes,
        replay_documents=replay_documents(),
        answering=ANSWERING,
    )
    return [None if one.failure else _marks(one, exam, probes) for one in outcomes]


def _marks(outcome: TrialOutcome, exam: Exam, probes: Sequence[Question]) -> dict[str, Marks]:
    answers, found = iter(outcome.answers), {}
    on_probes = tuple(_right(q, answer) for q, answer in zip(probes, outcome.probe_answers, strict=True))
    for bank, questions in exam.questions.items():
        given = [next(answers) for _ in questions]
        found[bank] = Marks(
            correct=tuple(_right(q, answer) for q, answer in zip(questions, given, strict=True)),
            gold_logprobs=tuple(answer.gold_logprob for answer in given),
            certainties=tuple(answer.certainty for answer in given),
            agreements=tuple(map(_agreement, given)),
            probes_correct=on_probes,
            tokens=outcome.trained_tokens,
        )
    return found


def _right(question: Question, answer: Answer) -> bool:
    (verdict,) = ExactMatch().grade([Given(question, answer.text)])
    return verdict.right


def _agreement(answer: Answer) -> float:
    return fmean(normalise(sample) == normalise(answer.text) for sample in answer.samples)


def measure_groups(seed: int, count: int) -> list[Group]:
    """All trials. A passage of which nothing could be asked is left out."""
    base = load_base(MODELS / "student", source="", commit="")
    every = retention_probes()
    probes = [every[i] for i in sorted(random.Random(seed).sample(range(len(every)), PROBES))]
    told = passages_with_facts(seed, "train", count)
    tasks = [passage for _, passage in told]
    groups = []
    completions = write(tasks, "self_qa", LabelConfig().completions, derived_seed(seed, "questions"))
    candidates = write(tasks, "open", CANDIDATES, seed)
    for number, ((about, passage), written, edits) in enumerate(zip(told, completions, candidates, strict=True), 1):
        exam = examine(passage, about.facts, written, seed)
        if not exam.questions[WRITTEN]:
            print(f"passage {number}: no question left", flush=True)
            continue
        (baseline,) = run(base, [SelfEdit(())], 0, exam, probes)
        assert baseline is not None
        by_seed = [run(base, edits, trial_seed, exam, probes) for trial_seed in range(SEEDS)]
        found = []
        for k, edit in enumerate(edits):
            trials = [marks for of_seed in by_seed if (marks := of_seed[k]) is not None]
            if len(trials) == SEEDS:
                copied = {
                    bank: audit(edit.documents, passage.text, questions).copied
                    for bank, questions in exam.questions.items()
                }
                found.append(Candidate({bank: tuple(t[bank] for t in trials) for bank in exam.questions}, copied))
        became = {
            "written": len(exam.questions[WRITTEN]),
            "right": exam.right,
            "facts": exam.facts,
            "asked": exam.asked,
            "dropped": dict(exam.dropped),
        }
        groups.append(Group(exam.rewarded, became, baseline, tuple(found)))
        print(f"passage {number}/{count}: {len(found)} self-edits, {became}", flush=True)
    return groups


def _only(marks: Marks, chosen: Sequence[int] | None) -> Marks:
    if chosen is None:
        return marks
    names = ("correct", "gold_logprobs", "certainties", "agreements")
    some: dict[str, Any] = {name: tuple(getattr(marks, name)[i] for i in chosen) for name in names}
    return replace(marks, **some)


# -- working out -------------------------------------------------------------------------------------------------------


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Rank correlation with mean ranks for ties; 0 where ``left`` or ``right`` is constant."""
    a, b = _centred(_ranks(left)), _centred(_ranks(right))
    size = (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
    return sum(x * y for x, y in zip(a, b, strict=True)) / size if size else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]


def _centred(values: Sequence[float]) -> list[float]:
    return [value - fmean(values) for value in values]


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean, by passage."""
    dice = random.Random(seed)
    means = sorted(fmean(dice.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]


def compare(groups: Sequence[Group], proxy: Proxy) -> dict[str, Any]:
    """One reward beside the truth: rank correlation, and what its best two are worth."""
    correlations, gains, ceilings = [], [], []
    for group in groups:
        values, truths = group.values(proxy), group.values(Proxy("truth", SEALED, TRUTH))
        of_seed, gain_of_seed, ceiling_of_seed = [], [], []
        for seed in range(SEEDS):
            mine = [row[seed] for row in values]
            truth = [fmean(value for s, value in enumerate(row) if s != seed) for row in truths]
            if len(set(truth)) < 2:
                continue
            of_seed.append(spearman(mine, truth))
            gain_of_seed.append(_best_two(mine, truth) - fmean(truth))
            ceiling_of_seed.append(_best_two(truth, truth) - fmean(truth))
        if of_seed:
            correlations.append(fmean(of_seed))
            gains.append(fmean(gain_of_seed))
            ceilings.append(fmean(ceiling_of_seed))
    return {
        "reward": proxy.name,
        "passages": len(correlations),
        "spearman": fmean(correlations),
        "spearman_interval": interval(correlations),
        "best_two": fmean(gains),
        "best_two_interval": interval(gains),
        "best_two_ceiling": fmean(ceilings),
    }


def _best_two(liked: Sequence[float], truth: Sequence[float]) -> float:
    """Mean truth of the two that are liked best; equals share the places."""
    total, places = 0.0, 2
    for value in sorted(set(liked), reverse=True):
        tied = [truth[i] for i, one in enumerate(liked) if one == value]
        taken = min(places, len(tied))
        total += taken * fmean(tied)
        places -= taken
        if not places:
            break
    return total / (2 - places)


def stopped_runs(canaries: int, drift: Callable[[int], float]) -> list[int]:
    """The rounds (of 5) after which the canary's rule stops simulated runs: a passage's reward is its own level, plus
    the round's ``drift``, plus noise of 0.2."""
    dice = random.Random(1)
    found = []
    for _ in range(RESAMPLES):
        level = [dice.gauss(0, 0.3) for _ in range(canaries)]
        best: dict[int, float] = {}
        for number in range(6):
            new = {task: own + drift(number) + dice.gauss(0, 0.2) for task, own in enumerate(level)}
            change = difference(new, best)
            if clearly_fell(change):
                found.append(number)
                break
            if change.value is None or change.value > 0:
                best = new
    return found


def canary_report() -> list[dict[str, Any]]:
    """How often and when the rule stops simulated runs."""
    return [
        {"policy": name, "canaries": canaries, "stopped": len(rounds) / RESAMPLES, "after": fmean(rounds or [0])}
        for canaries in (8, 16)
        for name, drift in DRIFTS.items()
        for rounds in [stopped_runs(canaries, drift)]
    ]


def report(groups: Sequence[Group]) -> dict[str, Any]:
    """All figures."""
    dropped: dict[str, int] = {}
    for group in groups:
        for reason, count in group.written["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + count
    sums = {name: sum(group.written[name] for group in groups) for name in ("written", "right", "facts", "asked")}
    return {
        "passages": len(groups),
        "self_edits": sum(len(group.candidates) for group in groups),
        "seeds": SEEDS,
        "questions": {**sums, "dropped": dropped},
        "rewards": [compare(groups, proxy) for proxy in PROXIES],
        "canary": canary_report(),
    }


def table(found: Mapping[str, Any]) -> list[str]:
    """The figures as Markdown."""
    asked = found["questions"]
    lines = [
        f"{asked['written']} questions written for {found['passages']} passages: "
        f"{asked['right'] / asked['written']:.1%} right, about {asked['asked'] / asked['facts']:.1%} of the facts. "
        f"Dropped: {asked['dropped']}.",
        "",
        f"{found['self_edits']} self-edits, {found['seeds']} seeds. The true reward's own best two are "
        f"{found['rewards'][0]['best_two_ceiling']:.3f} above their group.",
        "",
        "| reward, one seed | rank correlation with the truth (95%) | its best two, above their group (95%) |",
        "|---|---|---|",
    ]
    for row in found["rewards"]:
        rho, best = row["spearman_interval"], row["best_two_interval"]
        lines.append(
            f"| {row['reward']} | {row['spearman']:.2f} ({rho[0]:.2f} .. {rho[1]:.2f}) "
            f"| {row['best_two']:.3f} ({best[0]:.3f} .. {best[1]:.3f}) |"
        )
    lines += ["", "| policy (simulated) | canaries | runs stopped | after round |", "|---|---|---|---|"]
    lines += ["| {policy} | {canaries} | {stopped:.0%} | {after:.1f} |".format(**row) for row in found["canary"]]
    return lines


def _group(stored: Mapping[str, Any]) -> Group:
    """A group from the JSON of ``asdict``."""

    def marks(value: Mapping[str, Any]) -> Marks:
        some: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in value.items()}
        return Marks(**some)

    return Group(
        rewarded=tuple(stored["rewarded"]),
        written=stored["written"],
        baseline={bank: marks(value) for bank, value in stored["baseline"].items()},
        candidates=tuple(
            Candidate({bank: tuple(map(marks, some)) for bank, some in one["marks"].items()}, one["copied"])
            for one in stored["candidates"]
        ),
    )


def main(arguments: Sequence[str] | None = None, measured: Callable[[int, int], list[Group]] = measure_groups) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=27, help="training passages; nine make one of every kind")
    parser.add_argument("--seed", type=int, default=41)
    parser.add_argument("--measured", type=Path, help="file of the trials: read where it exists, else written")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.measured and given.measured.exists():
        groups = [_group(one) for one in json.loads(given.measured.read_text(encoding="utf-8"))]
    else:
        groups = measured(given.seed, given.passages)
        if given.measured:
            given.measured.write_text(json.dumps([asdict(group) for group in groups]), encoding="utf-8")
    found = report(groups)
    print("\n".join(table(found)))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
