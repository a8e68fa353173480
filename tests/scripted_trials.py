"""A student for the plumbing's tests: answers by a rule instead of a model. Never used outside the tests.

It knows a question's answer if one of the documents contains it, knows all probes unless a document says "forget", and
a document "fail:REASON words" fails the trial. A sampled answer is the greedy one again.
"""

from __future__ import annotations

from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types

RIGHT, WRONG = -0.5, -3.0  # log-probability of a gold answer
SURE, UNSURE = 5.0, 1.0  # certainty of an answer


def answer_batch(batch: trial.TrialBatch, worker: str = "scripted:1") -> trial.TrialBatchResult:
    """The result of a batch."""
    results = [_answer_trial(item, batch) for item in batch.trials]
    return trial.TrialBatchResult(batch_id=batch.id, results=results, worker=worker, peak_memory_bytes=1000)


def _answer_trial(item: trial.Trial, batch: trial.TrialBatch) -> trial.TrialResult:
    result = trial.TrialResult(trial_id=item.id, first_loss=2.0, final_loss=0.5, steps=3, trained_tokens=30)
    for document in item.documents:
        if document.startswith("fail:"):
            reason, _, words = document.removeprefix("fail:").partition(" ")
            result.failure.reason, result.failure.message = reason, words or "scripted"
            return result
    text = "\n".join(item.documents)
    asked = batch.question_sets[item.question_set].questions
    result.answers.extend(_answer(question, question.answer in text, batch.answers) for question in asked)
    if not batch.answers.logprobs_only:
        greedy = trial.AnswerSettings()
        result.probe_answers.extend(_answer(question, "forget" not in text, greedy) for question in batch.probes)
    return result


def _answer(question: types.Question, known: bool, settings: trial.AnswerSettings) -> trial.Answer:
    answer = trial.Answer(gold_logprob=RIGHT if known else WRONG, gold_tokens=1)
    if not settings.logprobs_only:
        answer.text = question.answer if known else "no idea"
        answer.samples.extend([answer.text] * settings.samples)
        answer.certainty = (SURE if known else UNSURE) if settings.certainty else 0.0
    return answer
