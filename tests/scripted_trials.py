"""A student for the plumbing's tests: answers by a rule instead of a model. Never used outside the tests.

It knows a question's answer if one of the documents contains it, knows all probes unless a document says "forget", and
a document "fail:REASON" fails the trial.
"""

from __future__ import annotations

from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types

RIGHT, WRONG = -0.5, -3.0  # log-probability of a gold answer


def answer_batch(batch: trial.TrialBatch, worker: str = "scripted:1") -> trial.TrialBatchResult:
    """The result of a batch."""
    results = [_answer_trial(item, batch) for item in batch.trials]
    return trial.TrialBatchResult(batch_id=batch.id, results=results, worker=worker, peak_memory_bytes=1000)


def _answer_trial(item: trial.Trial, batch: trial.TrialBatch) -> trial.TrialResult:
    result = trial.TrialResult(trial_id=item.id, first_loss=2.0, final_loss=0.5, steps=3, trained_tokens=30)
    for document in item.documents:
        if document.startswith("fail:"):
            result.failure.reason, result.failure.message = document.removeprefix("fail:"), "scripted"
            return result
    text = "\n".join(item.documents)
    result.answers.extend(_answer(q, q.answer in text) for q in batch.question_sets[item.question_set].questions)
    result.probe_answers.extend(_answer(q, "forget" not in text) for q in batch.probes)
    return result


def _answer(question: types.Question, known: bool) -> trial.Answer:
    text = question.answer if known else "no idea"
    return trial.Answer(text=text, gold_logprob=RIGHT if known else WRONG, gold_tokens=1)
