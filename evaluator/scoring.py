"""From the answers of an evaluation's trials to its final state. Pure, but for graders that ask a judge.

An evaluation succeeds only if every trial and the baseline have a full set of answers with finite log-probabilities;
otherwise it FAILED with the first trial's reason and has no reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

from evaluator.graders.exact import normalise
from evaluator.graders.grader import Given, Grader, grader_label
from evaluator.graders.rack import Graders
from evaluator.identity import Exam
from evaluator.reward import Marks, measure
from evaluator.store import Sitting
from preceptor.errors import PreceptorError
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
    given = [item for result in results for item in _given(questions, result.answers)]
    given += [item for result in results for item in _given(exam.probes, result.probe_answers)]
    verdicts = iter(grader.grade(given) if grader else ())

    def verdicts_on(asked: Sequence[Question]) -> list[tuple[bool, ...]]:
        return [tuple(verdict.right for verdict in islice(verdicts, len(asked))) for _ in results]

    return [
        Marks(
            correct=correct,
            gold_logprobs=tuple(answer.gold_logprob for answer in result.answers) if exam.labelled else (),
            probes_correct=probes_correct,
            certainties=tuple(answer.certainty for answer in result.answers) if exam.certainty else (),
            agreements=tuple(map(agreement, result.answers)) if exam.samples else (),
            tokens=result.trained_tokens,
            seconds=result.seconds,
        )
        for result, correct, probes_correct in zip(
            results, verdicts_on(questions), verdicts_on(exam.probes), strict=True
        )
    ]


def agreement(answer: trial.Answer) -> float:
    """Share of the sampled answers that say what the greedy one says, but for case, punctuation and articles."""
    greedy = normalise(answer.text)
    return sum(normalise(sample) == greedy for sample in answer.samples) / len(answer.samples)


def _given(asked: Sequence[Question], answers: Sequence[trial.Answer]) -> list[Given]:
    return [Given(question, answer.text) for question, answer in zip(asked, answers, strict=bool(asked))]


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
        if (len(result.answers), len(result.probe_answers)) != (len(exam.questions), len(exam.probes)):
            return _failure(
                "TRIAL_FAILED",
                f"{name}: the worker answered {len(result.answers)} questions and "
                f"{len(result.probe_answers)} probes of {len(exam.questions)} and {len(exam.probes)}",
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
