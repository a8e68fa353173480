import pickle

import pytest

from preceptor.errors import CATALOGUE, PreceptorError


def test_a_reason_that_is_not_in_the_catalogue_is_refused() -> None:
    with pytest.raises(ValueError, match="NO_SUCH_REASON"):
        PreceptorError("NO_SUCH_REASON", "x")


def test_an_error_names_its_place_and_the_next_step() -> None:
    error = PreceptorError("BAD_TASK_FILE", "no answer", file="a.jsonl", line=3, field="answer")
    assert str(error) == "a.jsonl:3: no answer [answer]"
    assert "preceptor tasks check" in error.next_step


def test_an_error_survives_pickling_between_processes() -> None:
    error = pickle.loads(pickle.dumps(PreceptorError("PORT_IN_USE", "taken", port=7)))
    assert (error.reason, error.message, error.metadata) == ("PORT_IN_USE", "taken", {"port": "7"})


def test_every_catalogue_entry_says_what_to_do() -> None:
    for reason, entry in CATALOGUE.items():
        assert reason.isupper()
        assert len(entry.next_step) > 10, reason
