import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluator.graders.exact import is_equal, normalise
from evaluator.graders.grader import grader_label
from evaluator.graders.rack import WITHOUT_A_JUDGE
from preceptor.errors import PreceptorError
from preceptor.tasks import Question


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("lisbon", "Lisbon"),
        ("  The  Lisbon. ", "Lisbon"),
        ("St John's", "St. Johns"),
        ("ﬁsh", "fish"),  # a ligature
        ("STRASSE", "Straße"),
        ("１２", "12"),  # full-width digits
        ("“Lisbon”", "Lisbon"),
        ("1,000", "1000"),
        ("the a", "the a"),
        ("A", "a"),
        ("?", "?"),
    ],
)
def test_what_differs_only_in_form_is_right(answer: str, gold: str) -> None:
    assert is_equal(Question("?", gold), answer)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("", "Lisbon"),
        ("in Lisbon", "Lisbon"),
        ("3.5", "35"),
        ("-5", "5"),
        ("B", "A"),
        ("not Lisbon", "Lisbon"),
        ("", ""),
    ],
)
def test_what_differs_in_meaning_is_wrong(answer: str, gold: str) -> None:
    assert not is_equal(Question("?", gold), answer)


def test_an_alias_is_right() -> None:
    question = Question("?", "Lisbon", aliases=("Lisboa",))
    assert is_equal(question, "lisboa")
    assert not is_equal(question, "Porto")


@given(st.text(max_size=40))
def test_every_answer_that_says_something_equals_itself(text: str) -> None:
    assert is_equal(Question("?", text), text) == bool(normalise(text))


def test_an_unknown_grader_is_named() -> None:
    with pytest.raises(PreceptorError, match="'oracle'") as raised:
        WITHOUT_A_JUDGE.named("oracle")
    assert raised.value.reason == "GRADER_UNKNOWN"
    assert grader_label(WITHOUT_A_JUDGE.named("")) == "exact/1"
