"""The teacher sees no question: whatever a task holds, of its questions nothing reaches the teacher, neither over the
wire nor in a prompt.

Passages are drawn from one alphabet and everything that is to stay secret from another, so that one letter is a leak.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.entries import EditKey, Entry, round_stage
from orchestrator.plan import RunPlan
from preceptor.config import RunConfig
from preceptor.convert import task_to_proto
from preceptor.names import message_json
from preceptor.tasks import Bank, Directive, Passage, Question, SelfEdit
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import types_pb2 as types
from teacher.prompts import FORMATS
from teacher.servicer import update, writing_request
from tests.orchestrated import run_config

SECRET = "αβγδεζηθικλμνξοπρστυφχψω"

open_texts = st.text("abcdefg h", min_size=1, max_size=40).filter(str.strip)
secrets = st.text(SECRET, min_size=1, max_size=20)
questions = st.builds(
    Question, secrets, secrets, st.sampled_from(Bank), st.lists(secrets, max_size=2).map(tuple), st.booleans()
)
edits = st.builds(SelfEdit, st.lists(secrets, min_size=1, max_size=3).map(tuple), st.just(Directive()))
passages = st.builds(
    Passage,
    open_texts,
    open_texts,
    st.lists(questions, min_size=1, max_size=6).map(tuple),
    st.dictionaries(secrets, secrets, max_size=2),
    st.dictionaries(st.sampled_from(["oracle", "shuffled_facts"]), edits, max_size=2),
)
many = st.lists(passages, min_size=1, max_size=4)


def is_open(*messages: Message) -> bool:
    """Whether no letter of a secret is in the messages."""
    written = json.dumps([message_json(message) for message in messages], ensure_ascii=False)
    bytes_of = b"".join(message.SerializeToString() for message in messages)
    return not any(letter in written or letter.encode() in bytes_of for letter in SECRET)


def plan(train: list[Passage], heldout: list[Passage], config: RunConfig) -> RunPlan:
    """A run of these tasks."""
    return RunPlan(
        run_id="run-a",
        config=config,
        student=types.PinnedStudent(name="first", source="/s", commit="c"),
        tasks=tuple(map(task_to_proto, train)),
        heldout_tasks=tuple(map(task_to_proto, heldout)),
        canary_tasks=tuple(map(task_to_proto, heldout)),
        probes=(types.Question(text=SECRET, answer=SECRET),),
        replay_documents=(SECRET,),
    )


def learnt(made: RunPlan) -> Iterator[Entry]:
    """One self-edit of each task of the first round, with a reward."""
    reward = types.Reward(value=1.0, stderr=0.1)
    done = evaluator.Evaluation(id=SECRET, state=evaluator.EVALUATION_STATE_SUCCEEDED, reward=reward)
    done.overlap.examples.append(SECRET)
    done.trials.add(seed=1, value=1.0)
    for position, task in enumerate(made.tasks_of_round(1)):
        key = EditKey(round_stage(1), "", position, 0)
        yield Entry(key, task.id, "base", "abc", self_edit=types.SelfEdit(documents=["abc"]), evaluation=done)


@settings(max_examples=30, deadline=None)
@given(many, many)
def test_nothing_of_a_question_reaches_the_teacher(train: list[Passage], heldout: list[Passage]) -> None:
    made = plan(train, heldout, run_config())
    generations = [
        made.round_generation(1, "policy"),
        made.selection_generation("policy", "self_qa"),
        made.heldout_generation("policy", "open"),
        made.canary_generation("policy"),
        made.question_generation("policy"),
    ]
    examples = made.update(1, "policy", list(learnt(made)))
    assert all(request.tasks for request in generations)
    assert examples.examples
    assert is_open(*generations, examples)


@settings(max_examples=30, deadline=None)
@given(many)
def test_nothing_of_a_question_is_in_a_prompt_even_if_it_is_sent(sent: list[Passage]) -> None:
    """A client that forgets to leave the questions out changes nothing: the teacher reads title and text alone."""
    made = plan(sent, sent, run_config())
    request = made.round_generation(1, "policy")
    for task, whole in zip(request.tasks, made.tasks_of_round(1), strict=True):
        task.CopyFrom(whole)
    assert not is_open(request)
    read = writing_request(request)
    prompts = [form.render(task.title, task.text) for form in FORMATS.values() for task in read.tasks]
    learning = made.update(1, "policy", list(learnt(made)))
    for example, whole in zip(learning.examples, made.tasks_of_round(1), strict=True):
        example.task.CopyFrom(whole)
    shown = json.dumps([prompts, asdict(read), [asdict(one) for one in update(learning).examples]], ensure_ascii=False)
    assert not any(letter in shown for letter in SECRET)
