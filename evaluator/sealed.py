"""The sealed questions that a request asks for: each further look at them makes them a little less of a test.

A sealed bank is named by what it is, the passage's text and the questions' texts, so that neither another label, title,
seed or alias, nor a question more in another bank makes an opened bank look unopened.
"""

from __future__ import annotations

from preceptor.convert import bank_from_proto
from preceptor.names import content_id, task_id
from preceptor.tasks import Bank
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import types_pb2 as types


def sealed_banks(message: pb.CreateEvaluationsRequest) -> dict[str, str]:
    """The id of the sealed bank of each task, by the task's id; nothing where another bank is asked, and
    for few-shot tasks, which have no banks."""
    if bank_from_proto(message.protocol.bank) is not Bank.SEALED:
        return {}
    tasks = (message.task, *(more.task for more in message.more))
    return {task.id or task_id(task): _bank_id(task) for task in tasks if task.HasField("passage")}


def _bank_id(task: types.Task) -> str:
    sealed = {question.text for question in task.passage.questions if question.bank == types.QUESTION_BANK_SEALED}
    return content_id("sealed", [task.passage.text, sorted(sealed)])
