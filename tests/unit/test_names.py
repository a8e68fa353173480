from preceptor import names
from preceptor.convert import task_to_proto
from preceptor.tasks import Passage, Question, SelfEdit
from preceptor.v1 import types_pb2 as types


def test_the_same_content_gives_the_same_id_whatever_the_order_of_keys() -> None:
    assert names.content_id("x", {"a": 1, "b": [1.5, "c"]}) == names.content_id("x", {"b": [1.5, "c"], "a": 1})
    assert names.content_id("x", {"a": 1}) != names.content_id("x", {"a": 2})
    assert names.content_id("x", {"a": 1}) != names.content_id("y", {"a": 1})


def test_a_task_id_stands_for_text_and_questions_but_not_for_labels_or_reference_edits() -> None:
    plain = Passage("T", "text", (Question("q?", "a"),))
    dressed = Passage("T", "text", (Question("q?", "a"),), {"genre": "g"}, {"oracle": SelfEdit(("d",))})
    other = Passage("T", "text", (Question("q?", "b"),))
    assert task_to_proto(plain).id == task_to_proto(dressed).id
    assert task_to_proto(plain).id != task_to_proto(other).id


def test_a_student_is_its_weights_not_its_name_or_place() -> None:
    here = types.PinnedStudent(name="a", source="/x", commit="c1")
    there = types.PinnedStudent(name="b", source="/y", commit="c1")
    edited = types.PinnedStudent(name="a", source="/x", commit="c1", adapters=[types.Artifact(sha256="s")])
    assert names.student_identity(here) == names.student_identity(there)
    assert names.student_identity(here) != names.student_identity(edited)


def test_derived_seeds_depend_on_every_part_and_fit_63_bits() -> None:
    seeds = {names.derived_seed(0, "round", i) for i in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert names.derived_seed(1, "a") != names.derived_seed("1", "a")
