"""What a worker reads: questions and probes in the words in which a student is asked, and the settings that go with
them.

A passage's questions go as they are; the worker puts them into the prompt's frame. Where a question is more than that
(the passage stands before it, or it is a view of a few-shot task's query) the prompts are put together here, and so are
those of the probes, which are asked beside them: the frame of such a batch is ``{question}`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from preceptor.errors import PreceptorError
from preceptor.few_shot.views import View
from preceptor.limits import MAX_PROMPT_CHARACTERS
from preceptor.tasks import Question
from preceptor.v1 import trial_pb2 as trial

_WHOLE = "{question}"


@dataclass(frozen=True, slots=True)
class Asking:
    """What a student is asked, and how."""

    questions: tuple[Question, ...]
    probes: tuple[Question, ...]
    answers: trial.AnswerSettings


def in_context(text: str, asking: Asking) -> Asking:
    """The same questions, each behind the text that answers it. Raises PreceptorError(INVALID_REQUEST)."""
    framed = _whole(asking)
    questions = tuple(replace(one, text=f"{text}\n{one.text}") for one in framed.questions)
    check_prompts("task.passage.text", questions)
    return replace(framed, questions=questions)


def of_views(views: Sequence[Sequence[View]], asking: Asking) -> Asking:
    """Every view of every query in the place of the questions, query after query."""
    seen = tuple(Question(view.prompt, view.gold) for of_query in views for view in of_query)
    return replace(_whole(asking), questions=seen)


def check_prompts(place: str, questions: Sequence[Question]) -> None:
    """No student's context holds more, and all of them must fit into a message.

    Raises PreceptorError(INVALID_REQUEST).
    """
    longest = max((len(question.text) for question in questions), default=0)
    if longest > MAX_PROMPT_CHARACTERS:
        problem = f"makes a prompt of {longest} characters; at most {MAX_PROMPT_CHARACTERS} are allowed"
        raise PreceptorError("INVALID_REQUEST", f"{place} {problem}", field=place)


def _whole(asking: Asking) -> Asking:
    """With the frame around every question and probe."""
    frame = asking.answers.prompt
    answers = trial.AnswerSettings()
    answers.CopyFrom(asking.answers)
    answers.prompt = _WHOLE
    return Asking(_framed(asking.questions, frame), _framed(asking.probes, frame), answers)


def _framed(questions: Sequence[Question], frame: str) -> tuple[Question, ...]:
    return tuple(replace(one, text=frame.replace("{question}", one.text)) for one in questions)
