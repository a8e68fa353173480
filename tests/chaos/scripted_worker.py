"""``python -m tests.chaos.scripted_worker``: the scripted worker of the queue's tests, as a child of the stack.

What its student knows is drawn from the trial alone (documents, seed, question), so rewards differ from one another and
a trial comes out the same on any worker, in any batch.
"""

from __future__ import annotations

import os
import sys
import threading
import time

from preceptor.names import derived_seed
from preceptor.settings import HouseSettings
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types
from tests.integration import scripted_worker

BATCH_SECONDS = 0.4


def answer_batch(batch: trial.TrialBatch, worker: str = "scripted:1") -> trial.TrialBatchResult:
    """The result of a batch."""
    results = [_answer_trial(item, batch) for item in batch.trials]
    return trial.TrialBatchResult(batch_id=batch.id, results=results, worker=worker, peak_memory_bytes=1000)


def _answer_trial(item: trial.Trial, batch: trial.TrialBatch) -> trial.TrialResult:
    result = trial.TrialResult(trial_id=item.id, first_loss=2.0, final_loss=0.5, steps=3, trained_tokens=30)
    asked = batch.question_sets[item.question_set].questions
    result.answers.extend(_answer(item, question, 0.5 if item.documents else 0.1) for question in asked)
    result.probe_answers.extend(_answer(item, question, 0.9) for question in batch.probes)
    return result


def _answer(item: trial.Trial, question: types.Question, known: float) -> trial.Answer:
    dice = derived_seed("scripted", *item.documents, str(item.seed), question.text) % 1000 / 1000
    right = dice < known
    return trial.Answer(
        text=question.answer if right else "no idea", gold_logprob=-0.5 - dice if right else -3 - dice, gold_tokens=1
    )


def _end_with_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    settings = HouseSettings()
    threading.Thread(target=_end_with_parent, args=(settings.parent_pid,), daemon=True).start()
    vars(scripted_worker)["answer_batch"] = answer_batch  # another student, and nothing else
    log = settings.home / "trained.log"
    sys.argv[1:] = [settings.broker_url, str(log), "--slow", str(BATCH_SECONDS)]
    scripted_worker.main()


if __name__ == "__main__":
    main()
