"""From the answers of an evaluation's trials to its final state. Pure, but for graders that ask a judge.

An evaluation succeeds only if every trial and the baseline have a full set of answers with finite log-probabilities;
otherwise it FAILED with the first trial's reason and has no reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

from evaluator.graders.grader import Given, Grader, grader_label
from evaluator.graders.rack import Graders
from evaluator.identity import Exam
from evaluator.reward import Marks, reward
from evaluator.store import Sitting
from preceptor.errors import PreceptorError
from preceptor.tasks import Question
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types


def asks_a_judge(sitting: Sitting, graders: Graders) -> bool:
    """Whether ``score`` may take minutes."""
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
    try:
        grader = graders.named(sitting.exam.grader)
    except PreceptorError as error:  # it was at hand when the evaluation was asked for
        return failed(evaluation, _failure(error.reason, error.message))
    if grader_label(grader) != sitting.exam.grader_label:
        return failed(evaluation, _failure("GRADER_UNKNOWN", f"{sitting.exam.grader_label} is not at hand any more"))
    results = [result for _, result in sitting.results]
    *trained, baseline = mark(sitting.exam, grader, [*results, sitting.baseline])
    evaluation.reward.CopyFrom(reward(trained, baseline, sitting.exam.weights))
    for (seed, result), marks in zip(sitting.results, trained, strict=True):
        evaluation.trials.append(
            pb.TrialReport(
                seed=seed,
                accuracy=marks.accuracy,
                retention=marks.retention or 0.0,
                first_loss=result.first_loss,
                final_loss=result.final_loss,
                steps=result.steps,
                trained_tokens=result.trained_tokens,
                correct=marks.correct,
            )
        )
    evaluation.state = pb.EVALUATION_STATE_SUCCEEDED
    return evaluation


def failed(evaluation: pb.Evaluation, failure: types.Failure) -> pb.Evaluation:
    """The evaluation as FAILED: a reason and no reward."""
    evaluation.ClearField("reward")
    evaluation.ClearField("trials")
    evaluation.failure.CopyFrom(failure)
    evaluation.state = pb.EVALUATION_STATE_FAILED
    return evaluation


def mark(exam: Exam, grader: Grader, results: Sequence[trial.TrialResult]) -> list[Marks]:
    """The graded answers of trials that have all of them; asked for together, so that a judge is asked at once."""
    given = [item for result in results for item in _given(exam, result)]
    verdicts = iter(grader.grade(given))

    def next_of(questions: Sequence[Question]) -> tuple[bool, ...]:
        return tuple(verdict.right for verdict in islice(verdicts, len(questions)))

    return [
        Marks(next_of(exam.questions), tuple(answer.gold_logprob for answer in result.answers), next_of(exam.probes))
        for result in results
    ]


def _given(exam: Exam, result: trial.TrialResult) -> list[Given]:
    asked, answers = (*exam.questions, *exam.probes), (*result.answers, *result.probe_answers)
    return [Given(question, answer.text) for question, answer in zip(asked, answers, strict=True)]


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
        if not all(math.isfinite(answer.gold_logprob) for answer in result.answers):
            return _failure("TRIAL_DIVERGED", f"{name}: log-probabilities that are not finite")
    return None


def _failure(reason: str, message: str) -> types.Failure:
    return types.Failure(reason=reason, message=message, attempts=1)
