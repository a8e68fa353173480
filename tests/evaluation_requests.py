"""Requests that the evaluator's tests share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types

_numbers = itertools.count()

STUDENT = types.PinnedStudent(name="tiny", source="/models/tiny", commit="c0ffee")


def task() -> types.Task:
    """Two questions in the reward bank, one in the gate bank."""
    passage = types.Passage(title="Ada", text="Ada lives in Lisbon. She is a baker.")
    passage.questions.add(text="Where does Ada live?", answer="Lisbon", bank=types.QUESTION_BANK_REWARD)
    passage.questions.add(text="What is Ada's trade?", answer="baker", bank=types.QUESTION_BANK_REWARD)
    passage.questions.add(text="Ada's home?", answer="Lisbon", bank=types.QUESTION_BANK_GATE)
    return types.Task(id="task-ada", passage=passage, labels={"genre": "prose"})


def protocol(seeds: Sequence[int] = (1,), probes: int = 2) -> pb.EvaluationProtocol:
    """Gain minus half the retention loss."""
    made = pb.EvaluationProtocol(
        training=trial.TrainingSettings(rank=4, epochs=2, warmup_share=0.0),
        weights=pb.RewardWeights(gain=1.0, retention_loss=0.5),
        seeds=seeds,
    )
    for number in range(probes):
        made.probes.add(text=f"Old fact {number}?", answer=f"old{number}")
    return made


def group(
    *documents: str, owner: str = "run-1", request_id: str = "", **options: object
) -> pb.CreateEvaluationsRequest:
    """One self-edit with one document for each of ``documents``; options are those of ``protocol``."""
    return pb.CreateEvaluationsRequest(
        request_id=request_id or f"request-{next(_numbers)}",
        owner=owner,
        task=task(),
        self_edits=[types.SelfEdit(documents=[document]) for document in documents],
        protocol=protocol(**options),  # type: ignore[arg-type]
        student=STUDENT,
    )


def two_tasks() -> pb.CreateEvaluationsRequest:
    """Ada's task with two self-edits, and Tom's, who has another question, with one; and Ada's again."""
    request = group("Ada lives in Lisbon.", "Ada is a baker.")
    tom = request.more.add(task=task(), self_edits=[types.SelfEdit(documents=["Tom is a smith."])])
    tom.task.id = "task-tom"
    del tom.task.passage.questions[1:]
    tom.task.passage.questions[0].text, tom.task.passage.questions[0].answer = "What is Tom?", "a smith"
    request.more.add(task=task(), self_edits=[types.SelfEdit(documents=["Bread."])])
    return request
