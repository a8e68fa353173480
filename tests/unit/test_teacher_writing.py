"""From tasks to groups of self-edits, without a socket."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.completions import Limits
from preceptor.convert import task_to_proto
from preceptor.errors import PreceptorError
from preceptor.tasks import Augmentations, Directive, FewShotTask, GridPair, LossMask, Passage, Question, SelfEdit
from preceptor.v1 import teacher_pb2 as pb
from preceptor.v1 import types_pb2
from teacher.backend import SamplingSettings
from teacher.in_process import in_process
from teacher.prompts import FORMATS, Formats
from teacher.service import Teacher
from teacher.servicer import task_text, update, writing_request
from teacher.settings import TeacherSettings
from teacher.writing import TaskText, WritingRequest, Written, WrittenGroup, _from_bytes, _key, batches, read
from tests.unit.tiny_teachers import PASSAGE, tiny_teacher

TASKS = tuple(TaskText(f"task-{i}", f"Title {i}", f"{PASSAGE} Number {i}.") for i in range(5))
REQUEST = WritingRequest(
    policy_id="",
    tasks=TASKS,
    samples=4,
    prompt_format="open",
    sampling=SamplingSettings(1.0, 1.0, 24),
    seed=3,
    limits=Limits(),
    max_resamples=0,
)


GRIDS = task_to_proto(
    FewShotTask("turn", (GridPair(((0, 1),), ((1, 0),)),) * 2, (GridPair(((2, 3),), ((3, 2),)),), {"hidden": "no"})
)


def damaged(pairs: str, side: str, rows: list[list[int]]) -> types_pb2.Task:
    """The few-shot task with another grid in the last of these pairs."""
    task = types_pb2.Task()
    task.CopyFrom(GRIDS)
    grid = getattr(getattr(task.few_shot, pairs)[-1], side)
    grid.CopyFrom(types_pb2.Grid(rows=[types_pb2.GridRow(cells=row) for row in rows]))
    return task


def settings(home: Path, **changes: Any) -> TeacherSettings:
    return TeacherSettings(home=home, port=0, teacher_rows=8, **changes)


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[Teacher]:
    made = Teacher(in_process(tiny_teacher()), settings(tmp_path))
    yield made
    made.stop()
    made.store.close()


def write(teacher: Teacher, request: WritingRequest) -> list[WrittenGroup]:
    return list(teacher.writer.write(request, lambda: False))


def texts(groups: list[WrittenGroup]) -> list[list[str]]:
    return [[written.completion for written in group.written] for group in groups]


def test_groups_come_in_the_order_of_the_tasks_with_every_sample(teacher: Teacher) -> None:
    groups = write(teacher, REQUEST)
    assert [group.task_id for group in groups] == [task.id for task in TASKS]
    assert all(len(group.written) == 4 for group in groups)
    assert len({text for group in texts(groups) for text in group}) > 15  # neither tasks nor samples repeat each other


def test_the_same_request_gives_the_same_groups_in_another_home(teacher: Teacher, tmp_path: Path) -> None:
    other = Teacher(in_process(tiny_teacher()), settings(tmp_path / "other"))
    assert texts(write(teacher, REQUEST)) == texts(write(other, REQUEST))
    assert texts(write(teacher, replace(REQUEST, seed=4))) != texts(write(other, REQUEST))
    other.stop()
    other.store.close()


def test_groups_that_were_written_once_are_given_again_without_the_model(teacher: Teacher) -> None:
    first = write(teacher, REQUEST)
    teacher.writer._author.writing = None  # type: ignore[method-assign, assignment]
    assert texts(write(teacher, REQUEST)) == texts(first)
    with pytest.raises(TypeError):
        write(teacher, replace(REQUEST, seed=4))


def test_a_malformed_completion_is_drawn_again_and_the_others_stay(teacher: Teacher) -> None:
    once = replace(REQUEST, sampling=SamplingSettings(1.0, 1.0, 10))
    first = [written for group in write(teacher, once) for written in group.written]
    again = [written for group in write(teacher, replace(once, max_resamples=3)) for written in group.written]
    malformed = [written for written in first if written.malformed_reason]
    assert 3 < len(malformed) < 17  # the random model gives both kinds
    for before, after in zip(first, again, strict=True):
        if not before.malformed_reason:
            assert after == before
        else:
            assert after.draws > 1
            assert after.completion != before.completion
            assert after.draws == 4 or not after.malformed_reason
    assert sum(bool(written.malformed_reason) for written in again) < len(malformed)


def test_a_completion_cut_off_by_the_limit_is_malformed(teacher: Teacher) -> None:
    cut = replace(REQUEST, sampling=SamplingSettings(1.0, 1.0, 2))
    for group in write(teacher, cut):
        for written in group.written:
            assert written.tokens <= 2
            if written.tokens == 2:
                assert "token limit" in written.malformed_reason


def test_a_completion_that_reaches_the_end_of_the_context_is_malformed(tmp_path: Path) -> None:
    base = tiny_teacher(context=120)
    teacher = Teacher(in_process(base), settings(tmp_path, teacher_answer_room=2))
    prompt = base.prompt_ids(FORMATS["open"].render(TASKS[0].title, TASKS[0].text))
    room = 120 - len(prompt)
    assert 5 <= room < 20
    long = replace(REQUEST, samples=40, sampling=SamplingSettings(1.0, 1.0, 200), tasks=TASKS[:1])
    written = write(teacher, long)[0].written
    at_limit = [w for w in written if w.tokens == room]
    assert max(w.tokens for w in written) == room
    assert all("token limit" in w.malformed_reason for w in at_limit)
    teacher.stop()
    teacher.store.close()


def test_a_passage_too_long_is_named_before_anything_is_written(teacher: Teacher) -> None:
    long = TaskText("task-long", "The long one", PASSAGE * 20)
    writing = teacher.writer.write(replace(REQUEST, tasks=(*TASKS, long)), lambda: False)
    with pytest.raises(PreceptorError) as error:
        next(writing)
    assert error.value.reason == "PASSAGE_TOO_LONG"
    assert error.value.metadata["task"] == "task-long"
    assert error.value.metadata["limit"] == "256"
    assert int(error.value.metadata["tokens"]) > 256
    assert "The long one" in error.value.message


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 200))
def test_batches_cover_every_task_once_and_begin_small(tasks: int, samples: int, rows: int) -> None:
    made = list(batches(tasks, samples, rows))
    assert [i for batch in made for i in range(tasks)[batch]] == list(range(tasks))
    for batch in made:
        assert batch.stop - batch.start == 1 or (batch.stop - batch.start) * samples <= rows
    if made and made[0].stop > 1:
        assert made[0].stop * samples <= rows / 8


def test_an_unknown_format_is_named(teacher: Teacher) -> None:
    with pytest.raises(PreceptorError) as error:
        write(teacher, replace(REQUEST, prompt_format="poem"))
    assert error.value.reason == "UNKNOWN_PROMPT_FORMAT"


def test_writing_ends_when_the_client_is_gone_even_while_it_waits_for_the_device(teacher: Teacher) -> None:
    calls = 0

    def stopped() -> bool:
        nonlocal calls
        calls += 1
        return calls > 3

    with pytest.raises(PreceptorError) as error:
        list(teacher.writer.write(REQUEST, stopped))
    assert error.value.reason == "CANCELLED"
    with teacher.writer._author._device, pytest.raises(PreceptorError) as error:
        list(teacher.writer.write(REQUEST, lambda: True))
    assert error.value.reason == "CANCELLED"


@given(st.text(), st.text(min_size=1), st.text(min_size=1), st.text(min_size=1))
def test_a_prompt_is_made_of_title_and_text_alone(title: str, text: str, question: str, answer: str) -> None:
    bare = Passage(title, text + "x", ())
    full = Passage(
        title,
        text + "x",
        (Question(question, answer, aliases=(answer,)),),
        labels={"genre": question},
        reference_edits={"oracle": SelfEdit((answer,), Directive(epochs=3))},
    )
    one, other = task_to_proto(bare), task_to_proto(full)
    other.id = one.id
    assert task_text(one, "tasks[0]") == task_text(other, "tasks[0]")
    for form in FORMATS.values():
        seen = task_text(other, "tasks[0]")
        assert form.render(seen.title, seen.text) == f"# {title}\n{(text + 'x').strip()}\n\n{form.instruction}\n"


def test_questions_change_no_completion(teacher: Teacher) -> None:
    """The whole way: the same ids with and without questions write the same."""
    bare = pb.GenerateSelfEditsRequest(samples_per_task=4, seed=5)
    bare.sampling.max_new_tokens = 24
    bare.tasks.add(id="task-1").passage.CopyFrom(types_pb2.Passage(title="Ada", text=PASSAGE))
    full = pb.GenerateSelfEditsRequest()
    full.CopyFrom(bare)
    full.tasks[0].passage.questions.add(text="Where does Ada Brook live?", answer="Lisbon")
    assert writing_request(bare) == writing_request(full)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sampling": pb.SamplingSettings(temperature=-1)}, "sampling.temperature"),
        ({"sampling": pb.SamplingSettings(temperature=float("nan"))}, "sampling.temperature"),
        ({"sampling": pb.SamplingSettings(top_p=1.5)}, "sampling.top_p"),
        ({"samples_per_task": 5000}, "samples_per_task"),
        ({"tasks": [types_pb2.Task(id="t")]}, "tasks[0]"),
        ({"tasks": [types_pb2.Task(passage=types_pb2.Passage(text="x"))]}, "tasks[0].id"),
        ({"tasks": [types_pb2.Task(id="t", passage=types_pb2.Passage(text=" "))]}, "tasks[0]"),
        (
            {"tasks": [types_pb2.Task(id="t", few_shot=types_pb2.FewShotTask(name="x"))]},
            "tasks[0].few_shot.demonstrations",
        ),
        ({"tasks": [damaged("demonstrations", "output", [[1, 2], [3]])]}, "tasks[0].few_shot.demonstrations[1].output"),
        ({"tasks": [damaged("demonstrations", "output", [])]}, "tasks[0].few_shot.demonstrations[1].output"),
        ({"tasks": [damaged("queries", "input", [[10]])]}, "tasks[0].few_shot.queries[0].input"),
        ({"tasks": [damaged("queries", "input", [[1] * 31])]}, "tasks[0].few_shot.queries[0].input"),
        ({"tasks": [GRIDS], "prompt_format": "open"}, "tasks[0]"),
        ({"tasks": [GRIDS, task_to_proto(Passage("T", "x", ()))]}, "tasks[0]"),
        ({"tasks": [task_to_proto(Passage("T", "x", ()))], "prompt_format": "augmentations"}, "tasks[0]"),
        ({"limits": pb.DirectiveLimits(targets=["qv", "heads"])}, "limits.targets[1]"),
        ({"limits": pb.DirectiveLimits(min_epochs=9, max_epochs=8)}, "limits.min_epochs"),
        ({"limits": pb.DirectiveLimits(min_learning_rate=1e-2, max_learning_rate=1e-3)}, "limits.min_learning_rate"),
        ({"limits": pb.DirectiveLimits(min_learning_rate=float("nan"))}, "limits.min_learning_rate"),
        ({"limits": pb.DirectiveLimits(default_replay_share=1.0)}, "limits.default_replay_share"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, object], field: str) -> None:
    with pytest.raises(PreceptorError) as error:
        writing_request(pb.GenerateSelfEditsRequest(**change))  # type: ignore[arg-type]
    assert error.value.reason == "INVALID_REQUEST"
    assert error.value.metadata["field"] == field


def test_what_is_left_out_has_the_contracts_defaults() -> None:
    request = writing_request(pb.GenerateSelfEditsRequest())
    assert request == WritingRequest("", (), 1, "open", SamplingSettings(1.0, 1.0, 512), 0, Limits(), 0)
    bounded = pb.GenerateSelfEditsRequest(limits=pb.DirectiveLimits(max_epochs=3, max_documents=2))
    assert writing_request(bounded).limits == replace(Limits(), epochs=(1, 3), documents=2)


def test_of_a_few_shot_task_the_teacher_sees_its_grids_and_no_output_of_a_query() -> None:
    short = writing_request(pb.GenerateSelfEditsRequest(tasks=[GRIDS]))
    assert (short.prompt_format, short.tasks[0].title) == ("augmentations", "turn")
    assert short.tasks[0].text == "Input: 01\nOutput: 10\nInput: 01\nOutput: 10\nQuery: 23"
    spaced = writing_request(pb.GenerateSelfEditsRequest(tasks=[GRIDS], prompt_format="augmentations_explained"))
    assert "Query: 2 3" in spaced.tasks[0].text
    assert "32" not in short.tasks[0].text
    assert "no" not in Formats().find("augmentations").render("turn", short.tasks[0].text).split()


def test_a_few_shot_tasks_completion_is_a_directive_without_documents() -> None:
    form = Formats().find("augmentations_explained")
    said = '{"data_generation": {"use_basic_augmentations": true}, "training": {"num_train_epochs": 2}}'
    said = f"Sure!\n```json\n{said}\n```"
    edit = read(said, form, "turn", Limits())
    assert edit == SelfEdit((), Directive(epochs=2, augmentations=Augmentations(basic=True)))
    outputs = read('{"training": {"strategy": "train_using_output_tokens"}}', form, "turn", Limits())
    assert outputs.directive.loss_mask is LossMask.AFTER_MARKER


def test_limits_at_their_defaults_are_those_of_no_limits() -> None:
    plain = writing_request(pb.GenerateSelfEditsRequest()).limits
    said = pb.DirectiveLimits(
        min_learning_rate=1e-6,
        max_learning_rate=1e-1,
        min_epochs=1,
        max_epochs=64,
        max_replay_share=0.9,
        max_rank=128,
        max_documents=512,
        targets=["all", "mlp", "attention", "qv"],
    )
    assert writing_request(pb.GenerateSelfEditsRequest(limits=said)).limits == plain == Limits()


def test_groups_that_were_written_before_there_were_more_limits_keep_their_names() -> None:
    # As it was named before targets, full fine-tunes and the cost guard: nothing that is not used may change it.
    known = "group-700431df464bc2e2afd6f28ecbf6925a"
    assert _key(REQUEST, "policy-x", FORMATS["open"], TASKS[0]) == known
    for later in ({"allow_full": True}, {"targets": ("qv",)}, {"trained_characters": 9}, {"default_epochs": 3}):
        other = replace(REQUEST, limits=replace(REQUEST.limits, **later))
        assert _key(other, "policy-x", FORMATS["open"], TASKS[0]) != known


def test_a_template_with_other_words_names_other_groups(tmp_path: Path) -> None:
    def key(words: str) -> str:
        (tmp_path / "mine.toml").write_text(f'template = "{words} {{text}}"')
        return _key(REQUEST, "policy-x", Formats(tmp_path).find("mine"), TASKS[0])

    assert key("List") == key("List") != key("Tell")


def test_written_groups_of_an_older_version_are_read() -> None:
    old = b'[{"completion":"A.","draws":1,"malformed_reason":"","tokens":3}]'
    assert _from_bytes(old) == (Written("A.", "", 1, 3),)


def test_what_is_too_costly_is_told_and_not_drawn_again(teacher: Teacher) -> None:
    free = [written for group in write(teacher, REQUEST) for written in group.written]
    guarded = replace(REQUEST, limits=Limits(trained_characters=40, default_epochs=4), max_resamples=2)
    found = [written for group in write(teacher, guarded) for written in group.written]
    costly = [written for written in found if written.too_costly]
    assert len(costly) > 3
    for before, written in zip(free, found, strict=True):
        if written.too_costly:
            assert "too costly: " in written.malformed_reason
            assert "limit 40" in written.malformed_reason
        if not before.malformed_reason:
            assert written.completion == before.completion
            assert written.draws == 1


def test_of_the_format_none_each_passage_is_its_own_self_edit(teacher: Teacher) -> None:
    groups = write(teacher, replace(REQUEST, prompt_format="none", samples=2))
    assert [group.task_id for group in groups] == [task.id for task in TASKS]
    for task, group in zip(TASKS, groups, strict=True):
        assert group.written == (Written(task.text.strip(), "", 1, 0),) * 2
        assert read(task.text, Formats().find("none"), task.title, Limits()).documents == (task.text,)


def test_a_users_template_is_asked_with_and_learnt_from(tmp_path: Path) -> None:
    folder = tmp_path / "templates"
    folder.mkdir()
    (folder / "mine.toml").write_text('splitting = "whole"\ntemplate = "About {title}: {text} Study:"')
    made = Teacher(in_process(tiny_teacher()), settings(tmp_path / "home", teacher_templates=folder))
    try:
        [group] = write(made, replace(REQUEST, prompt_format="mine", tasks=TASKS[:1]))
        assert any(not written.malformed_reason for written in group.written)
        with pytest.raises(PreceptorError, match=r"no prompt format named 'yours'; there are: open, .*mine"):
            write(made, replace(REQUEST, prompt_format="yours"))
        task = task_to_proto(Passage("T", "x", ()))
        example = pb.RewardedSelfEdit(group_id="g", task=task, completion="A.", prompt_format="mine", reward=1)
        learnt = update(pb.UpdatePolicyRequest(examples=[example]), Formats(folder)).examples[0]
        assert (learnt.prompt, learnt.prompt_format) == ("About T: x Study:\n", "mine")
    finally:
        made.stop()
        made.store.close()


def test_there_is_nothing_to_learn_where_nobody_writes() -> None:
    example = pb.RewardedSelfEdit(
        group_id="g", task=task_to_proto(Passage("T", "x", ())), prompt_format="none", reward=1
    )
    with pytest.raises(PreceptorError, match=r"examples\[0\].prompt_format is 'none', in which nobody writes"):
        update(pb.UpdatePolicyRequest(examples=[example]))


def test_an_update_takes_few_shot_tasks_and_says_their_prompt_as_it_was() -> None:
    said = '{"training": {"num_train_epochs": 2}}'
    example = pb.RewardedSelfEdit(group_id="g", task=GRIDS, completion=said, reward=1)
    learnt = update(pb.UpdatePolicyRequest(examples=[example])).examples[0]
    written = writing_request(pb.GenerateSelfEditsRequest(tasks=[GRIDS])).tasks[0]
    assert (learnt.title, learnt.text, learnt.prompt_format) == (written.title, written.text, "augmentations")
