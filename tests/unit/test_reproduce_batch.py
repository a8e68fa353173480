"""Many passages at once: what the teacher is asked for, and the choice of learning rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

from preceptor import arms
from preceptor.config import RunConfig
from preceptor.convert import task_to_proto
from preceptor.protocols import directive_limits
from preceptor.reproduce.batch import LEARNING_RATES, SETTINGS, Authors, choose_rates, generation
from preceptor.reproduce.lab import Lab
from preceptor.task_sources import RunTasks
from preceptor.tasks import Bank, Passage, Question
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import types_pb2 as types

TASKS = [
    task_to_proto(Passage(name, f"All about {name}.", (Question(f"What is {name}?", "this", Bank.GATE),)))
    for name in "abcdefghijklmnop"
]


def config(**teacher: object) -> RunConfig:
    return RunConfig.model_validate({"tasks": {"world": "almanac"}, "teacher": teacher})


def test_the_teacher_is_asked_under_the_limits_of_the_run() -> None:
    """Else it would write other self-edits than those that the run has measured one by one."""
    limited = config(limits={"max_documents": 3})
    assert generation(limited, "p", "qa", TASKS, "heldout").limits == directive_limits(limited)
    request = generation(config(), "p", "qa", TASKS, "heldout")
    assert not request.HasField("limits")
    assert not any(task.passage.questions for task in request.tasks)


class Dead:
    """A lab in which nothing succeeds, or only what is trained at one learning rate."""

    def __init__(self, good: float | None) -> None:
        self._good = good

    def attempt(self, _what: str, do: Callable[[], Any]) -> Any:
        return do()

    def evaluate(
        self, _words: str, asked: Sequence[tuple[types.Task, Sequence[types.SelfEdit]]], *_: object
    ) -> list[list[evaluator.Evaluation]]:
        def made(edit: types.SelfEdit) -> evaluator.Evaluation:
            one = evaluator.Evaluation(state=evaluator.EVALUATION_STATE_FAILED)
            if edit.directive.learning_rate == self._good:
                one.state = evaluator.EVALUATION_STATE_SUCCEEDED
            return one

        return [[made(edit) for edit in edits] for _, edits in asked]


def rates(good: float | None) -> dict[tuple[str, int, str], float]:
    tasks = cast("RunTasks", SimpleNamespace(probes=(), replay_documents=()))
    authors = Authors(0, config(), TASKS, (), tasks, {}, types.PinnedStudent())
    return choose_rates(cast("Lab", Dead(good)), authors)


def test_the_middle_learning_rate_holds_where_none_could_be_measured() -> None:
    for setting in SETTINGS:
        low, middle, _ = LEARNING_RATES[setting.kind]
        assert rates(None)[setting.kind, setting.size, arms.PASSAGE] == middle
        assert rates(low)[setting.kind, setting.size, arms.PASSAGE] == low
