"""From the answers of an evaluation's trials to its final state. Pure.

An evaluation succeeds only if every trial and the baseline have a full set of answers with finite log-probabilities;
otherwise it FAILED with the first trial's reason and has no reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from evaluator.graders import Grader, grader_label, grader_named
from evaluator.identity import Exam
from evaluator.reward import Marks, reward
from evaluator.store import Sitting
from preceptor.tasks import Question
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types


def score(sitting: Sitting) -> pb.Evaluation:
    """The evaluation in its final state, SUCCEEDED with a reward or FAILED with a failure."""
    evaluation = pb.Evaluation()
    evaluation.CopyFrom(sitting.evaluation)
    failure = _first_failure(sitting)
    if failure is not None:
        return failed(evaluation, failure)
    grader = grader_named(sitting.exam.grader)
    if grader_label(grader) != sitting.exam.grader_label:
        return failed(evaluation, _failure("GRADER_UNKNOWN", f"{sitting.exam.grader_label} is not at hand any more"))
    marked = [(seed, result, mark(sitting.exam, grader, result)) for seed, result in sitting.results]
    baseline = mark(sitting.exam, grader, sitting.baseline)
    evaluation.reward.CopyFrom(reward([marks for _, _, marks in marked], baseline, sitting.exam.weights))
    for seed, result, marks in marked:
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


def mark(exam: Exam, grader: Grader, result: trial.TrialResult) -> Marks:
    """The graded answers of a trial that has all of them."""
    return Marks(
        _grade(grader, exam.questions, result.answers),
        tuple(answer.gold_logprob for answer in result.answers),
        _grade(grader, exam.probes, result.probe_answers),
    )


def _grade(grader: Grader, questions: Sequence[Question], answers: Sequence[trial.Answer]) -> tuple[bool, ...]:
    return tuple(grader.grade(question, answer.text) for question, answer in zip(questions, answers, strict=True))


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
