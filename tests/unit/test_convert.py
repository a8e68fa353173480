from hypothesis import given
from hypothesis import strategies as st

from preceptor.convert import for_teacher, self_edit_from_proto, self_edit_to_proto, task_from_proto, task_to_proto
from preceptor.tasks import Bank, Directive, FewShotTask, GridPair, LossMask, Passage, Question, SelfEdit

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
directives = st.builds(
    Directive,
    learning_rate=st.none() | st.floats(1e-6, 0.1),
    epochs=st.none() | st.integers(1, 64),
    replay_share=st.none() | st.floats(0, 0.9),
    rank=st.none() | st.integers(1, 128),
    loss_mask=st.none() | st.sampled_from(LossMask),
)
edits = st.builds(SelfEdit, st.lists(texts, max_size=4).map(tuple), directives)
questions = st.builds(Question, texts, texts, st.sampled_from(Bank), st.lists(texts, max_size=2).map(tuple))
passages = st.builds(
    Passage,
    texts,
    texts,
    st.lists(questions, max_size=4).map(tuple),
    st.dictionaries(texts, texts, max_size=2),
    st.dictionaries(texts, edits, max_size=2),
)
rows = st.lists(st.integers(0, 9), min_size=2, max_size=2).map(tuple)
grids = st.lists(rows, min_size=1, max_size=3).map(tuple)
pairs = st.lists(st.builds(GridPair, grids, grids), max_size=3).map(tuple)
few_shot_tasks = st.builds(FewShotTask, texts, pairs, pairs, st.dictionaries(texts, texts, max_size=2))


@given(passages | few_shot_tasks)
def test_a_task_comes_back_from_the_wire_as_it_was(task: Passage | FewShotTask) -> None:
    assert task_from_proto(task_to_proto(task)) == task


@given(edits)
def test_a_self_edit_comes_back_from_the_wire_and_absent_settings_stay_absent(edit: SelfEdit) -> None:
    assert self_edit_from_proto(self_edit_to_proto(edit)) == edit


@given(passages | few_shot_tasks)
def test_the_teacher_is_sent_no_question_no_answer_and_no_reference_edit(task: Passage | FewShotTask) -> None:
    whole = task_to_proto(task)
    bare = for_teacher(whole)
    assert bare.id == whole.id
    assert not bare.reference_edits
    assert not bare.passage.questions
    assert all(not query.HasField("output") for query in bare.few_shot.queries)
