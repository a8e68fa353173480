"""From the answers of an evaluation's trials to its final state. Pure, but for graders that ask a judge.

An evaluation succeeds only if every trial and the baseline have a full set of answers with finite log-probabilities;
otherwise it FAILED with the first trial's reason and has no reward. A query of a few-shot task was asked in several
views: their answers are turned back and vote, and the two grids with most votes are its two attempts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

from evaluator.graders.exact import normalise
from evaluator.graders.grader import Given, Grader, Verdict, grader_label
from evaluator.graders.grid import BETWEEN_ATTEMPTS, GridMatch
from evaluator.graders.rack import Graders
from evaluator.identity import Exam
from evaluator.reward import Marks, measure
from evaluator.store import Sitting
from preceptor.errors import PreceptorError
from preceptor.few_shot.text import grid_text
from preceptor.few_shot.views import vote
from preceptor.tasks import Question
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types

# Of a sum of log-probabilities: 0, and some rounding.
MOST_LOGPROB = 0.1


def asks_a_judge(sitting: Sitting, graders: Graders) -> bool:
    """Whether ``score`` may take minutes."""
    if not sitting.exam.graded:
        return False
    try:
        return graders.named(sitting.exam.grader).waits
    except PreceptorError:  # which ``score`` makes a failure of
        return False


def score(sitting: Sitting, graders: Graders) -> pb.Evaluation:
    """The evaluation in its final state, SUCCEEDED with a reward or FAILED with a failure.

    Raises what a judge raises (``graders.grader``).
    """
    evaluation = pb.Evaluation()
    evaluation.CopyFrom(sitting.evaluation)
    failure = _first_failure(sitting)
    if failure is not None:
        return failed(evaluation, failure)
    grader = None
    if sitting.exam.graded:
        try:
            grader = graders.named(sitting.exam.grader)
        except PreceptorError as error:  # it was at hand when the evaluation was asked for
            return failed(evaluation, _failure(error.reason, error.message))
        if grader_label(grader) != sitting.exam.grader_label:
            gone = f"{sitting.exam.grader_label} is not at hand any more"
            return failed(evaluation, _failure("GRADER_UNKNOWN", gone))
    exam, results = sitting.exam, [result for _, result in sitting.results]
    *trained, baseline = mark(exam, grader, [*results, sitting.baseline])
    written = any(question.written for question in exam.questions)
    # Whoever writes study material with the model that wrote the questions writes the same questions: no fault of his.
    copied = 0 if written else evaluation.overlap.copied
    found = measure(trained, baseline, exam.weights, copied=copied, written=written)
    evaluation.reward.CopyFrom(found.reward)
    for at, (seed, result) in enumerate(sitting.results):
        report = _report(trained[at], result)
        report.seed, report.value = seed, found.values_S[at]
        report.values.extend(found.values_S_Q[at])
        evaluation.trials.append(report)
    evaluation.baseline.CopyFrom(_report(baseline, sitting.baseline))
    evaluation.state = pb.EVALUATION_STATE_SUCCEEDED
    return evaluation


def _report(marks: Marks, result: trial.TrialResult) -> pb.TrialReport:
    return pb.TrialReport(
        accuracy=marks.accuracy or 0.0,
        retention=marks.retention or 0.0,
        first_loss=result.first_loss,
        final_loss=result.final_loss,
        steps=result.steps,
        trained_tokens=result.trained_tokens,
        correct=marks.correct,
        gold_logprobs=marks.gold_logprobs,
        probes_correct=marks.probes_correct,
        certainties=marks.certainties,
        agreements=marks.agreements,
        seconds=result.seconds,
        adapter=result.adapter if result.HasField("adapter") else None,
    )


def failed(evaluation: pb.Evaluation, failure: types.Failure) -> pb.Evaluation:
    """The evaluation as FAILED: a reason and no reward."""
    evaluation.ClearField("reward")
    evaluation.ClearField("trials")
    evaluation.failure.CopyFrom(failure)
    evaluation.state = pb.EVALUATION_STATE_FAILED
    return evaluation


def mark(exam: Exam, grader: Grader | None, results: Sequence[trial.TrialResult]) -> list[Marks]:
    """What the trials showed, all of which have all answers; asked for together, so that a judge is asked at once.

    Without a grader no answer is right or wrong. Questions without gold answers are not graded, probes are.
    """
    questions = exam.questions if exam.labelled else ()
    said = [_said(exam, result.answers) for result in results]
    asked = [item for of_result in said for item in _given(questions, [one.text for one in of_result])]
    probed = [
        item for result in results for item in _given(exam.probes, [answer.text for answer in result.probe_answers])
    ]
    if grader is None:
        verdicts: Iterator[Verdict] = iter(())
    elif exam.ways:  # grids, whatever the probes are
        verdicts = iter([*GridMatch().grade(asked), *grader.grade(probed)])
    else:
        verdicts = iter(grader.grade([*asked, *probed]))

    def verdicts_on(asked: Sequence[Question]) -> list[tuple[bool, ...]]:
        return [tuple(verdict.right for verdict in islice(verdicts, len(asked))) for _ in results]

    return [
        Marks(
            correct=correct,
            gold_logprobs=tuple(one.gold_logprob for one in of_result) if exam.labelled else (),
            probes_correct=probes_correct,
            certainties=tuple(one.certainty for one in of_result) if exam.certainty else (),
            agreements=tuple(one.agreement for one in of_result) if exam.samples else (),
            tokens=result.trained_tokens,
            seconds=result.seconds,
        )
        for result, of_result, correct, probes_correct in zip(
            results, said, verdicts_on(questions), verdicts_on(exam.probes), strict=True
        )
    ]


@dataclass(frozen=True, slots=True)
class _Said:
    """What a student said to one question, over all its views."""

    text: str
    gold_logprob: float
    certainty: float
    agreement: float


def _said(exam: Exam, answers: Sequence[trial.Answer]) -> list[_Said]:
    """Per question. Of views the text is the two grids that are said most often, the rest a mean."""
    each = [
        _Said(one.text, one.gold_logprob, one.certainty, agreement(one) if exam.samples else 0.0) for one in answers
    ]
    if not exam.ways:
        return each
    grouped = [each[start : start + len(exam.ways)] for start in range(0, len(each), len(exam.ways))]
    return [
        _Said(
            BETWEEN_ATTEMPTS.join(
                grid_text(grid) for grid in vote([way.read(one.text) for way, one in zip(exam.ways, seen, strict=True)])
            ),
            *(fmean(getattr(one, name) for one in seen) for name in ("gold_logprob", "certainty", "agreement")),
        )
        for seen in grouped
    ]


def agreement(answer: trial.Answer) -> float:
    """Share of the sampled answers that say what the greedy one says, but for case, punctuation and articles."""
    greedy = normalise(answer.text)
    return sum(normalise(sample) == greedy for sample in answer.samples) / len(answer.samples)


def _given(asked: Sequence[Question], answers: Sequence[str]) -> list[Given]:
    return [Given(question, answer) for question, answer in zip(asked, answers, strict=bool(asked))]


def _first_failure(sitting: Sitting) -> types.Failure | None:
    exam = sitting.exam
    for name, result in [(f"seed {seed}", result) for seed, result in sitting.results] + [
        ("the baseline", sitting.baseline)
    ]:
        if result.HasField("failure"):
            failure = types.Failure()
            failure.CopyFrom(result.failure)
            failure.message = f"{name}: {failure.message}"
            return failure
        asked = len(exam.questions) * max(len(exam.ways), 1)
        if (len(result.answers), len(result.probe_answers)) != (asked, len(exam.probes)):
            return _failure(
                "TRIAL_FAILED",
                f"{name}: the worker answered {len(result.answers)} questions and "
                f"{len(result.probe_answers)} probes of {asked} and {len(exam.probes)}",
            )
        if any(len(answer.samples) != exam.samples for answer in result.answers):
            return _failure("TRIAL_FAILED", f"{name}: the worker did not sample {exam.samples} answers per question")
        if not all(math.isfinite(answer.gold_logprob + answer.certainty) for answer in result.answers):
            return _failure("TRIAL_DIVERGED", f"{name}: log-probabilities that are not finite")
        if any(answer.gold_logprob > MOST_LOGPROB for answer in result.answers) or not math.isfinite(result.seconds):
            return _failure("TRIAL_FAILED", f"{name}: the worker gives a log-probability above 0, or no finite time")
    return None


def _failure(reason: str, message: str) -> types.Failure:
    return types.Failure(reason=reason, message=message, attempts=1)
