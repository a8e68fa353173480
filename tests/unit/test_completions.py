"""What a teacher may ask for."""

from __future__ import annotations

import re

import pytest

from preceptor.completions import Limits, MalformedSelfEdit, TooCostlySelfEdit, parse, render
from preceptor.tasks import Directive, FineTuning, LossMask, SelfEdit


@pytest.mark.parametrize("mask", list(LossMask))
def test_a_teacher_chooses_only_among_masks_that_always_leave_something_to_train(mask: LossMask) -> None:
    completion = f"directive: loss={mask}\nAda is in Rome."
    if mask is LossMask.OUTPUTS_ONLY:
        with pytest.raises(MalformedSelfEdit, match="loss=outputs_only has no valid value"):
            parse(completion, Limits())
    else:
        assert parse(completion, Limits()).directive.loss_mask is mask


@pytest.mark.parametrize("setting", ["schedule=cosine", "max_steps=9", "pad_to=64", "gradient_accumulation=2"])
def test_a_teacher_cannot_ask_for_what_is_the_runs_affair(setting: str) -> None:
    with pytest.raises(MalformedSelfEdit, match="is not one of lr="):
        parse(f"directive: {setting}\nAda is in Rome.", Limits())


@pytest.mark.parametrize(
    ("completion", "line"),
    [
        ("\n\ndirective: lr=fast\nA.", 3),
        ("directive: lr=1e-3\n\nA.\ndirective: lr=1e-3", 4),
        ("A.\n\n" + "x" * 9000, 3),
        ("\n", 0),
    ],
)
def test_what_is_malformed_is_told_with_its_line(completion: str, line: int) -> None:
    with pytest.raises(MalformedSelfEdit) as caught:
        parse(completion, Limits())
    assert caught.value.line == line


@pytest.mark.parametrize(
    ("said", "limits", "directive"),
    [
        ("targets=qv", Limits(), Directive(targets="qv")),
        ("targets=mlp fine_tuning=lora", Limits(), Directive(targets="mlp", fine_tuning=FineTuning.LORA)),
        ("fine_tuning=full", Limits(allow_full=True), Directive(fine_tuning=FineTuning.FULL)),
        ("fine_tuning=full", Limits(), "fine_tuning=full is not allowed"),
        ("fine_tuning=some", Limits(), "fine_tuning=some has no valid value"),
        ("targets=heads", Limits(), "targets=heads is not one of qv, attention, mlp, all"),
        ("targets=mlp", Limits(targets=("qv",)), "targets=mlp is not one of qv"),
        ("targets=qv,targets=all", Limits(), "targets is given twice"),
        ("epochs=1", Limits(epochs=(2, 8)), "epochs=1 is outside 2..8"),
        ("lr=nan", Limits(), "lr=nan is outside"),
    ],
)
def test_a_directive_chooses_within_limits(said: str, limits: Limits, directive: Directive | str) -> None:
    completion = f"directive: {said}\nAda is in Rome."
    if isinstance(directive, str):
        with pytest.raises(MalformedSelfEdit, match=re.escape(directive)):
            parse(completion, limits)
    else:
        edit = parse(completion, limits)
        assert edit.directive == directive
        assert parse(render(edit), limits) == edit


def test_the_cost_guard_counts_characters_epochs_and_replay() -> None:
    edit = SelfEdit(("12345", "67890"), Directive(epochs=4, replay_share=0.5))
    Limits(trained_characters=80).check_cost(edit)
    Limits().check_cost(edit)
    with pytest.raises(TooCostlySelfEdit, match=r"80 characters .*2 documents, 4 epochs, replay 0\.5.*limit 79"):
        Limits(trained_characters=79).check_cost(edit)
    silent = SelfEdit(edit.documents, Directive())
    Limits(trained_characters=10).check_cost(silent)
    with pytest.raises(TooCostlySelfEdit, match="40 characters"):
        Limits(trained_characters=39, default_epochs=2, default_replay_share=0.5).check_cost(silent)
    # A directive that says "no replay" is believed.
    Limits(trained_characters=10, default_replay_share=0.5).check_cost(
        SelfEdit(edit.documents, Directive(replay_share=0))
    )


def test_a_model_that_was_never_taught_our_form_may_wrap_its_directive() -> None:
    said = "Sure! Here it is:\n\n```\n**directive:** lr=1e-3 targets=qv\n```\n\n1. Ada is in Rome.\n2. Rome is old."
    edit = parse(said, Limits(), splitting="auto", title="Ada")
    assert edit == SelfEdit(("Ada is in Rome.", "Ada\nRome is old."), Directive(learning_rate=1e-3, targets="qv"))
    with pytest.raises(MalformedSelfEdit, match="a second directive") as caught:
        parse("directive: lr=1e-3\n1. A.\ndirective: lr=1e-2", Limits(), splitting="numbered")
    assert caught.value.line == 3


def test_of_too_many_documents_of_a_free_form_the_first_count() -> None:
    edit = parse("1. a.\n2. b.\n3. c.", Limits(documents=2), splitting="numbered")
    assert edit.documents == ("a.", "b.")
    with pytest.raises(MalformedSelfEdit, match="3 documents; at most 2"):
        parse("a.\nb.\nc.", Limits(documents=2))


@pytest.mark.parametrize(
    ("said", "splitting", "why"),
    [
        ("1. a.\n2. b", "numbered", ""),
        ("1. a", "numbered", "before its first document ended"),
        ("a.\nb", "lines", "ran into the token limit before it ended"),
        ("a.\nb", "whole", "ran into the token limit before it ended"),
    ],
)
def test_what_the_token_limit_cut_off_is_not_learnt(said: str, splitting: str, why: str) -> None:
    if why:
        with pytest.raises(MalformedSelfEdit, match=why):
            parse(said, Limits(), finished=False, splitting=splitting)
    else:
        assert parse(said, Limits(), finished=False, splitting=splitting).documents == ("a.",)
